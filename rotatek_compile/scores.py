"""How one answer is scored against its reference answers: by exact match, and by the metric of each benchmark.

The benchmarks' metrics are those of lmms-eval 0.7 (its task files), so that scores can be compared with published ones. They get
the text stripped of blanks at its ends, all else as it was generated.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .vqa_words import vqa_normalise

# The first four numbers in square brackets.
BOX = re.compile(r"\[\s*" + r",\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*\]")
# Full-width forms of ASCII and the full-width blank; other compatibility characters keep their meaning.
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


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
        best = max(best, 1.0 - edits(a, b) / longest if longest else 1.0)
    return best if best >= threshold else 0.0


def relaxed_accuracy(text: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """ChartQA (Masry et al. 2022, section 5.1): numbers within 5 % of the answer, anything else equal but for case.

    A percent sign divides by 100. An answer of 0 is compared as text, since no relative change can be told.
    """
    got = _number(text)
    for answer in answers:
        wanted = _number(answer)
        if got is not None and wanted:
            if abs(got - wanted) / abs(wanted) <= tolerance:
                return 1.0
        elif text.lower() == answer.lower():
            return 1.0
    return 0.0


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """TextVQA: mean over the people asked of min(1, n / 3), n the others who answered the same (Antol et al. 2015).

    Both sides are normalised as the VQA challenge does (vqa_words.py).
    """
    got, given = vqa_normalise(text), [vqa_normalise(answer) for answer in answers]
    if not given:
        return 0.0
    same = given.count(got)
    return sum(min(1.0, (same - (answer == got)) / 3) for answer in given) / len(given)


def ocrbench_match(text: str, answers: Sequence[str], dataset: str) -> float:
    """OCRBench: whether an answer stands in the text.

    Formulas (HME100k) are compared without blanks and with their case; all else in lower case, full-width ASCII folded.
    """
    formula = dataset == "HME100k"

    def plain(value: str) -> str:
        value = value.strip().replace("\n", " ")
        return value.replace(" ", "") if formula else value.translate(FULL_WIDTH).lower()

    return float(any(plain(answer) in plain(text) for answer in answers))


def exact_choice(text: str, answers: Sequence[str]) -> float:
    """ScienceQA: the option's letter, alone or at the start followed by a full stop."""
    chosen = text[0] if len(text) >= 2 and text[0].isupper() and text[1] == "." else text
    return float(chosen in answers or text in answers)


def mathvista_quick(text: str, answers: Sequence[str], details: Mapping[str, Any]) -> float:
    """MathVista without a judge: what the text says is compared as the harness compares what its judge extracts.

    A choice may be named by its letter, "(B) ...", or its text; what is neither counts as the choice with the fewest edits. Integers are
    cut, floats rounded to the question's digits. Text that only explains the answer scores 0, where a judge would find it in there:
    figures are lower bounds.
    """
    quoted = re.search(r'The answer is "(.*)"\.', text)
    said, kind, choices = quoted.group(1) if quoted else text, details["answer_type"], details["choices"]
    try:
        if details["question_type"] == "multi_choice" and choices:
            said = _choice(said.strip(), choices)
        elif kind == "integer":
            said = str(int(float(said)))
        elif kind == "float":
            said = str(round(float(said), details["precision"]))
    except (ValueError, OverflowError):  # no number
        return 0.0
    return float(said.strip() in {answer.strip() for answer in answers})


def box_iou(text: str, box: Sequence[float]) -> float:
    """RefCOCO: intersection over union of the first box [x1, y1, x2, y2] in the text and the reference one; 0 without a box."""
    found = BOX.search(text)
    if found is None:
        return 0.0
    got = [float(side) for side in found.groups()]
    wide, high = min(got[2], box[2]) - max(got[0], box[0]), min(got[3], box[3]) - max(got[1], box[1])
    both = max(0.0, wide) * max(0.0, high)
    union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (got, box)) - both
    return both / union if union > 0 else 0.0


Metric = Callable[[str, Sequence[str], Mapping[str, Any]], float]
METRICS: dict[str, Metric] = {
    "exact_match": lambda text, answers, details: float(exact_match(text, answers)),
    "anls": lambda text, answers, details: anls(text, answers),
    "relaxed_accuracy": lambda text, answers, details: relaxed_accuracy(text, answers),
    "vqa_accuracy": lambda text, answers, details: vqa_accuracy(text, answers),
    "ocrbench": lambda text, answers, details: ocrbench_match(text, answers, details["dataset"]),
    "exact_choice": lambda text, answers, details: exact_choice(text, answers),
    "mathvista_quick": mathvista_quick,
    "iou": lambda text, answers, details: box_iou(text, details["box"]),
}
"""By the names that data sets give (`Sample.metric`)."""


def score(metric: str, text: str, answers: Sequence[str], details: Mapping[str, Any]) -> float:
    """The set's own metric of one answer, between 0 and 1.

    Args:
        metric: one of `METRICS`.
        details: what the metric needs beside the answers (`Sample.details`).
    """
    return METRICS[metric](text.strip(), answers, details)


def edits(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _choice(said: str, choices: Sequence[str]) -> str:
    """The choice that is meant; choices are strings, at least one."""
    if said in choices:
        return said
    bracketed = re.search(r"\(([a-zA-Z])\)", said)
    letter = bracketed.group(1).upper() if bracketed else said
    letters = [chr(ord("A") + number) for number in range(len(choices))]
    if letter in letters:
        return choices[letters.index(letter)]
    return min(choices, key=lambda choice: edits(letter, choice))
