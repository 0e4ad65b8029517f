"""Scores on hand values."""

import pytest

from rotatek_compile.scores import anls, exact_match, normalise


def test_exact_match_normalises():
    assert normalise("  a \t b\n") == "a b"
    assert exact_match("Cafe\u0301  noir ", ["x", "Caf\u00e9 noir"])
    assert not exact_match("cafe noir", ["Cafe noir"])  # case counts
    assert not exact_match("ab", ["a b"])
    assert not exact_match("x", [])


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("Hello", ["hello"], 1.0),
        ("hella", ["hello"], 0.8),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("abcd", ["abxy"], 0.5),
        ("abc", ["axy"], 0.0),
        ("hella", ["zzz", "hello"], 0.8),
        ("", ["a"], 0.0),
        ("a  b", ["a b"], 1.0),
        ("", [""], 1.0),
    ],
)
def test_anls_by_hand(text, answers, expected):
    assert anls(text, answers) == pytest.approx(expected)
