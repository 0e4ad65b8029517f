"""The bundled data set `forms`: documents of one to three pages of `key: value` fields, one question each.

Everything is generated on demand and is equal to the byte on every machine and with every numpy version: random numbers are the raw
words of numpy's Philox counter generator, keyed by a SHA-256 of (split, seed, index), and only integer arithmetic follows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from . import forms_content as content
from .glyphs import load_glyphs
from .sample import Sample

SPLITS = ("train", "calibration", "evaluation")


class Draws:
    """A stream of random integers that depends on nothing but `name`."""

    def __init__(self, name: str) -> None:
        digest = hashlib.sha256(name.encode("utf-8")).digest()
        self._generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def below(self, bound: int) -> int:
        """An integer in [0, bound); the bias of the multiplication is below bound / 2**64."""
        return (int(self._generator.random_raw()) * bound) >> 64

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + self.below(high - low + 1)

    def distinct(self, count: int, bound: int) -> list[int]:
        """`count` different integers in [0, bound), in random order."""
        pool = list(range(bound))
        return [pool.pop(self.below(len(pool))) for _ in range(count)]

    def raw_bytes(self, count: int) -> np.ndarray:
        """`count` random bytes, uint8 [count]; `count` is a multiple of 8."""
        return self._generator.random_raw(count // 8).astype("<u8").view(np.uint8)


class Forms:
    """Documents of one split; splits never share a document, since the split's name is part of every random key."""

    def __init__(self, split: str, seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"forms has the splits {', '.join(SPLITS)}; {split!r} is none of them")
        self.split = split
        self.seed = seed

    def sample(self, index: int) -> Sample:
        """Document number `index`, with one question about a field on a random page."""
        name = f"forms/{self.split}/{self.seed}/{index}"
        draws = Draws(name)
        used: set[str] = set()
        pages = [draw_fields(draws, used) for _ in range(draws.between(1, content.MAX_PAGES))]
        asked_page = pages[draws.below(len(pages))]
        key, value = list(asked_page.values())[draws.below(len(asked_page))]
        images = tuple(Image.fromarray(render_page(draws, page)) for page in pages)
        return Sample(id=name, images=images, question=content.question_about(key), answers=(value,))

    def iterate(self, num_samples: int) -> Iterator[Sample]:
        """The first `num_samples` documents."""
        for index in range(num_samples):
            yield self.sample(index)


def draw_fields(draws: Draws, used: set[str]) -> dict[int, tuple[str, str]]:
    """Fields of one page by row: {row: (key, value)}. Keys not in `used` are drawn, and added to it."""
    rows = sorted(draws.distinct(draws.between(*content.ROWS), content.CELLS))
    return {row: (draw_key(draws, used), draw_value(draws)) for row in rows}


def draw_key(draws: Draws, used: set[str]) -> str:
    """A key that is not in `used`; it is added."""
    singles = len(content.SINGLE_KEYS) * content.SINGLE_WEIGHT
    while True:
        choice = draws.below(singles + len(content.PAIR_KEYS))
        key = content.SINGLE_KEYS[choice // content.SINGLE_WEIGHT] if choice < singles else content.PAIR_KEYS[choice - singles]
        if key not in used:
            used.add(key)
            return key


def draw_value(draws: Draws) -> str:
    """A value of a random kind: a number, an amount, a date, a code or a name."""
    kind = content.VALUE_KINDS[draws.below(len(content.VALUE_KINDS))]
    return "".join(slot[draws.below(len(slot))] for slot in kind)


def render_page(draws: Draws, fields: dict[int, tuple[str, str]]) -> np.ndarray:
    """Draw the fields at random columns in one random style: uint8 [320, 320, 3], grey."""
    atlas = load_glyphs()
    cells = np.zeros((content.CELLS, content.CELLS), dtype=np.uint8)
    for row, (key, value) in fields.items():
        line = f"{key}: {value}"
        column = draws.below(content.CELLS - len(line) + 1)
        cells[row, column : column + len(line)] = atlas.codes(line)
    style = draws.below(len(atlas.styles))
    side = content.CELLS * atlas.cell
    coverage = atlas.coverage[style][cells].transpose(0, 2, 1, 3).reshape(side, side)

    down, right = draws.between(-content.SHIFT, content.SHIFT), draws.between(-content.SHIFT, content.SHIFT)
    margin = np.pad(coverage, content.SHIFT)
    coverage = margin[content.SHIFT - down :][:side, content.SHIFT - right :][:, :side]

    paper, ink = draws.between(*content.PAPER), draws.between(*content.INK)
    if draws.below(content.INVERTED_ONE_IN) == 0:
        paper, ink = ink, paper
    grey = paper + (coverage.astype(np.int32) * (ink - paper)) // 255
    amplitude = draws.between(0, content.NOISE)
    noise = (draws.raw_bytes(side * side).astype(np.int32) * (2 * amplitude + 1) >> 8) - amplitude
    grey = np.clip(grey + noise.reshape(side, side), 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)
