"""`forms` documents composed on the training device: the same distribution as calibration_data/forms.py, thousands of pages a second."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .bundled import forms_content as content
from .bundled import glyphs

CELLS, SPACE = content.CELLS, 0  # a space is character 0 of the atlas


@dataclass(frozen=True, slots=True)
class Documents:
    """A batch of B documents with P pages each; R = P * CELLS possible fields per document. Characters are atlas codes (ASCII - 32).

    `pages` uint8 [B, P, H, W] grey; `cells` int64 [B, P, CELLS, CELLS] what is written where; `used` bool [B, R];
    `keys` int64 [B, R, MAX_KEY] and `values` int64 [B, R, MAX_VALUE], padded with spaces; `key_lengths`, `value_lengths` int64 [B, R].
    """

    pages: Tensor
    cells: Tensor
    used: Tensor
    keys: Tensor
    key_lengths: Tensor
    values: Tensor
    value_lengths: Tensor


class FormsComposer:
    """Draws documents with torch's random numbers on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        atlas = glyphs.load_glyphs()
        self.cell = atlas.cell
        self.coverage = torch.tensor(atlas.coverage, device=device)
        self.keys = torch.tensor([[ord(c) - 32 for c in key.ljust(content.MAX_KEY)] for key in content.KEYS], device=device)
        self.key_lengths = torch.tensor([len(key) for key in content.KEYS], device=device)
        weights = [content.SINGLE_WEIGHT] * len(content.SINGLE_KEYS) + [1] * len(content.PAIR_KEYS)
        self.key_log_weights = torch.tensor(weights, dtype=torch.float32, device=device).log()
        self._prepare_values()

    def _prepare_values(self) -> None:
        """Tables that turn (kind, position, choice of the slot there) into a character by one gather.

        `flat` lists, for every kind and position, the characters that the possible choices put there; `base` and `count` [kinds, MAX_VALUE]
        say where that list starts and how long it is, `slot` [kinds, MAX_VALUE] which slot of the kind the position belongs to.
        """
        flat, base, count, slot, lengths = [SPACE], [], [], [], []
        for kind in content.VALUE_KINDS:
            bases, counts, slots = [], [], []
            for number, choices in enumerate(kind):
                for offset in range(len(choices[0])):
                    bases.append(len(flat))
                    counts.append(len(choices))
                    slots.append(number)
                    flat.extend(ord(choice[offset]) - 32 for choice in choices)
            lengths.append(len(bases))
            missing = content.MAX_VALUE - len(bases)
            base.append(bases + [0] * missing)
            count.append(counts + [1] * missing)
            slot.append(slots + [0] * missing)
        self.flat, self.base, self.count, self.slot, self.kind_lengths = (
            torch.tensor(table, device=self.device) for table in (flat, base, count, slot, lengths)
        )

    def _below(self, bound: Tensor | int, shape: tuple[int, ...]) -> Tensor:
        """Random integers in [0, bound), int64 [*shape]."""
        return (torch.rand(shape, device=self.device) * bound).long()

    def compose(self, documents: int, pages: int, rows: tuple[int, int]) -> Documents:
        """`documents` documents of `pages` pages with `rows` (lowest, highest number of) fields on each page."""
        fields = pages * CELLS
        count = rows[0] + self._below(rows[1] - rows[0] + 1, (documents, pages, 1))
        rank = torch.rand(documents, pages, CELLS, device=self.device).argsort(-1).argsort(-1)
        used = (rank < count).reshape(documents, fields)

        # Gumbel noise and top-k: weighted drawing without replacement, so that no key stands twice in a document.
        gumbel = -torch.empty(documents, len(content.KEYS), device=self.device).exponential_().log()
        key_ids = (self.key_log_weights + gumbel).topk(fields, dim=-1).indices
        key_ids = key_ids.gather(-1, torch.rand(documents, fields, device=self.device).argsort(-1))
        keys, key_lengths = self.keys[key_ids], self.key_lengths[key_ids]

        kinds = self._below(len(content.VALUE_KINDS), (documents, fields))
        uniform = torch.rand(documents, fields, content.MAX_VALUE, device=self.device).gather(-1, self.slot[kinds])
        choice = (uniform * self.count[kinds]).long()
        values, value_lengths = self.flat[self.base[kinds] + choice], self.kind_lengths[kinds]

        cells = self._write(keys, key_lengths, values, value_lengths, used).reshape(documents, pages, CELLS, CELLS)
        images = self._render(cells.flatten(0, 1)).unflatten(0, (documents, pages))
        return Documents(images, cells, used, keys, key_lengths, values, value_lengths)

    def _write(self, keys: Tensor, key_lengths: Tensor, values: Tensor, value_lengths: Tensor, used: Tensor) -> Tensor:
        """`key: value` at a random column of every used row: int64 [B, R, CELLS]."""
        length = key_lengths + 2 + value_lengths
        start = self._below(CELLS - length + 1, tuple(length.shape))
        middle = torch.tensor([ord(":") - 32, SPACE], device=self.device).expand(*keys.shape[:2], 2)
        blank = torch.full_like(keys[..., :1], SPACE)
        source = torch.cat((keys, middle, values, blank), dim=-1)
        at = torch.arange(CELLS, device=self.device) - start[..., None]
        key_end, end = key_lengths[..., None], length[..., None]
        # Behind a short key, skip its padding in `source`.
        index = torch.where(at < key_end, at, at - key_end + content.MAX_KEY)
        written = (at >= 0) & (at < end) & used[..., None]
        return source.gather(-1, torch.where(written, index, source.shape[-1] - 1))

    def _render(self, cells: Tensor) -> Tensor:
        """Draw int64 [N, CELLS, CELLS] in a random style each: uint8 [N, H, W]."""
        n, side = cells.shape[0], CELLS * self.cell
        style = self._below(self.coverage.shape[0], (n, 1, 1))
        coverage = self.coverage[style, cells].permute(0, 1, 3, 2, 4).reshape(n, side, side)

        margin = torch.nn.functional.pad(coverage, (content.SHIFT,) * 4)
        line = torch.arange(side, device=self.device)
        down, right = (line + self._below(2 * content.SHIFT + 1, (n, 1)) for _ in range(2))
        coverage = margin[torch.arange(n, device=self.device)[:, None, None], down[:, :, None], right[:, None, :]].to(torch.int32)

        paper, ink = (low + self._below(high - low + 1, (n, 1, 1)) for low, high in (content.PAPER, content.INK))
        inverted = self._below(content.INVERTED_ONE_IN, (n, 1, 1)) == 0
        paper, ink = torch.where(inverted, ink, paper).int(), torch.where(inverted, paper, ink).int()
        grey = paper + torch.div(coverage * (ink - paper), 255, rounding_mode="floor")
        amplitude = self._below(content.NOISE + 1, (n, 1, 1)).int()
        noise = (torch.rand(n, side, side, device=self.device) * (2 * amplitude + 1)).int() - amplitude
        return (grey + noise).clamp_(0, 255).to(torch.uint8)
