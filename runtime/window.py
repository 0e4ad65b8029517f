"""The raw text window of one cache layer: newest text tokens of B sequences at full width, lengths differing by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

WINDOW_STEP = 32  # tokens by which the buffer grows at least
GROWTH = 8  # a row that goes on growing gets room for this part of what it holds, so that a long answer is not copied every few steps
MOST_SLACK = 512  # tokens of room that stay when there is less text: two captured stretches (graphs.py)


def most_slack(longest: int) -> int:
    """Tokens of room that a window may keep beyond its longest row: at least twice what a row grows by, or every crop would free some."""
    return max(MOST_SLACK, 2 * (longest // GROWTH))


class Window:
    """Raw Keys and Values of the newest text.

    Attributes:
        buffer: [2, B, Hkv, C, D], Keys and Values in one storage, because allocators round each storage up; slack may hold anything.
        lengths: int32 [B] on the device, valid tokens of each row.
        host: the same numbers in numpy, so that planning needs no copy from the device.
    """

    def __init__(self, batch: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.buffer = torch.empty((2, batch, heads, 0, dim), dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.host = np.zeros(batch, dtype=np.int64)

    @property
    def keys(self) -> Tensor:
        """[B, Hkv, C, D]"""
        return self.buffer[0]

    @property
    def values(self) -> Tensor:
        """[B, Hkv, C, D]"""
        return self.buffer[1]

    def grow(self, tokens: int) -> None:
        """Count so many new tokens at the end of every row; whoever attends to them writes them (`Backend.decode`)."""
        longest = int(self.host.max(initial=0))
        if longest + tokens > self.buffer.shape[3]:
            try:
                self._reserve(longest + max(tokens, longest // GROWTH))
            except torch.OutOfMemoryError:
                self._reserve(longest + tokens)
        self.host += tokens
        self.lengths += tokens

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens in every row."""
        self._reserve(int(self.host.max(initial=0)) + tokens)

    def append_row(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Append T tokens to one row: keys, values [Hkv, T, D]."""
        start, new = int(self.host[row]), keys.shape[1]
        self._reserve(start + new)
        self.keys[row, :, start : start + new] = keys
        self.values[row, :, start : start + new] = values
        self.host[row] += new
        self.lengths[row] += new

    def oldest(self, rows: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and Values [R, Hkv, tokens, D] of the oldest tokens of these rows, ascending; not always a copy."""
        part = self.buffer[:, self._index(rows), :, :tokens]
        return part[0], part[1]

    def drop_oldest(self, rows: Sequence[int], tokens: int) -> None:
        """Remove so many of the oldest tokens of these rows, ascending, which have been stored elsewhere."""
        index, end = self._index(rows), int(self.host[list(rows)].max())
        self.buffer[:, index, :, : end - tokens] = self.buffer[:, index, :, tokens:end].clone()
        self.host[list(rows)] -= tokens
        self.lengths[index] -= tokens
        self._give_back()

    def _index(self, rows: Sequence[int]) -> slice | Tensor:
        """All rows as a slice, which copies nothing."""
        return slice(None) if len(rows) == len(self.host) else torch.tensor(rows, device=self.buffer.device)

    def trim(self, tokens: int) -> None:
        """Forget the newest `tokens` of every row (speculative decoding)."""
        self.host -= tokens
        self.lengths -= tokens
        self._give_back()

    def select_rows(self, rows: np.ndarray) -> None:
        """Keep these rows, in this order, repeats allowed; everything is copied."""
        index = torch.from_numpy(rows).to(self.buffer.device)
        self.host = self.host[rows]
        self.buffer = self.buffer.index_select(1, index)
        self.lengths = self.lengths.index_select(0, index)
        self._give_back()

    def used_elements(self) -> int:
        """Numbers that belong to tokens; the rest of the buffer is slack."""
        _, _, heads, _, dim = self.buffer.shape
        return int(self.host.sum()) * heads * 2 * dim

    def _give_back(self) -> None:
        """Free room that is more than `most_slack`."""
        longest = int(self.host.max(initial=0))
        if self.buffer.shape[3] - longest > most_slack(longest):
            self.buffer = self.buffer[:, :, :, : -(-longest // WINDOW_STEP) * WINDOW_STEP].clone()

    def _reserve(self, capacity: int) -> None:
        two, batch, heads, have, dim = self.buffer.shape
        if capacity <= have:
            return
        capacity = -(-capacity // WINDOW_STEP) * WINDOW_STEP
        grown = self.buffer.new_empty((two, batch, heads, capacity, dim))
        grown[:, :, :, :have] = self.buffer
        self.buffer = grown
