"""Which tokens of a forward call are what: runs of text and of one image or clip each, per row, padding left out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

PAD, TEXT, IMAGE, VIDEO = -1, 0, 1, 2


@dataclass(frozen=True, slots=True)
class Run:
    """Columns [start, end) of one row of the call, all of one kind. `medium` numbers the call's images and clips; -1 for text.

    A clip may have several runs: some models write the time between its frames.
    """

    start: int
    end: int
    kind: int
    medium: int = -1

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Step:
    """One forward call: `rows[b]` lists the runs of row b, in order. Padding belongs to no run.

    going_on: rows in which an earlier call left an image or clip incomplete, and this one does not end it before its first token.
    unfinished: rows whose last image or clip goes on in a later call.
    """

    batch: int
    length: int
    rows: tuple[tuple[Run, ...], ...]
    going_on: frozenset[int] = field(default_factory=frozenset)
    unfinished: frozenset[int] = field(default_factory=frozenset)

    @property
    def plain_text(self) -> bool:
        """Every row is one text run over all columns: tokens can be appended to the window as they come."""
        return all(len(row) == 1 and row[0].kind == TEXT and row[0].length == self.length for row in self.rows)

    def text_tail(self) -> int:
        """Columns at the end of the call that are text in every row."""
        ends = [row[-1] if row else Run(0, 0, PAD) for row in self.rows]
        return min(run.length if run.kind == TEXT and run.end == self.length else 0 for run in ends)

    def text(self, row: int) -> list[Run]:
        """Runs of text of this row, in order."""
        return [run for run in self.rows[row] if run.kind == TEXT]

    def media(self, row: int) -> list[list[Run]]:
        """The runs of each image or clip of this row, in order."""
        found: dict[int, list[Run]] = {}
        for run in self.rows[row]:
            if run.kind > TEXT:
                found.setdefault(run.medium, []).append(run)
        return list(found.values())

    def tokens(self, row: int) -> int:
        """Real tokens of this row."""
        return sum(run.length for run in self.rows[row])


def columns(x: Tensor, runs: Sequence[Run]) -> Tensor:
    """The columns of these runs, one behind the other: x [H, T, D] -> [H, S, D]; of one run a view.

    Slices, because an index would be copied to the device, which waits for all that the device has to do.
    """
    parts = [x[:, run.start : run.end] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1) if parts else x[:, :0]


def plain_step(batch: int, length: int) -> Step:
    """A call of text tokens without padding."""
    row = (Run(0, length, TEXT),)
    return Step(batch, length, (row,) * batch)


def runs_of(kinds: np.ndarray, media: np.ndarray | None = None) -> tuple[Run, ...]:
    """Maximal runs of equal kind and medium in one row, padding (-1) left out.

    Args:
        kinds: [T].
        media: number of the image or clip of each token [T]; by default every run is one of its own, and two images with no token
            between them are one: they then share a mean and a basis, which costs a little accuracy and no correctness.
    """
    if kinds.size == 0:
        return ()
    changes = np.diff(kinds) != 0
    if media is not None:
        changes |= np.diff(media) != 0
    bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), kinds.size]
    runs = []
    for number, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        kind = int(kinds[a])
        if kind != PAD:
            runs.append(Run(a, b, kind, -1 if kind == TEXT else number if media is None else int(media[a])))
    return tuple(runs)


def hides_past(attention_mask: Any, length: int, tokens: list[int]) -> bool:
    """Whether a call's mask hides any of the `tokens[b]` that row b had before its `length` new ones; padding may be hidden.

    Masks [B, past + T] (1 = real) of single tokens are not looked at: `generate` goes on with the mask of the prompt.

    Args:
        attention_mask: that, or a custom one [B, 1, T, past + T] (bool, or added to logits); anything else hides nothing.
    """
    if not isinstance(attention_mask, Tensor) or not tokens or attention_mask.shape[-1] <= length:
        return False
    if attention_mask.dim() == 4:
        past = attention_mask[..., :-length]
        seen = (past if past.dtype == torch.bool else past == 0).sum(-1).amax((1, 2))  # rows of padding see nothing
    elif attention_mask.dim() == 2 and length > 1:
        seen = (attention_mask[:, :-length] != 0).sum(-1)
    else:
        return False
    return any(have < held for have, held in zip(seen.tolist(), tokens, strict=False))


def read_kinds(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    visual_token_ids: tuple[int, ...],
    shape: tuple[int, int],
    video_token_id: int | None = None,
) -> np.ndarray | None:
    """Token kinds int8 [B, T] of a call of `shape` (B, T); None where all are text and nothing is padding.

    Args:
        input_ids: [B, T] or None when the caller passed embeddings; then only `token_type_ids` can tell images.
        attention_mask: 2-D [B, past + T] (1 = real) or None; other shapes say nothing about padding here.
        token_type_ids: `mm_token_type_ids` [B, T] or [B, past + T], 0 text, 1 image, 2 video; wins over ids when given.
        visual_token_ids: ids of image and video placeholder tokens; `video_token_id` says which of them means video.
    """
    batch, length = shape
    padding = None
    whole = length
    if attention_mask is not None and attention_mask.dim() == 2:
        real = attention_mask[:, -length:] != 0
        whole = attention_mask.shape[1]
        if not bool(real.all()):
            padding = ~real
    if length == 1 and padding is None:
        return None  # a generated token is text, whatever its id
    if token_type_ids is not None and token_type_ids.shape in ((batch, length), (batch, whole)):
        types = token_type_ids[:, -length:]
        kinds = torch.where((types == IMAGE) | (types == VIDEO), types, TEXT)
    elif input_ids is not None:
        kinds = torch.zeros_like(input_ids)
        for token_id in visual_token_ids:
            kinds[input_ids == token_id] = VIDEO if token_id == video_token_id else IMAGE
    else:
        warnings.warn("inputs_embeds came without input_ids or mm_token_type_ids: all tokens count as text", stacklevel=3)
        kinds = torch.zeros(shape, dtype=torch.int64)
    found = kinds.to("cpu", torch.int8).numpy()
    if padding is not None:
        found = np.where(padding.cpu().numpy(), np.int8(PAD), found)
    return found if (found != TEXT).any() else None
