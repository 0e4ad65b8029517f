"""Pictures of pages, and the characters they are made of."""

import numpy as np
import pytest

from rotatek_compile.calibration_data import bundled, drawing, fields, letters, page, tables, words
from rotatek_compile.calibration_data.draws import Draws
from rotatek_compile.calibration_data.glyphs import load_glyphs


@pytest.fixture
def plain(monkeypatch):
    """Without noise, displacement and grey levels a cell is a glyph, bit by bit."""
    for name, value in {"SHIFT": 0, "NOISE": 0, "PAPER": (255, 255), "INK": (0, 0), "INVERTED_ONE_IN": 2**62}.items():
        monkeypatch.setattr(drawing, name, value)


def to_cells(picture):
    """Picture uint8 [320, 320] to [20, 20, 16, 16]."""
    return picture.reshape(20, 16, 20, 16).transpose(0, 2, 1, 3)


def read_back(picture):
    """Codes [20, 20] of the best matching style, and its total squared error."""
    cells = to_cells(255.0 - picture[:, :, 0]).reshape(400, 256)
    best = None
    for style in load_glyphs().coverage.reshape(-1, 96, 256).astype(float):
        error = (cells**2).sum(1)[:, None] + (style**2).sum(1) - 2 * cells @ style.T
        total = error.min(1).sum()
        if best is None or total < best[1]:
            best = error.argmin(1).reshape(20, 20), total
    return best


def test_the_page_reads_back_cell_by_cell(plain):
    kinds, bars = tuple(bundled.WRITERS), 0
    for number in range(4):
        content, _ = bundled.document_about(Draws(f"mixed/evaluation/0/{number}"), ("chart", "field", "cell", "line")[number], kinds)
        for cells in content.pages[:2]:
            codes, error = read_back(drawing.draw_page(Draws(f"drawing/{number}"), cells))
            assert error == 0 and np.array_equal(codes, cells)
            bars += int((cells == page.BAR).sum())
    assert bars > 0


def test_noise_shift_and_paper_stay_within_their_bounds():
    cells = np.zeros((20, 20), dtype=np.uint8)
    cells[5:15, 5:15] = page.BAR
    inverted, shifts = 0, set()
    for number in range(200):
        grey = drawing.draw_page(Draws(f"bounds/{number}"), cells)
        assert grey.shape == (320, 320, 3) and grey.dtype == np.uint8 and (grey == grey[:, :, :1]).all()
        grey = grey[:, :, 0].astype(int)
        paper, ink = np.median(grey[:60]), np.median(to_cells(grey)[8, 8, 5:11])
        inverted += paper < ink
        assert (200 <= max(paper, ink) <= 255) and (0 <= min(paper, ink) <= 90 + drawing.NOISE)
        assert np.abs(grey[:60] - paper).max() <= drawing.NOISE + 1
        dark = np.abs(grey - paper) > abs(ink - paper) / 2
        shifts.add((int(dark.any(1).argmax()) - 83, int(dark.any(0).argmax()) - 80))  # a bar begins three pixels below its cell
    assert 10 < inverted < 45
    assert {down for down, _ in shifts} == {right for _, right in shifts} == {-2, -1, 0, 1, 2} and len(shifts) == 25


def test_a_picture_depends_on_its_stream_only():
    cells = np.full((20, 20), 33, dtype=np.uint8)
    first, again, other = (drawing.draw_page(Draws(name), cells) for name in ("a", "a", "b"))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_atlas_has_enough_distinct_styles():
    atlas = load_glyphs()
    assert len({font for font, _ in atlas.styles}) >= 10
    assert len({size for _, size in atlas.styles}) == 3
    assert atlas.characters == "".join(map(chr, range(32, 127)))
    assert atlas.coverage.shape == (len(atlas.styles), 96, 16, 16) and not atlas.coverage.flags.writeable
    assert (atlas.coverage[:, page.BAR, 3:13] == 255).all() and not atlas.coverage[:, page.BAR, [0, 1, 2, 13, 14, 15]].any()
    assert not atlas.coverage[:, 0].any()
    assert atlas.codes(" ~").tolist() == [0, page.BAR - 1]
    texts = [*words.WORDS, fields.SUFFIXES, *tables.NAMES, *tables.LONG_NAMES, *tables.STATES, tables.CODE, ":"]
    needed = set("".join(texts) + "".join(choice for kind in words.VALUE_KINDS for slot in kind for choice in slot)) | {"\x7f"}
    assert letters.WORDS is words.WORDS
    for style in atlas.coverage:
        glyphs = {style[ord(character) - 32].tobytes() for character in needed}
        assert len(glyphs) == len(needed)  # none is blank by accident, none looks like another
