"""The pre-rendered characters that `forms` pages are made of: no font and no font renderer at run time."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

BAR_MARGIN = 3  # blank pixels above and below a bar
FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True, kw_only=True)
class GlyphAtlas:
    """`coverage` is uint8 [styles, characters + 1, cell, cell]: how much ink a pixel carries, 0 to 255. A style is a font at a size.

    The last glyph is no character but a filled cell, for bars.
    """

    coverage: np.ndarray
    characters: str
    styles: tuple[tuple[str, int], ...]

    @property
    def cell(self) -> int:
        """Side of a character cell in pixels."""
        return self.coverage.shape[-1]

    def codes(self, text: str) -> np.ndarray:
        """Index of every character of `text` in `characters`, uint8 [len(text)]. The characters are consecutive in ASCII."""
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8) - np.uint8(ord(self.characters[0]))


@functools.cache
def load_glyphs() -> GlyphAtlas:
    """Read the atlas shipped beside this file (made by tools/make_forms_glyphs.py)."""
    description = json.loads((FOLDER / "forms_glyphs.json").read_text(encoding="utf-8"))
    cell, characters = description["cell"], description["characters"]
    styles = tuple((style["font"], style["size"]) for style in description["styles"])
    with Image.open(FOLDER / "forms_glyphs.png") as image:
        flat = np.asarray(image, dtype=np.uint8)
    coverage = flat.reshape(len(styles), cell, len(characters), cell).transpose(0, 2, 1, 3)
    bar = np.zeros((len(styles), 1, cell, cell), dtype=np.uint8)
    bar[:, :, BAR_MARGIN : cell - BAR_MARGIN] = 255
    coverage = np.concatenate([coverage, bar], axis=1)
    coverage.setflags(write=False)
    return GlyphAtlas(coverage=coverage, characters=characters, styles=styles)
