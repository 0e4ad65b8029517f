"""The trainer's renderer against the generator's own drawing."""

import numpy as np
import pytest
import torch

from tiny_training.bundled import drawing, draws, page
from tiny_training.rendering import Renderer

CPU = torch.device("cpu")


def test_without_chance_the_pages_are_equal(monkeypatch):
    for name, value in {"SHIFT": 0, "NOISE": 0, "PAPER": (230, 230), "INK": (41, 41), "INVERTED_ONE_IN": 2**62}.items():
        monkeypatch.setattr(drawing, name, value)
    renderer = Renderer(CPU)
    atlas, every = renderer.coverage, set()
    cells = torch.randint(0, page.BAR + 1, (6, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for number, codes in enumerate(cells):
        style = draws.Draws(f"page/{number}").below(len(atlas))  # the first draw of draw_page
        renderer.coverage = atlas[style : style + 1]
        expected = drawing.draw_page(draws.Draws(f"page/{number}"), codes.numpy())[:, :, 0]
        assert np.array_equal(renderer.draw(codes[None])[0].numpy(), expected)
        every.add(style)
    assert len(every) > 2
    renderer.coverage = atlas
    torch.manual_seed(0)
    assert len({picture.numpy().tobytes() for picture in renderer.draw(cells[:1].expand(20, -1, -1))}) > 5  # styles differ


def measured(picture):
    """(inverted, down, right, noise, lighter, darker) of a page with one block of bars."""
    grey = picture.astype(int)
    paper, ink = np.median(grey[:60]), np.median(grey[86:90, 100:220])
    block = np.abs(grey - paper) > abs(ink - paper) / 2
    noise = np.abs(grey[:60] - paper).max()
    return paper < ink, block.any(1).argmax() - 83, block.any(0).argmax() - 80, noise, max(paper, ink), min(paper, ink)


@pytest.fixture(scope="module")
def statistics():
    cells = np.zeros((20, 20), dtype=np.uint8)
    cells[5:15, 5:15] = page.BAR
    torch.manual_seed(0)
    renderer, count = Renderer(CPU), 400
    here = [measured(picture.numpy()) for _ in range(8) for picture in renderer.draw(torch.from_numpy(cells).expand(count // 8, -1, -1))]
    there = [measured(drawing.draw_page(draws.Draws(f"statistics/{number}"), cells)[:, :, 0]) for number in range(count)]
    return np.array(here, dtype=float), np.array(there, dtype=float)


def test_chance_has_the_same_distribution(statistics):
    here, there = statistics
    error = 4 * np.sqrt((here.var(0) + there.var(0)) / len(here))
    assert (np.abs(here.mean(0) - there.mean(0)) < error).all()
    assert np.abs(here.std(0) / there.std(0) - 1).max() < 0.2
    for column in (1, 2):
        assert set(here[:, column]) == set(there[:, column]) == {-2, -1, 0, 1, 2}
    for data in statistics:
        assert data[:, 3].max() <= drawing.NOISE + 1 and data[:, 4].min() >= 199 and data[:, 4].max() <= 255 and data[:, 5].max() <= 91
