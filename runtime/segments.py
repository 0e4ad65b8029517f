"""Which tokens of a forward call are what: runs of text and of one image each, per row, padding left out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PAD, TEXT, VISUAL = -1, 0, 1


@dataclass(frozen=True, slots=True)
class Run:
    """Columns [start, end) of one row of the call, all of one kind (TEXT or VISUAL)."""

    start: int
    end: int
    kind: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Step:
    """One forward call: `rows[b]` lists the runs of row b, in order. Padding belongs to no run."""

    batch: int
    length: int
    rows: tuple[tuple[Run, ...], ...]

    @property
    def plain_text(self) -> bool:
        """Every row is one text run over all columns: tokens can be appended to the window as they come."""
        return all(len(row) == 1 and row[0].kind == TEXT and row[0].length == self.length for row in self.rows)

    def text_tail(self) -> int:
        """Columns at the end of the call that are text in every row."""
        ends = [row[-1] if row else Run(0, 0, PAD) for row in self.rows]
        return min(run.length if run.kind == TEXT and run.end == self.length else 0 for run in ends)

    def text_columns(self, row: int) -> np.ndarray:
        """Columns of this row's text tokens, in order."""
        parts = [np.arange(run.start, run.end) for run in self.rows[row] if run.kind == TEXT]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def plain_step(batch: int, length: int) -> Step:
    """A call of text tokens without padding."""
    row = (Run(0, length, TEXT),)
    return Step(batch, length, (row,) * batch)


def runs_of(kinds: np.ndarray) -> tuple[Run, ...]:
    """Maximal runs of equal kind in one row [T], padding (-1) left out.

    Two images with no token between them form one run: they then share a mean and a basis, which costs a little accuracy and
    no correctness.
    """
    if kinds.size == 0:
        return ()
    edges = np.flatnonzero(np.diff(kinds)) + 1
    bounds = [0, *edges.tolist(), kinds.size]
    return tuple(Run(a, b, int(kinds[a])) for a, b in zip(bounds[:-1], bounds[1:], strict=True) if kinds[a] != PAD)


def read_step(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    visual_token_ids: tuple[int, ...],
    shape: tuple[int, int],
) -> Step:
    """Token kinds of a call of `shape` (B, T) as a `Step`.

    Args:
        input_ids: [B, T] or None when the caller passed embeddings; then only `token_type_ids` can tell images.
        attention_mask: 2-D [B, past + T] (1 = real) or None; other shapes say nothing about padding here.
        token_type_ids: `mm_token_type_ids` [B, T], 0 text, 1 image, 2 video; wins over ids when given.
        visual_token_ids: ids of image and video placeholder tokens.
    """
    batch, length = shape
    padding = None
    if attention_mask is not None and attention_mask.dim() == 2:
        real = attention_mask[:, -length:] != 0
        if not bool(real.all()):
            padding = ~real
    if length == 1 and padding is None:
        return plain_step(batch, length)  # a generated token is text, whatever its id
    if token_type_ids is not None and token_type_ids.shape == (batch, length):
        visual = (token_type_ids == 1) | (token_type_ids == 2)
    elif input_ids is not None:
        visual = torch.zeros_like(input_ids, dtype=torch.bool)
        for token_id in visual_token_ids:
            visual |= input_ids == token_id
    else:
        warnings.warn("inputs_embeds came without input_ids or mm_token_type_ids: all tokens count as text", stacklevel=3)
        visual = torch.zeros(shape, dtype=torch.bool)
    kinds = visual.to("cpu", torch.int8).numpy()
    if padding is not None:
        kinds = np.where(padding.cpu().numpy(), np.int8(PAD), kinds)
    return Step(batch, length, tuple(runs_of(row) for row in kinds))
