"""Pages with a bar chart: labels on the left, bars of whole cells, and an axis whose only number gives the scale."""

from __future__ import annotations

from .draws import Draws
from .page import BAR, Content, Question, write

BARS = (4, 14)
LABEL = 6
AXIS = 7  # column of the first cell of every bar
LONGEST = 12  # cells
TICK = 10  # cells from the zero to the label of the axis
SCALES = (1, 2, 3, 5, 10, 20)  # value of one cell


def write_page(draws: Draws, content: Content) -> None:
    """Add one chart."""
    page = content.new_page("chart")
    scale, top = draws.one_of(SCALES), draws.below(3)
    count = content.draw_rows(draws, BARS)
    for row in range(top, top + count):
        label, length = content.take_word(LABEL), draws.between(1, LONGEST)
        write(page, row, 0, label)
        page[row, AXIS : AXIS + length] = BAR
        content.bars.append((label, length * scale))
    write(page, top + count, AXIS, "0")
    write(page, top + count, AXIS + TICK, str(TICK * scale))


def ask_chart(draws: Draws, content: Content) -> Question | None:
    """The value of a bar."""
    if not content.bars:
        return None
    label, value = draws.one_of(content.bars)
    return Question("chart", f"How much is {label}?", str(value))
