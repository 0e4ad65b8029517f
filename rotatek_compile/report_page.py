"""`rotatek-inspect --html`: one self-contained page about an artifact, or about two side by side.

No script, no request, nothing from elsewhere: a content security policy forbids what the page does not need, and every word that comes
from an artifact is escaped (markup.py). Each plot has its numbers behind it, for readers who cannot see it and for copying.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from ._version import __version__
from .artifact import Artifact
from .errors import RotateKError
from .markup import node, page_text, table
from .report_data import Numbers, numbers
from .report_panels import Panel, differences
from .report_plots import WIDTH
from .report_sections import Section, sections
from .report_style import STYLE

GENERATOR = "rotatek-inspect"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
HEAD_BYTES = 1024  # within which a page says what made it


def page(artifacts: Sequence[Artifact]) -> str:
    """The page about one artifact, or two side by side (also of different models).

    Raises:
        UsageError: an artifact names a rival that does not exist.
    """
    every = [numbers(artifact) for artifact in artifacts]
    title = " | ".join(f"{one.name} ({one.facts['base model']})" for one in every)
    made = sections(every)
    shown = [s for s in made if any(not p.without for p in s.panels)]
    absent = [s for s in made if all(p.without for p in s.panels)]
    cards = [_section(s, every) for s in shown]
    if len(every) == 2 and (maps := differences(*every)):
        how = f"What {every[1].name} keeps more (+) or less (-) of than {every[0].name}."
        grids = node("div", *(_figure(*one) for one in maps), class_="plots small" if len(maps) > 1 else "plots")
        cards.insert(1, node("section", node("h2", "Where the two differ"), node("p", how, class_="how"), grids))
    if absent:
        reasons: dict[str, list[str]] = {}
        for s in absent:
            reasons.setdefault(" ".join(dict.fromkeys(p.without for p in s.panels)), []).append(s.title)
        items = [node("li", node("strong", ", ".join(titles)), f": {why}") for why, titles in reasons.items()]
        cards.append(node("section", node("h2", "Not shown"), node("ul", *items)))
    head = node(
        "head",
        node("meta", charset="utf-8"),
        node("meta", name="generator", content=f"{GENERATOR} {__version__}"),
        node("meta", http_equiv="Content-Security-Policy", content=POLICY),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("title", f"RotateK: {title}"),
        node("style", STYLE),
    )
    body = node(
        "body",
        node(
            "header", node("h1", f"RotateK artifact{'s' if len(every) > 1 else ''}: {' | '.join(one.name for one in every)}"), _facts(every)
        ),
        node("main", *cards, class_="pair") if len(every) > 1 else node("main", *_in_columns(cards), class_="columns"),
        node(
            "footer",
            f"Made by {GENERATOR} {__version__}. KL: of the answer tokens to the dense model's, nats per token, on calibration documents.",
        ),
    )
    return page_text(node("html", head, body, lang="en"))


def _in_columns(cards: Sequence[Element]) -> list[Element]:
    """Cards in two columns of like height, each in order, so that a phone shows them in order and an opened table moves no other column."""
    heights = [_height(card) for card in cards]
    split = min(range(1, len(cards) + 1), key=lambda n: max(sum(heights[:n]), sum(heights[n:])))
    return [node("div", *part, class_="column") for part in (cards[:split], cards[split:])]


def _height(card: Element) -> float:
    """About how high a card is, in units of plots."""
    around = 110.0
    boxes = [[float(x) for x in svg.get("viewBox", "").split()] for svg in card.iter("svg")]
    return around + sum(box[3] * box[2] / WIDTH for box in boxes)


def _facts(every: Sequence[Numbers]) -> Element:
    labels = list(dict.fromkeys(label for one in every for label in one.facts))
    made = table(["", *(one.name for one in every)], [[label, *(one.facts.get(label, "-") for one in every)] for label in labels])
    for row, label in zip(made.iter("tr"), ["", *labels], strict=True):
        if label and len({one.facts.get(label) for one in every}) > 1:
            row.set("class", "differs")
    if len(every) == 1:
        made.remove(made[0])  # a column needs no name
    return node("div", made, class_="facts", role="region", aria_label="What the artifact is", tabindex="0")


def _section(section: Section, every: Sequence[Numbers]) -> Element:
    panels = [_panel(panel, one.name if len(every) > 1 else "", section.title) for panel, one in zip(section.panels, every, strict=True)]
    return node(
        "section", node("h2", section.title), node("p", section.how, class_="how"), node("div", *panels, class_="panels"), id=section.name
    )


def _panel(panel: Panel, name: str, title: str) -> Element:
    heading = node("h3", name) if name else None
    if panel.without:
        return node("div", heading, node("p", panel.without, class_="said"))
    small = all(float(svg.get("viewBox", "").split()[2]) < 300 for _, svg in panel.plots)
    keys = [node("li", node("i", class_=color), words) for color, words in panel.keys]
    if [color for color, _ in panel.keys] == ["none", "full"]:
        low, high = (words for _, words in panel.keys)
        keys = [node("li", f"{low} ", node("i", class_="ramp"), f" {high}")]
    tables = []
    for caption, head, rows in panel.tables:
        label = f"{title}{f', {name}' if name else ''}{f', {caption}' if caption else ''}: numbers"
        region = node("div", table(head, rows), class_="scroll", role="region", aria_label=label, tabindex="0")
        tables.append(node("details", node("summary", f"The numbers{f': {caption}' if caption else ''}"), region))
    return node(
        "div",
        heading,
        node("div", *(_figure(caption, svg) for caption, svg in panel.plots), class_="plots small" if small else "plots"),
        node("ul", *keys, class_="key") if keys else None,
        node("p", panel.said, class_="said") if panel.said else None,
        *tables,
    )


def _figure(caption: str, svg: Element) -> Element:
    return node("figure", node("figcaption", caption) if caption else None, svg)


def refuse_page(file: Path, overwrite: bool) -> None:
    """Refuse a file that would be lost: anything but an earlier page, unless it may be overwritten.

    Raises:
        RotateKError: `file` is a folder or lies in none, is something else than such a page, or cannot be read.
    """
    try:
        if file.is_dir():
            raise RotateKError(f"--html {file} is a folder; name a file in it, such as {file / 'artifact.html'}")
        if above := next((parent for parent in file.absolute().parents if parent.is_file()), None):
            raise RotateKError(f"--html {file} cannot be used: {above} is a file, not a folder; choose another file")
        if file.exists() and not file.is_file():
            raise RotateKError(f"--html {file} is no regular file; name another one")
        if not file.exists() or overwrite:
            return
        with file.open("rb") as stream:
            start = stream.read(HEAD_BYTES)
    except OSError as error:
        raise RotateKError(f"--html {file} cannot be used: {error.strerror or error}; choose another file") from error
    if start and f'<meta name="generator" content="{GENERATOR} '.encode() not in start:
        raise RotateKError(f"{file} is no page of {GENERATOR}; pass --overwrite to replace it, or choose another --html")


def write_page(text: str, file: Path, overwrite: bool) -> None:
    """Put a page in place, whole or not at all.

    Raises:
        RotateKError: as `refuse_page`, or the file cannot be written.
    """
    refuse_page(file, overwrite)
    target, staged = file.resolve(), None  # a link stays a link
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, staged = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        Path(staged).chmod(0o644)
        Path(staged).replace(target)
    except OSError as error:
        if staged is not None:
            Path(staged).unlink(missing_ok=True)
        raise RotateKError(f"could not write {file}: {error.strerror or error}; choose another --html") from error
