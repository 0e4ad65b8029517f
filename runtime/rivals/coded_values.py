"""Values at 4 bits for methods that code Keys alone, so that they can be compared at budgets below a half; or beside Keys as they are.

Four ways, all at 4 bits of every channel or direction:
    int4        per token and head, one scale and zero point (plain.py);
    kivi4       per token, groups of 32 channels, as KIVI (2402.02750) codes Values;
    hadamard4   after a Walsh-Hadamard rotation, per token and head (hadamard.py);
    calibrated4 along the artifact's Value directions, one scale a direction and image: exactly what our own store does with a plan of
                D directions at 4 bits (kernels/codes.py), the image's own mean included.
The best of them is added to both sides of a comparison of Keys, so that what differs is the Keys.
Bytes: the Keys' part is that of the method; Values are counted as allocated: codes, scales, zero points, the image's mean. The calibrated
basis belongs to the artifact and counts for no image, as on our side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ...errors import UsageError
from ...kernels.codes import pack, pool_bytes, unpack
from ...kernels.measure_torch import Job, measure_torch
from ...kernels.slabs import Slabs
from ..coder import NATIVE_BYTES, CodedSegment, Rebuild
from .base import RivalCoder
from .hadamard import walsh_hadamard
from .kivi import GROUP
from .our_keys import POOL_DTYPE, Directions
from .rounding import code_tokens, rebuild_tokens, token_code_bytes

BITS = 4
WAYS = ("int4", "kivi4", "hadamard4", "calibrated4")


@dataclass(frozen=True, kw_only=True)
class CodedValues(RivalCoder):
    """Keys by `inner`, or as they are; Values by `way`.

    bases: by layer, for `calibrated4` alone.
    """

    way: str
    inner: RivalCoder | None = None
    bases: Mapping[int, Directions] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Raises UsageError for an unknown way, missing bases or a head dimension that it cannot code."""
        if self.way not in WAYS:
            raise UsageError(f"unknown way to code Values {self.way!r}; choose one of {', '.join(WAYS)}")
        if self.way == "calibrated4" and not set(self.geometry.compressible) <= set(self.bases):
            raise UsageError("calibrated Values need an artifact with bases of the Values; compile one for rotatek")
        for i in self.geometry.compressible:
            dim = self.shape(i).head_dim
            if dim % GROUP or (self.way == "hadamard4" and dim & (dim - 1)):
                needed = f"a multiple of {GROUP}" + (" and a power of two" if self.way == "hadamard4" else "")
                raise UsageError(f"Values by {self.way} need a head_dim that is {needed}, not {dim}")

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        tokens = keys.shape[1]
        heads = self._heads(layer)
        if self.inner is None:
            inner = CodedSegment(tokens, {"keys": keys, "values": values}, frozenset({"keys", "values"}), _raw)
        else:
            inner = self.inner.code(layer, keys, values, queries)
        parts = {name: part for name, part in inner.parts.items() if name != "values"}
        coded = inner.parts["values"]
        basis = self._basis(layer, heads, coded.device)
        rebuilt = partial(_rebuild, keys=inner.rebuilt, way=self.way, basis=basis, dim=keys.shape[-1])
        return CodedSegment(tokens, parts | self._code(coded, basis), inner.native - {"values"}, rebuilt)

    def bytes_of(self, tokens: int, layer: int) -> int:
        shape, heads = self.shape(layer), len(self._heads(layer))
        native = NATIVE_BYTES * tokens * shape.head_dim
        keys = self.inner.bytes_of(tokens, layer) - heads * native if self.inner is not None else shape.kv_heads * native
        return keys + heads * self._value_bytes(tokens, shape.head_dim)

    def _heads(self, layer: int) -> tuple[int, ...]:
        return (self.inner or self).value_heads(layer)

    def _basis(self, layer: int, heads: tuple[int, ...], device: torch.device) -> Directions | None:
        if self.way != "calibrated4":
            return None
        return self.bases[layer].of(heads, device)

    def _code(self, values: Tensor, basis: Directions | None) -> dict[str, Tensor]:
        dim = values.shape[-1]
        if basis is not None:
            slabs = Slabs(nibble=dim)
            if not len(values):  # leank may leave none of a layer's heads
                codes, scale = values.new_zeros(0, 0, dtype=torch.uint8), values.new_zeros(0, dim, dtype=torch.bfloat16)
                return {"v_codes": codes, "v_scale": scale, "v_mean": scale.half()}
            seen = measure_torch(Job(values, basis.mean, basis.encode, basis.balance, (slabs,) * values.shape[0]), own=True)
            assert seen.own_mean is not None
            return {"v_codes": pack(seen.z, seen.scales, slabs, POOL_DTYPE), "v_scale": seen.scales, "v_mean": seen.own_mean}
        if self.way == "hadamard4":
            values = values.float() @ walsh_hadamard(dim, values.device)
        return code_tokens("v", values, BITS, _group(self.way, dim))

    def _value_bytes(self, tokens: int, dim: int) -> int:
        """Of one head."""
        if self.way == "calibrated4":
            return pool_bytes(tokens, Slabs(nibble=dim), NATIVE_BYTES) + 2 * NATIVE_BYTES * dim  # bf16 scales, fp16 mean
        return token_code_bytes(tokens, dim, BITS, _group(self.way, dim))


def _group(way: str, dim: int) -> int:
    return GROUP if way == "kivi4" else dim


def _values(parts: Mapping[str, Tensor], tokens: int, way: str, basis: Directions | None, dim: int) -> Tensor:
    if basis is None:
        values = rebuild_tokens("v", parts, BITS, _group(way, dim))
        return values @ walsh_hadamard(dim, values.device) if way == "hadamard4" else values
    slabs = Slabs(nibble=dim)
    levels = [unpack(flat, tokens, slabs, POOL_DTYPE) for flat in parts["v_codes"]]
    z = torch.stack(levels) if levels else basis.mean.new_zeros(0, tokens, dim)
    centre = basis.mean + parts["v_mean"]
    return (z * parts["v_scale"].float().unsqueeze(1)) @ basis.decode.mT + centre.unsqueeze(1)


def _rebuild(
    parts: Mapping[str, Tensor], tokens: int, keys: Rebuild, way: str, basis: Directions | None, dim: int
) -> tuple[Tensor, Tensor]:
    return keys({**parts, "values": _values(parts, tokens, way, basis, dim)}, tokens)


def _raw(parts: Mapping[str, Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    return parts["keys"].float(), parts["values"]
