"""Which tokens of an image a cache layer keeps: tables of indices, and how they are stored and counted.

Keys hold their positions (RoPE was applied before they came), so decoding needs no table. It is kept all the same, and counted: without it
nobody could say what a cache still holds of a page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SHORT = 1 << 16  # tokens that two bytes can number


@dataclass(frozen=True, slots=True, eq=False)
class KeptSegment:
    """Kept tokens of one image; immutable, shared by beams, and by layers where one selection serves all.

    tokens: S of the image. count: n, how many are kept. heads: 1 where all heads keep the same tokens, else Hkv.
    table: as `packed`.
    """

    tokens: int
    count: int
    heads: int
    table: Tensor

    @classmethod
    def of(cls, indices: Tensor, tokens: int) -> KeptSegment:
        """From int64 [1 or Hkv, n], ascending."""
        heads, count = indices.shape
        return cls(tokens, count, heads, packed(indices, tokens))

    def __deepcopy__(self, memo: dict[int, object]) -> KeptSegment:
        return self

    def indices(self) -> Tensor:
        """int64 [1 or Hkv, n], ascending."""
        return unpacked(self.table, self.heads, self.count, self.tokens)


class KeptTokens:
    """Kept tokens of the images of B sequences, in order; rows are ragged, and may share segments (beams)."""

    def __init__(self, batch: int) -> None:
        self.rows: list[list[KeptSegment]] = [[] for _ in range(batch)]

    def __deepcopy__(self, memo: dict[int, object]) -> KeptTokens:
        twin = KeptTokens(0)
        twin.rows = [list(row) for row in self.rows]
        return twin

    def select_rows(self, rows: Iterable[int]) -> None:
        """Keep these rows, in this order, repeats allowed."""
        self.rows = [list(self.rows[row]) for row in rows]

    def distinct(self) -> Iterator[KeptSegment]:
        """Every segment once."""
        yield from {id(segment): segment for row in self.rows for segment in row}.values()

    def evicted(self) -> int:
        """Tokens that are gone, over all rows, those of shared segments once."""
        return sum(segment.tokens - segment.count for segment in self.distinct())


def packed(indices: Tensor, tokens: int) -> Tensor:
    """Indices int64 [H, n] below S in the fewest bytes: two each (four from 65,537 tokens on), or one bit for each of the S tokens."""
    heads, count = indices.shape
    short = tokens <= SHORT
    if -(-tokens // 8) < count * (2 if short else 4):
        bits = torch.zeros(heads, -(-tokens // 8) * 8, dtype=torch.uint8, device=indices.device).scatter_(1, indices, 1)
        weights = (1 << torch.arange(8, device=indices.device)).to(torch.uint8)
        return (bits.view(heads, -1, 8) * weights).sum(-1).to(torch.uint8)
    if not short:
        return indices.to(torch.int32)
    return (indices - SHORT // 2).to(torch.int16)  # from the middle on, so that 16 bits with a sign do


def unpacked(table: Tensor, heads: int, count: int, tokens: int) -> Tensor:
    """Inverse of `packed`: int64 [H, n], ascending."""
    if table.dtype == torch.uint8:
        bits = (table.unsqueeze(-1) >> torch.arange(8, device=table.device, dtype=torch.uint8)) & 1
        return bits.flatten(1).nonzero()[:, 1].view(heads, count)
    return table.long() + (SHORT // 2 if table.dtype == torch.int16 else 0)
