"""The bundled data sets: generated documents of one to three pages, one question each, several skills.

Everything is generated on demand and is equal to the byte on every machine: every document is drawn from its own stream, keyed by
set, split, seed and index, so splits and sets never share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from PIL import Image

from . import charts, fields, letters, tables
from .drawing import draw_page
from .draws import Draws
from .page import Content, Question, blank_content
from .sample import Sample

SPLITS = ("train", "calibration", "evaluation")
MAX_PAGES = 3

Writer = Callable[[Draws, Content], None]
Asker = Callable[[Draws, Content], "Question | None"]

WRITERS: dict[str, Writer] = {
    "fields": fields.write_page, "table": tables.write_page, "letter": letters.write_page, "chart": charts.write_page,
}  # fmt: skip
ASKERS: dict[str, Asker] = {
    "field": fields.ask_field, "missing": fields.ask_missing, "larger": fields.ask_larger, "page": fields.ask_page,
    "cell": tables.ask_cell, "count": tables.ask_count, "line": letters.ask_line, "ordinal": letters.ask_ordinal,
    "chart": charts.ask_chart,
}  # fmt: skip
SKILLS = tuple(ASKERS)
# Which kind of page a skill is about.
SUBJECT = {
    "field": "fields", "missing": "fields", "larger": "fields", "page": "fields", "cell": "table", "count": "table",
    "line": "letter", "ordinal": "letter", "chart": "chart",
}  # fmt: skip
# Sets: the kinds of pages in their documents, and their skills in the order in which samples go round.
SETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "forms": (("fields",), ("field", "missing", "larger", "page")),
    "tables": (("table",), ("cell", "count")),
    "letters": (("letter",), ("line", "ordinal")),
    "charts": (("chart",), ("chart",)),
    "mixed": (tuple(WRITERS), SKILLS),
}


class BundledSet:
    """Documents of one split of a set, of all of its skills in turn or of one.

    Raises:
        ValueError: unknown set, skill or split.
    """

    def __init__(self, name: str, split: str, seed: int = 0, skill: str | None = None) -> None:
        if name not in SETS or split not in SPLITS:
            raise ValueError(f"bundled sets are {', '.join(SETS)}, splits {', '.join(SPLITS)}; got {name!r}, {split!r}")
        self.kinds, self.skills = SETS[name]
        if skill is not None and skill not in self.skills:
            raise ValueError(f"{name} has the skills {', '.join(self.skills)}; {skill!r} is none of them")
        self.name, self.split, self.seed, self.skill = name, split, seed, skill

    def sample(self, index: int) -> Sample:
        """Document number `index` with its question."""
        name = f"{self.name}:{self.skill}" if self.skill else self.name
        skill = self.skill or self.skills[index % len(self.skills)]
        draws = Draws(f"{name}/{self.split}/{self.seed}/{index}")
        content, question = document_about(draws, skill, self.kinds)
        images = tuple(Image.fromarray(draw_page(draws, page)) for page in content.pages)
        return Sample(
            id=f"{name}/{self.split}/{self.seed}/{index}", images=images, question=question.text, answers=(question.answer,), skill=skill
        )

    def iterate(self, num_samples: int) -> Iterator[Sample]:
        """The first `num_samples` documents."""
        for index in range(num_samples):
            yield self.sample(index)


def document_about(draws: Draws, skill: str, kinds: tuple[str, ...]) -> tuple[Content, Question]:
    """A document with pages of `kinds` on which a question of `skill` can be asked, and that question."""
    while True:
        content = compose(draws, draws.between(1, MAX_PAGES), kinds, SUBJECT[skill], skill == "page")
        if question := ASKERS[skill](draws, content):
            return content, question


def compose(draws: Draws, pages: int, kinds: tuple[str, ...], subject: str, alike: bool = False, fullness: int = 100) -> Content:
    """Write `pages` pages, at least one of them of the kind `subject`; with `alike` all of them."""
    content = blank_content(draws, fullness)
    place = draws.below(pages)
    for number in range(pages):
        kind = subject if alike or number == place else draws.one_of(kinds)
        WRITERS[kind](draws, content)
    return content
