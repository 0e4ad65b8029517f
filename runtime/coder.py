"""The interface of rival methods: what codes one image segment of one sequence, and what must be kept of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from .segments import Run, columns

if TYPE_CHECKING:
    from .before_rope import BeforeRope

NATIVE_BYTES = 2  # native numbers are compared at 2 bytes, whatever the compute dtype (DESIGN.md §3)

Rebuild = Callable[[Mapping[str, Tensor], int], tuple[Tensor, Tensor]]
"""(parts, tokens) -> Keys and Values [Hkv, S, D]; a function of the parts alone, so that nothing is kept that is not counted."""


@dataclass(frozen=True, slots=True, eq=False)
class CodedSegment:
    """One coded image segment of one sequence; immutable, and shared by beams and by copies of a cache.

    parts: everything that must be kept (codes, scales, zero points, masks, means, bases, native numbers); each tensor owns
    its storage. native: names of the parts in the compute dtype; they count `NATIVE_BYTES` a number, others their real size.
    tokens: S.
    """

    tokens: int
    parts: Mapping[str, Tensor]
    native: frozenset[str]
    rebuilt: Rebuild

    def __post_init__(self) -> None:
        # a slice would keep the whole prefill alive, and packing is only real if the storage is small
        object.__setattr__(self, "parts", {name: part if _alone(part) else part.clone() for name, part in self.parts.items()})

    def __deepcopy__(self, memo: dict[int, object]) -> CodedSegment:
        return self

    def rebuild(self) -> tuple[Tensor, Tensor]:
        """Keys and Values as attention sees them, fp32 [Hkv, S, D] each."""
        keys, values = self.rebuilt(self.parts, self.tokens)
        return keys.float(), values.float()

    def bytes(self) -> int:
        """Bytes of the parts as they are compared."""
        return sum(p.numel() * (NATIVE_BYTES if name in self.native else p.element_size()) for name, p in self.parts.items())


class Coder(Protocol):
    """A rival method, made for one model. Holds settings and learned state only: nothing of any sequence."""

    @property
    def name(self) -> str:
        """As in `rivals.registry.RIVALS`."""

    @property
    def setting(self) -> str:
        """What its knob was set to, in words for a table; empty without a knob. Equal settings give equal segments."""

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        """Code one image segment.

        Args:
            layer: index of the text layer.
            keys, values: [Hkv, S, D] in the compute dtype, Keys after RoPE.
            queries: [Hkv, G, T, D], this row's queries of the call that brought the image, padding left out, newest last.
        """

    def bytes_of(self, tokens: int, layer: int) -> int:
        """Bytes of one coded segment of S tokens in one layer; exactly `CodedSegment.bytes()`."""


@runtime_checkable
class BeforeRopeCoder(Coder, Protocol):
    """A coder that works on Keys before RoPE and heads jointly; a cache calls `code_before` of it in place of `code`."""

    def code_before(self, layer: int, before: BeforeRope, values: Tensor) -> CodedSegment:
        """Code one image segment.

        Args:
            layer: index of the text layer.
            before: the segment's tokens, keys [Hkv, S, D] in the compute dtype.
            values: [Hkv, S, D].
        """


def _alone(part: Tensor) -> bool:
    return part.is_contiguous() and part.untyped_storage().nbytes() == part.numel() * part.element_size()


def real_queries(query: Tensor, kv_heads: int, runs: Sequence[Run]) -> Tensor:
    """Queries [Hq, T, D] of one row to [Hkv, G, T', D], padding left out; query head h reads KV head h // G."""
    start, end = runs[0].start, runs[-1].end
    if sum(run.length for run in runs) == end - start:  # no padding in between, so no copy
        return query[:, start:end].unflatten(0, (kv_heads, -1))
    return columns(query, runs).unflatten(0, (kv_heads, -1))


def padded(rebuilt: list[tuple[Tensor, Tensor]], longest: int) -> tuple[Tensor, Tensor]:
    """Segments of one row after one another, zeros behind: fp32 [Hkv, longest, D] each."""
    keys, values = (torch.cat(parts, dim=1) for parts in zip(*rebuilt, strict=True))
    missing = (0, 0, 0, longest - keys.shape[1])
    return torch.nn.functional.pad(keys, missing), torch.nn.functional.pad(values, missing)
