"""No coding: Keys and Values as they are, at 2 bytes a number.

What token selection alone keeps (runtime/token_selection.py), and the measure of what the cache itself costs. It meets no budget below 1
unless tokens are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..coder import NATIVE_BYTES, CodedSegment
from .base import RivalCoder


@dataclass(frozen=True, kw_only=True)
class NativeCoder(RivalCoder):
    """Keeps what it is given."""

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        return CodedSegment(keys.shape[1], {"keys": keys, "values": values}, frozenset({"keys", "values"}), _rebuild)

    def bytes_of(self, tokens: int, layer: int) -> int:
        shape = self.shape(layer)
        return 2 * shape.kv_heads * tokens * shape.head_dim * NATIVE_BYTES


def _rebuild(parts: Mapping[str, Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    return parts["keys"], parts["values"]
