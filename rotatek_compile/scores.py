"""How one answer is scored against its reference answers."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def normalise(text: str) -> str:
    """Unicode NFC, stripped, blanks collapsed, case kept."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Whether the text is one of the reference answers, after `normalise`."""
    return normalise(text) in {normalise(answer) for answer in answers}


def anls(text: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of DocVQA: best over answers, 0 below the threshold; case and blanks ignored."""
    best = 0.0
    for answer in answers:
        a, b = " ".join(text.lower().split()), " ".join(answer.lower().split())
        longest = max(len(text), len(answer))
        best = max(best, 1.0 - _edits(a, b) / longest if longest else 1.0)
    return best if best >= threshold else 0.0


def _edits(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
