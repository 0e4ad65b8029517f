"""Hadamard rotation, then codes, as QuaRot does (arXiv 2404.00456): outlier channels are spread over all channels first.

Formula: x' = x H / √D with the Walsh-Hadamard matrix H of the head dimension (a power of two), x' coded per token and head,
asymmetric, fp16 scale and zero point; x̂ = x̂' H / √D. 4 bit: one group per head, as QuaRot (its group of 128 is the head).
2 bit: groups of 32 channels, the size KIVI uses at 2 bit; one group per head loses too much to be a fair rival.
Limits: QuaRot also folds rotations into the weights and quantises them; here only the cache is coded. Keys and Values are
rotated back when rebuilt instead of rotating the query, which is the same product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..coder import CodedSegment
from .base import RivalCoder
from .rounding import code_tokens, rebuild_tokens, token_code_bytes

SMALL_GROUP = 32


@dataclass(frozen=True, kw_only=True)
class HadamardCoder(RivalCoder):
    """Walsh-Hadamard rotation and per-token codes of `bits` bits."""

    bits: int

    def group(self, dim: int) -> int:
        """Channels that share a scale."""
        return dim if self.bits >= 4 else min(SMALL_GROUP, dim)

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        dim = keys.shape[-1]
        rotation, group = walsh_hadamard(dim, keys.device), self.group(dim)
        parts = code_tokens("key", keys.float() @ rotation, self.bits, group)
        parts |= code_tokens("value", values.float() @ rotation, self.bits, group)
        return CodedSegment(keys.shape[1], parts, frozenset(), partial(_rebuild, bits=self.bits, group=group))

    def bytes_of(self, tokens: int, layer: int) -> int:
        shape = self.shape(layer)
        return 2 * shape.kv_heads * token_code_bytes(tokens, shape.head_dim, self.bits, self.group(shape.head_dim))


def walsh_hadamard(dim: int, device: torch.device | None = None) -> Tensor:
    """The normalised Walsh-Hadamard matrix fp32 [D, D], D a power of two: symmetric and its own inverse."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * dim**-0.5


def _rebuild(parts: Mapping[str, Tensor], tokens: int, bits: int, group: int) -> tuple[Tensor, Tensor]:
    keys, values = rebuild_tokens("key", parts, bits, group), rebuild_tokens("value", parts, bits, group)
    rotation = walsh_hadamard(keys.shape[-1], keys.device)
    return keys @ rotation, values @ rotation
