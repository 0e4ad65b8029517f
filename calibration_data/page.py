"""A page of character cells and the questions it answers: what every kind of bundled page is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from . import words
from .draws import Draws

CELLS = 20  # characters per row, rows per page
BAR = 95  # code of a filled cell, after the 95 printable ASCII characters; a space is 0
FIRST_CHARACTER = " "


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a document; `skill` names what it takes to answer it."""

    skill: str
    text: str
    answer: str


@dataclass(slots=True)
class Field:
    """A `key: value` row of page `page`; `number` is the value if it is a plain integer."""

    page: int
    key: str
    value: str
    number: int | None


@dataclass(slots=True)
class Content:
    """Everything written in one document so far, page by page, in the form that questions are drawn from.

    `words` [N] is a shuffled list of the vocabulary: every label of a document is taken from its end, so none occurs twice.
    """

    words: list[str]
    fullness: int = 100  # percent of the usual number of rows: the trainer's curriculum begins with emptier pages
    pages: list[np.ndarray] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    fields: list[Field] = field(default_factory=list)
    absent_keys: list[str] = field(default_factory=list)  # look like keys of the document, and are none
    cells: list[tuple[str, str, str]] = field(default_factory=list)  # (column, row label, value)
    states: list[list[str]] = field(default_factory=list)  # the state column of every table that has one
    lines: list[str] = field(default_factory=list)
    bars: list[tuple[str, int]] = field(default_factory=list)  # (label, value)

    def take_word(self, longest: int) -> str:
        """A word of at most `longest` letters that this document has not used yet."""
        for place in range(len(self.words) - 1, -1, -1):
            if len(self.words[place]) <= longest:
                return self.words.pop(place)
        raise ValueError(f"no word of at most {longest} letters is left")

    def draw_rows(self, draws: Draws, rows: tuple[int, int]) -> int:
        """How many rows a page gets, both ends of `rows` included; fewer while `fullness` is below 100."""
        low, high = (max(2, bound * self.fullness // 100) for bound in rows)
        return draws.between(low, high)

    def new_page(self, kind: str) -> np.ndarray:
        """A blank page, uint8 [CELLS, CELLS] of character codes, appended to the document."""
        page = np.zeros((CELLS, CELLS), dtype=np.uint8)
        self.pages.append(page)
        self.kinds.append(kind)
        return page


def blank_content(draws: Draws, fullness: int = 100) -> Content:
    """A document with no page yet."""
    return Content([words.WORDS[i] for i in draws.distinct(len(words.WORDS), len(words.WORDS))], fullness)


def write(page: np.ndarray, row: int, column: int, text: str) -> None:
    """Write `text` into the cells of one row.

    Raises:
        ValueError: it does not fit.
    """
    if column < 0 or column + len(text) > CELLS:
        raise ValueError(f"{text!r} does not fit row {row} at column {column}")
    page[row, column : column + len(text)] = np.frombuffer(text.encode("ascii"), dtype=np.uint8) - ord(FIRST_CHARACTER)
