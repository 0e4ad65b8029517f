"""fp8: Keys and Values in e4m3 (4 exponent, 3 mantissa bits), one fp32 scale per head and segment for each.

Formula: x̂ = scale · e4m3(x / scale), scale = max|x| / 448. Source: the format of arXiv 2209.05433, as serving engines store KV caches.
Limits: the scale is taken from the segment itself, which serving engines with static scales cannot do; a relative error of
2^-4 stays however small the numbers are, down to scale · 2^-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..coder import CodedSegment
from .base import RivalCoder

LARGEST = 448.0  # of e4m3 without infinities


@dataclass(frozen=True, kw_only=True)
class Fp8Coder(RivalCoder):
    """e4m3 with one scale per (head, segment)."""

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        return CodedSegment(keys.shape[1], _codes("key", keys) | _codes("value", values), frozenset(), _rebuild)

    def bytes_of(self, tokens: int, layer: int) -> int:
        shape = self.shape(layer)
        return 2 * shape.kv_heads * (tokens * shape.head_dim + 4)


def _codes(name: str, x: Tensor) -> dict[str, Tensor]:
    exact = x.float()
    scale = exact.abs().amax((1, 2)) / LARGEST  # [H]
    divisor = torch.where(scale > 0, scale, 1.0)[:, None, None]
    return {f"{name}_codes": (exact / divisor).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), f"{name}_scale": scale}


def _rebuild(parts: Mapping[str, Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    keys, values = (parts[f"{name}_codes"].float() * parts[f"{name}_scale"][:, None, None] for name in ("key", "value"))
    return keys, values
