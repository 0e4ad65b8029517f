"""Cells and random draws."""

import numpy as np
import pytest

from rotatek_compile.calibration_data import words
from rotatek_compile.calibration_data.draws import Draws
from rotatek_compile.calibration_data.page import BAR, CELLS, blank_content, write


def test_writing_outside_a_row_is_refused():
    page = np.zeros((CELLS, CELLS), dtype=np.uint8)
    write(page, 3, CELLS - 2, "a~")
    assert page[3].tolist() == [0] * 18 + [ord("a") - 32, BAR - 1] and not np.delete(page, 3, 0).any()
    for column, text in ((CELLS - 1, "ab"), (-1, "a"), (0, "x" * 21)):
        with pytest.raises(ValueError, match="does not fit"):
            write(page, 0, column, text)


def test_words_are_taken_once_and_run_out_with_a_word_of_their_own():
    content = blank_content(Draws("words"))
    short = [word for word in words.WORDS if len(word) <= 3]
    assert sorted(content.take_word(3) for _ in short) == sorted(short)
    with pytest.raises(ValueError, match="at most 3"):
        content.take_word(3)
    assert len(set(words.WORDS)) == len(words.WORDS) == len(short) + len(content.words)


def test_draws_depend_on_the_name_only_and_cover_their_range():
    first, again, other = Draws("a"), Draws("a"), Draws("b")
    stream = [first.below(10) for _ in range(500)]
    assert stream == [again.below(10) for _ in range(500)] != [other.below(10) for _ in range(500)]
    assert all(30 < stream.count(digit) < 75 for digit in range(10))
    assert {other.between(-2, 2) for _ in range(100)} == {-2, -1, 0, 1, 2}
    assert sorted(other.distinct(7, 7)) == list(range(7)) and len(set(other.distinct(3, 50))) == 3
    assert other.raw_bytes(64).shape == (64,) and other.raw_bytes(8).dtype == np.uint8


def test_values_are_short_and_never_plain_integers():
    draws = Draws("values")
    values = {words.draw_value(draws) for _ in range(2000)}
    assert max(map(len, values)) == 9 and not any(value.isdigit() or ": " in value for value in values)
    assert "none" not in values and len(values) > 1500
