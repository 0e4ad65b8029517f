"""The bundled data set: the same bytes everywhere, and questions that the pages answer."""

import hashlib
import re

import numpy as np
import pytest

from rotatek_compile.calibration_data import forms, forms_content
from rotatek_compile.calibration_data.glyphs import load_glyphs

GOLDEN = {
    ("train", 0, 0): "03435307c567b636e97e7f5013be50afe3f7f819f499f7313af82122353e5ab8",
    ("calibration", 0, 1): "d9edc423a26316ec4874eeb462ecf6e2348f3310c075168fc61ff179f49c647d",
    ("evaluation", 0, 17): "54c72c74cbda2a73f499bf3a1941ed8e78fdc867ed02342637d54c0611dbe3bc",
    ("evaluation", 3, 2): "0ce73021d1604fb854434f1c3a8d53d81f8c83e9d46b54ac0d9d94a55f5850d2",
}


def fingerprint(sample):
    digest = hashlib.sha256()
    for part in (sample.id, sample.question, *sample.answers):
        digest.update(part.encode())
    for image in sample.images:
        digest.update(image.tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(("split", "seed", "index"), list(GOLDEN))
def test_samples_never_change(split, seed, index):
    assert fingerprint(forms.Forms(split, seed).sample(index)) == GOLDEN[split, seed, index]


def test_order_of_access_does_not_matter():
    data = forms.Forms("calibration")
    late = fingerprint(data.sample(3))
    assert [fingerprint(sample) for sample in data.iterate(4)][3] == late


def test_splits_and_seeds_are_disjoint():
    texts = [fingerprint(forms.Forms(split, seed).sample(index)) for split in forms.SPLITS for seed in (0, 1) for index in range(10)]
    assert len(set(texts)) == len(texts)
    with pytest.raises(ValueError, match="evaluation"):
        forms.Forms("test")


def test_geometry_and_page_counts():
    samples = list(forms.Forms("train").iterate(60))
    assert {len(sample.images) for sample in samples} == {1, 2, 3}
    assert all(image.size == (320, 320) and image.mode == "RGB" for sample in samples for image in sample.images)
    assert samples[17].id == "forms/train/0/17"


def test_keys_of_a_document_are_unique_and_fields_fit_a_row():
    for number in range(30):
        draws, used = forms.Draws(f"test/{number}"), set()
        pages = [forms.draw_fields(draws, used) for _ in range(3)]
        keys = [key for page in pages for key, _ in page.values()]
        assert len(keys) == len(set(keys)) == len(used)
        for page in pages:
            assert forms_content.ROWS[0] <= len(page) <= forms_content.ROWS[1]
            assert all(len(f"{key}: {value}") <= forms_content.CELLS for key, value in page.values())


def test_the_page_shows_the_answer(monkeypatch):
    """Read the pages back, cell by cell, by the best matching glyph of their style."""
    drawn = []
    render = forms.render_page
    monkeypatch.setattr(forms, "render_page", lambda draws, fields: drawn.append(fields) or render(draws, fields))
    # Without noise, displacement and grey levels a cell is a glyph, bit by bit.
    for name, value in {"SHIFT": 0, "NOISE": 0, "PAPER": (255, 255), "INK": (0, 0), "INVERTED_ONE_IN": 2**62}.items():
        monkeypatch.setattr(forms_content, name, value)
    atlas = load_glyphs()
    for sample in forms.Forms("evaluation").iterate(3):
        text = []
        for image in sample.images:
            coverage = 255 - np.asarray(image)[:, :, 0].astype(int)
            cells = coverage.reshape(20, 16, 20, 16).transpose(0, 2, 1, 3)[:, :, None]
            error = [np.abs(cells - style[None, None].astype(int)).sum((3, 4)) for style in atlas.coverage]
            best = error[int(np.argmin([e.min(2).sum() for e in error]))]
            text += ["".join(atlas.characters[code] for code in row) for row in best.argmin(2)]
        key = re.fullmatch(r"What is the (.+)\?", sample.question)[1]
        found = [line.strip() for line in text if line.strip().startswith(f"{key}: ")]
        assert found == [f"{key}: {sample.answers[0]}"]


def test_atlas_has_enough_distinct_styles():
    atlas = load_glyphs()
    assert len({font for font, _ in atlas.styles}) >= 10
    assert len({size for _, size in atlas.styles}) == 3
    assert atlas.coverage.shape == (len(atlas.styles), 95, 16, 16)
    values = (choice for kind in forms_content.VALUE_KINDS for slot in kind for choice in slot)
    needed = set(":" + "".join(forms_content.KEYS) + "".join(values))
    for style in atlas.coverage:
        glyphs = {style[ord(character) - 32].tobytes() for character in needed}
        assert len(glyphs) == len(needed)  # none is blank by accident, none looks like another
