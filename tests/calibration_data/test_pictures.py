"""Pictures of odd modes: pixels worked out by hand, through the readers of local data and of the Hub's."""

import io

import numpy as np
import pytest
from PIL import Image

from rotatek_compile.calibration_data.errors import DataError
from rotatek_compile.calibration_data.local import open_image, open_local
from rotatek_compile.calibration_data.pictures import upright_rgb
from rotatek_compile.video import read_clip

CORNERS = {1: "abcd", 2: "badc", 3: "dcba", 4: "cdab", 5: "acbd", 6: "cadb", 7: "dbca", 8: "bdac"}
"""By EXIF orientation: what a viewer shows at its four corners, row by row, of a picture stored as ab over cd."""


def greys(image):
    return np.asarray(image)[..., 0].tolist()


@pytest.mark.parametrize("orientation", CORNERS)
def test_the_orientation_of_a_camera_is_undone(tmp_path, orientation):
    """Row 0 of orientation 6 is the right-hand side of what is seen (EXIF): stored ab over cd is seen as ca over db."""
    stored = Image.new("L", (3, 2), 0)
    for place, level in zip([(0, 0), (2, 0), (0, 1), (2, 1)], (10, 20, 30, 40), strict=True):
        stored.putpixel(place, level)
    record = stored.getexif()
    record[0x0112] = orientation
    stored.save(tmp_path / "page.png", exif=record)
    page = open_image(tmp_path / "page.png", "page")
    assert page.size == ((3, 2) if orientation < 5 else (2, 3))
    seen = greys(page)
    corners = [seen[0][0], seen[0][-1], seen[-1][0], seen[-1][-1]]
    assert corners == [{"a": 10, "b": 20, "c": 30, "d": 40}[letter] for letter in CORNERS[orientation]]
    assert read_clip(tmp_path, 1).frames.shape[1:3] == page.size[::-1]


def test_a_damaged_record_turns_nothing():
    page = Image.new("L", (3, 2))
    page.info["exif"] = b"Exif\x00\x00II*\x00\xff\xff"
    assert upright_rgb(page).size == (3, 2)


def test_sixteen_bits_are_scaled(tmp_path):
    """65535 / 257 = 255; 257 * 128 + 128 is still 128, one more is 129."""
    levels = np.array([[0, 128, 129, 257 * 128 + 128, 257 * 128 + 129, 65535]], np.uint16)
    for name in ("page.png", "page.tif"):
        Image.fromarray(levels).save(tmp_path / name)
        assert greys(open_image(tmp_path / name, "page")) == [[0, 0, 1, 128, 129, 255]]
    Image.frombytes("I;16B", (6, 1), levels.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    assert greys(open_image(tmp_path / "big.tif", "page")) == [[0, 0, 1, 128, 129, 255]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_white_are_refused(tmp_path, mode):
    Image.new(mode, (2, 2), 1).save(tmp_path / "page.tif")
    with pytest.raises(DataError, match=f"numbers of 32 bits \\(mode {mode}\\).*replace or remove it"):
        open_image(tmp_path / "page.tif", "page")


def _transparent(mode):
    """Black everywhere: transparent, half, opaque. A palette has one transparent entry."""
    if mode == "P":
        page = Image.new("P", (3, 1), 1)
        page.putpalette([0] * 6)
        page.putpixel((0, 0), 0)
        return page, {"transparency": 0}, [[255, 0, 0]]
    page = Image.new(mode, (3, 1))
    for column, alpha in enumerate((0, 128, 255)):
        page.putpixel((column, 0), (*[0] * (len(mode) - 1), alpha))
    return page, {}, [[255, 127, 0]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """Black letters on a transparent page would be black on black; half of black on white is 255 * 127 / 255."""
    page, how, seen = _transparent(mode)
    page.save(tmp_path / "page.png", **how)
    assert greys(open_image(tmp_path / "page.png", "page")) == seen
    (tmp_path / "rows.jsonl").write_text('{"question": "?", "answer": "a", "image": "page.png"}\n')
    assert greys(open_local(tmp_path / "rows.jsonl").sample(0).images[0]) == seen
    assert greys(open_image(io.BytesIO((tmp_path / "page.png").read_bytes()), "page", transparent_is_white=False)) == [[0, 0, 0]]
