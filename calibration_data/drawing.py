"""Pages as pictures: every page in one random style, paper and ink, a little displaced and noisy."""

from __future__ import annotations

import numpy as np

from .draws import Draws
from .glyphs import load_glyphs
from .page import CELLS

PAPER = (200, 255)  # grey of the lighter colour of a page
INK = (0, 90)  # grey of the darker one
SHIFT = 2  # the print of a page is displaced by up to this many pixels in both directions
NOISE = 8  # largest amplitude of the uniform noise, in grey levels
INVERTED_ONE_IN = 8  # one page in so many is light on dark


def draw_page(draws: Draws, cells: np.ndarray) -> np.ndarray:
    """Character codes uint8 [CELLS, CELLS] to a picture uint8 [320, 320, 3], grey."""
    atlas = load_glyphs()
    style = draws.below(len(atlas.styles))
    side = CELLS * atlas.cell
    coverage = atlas.coverage[style][cells].transpose(0, 2, 1, 3).reshape(side, side)

    down, right = draws.between(-SHIFT, SHIFT), draws.between(-SHIFT, SHIFT)
    margin = np.pad(coverage, SHIFT)
    coverage = margin[SHIFT - down :][:side, SHIFT - right :][:, :side]

    paper, ink = draws.between(*PAPER), draws.between(*INK)
    if draws.below(INVERTED_ONE_IN) == 0:
        paper, ink = ink, paper
    grey = paper + (coverage.astype(np.int32) * (ink - paper)) // 255
    amplitude = draws.between(0, NOISE)
    noise = (draws.raw_bytes(side * side).astype(np.int32) * (2 * amplitude + 1) >> 8) - amplitude
    grey = np.clip(grey + noise.reshape(side, side), 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)
