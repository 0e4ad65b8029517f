"""Pages with a table: a cell is found by its row and its column, and states are counted."""

from __future__ import annotations

from .draws import Draws
from .page import CELLS, Content, Question, write

ROWS = (5, 15)
LABEL = 6  # letters of a row label, at most
FIRST_COLUMN = 8
NAMES = ("qty", "net", "tax", "sum", "fee", "sku", "lot", "bin", "bay", "day", "age", "min", "max", "avg", "pct", "ref")
LONG_NAMES = ("count", "price", "stock", "owner", "level", "batch", "shelf", "total", "gross", "state", "phase", "grade")
STATES = ("open", "paid", "void", "sent", "lost", "done")
CODE = "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789"


def write_page(draws: Draws, content: Content) -> None:
    """Add one table: two columns of six characters, the second one perhaps of states, or three of four.

    Row labels are unique in a document; column names are not, so neither alone finds a cell.
    """
    page = content.new_page("table")
    columns = draws.between(2, 3)
    width = (CELLS - FIRST_COLUMN) // columns
    with_states = columns == 2 and not content.states and draws.below(4) < 3
    choices = NAMES if columns == 3 else LONG_NAMES
    names = [choices[i] for i in draws.distinct(columns, len(choices))]
    top = draws.below(3)
    count = content.draw_rows(draws, ROWS)
    starts = [FIRST_COLUMN + width * c for c in range(columns)]
    for start, name in zip(starts, names, strict=True):
        write(page, top, start, name)
    used = STATES[: draws.between(3, len(STATES))]
    states = []
    for row in range(top + 1, top + 1 + count):
        label = content.take_word(LABEL)
        write(page, row, 0, label)
        for column, (start, name) in enumerate(zip(starts, names, strict=True)):
            if with_states and column == 1:
                value = draws.one_of(used)
                states.append(value)
            else:
                value = "".join(draws.one_of(CODE) for _ in range(width - 1 - draws.below(2)))
            write(page, row, start, value)
            content.cells.append((name, label, value))
    if with_states:
        content.states.append(states)


def ask_cell(draws: Draws, content: Content) -> Question | None:
    """A cell by row and column."""
    if not content.cells:
        return None
    column, label, value = draws.one_of(content.cells)
    return Question("cell", f"What is {column} of {label}?", value)


def ask_count(draws: Draws, content: Content) -> Question | None:
    """How many rows are in a state; a document has one column of states at most, so the question has one answer."""
    if not content.states:
        return None
    state = draws.one_of(sorted(set(content.states[0])))
    return Question("count", f"How many are {state}?", str(content.states[0].count(state)))
