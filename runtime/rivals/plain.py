"""Plain round-to-nearest quantisation, 8 or 4 bits: Keys and Values per token and head.

Formula: x̂ = scale · code + zero, one fp16 scale and zero point for the D numbers of a token's head; code in 0 .. 2^bits - 1.
Source: the baseline of every KV quantisation paper (for instance KIVI, arXiv 2402.02750, table 2: per-token asymmetric).
Limits: no outlier handling. Keys have channels of large constant size, which per-token scales spend their steps on; that is
exactly the weakness KIVI and Hadamard rotations address. Both run in the same cache, so the difference is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..coder import CodedSegment
from .base import RivalCoder
from .rounding import code_tokens, rebuild_tokens, token_code_bytes


@dataclass(frozen=True, kw_only=True)
class PlainCoder(RivalCoder):
    """Per-token, per-head asymmetric codes of `bits` bits; the group is the whole head."""

    bits: int

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        dim = keys.shape[-1]
        parts = code_tokens("key", keys, self.bits, dim) | code_tokens("value", values, self.bits, dim)
        return CodedSegment(keys.shape[1], parts, frozenset(), partial(_rebuild, bits=self.bits, dim=dim))

    def bytes_of(self, tokens: int, layer: int) -> int:
        shape = self.shape(layer)
        return 2 * shape.kv_heads * token_code_bytes(tokens, shape.head_dim, self.bits, shape.head_dim)


def _rebuild(parts: Mapping[str, Tensor], tokens: int, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    return rebuild_tokens("key", parts, bits, dim), rebuild_tokens("value", parts, bits, dim)
