"""Head dropping: the KV heads that matter most keep their images, all others keep one mean Key and one mean Value per image.

Formula: pairs (layer, KV head) in order of the measured knock-out, KL of the answer when the head's image Keys and Values are
replaced by their means; the first n over all layers are kept, at 4 bits (as `int4`) or native; the rest rebuild K̂ = mean(K),
V̂ = mean(V) for every token of the segment. Head mask and fp32 means count.
Source: the knock-out table of this project; in the spirit of retrieval heads (arXiv 2404.15574) and DuoAttention (2410.10819).
Limits: single knock-outs hide redundancy between heads, and n is one cut for all documents. The budget holds over all layers
together, not in each: a layer whose heads all matter keeps more than its share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...errors import UsageError
from ...geometry import Geometry
from ..coder import NATIVE_BYTES, CodedSegment
from .base import RivalCoder
from .rounding import code_tokens, pack_bits, packed_bytes, rebuild_tokens, token_code_bytes, unpack_bits

MEAN_BYTES = 8  # fp32 means of Key and Value, per channel


@dataclass(frozen=True, kw_only=True)
class HeadDropCoder(RivalCoder):
    """Keeps `kept[layer]` heads (True = kept), at `bits` bits or native (None)."""

    kept: Mapping[int, tuple[bool, ...]]
    bits: int | None

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        keep, dim = torch.tensor(self.kept[layer]), keys.shape[-1]
        on, off = keep.nonzero().flatten().to(keys.device), (~keep).nonzero().flatten().to(keys.device)
        parts = {
            "heads": pack_bits(keep.to(torch.uint8), 1).to(keys.device),
            "key_mean": keys[off].float().mean(1),
            "value_mean": values[off].float().mean(1),
        }
        if self.bits is None:
            parts |= {"keys": keys[on], "values": values[on]}
            return CodedSegment(keys.shape[1], parts, frozenset({"keys", "values"}), _rebuild_native)
        parts |= code_tokens("key", keys[on], self.bits, dim) | code_tokens("value", values[on], self.bits, dim)
        return CodedSegment(keys.shape[1], parts, frozenset(), partial(_rebuild_coded, bits=self.bits, dim=dim))

    def bytes_of(self, tokens: int, layer: int) -> int:
        shape, kept = self.shape(layer), sum(self.kept[layer])
        dim = shape.head_dim
        head = 2 * token_code_bytes(tokens, dim, self.bits, dim) if self.bits is not None else 2 * NATIVE_BYTES * tokens * dim
        return packed_bytes(shape.kv_heads, 1) + kept * head + (shape.kv_heads - kept) * dim * MEAN_BYTES


def most_important(geometry: Geometry, count: int, knockout: Mapping[int, Tensor] | None) -> dict[int, tuple[bool, ...]]:
    """Which heads are kept when the `count` pairs of largest knock-out are; ties go to the earlier layer and head.

    Args:
        knockout: by layer, fp32 [Hkv]; may be missing only for a count of zero.

    Raises:
        UsageError: knock-outs are missing, of another shape or not finite.
    """
    pairs = [(layer, head) for layer in geometry.compressible for head in range(geometry.layers[layer].kv_heads)]
    chosen: set[tuple[int, int]] = set()
    if count:
        measured = {layer: _measured(geometry, layer, knockout) for layer in geometry.compressible}
        chosen = set(sorted(pairs, key=lambda pair: -measured[pair[0]][pair[1]])[:count])
    return {layer: tuple((layer, head) in chosen for head in range(geometry.layers[layer].kv_heads)) for layer in geometry.compressible}


def _measured(geometry: Geometry, layer: int, knockout: Mapping[int, Tensor] | None) -> list[float]:
    heads = geometry.layers[layer].kv_heads
    if knockout is None or layer not in knockout:
        raise UsageError(f"head dropping needs measured knock-outs and layer {layer} has none; compile an artifact that has them")
    kl = knockout[layer].float().cpu()
    if kl.shape != (heads,) or not bool(kl.isfinite().all()):
        raise UsageError(f"the knock-outs of layer {layer} must be {heads} finite numbers, got {kl.tolist()}; compile the artifact again")
    return kl.tolist()


def _joined(parts: Mapping[str, Tensor], tokens: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Kept heads [kept, S, D] among the means of the others, in the heads' order."""
    heads = keys.shape[0] + parts["key_mean"].shape[0]
    keep = unpack_bits(parts["heads"], 1, heads).bool()
    out = []
    for kept, mean in ((keys, parts["key_mean"]), (values, parts["value_mean"])):
        whole = kept.new_empty((heads, tokens, kept.shape[-1]))
        whole[keep], whole[~keep] = kept, mean.unsqueeze(1).expand(-1, tokens, -1)
        out.append(whole)
    return out[0], out[1]


def _rebuild_native(parts: Mapping[str, Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    return _joined(parts, tokens, parts["keys"].float(), parts["values"].float())


def _rebuild_coded(parts: Mapping[str, Tensor], tokens: int, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    return _joined(parts, tokens, rebuild_tokens("key", parts, bits, dim), rebuild_tokens("value", parts, bits, dim))
