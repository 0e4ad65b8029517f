"""Render the glyph atlas of the bundled `forms` pages: calibration_data/forms_glyphs.png and .json.

Needs matplotlib only for its TrueType files; the shipped package needs neither. Run from anywhere, without arguments:

    python tools/make_forms_glyphs.py

The PNG is one grey image of [styles * 16, 95 * 16] pixels: row = style (font x size), column = printable ASCII character from the space on,
value = ink coverage, 0 to 255.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 16
BASELINE = 12  # row of the baseline inside a cell; descenders get the four rows below
OVERSAMPLE = 4  # glyphs are drawn four times as large and averaged down: centring then works on quarter pixels
SIZES = (8, 9, 10)  # em in pixels: small enough that nothing is legible once a page is reduced four times
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmss10", "cmtt10",
)  # fmt: skip
CHARACTERS = "".join(map(chr, range(32, 127)))
# Computer Modern is drawn smaller and lighter than its em suggests; without this it is illegible at the smallest size.
ENLARGE = {"cmss10": 1.15, "cmtt10": 1.15, "STIXGeneral": 1.1, "STIXGeneralBol": 1.1, "STIXGeneralItalic": 1.1}


def render_glyph(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """Ink coverage of one character, uint8 [CELL, CELL], centred by its ink and standing on the common baseline."""
    side = CELL * OVERSAMPLE
    left, _, right, _ = font.getbbox(character, anchor="ls")
    canvas = Image.new("L", (side, side), 0)
    ImageDraw.Draw(canvas).text(((side - left - right) / 2, BASELINE * OVERSAMPLE), character, fill=255, font=font, anchor="ls")
    coverage = np.asarray(canvas, dtype=np.float64).reshape(CELL, OVERSAMPLE, CELL, OVERSAMPLE).mean(axis=(1, 3))
    return np.round(coverage).astype(np.uint8)


def render_atlas() -> tuple[np.ndarray, list[dict[str, str | int]]]:
    """Atlas uint8 [styles * CELL, len(CHARACTERS) * CELL] and one record {font, size} per style."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    rows, styles = [], []
    for name in FONTS:
        for size in SIZES:
            font = ImageFont.truetype(str(folder / f"{name}.ttf"), round(size * OVERSAMPLE * ENLARGE.get(name, 1.0)))
            rows.append(np.concatenate([render_glyph(font, character) for character in CHARACTERS], axis=1))
            styles.append({"font": name, "size": size})
    return np.concatenate(rows, axis=0), styles


def main() -> None:
    atlas, styles = render_atlas()
    target = Path(__file__).resolve().parents[1] / "calibration_data"
    Image.fromarray(atlas).save(target / "forms_glyphs.png", optimize=True)
    description = {"cell": CELL, "characters": CHARACTERS, "styles": styles}
    (target / "forms_glyphs.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    print(f"{len(styles)} styles of {len(CHARACTERS)} glyphs, {(target / 'forms_glyphs.png').stat().st_size} bytes")


if __name__ == "__main__":
    main()
