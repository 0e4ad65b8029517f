"""Pages of text lines, to be copied by their first word or by their number."""

from __future__ import annotations

from .draws import Draws
from .page import CELLS, Content, Question, write
from .words import WORDS

LINES = (5, 14)
SHORTEST = 10  # characters of a line


def write_page(draws: Draws, content: Content) -> None:
    """Add one page of lines, each beginning with a word that begins no other line of the document."""
    page = content.new_page("letter")
    top = draws.below(4)
    for row in range(top, top + content.draw_rows(draws, LINES)):
        line = content.take_word(9)
        while len(line) < SHORTEST or (len(line) < CELLS - 4 and draws.below(3) > 0):
            word = draws.one_of(WORDS)
            if len(line) + 1 + len(word) <= CELLS:
                line = f"{line} {word}"
        write(page, row, 0, line)
        content.lines.append(line)


def ask_line(draws: Draws, content: Content) -> Question | None:
    """Copy the line that begins with a word."""
    if not content.lines:
        return None
    line = draws.one_of(content.lines)
    return Question("line", f"Copy the line {line.split()[0]}", line)


def ask_ordinal(draws: Draws, content: Content) -> Question | None:
    """Copy the line of a number, counted from the top; only where one page holds lines."""
    if content.kinds.count("letter") != 1:
        return None
    number = draws.below(len(content.lines))
    return Question("ordinal", f"Copy line {number + 1}", content.lines[number])
