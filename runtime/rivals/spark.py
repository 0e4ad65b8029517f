"""SparK (arXiv 2508.15212): every token drops the Key channels that matter least to it; what was dropped is filled in at attention.

Formula: n_d = norm over the last 32 queries of channel d, the G query heads averaged first; score of a channel in a token n_d k_d².
Each token keeps the keep_ratio · D channels of largest score at native precision; Values stay native. Dropped channels are
    spark-sign: sign(k_d) · sqrt(a / n_d), a the token's mean score over what it dropped: the method as its authors run it;
    spark-mean: the token's mean over what it dropped, no signs: the authors of RotateK run SparK so (2605.19218).
Bytes: the paper counts kept numbers alone, keep_ratio of the Keys, and its code zeroes or fills a cache of full width. We count what
attention needs besides: a bit per token and channel that says what was kept, and per token
    spark-sign: a bit per dropped channel, one native number sqrt(a); and 1 / sqrt(n_d) per channel, native, for each head and image;
    spark-mean: one native number.
Limits: a mask could be coded in less than a bit (0.81 at a quarter). A fixed share of channels; the paper's dynamic shares (until 99 % of
the score) and sampled fills are not run. sqrt(a / n_d) has no bound where queries do not look; n_d is at least 1e-6 of its largest.
Values are untouched, so at least half of the bytes stay. Queries are those of the call that brought the image, as for every method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..coder import NATIVE_BYTES, CodedSegment
from .base import ChannelCoder
from .rounding import pack_bits, packed_bytes, unpack_bits
from .think import QUERIES

LEAST_NORM = 1e-6  # of the largest: keeps the fill finite


@dataclass(frozen=True, kw_only=True)
class SparkCoder(ChannelCoder):
    """Every token keeps channels of its own; `signs` chooses between the two fills."""

    signs: bool

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        tokens, dim = keys.shape[1:]
        count, exact, norms = self.channels(dim), keys.float(), query_norms(queries)
        top = (exact.pow(2) * norms.unsqueeze(1)).topk(count, -1).indices
        mask = torch.zeros_like(keys, dtype=torch.uint8).scatter_(2, top, 1)
        order = mask.sort(dim=-1, descending=True, stable=True).indices  # kept channels in their order, then dropped ones
        kept, dropped = order[..., :count], order[..., count:]
        lost = exact.gather(2, dropped)  # [H, S, D - C]
        parts = {"keys": keys.gather(2, kept), "channels": pack_bits(mask, 1), "values": values}
        if self.signs:
            score = lost.pow(2) * norms.unsqueeze(1).expand(-1, tokens, -1).gather(2, dropped)
            parts["signs"] = pack_bits((lost > 0).to(torch.uint8), 1)
            parts["size"], parts["channel_size"] = _mean(score).sqrt().to(keys.dtype), norms.rsqrt().to(keys.dtype)
        else:
            parts["fill"] = _mean(lost).to(keys.dtype)
        return CodedSegment(tokens, parts, frozenset(parts) - {"channels", "signs"}, partial(_rebuild, signs=self.signs))

    def bytes_of(self, tokens: int, layer: int) -> int:
        shape = self.shape(layer)
        dim = shape.head_dim
        count = self.channels(dim)
        token = NATIVE_BYTES * (count + dim + 1) + packed_bytes(dim, 1) + (packed_bytes(dim - count, 1) if self.signs else 0)
        return shape.kv_heads * (tokens * token + (NATIVE_BYTES * dim if self.signs else 0))


def query_norms(queries: Tensor) -> Tensor:
    """Norms of each channel over the last 32 queries [H, G, T, D], averaged over G: fp32 [H, D], as shares of the head's largest.

    Only ratios matter to what is kept and filled in; with shares, no fp16 number overflows.
    """
    norms = queries[:, :, -QUERIES:].float().mean(1).norm(dim=1)
    largest = norms.amax(-1, keepdim=True)
    return torch.where(largest > 0, norms / largest, 1.0).clamp_min(LEAST_NORM)


def _mean(x: Tensor) -> Tensor:
    """Mean over the last axis, [..., 1]; zero of nothing."""
    return x.sum(-1, keepdim=True) / max(x.shape[-1], 1)


def _rebuild(parts: Mapping[str, Tensor], tokens: int, signs: bool) -> tuple[Tensor, Tensor]:
    kept, values = parts["keys"].float(), parts["values"].float()
    dim = values.shape[-1]
    mask = unpack_bits(parts["channels"], 1, dim).bool()
    if signs:
        filled = parts["size"].float() * parts["channel_size"].float().unsqueeze(1)  # [H, S, D]
        positive = torch.zeros_like(mask).masked_scatter(~mask, unpack_bits(parts["signs"], 1, dim - kept.shape[-1]).bool())
        filled = torch.where(positive, filled, -filled)
    else:
        filled = parts["fill"].float().expand_as(values)
    return filled.masked_scatter(mask, kept), values
