"""Pages of `key: value` rows whose keys are easily mistaken for each other, and the questions about them."""

from __future__ import annotations

from .draws import Draws
from .page import CELLS, Content, Field, Question, write
from .words import draw_value

ROWS = (6, 16)  # fields on one page, both ends included
SUFFIXES = "0123456789ABCDEFGH"
LONGEST_WORD = 7  # a key is a word, or a word, a blank and a suffix
NUMBER_DIGITS = (3, 5)
ABSENT = "none"


def write_page(draws: Draws, content: Content) -> None:
    """Add one page of fields. Keys come in families of one word, so that a key is recognised only by all of it."""
    page, number = content.new_page("fields"), len(content.pages) - 1
    rows = sorted(draws.distinct(content.draw_rows(draws, ROWS), CELLS))
    keys = _draw_keys(draws, content, len(rows))
    digits = draws.between(*NUMBER_DIGITS)  # numbers of one length compare digit by digit
    for row, key in zip(rows, keys, strict=True):
        numeric = draws.below(5) < 2
        value = str(draws.between(10 ** (digits - 1), 10**digits - 1)) if numeric else draw_value(draws)
        line = f"{key}: {value}"
        write(page, row, draws.below(CELLS - len(line) + 1), line)
        content.fields.append(Field(number, key, value, int(value) if numeric else None))


def _draw_keys(draws: Draws, content: Content, count: int) -> list[str]:
    """`count` different keys in random order; a few that look like them go to `content.absent_keys`."""
    keys: list[str] = []
    while len(keys) < count:
        word, members = content.take_word(LONGEST_WORD), draws.between(1, 5)
        suffixes = draws.distinct(members + 1, len(SUFFIXES))
        family = [f"{word} {SUFFIXES[s]}" for s in suffixes]
        if draws.below(3) == 0:
            family[draws.below(len(family))] = word
        keys.extend(family[:-1])
        content.absent_keys.append(family[-1])
    keys = keys[:count]
    return [keys[i] for i in draws.distinct(count, count)]


def ask_field(draws: Draws, content: Content) -> Question | None:
    """Look a value up by its key."""
    if not content.fields:
        return None
    asked = draws.one_of(content.fields)
    return Question("field", f"What is the {asked.key}?", asked.value)


def ask_missing(draws: Draws, content: Content) -> Question | None:
    """As `ask_field`; in one case of two the key is not there and the answer is `none`."""
    if not content.fields:
        return None
    if draws.below(2) == 0:
        return Question("missing", f"What is the {draws.one_of(content.absent_keys)}?", ABSENT)
    asked = draws.one_of(content.fields)
    return Question("missing", f"What is the {asked.key}?", asked.value)


def ask_larger(draws: Draws, content: Content) -> Question | None:
    """The larger of two numbers, named by their keys."""
    numeric = [f for f in content.fields if f.number is not None]
    if len(numeric) < 2:
        return None
    first, second = (numeric[i] for i in draws.distinct(2, len(numeric)))
    if first.number == second.number:
        return None
    return Question("larger", f"Larger of {first.key} and {second.key}?", str(max(first.number or 0, second.number or 0)))


def ask_page(draws: Draws, content: Content) -> Question | None:
    """The number of the page that a key stands on; only where several pages hold fields and no other kind gives it away."""
    if len(content.pages) < 2 or set(content.kinds) != {"fields"}:
        return None
    asked = draws.one_of(content.fields)
    return Question("page", f"Page of the {asked.key}?", str(asked.page + 1))
