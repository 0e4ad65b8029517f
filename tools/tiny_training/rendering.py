"""Pages drawn on the training device: the same distribution as calibration_data/drawing.py, thousands of pages a second."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .bundled import drawing, glyphs


class Renderer:
    """Draws character codes with torch's random numbers on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        atlas = glyphs.load_glyphs()
        self.cell = atlas.cell
        self.coverage = torch.tensor(atlas.coverage, device=device)

    def _below(self, bound: int, shape: tuple[int, ...]) -> Tensor:
        """Random integers in [0, bound), int64 [*shape]."""
        return (torch.rand(shape, device=self.device) * bound).long()

    def draw(self, cells: Tensor) -> Tensor:
        """Codes uint8 [N, CELLS, CELLS] in a random style each: uint8 [N, H, W]."""
        n, side = cells.shape[0], cells.shape[1] * self.cell
        style = self._below(self.coverage.shape[0], (n, 1, 1))
        coverage = self.coverage[style, cells.long()].permute(0, 1, 3, 2, 4).reshape(n, side, side)

        margin = pad(coverage, (drawing.SHIFT,) * 4)
        line = torch.arange(side, device=self.device)
        down, right = (line + self._below(2 * drawing.SHIFT + 1, (n, 1)) for _ in range(2))
        coverage = margin[torch.arange(n, device=self.device)[:, None, None], down[:, :, None], right[:, None, :]].to(torch.int32)

        paper, ink = (low + self._below(high - low + 1, (n, 1, 1)) for low, high in (drawing.PAPER, drawing.INK))
        inverted = self._below(drawing.INVERTED_ONE_IN, (n, 1, 1)) == 0
        paper, ink = torch.where(inverted, ink, paper).int(), torch.where(inverted, paper, ink).int()
        grey = paper + torch.div(coverage * (ink - paper), 255, rounding_mode="floor")
        amplitude = self._below(drawing.NOISE + 1, (n, 1, 1)).int()
        noise = (torch.rand(n, side, side, device=self.device) * (2 * amplitude + 1)).int() - amplitude
        return (grey + noise).clamp_(0, 255).to(torch.uint8)
