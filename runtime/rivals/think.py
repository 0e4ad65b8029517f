"""ThinK (arXiv 2407.21018): per head and segment, the Key channels that the last queries look at least are pruned.

Formula: score of channel d = mean over the last 32 queries and the G heads of the group of q_d², times the mean over the segment
of k_d²; the highest keep_ratio · D channels stay at native precision, pruned ones are zero; Values stay native.
This is the shipped score (notes: the outer-product form of the paper is commented out there), with squared queries averaged in
a GQA group as in kvpress, so that one mask serves a KV head. The mask counts one bit a channel.
Limits: Values are untouched, so at least half of the bytes stay. The queries are those of the call that brought the image: asked
after compression, the last 32 are image tokens', and the question is unseen, as for every method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..coder import NATIVE_BYTES, CodedSegment
from .base import ChannelCoder
from .rounding import pack_bits, packed_bytes, unpack_bits

QUERIES = 32  # the published window of queries


@dataclass(frozen=True, kw_only=True)
class ThinkCoder(ChannelCoder):
    """Keeps the same channels in every token of a head."""

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        heads, tokens, dim = keys.shape
        score = queries[:, :, -QUERIES:].float().pow(2).mean((1, 2)) * keys.float().pow(2).mean(1)
        top = score.topk(self.channels(dim), -1).indices.sort(-1).values  # [H, C]
        mask = torch.zeros(heads, dim, dtype=torch.uint8, device=keys.device).scatter_(1, top, 1)
        kept = keys.gather(2, top.unsqueeze(1).expand(-1, tokens, -1))
        parts = {"keys": kept, "channels": pack_bits(mask, 1), "values": values}
        return CodedSegment(tokens, parts, frozenset({"keys", "values"}), _rebuild)

    def bytes_of(self, tokens: int, layer: int) -> int:
        shape = self.shape(layer)
        dim = shape.head_dim
        return shape.kv_heads * (NATIVE_BYTES * tokens * (self.channels(dim) + dim) + packed_bytes(dim, 1))


def _rebuild(parts: Mapping[str, Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    kept, values = parts["keys"].float(), parts["values"].float()
    mask = unpack_bits(parts["channels"], 1, values.shape[-1])
    top = mask.sort(dim=-1, descending=True, stable=True).indices[:, : kept.shape[-1]]  # the ones, in channel order
    return torch.zeros_like(values).scatter_(2, top.unsqueeze(1).expand(-1, tokens, -1), kept), values
