"""How a row of each known set becomes samples: which columns are read, and the question as the benchmark asks it.

Prompts are those of lmms-eval 0.7 (its task files), so that scores can be compared with published ones. A row's image comes
decoded; a row may give several samples (RefCOCO: one per referring expression) or none (no answer published, no image).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."
WORD = "\nAnswer the question with a single word."
LETTER = "\nAnswer with the option's letter from the given choices directly."
BOX = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. "
    "Please provide the bounding box coordinate of the region this sentence describes: "
)
DIGITS = {1: "one decimal place", 2: "two decimal places"}
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as it is put to a model, and everything that scores the answer; the fields are those of `Sample`."""

    question: str
    answers: tuple[str, ...]
    skill: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reader:
    """`ask` turns a row and its images (of which it may read the size) into questions.

    The columns named must exist, `image` too unless it is empty; `identity` may be lacking. `optional_image`: rows without a picture
    belong to the set.
    """

    ask: Callable[[Row, tuple[Image.Image, ...]], list[Asked]]
    columns: tuple[str, ...]
    image: str = "image"
    identity: str = ""
    optional_image: bool = False


def texts(value: Any) -> tuple[str, ...]:
    """Answers of a column that holds one or a list; empty ones are left out.

    Raises:
        ValueError: an answer that is neither text nor a number: how a time is written, the file does not say any more.
    """
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if other := [v for v in values if v is not None and not isinstance(v, (str, int, float))]:
        raise ValueError(f"an answer is a {type(other[0]).__name__}, expected text")
    return tuple(str(v) for v in values if v is not None and str(v).strip())


def ask_docvqa(row: Row, images: tuple[Image.Image, ...]) -> list[Asked]:
    """DocVQA and InfographicVQA."""
    return [Asked(row["question"] + SHORT, texts(row["answers"]))]


def ask_cauldron(row: Row, images: tuple[Image.Image, ...]) -> list[Asked]:
    """The Cauldron: conversations about the images. Each turn is a question of its own, with the prompt that it brings along."""
    turns = row["texts"] or []
    return [Asked(turn["user"].strip(), texts(turn["assistant"])) for turn in turns if turn.get("user")]


def ask_chartqa(row: Row, images: tuple[Image.Image, ...]) -> list[Asked]:
    """ChartQA as lmms-lab stores it; skills are its two halves."""
    return [Asked(row["question"] + WORD, texts(row["answer"]), "human" if row["type"] == "human_test" else "augmented")]


def ask_chartqa_train(row: Row, images: tuple[Image.Image, ...]) -> list[Asked]:
    """ChartQA as HuggingFaceM4 stores it."""
    return [Asked(row["query"] + WORD, texts(row["label"]), "augmented" if row["human_or_machine"] else "human")]


def ask_textvqa(row: Row, images: tuple[Image.Image, ...]) -> list[Asked]:
    """TextVQA: ten people's answers; the first reference is the most frequent one, which is what a model should be taught."""
    answers = texts(row["answers"])
    ordered = sorted(answers, key=lambda answer: -answers.count(answer))  # stable: the earliest of equals stays first
    return [Asked(row["question"].capitalize() + SHORT, tuple(ordered))]


def ask_ocrbench(row: Row, images: tuple[Image.Image, ...]) -> list[Asked]:
    """OCRBench: asked as it stands."""
    return [Asked(row["question"].strip(), texts(row["answer"]), row["question_type"], {"dataset": row["dataset"]})]


def ask_scienceqa(row: Row, images: tuple[Image.Image, ...]) -> list[Asked]:
    """ScienceQA: the answer is an option's letter."""
    choices, answer = row["choices"], row["answer"]
    if not choices or answer is None or not 0 <= answer < len(choices):
        return []
    hint = f"Context: {row['hint']}\n" if row["hint"] else ""
    options = "\n".join(f"{letter(n)}. {choice}" for n, choice in enumerate(choices))
    return [Asked(f"{hint}{row['question']}\n{options}{LETTER}", (letter(answer),), row["subject"] or "")]


def ask_mathvista(row: Row, images: tuple[Image.Image, ...]) -> list[Asked]:
    """MathVista with the short-answer prompt (`mathvista_testmini_format`), the one that can be scored without a judge.

    A multiple choice is answered by its letter, as the prompt says, or by its text.
    """
    kind, choices = row["answer_type"], row["choices"] or []
    precision = int(row["precision"]) if row["precision"] is not None else 0
    lines = [row["question"] + (f" (Unit: {row['unit']})" if row["unit"] else "")]
    lines += [f"{letter(n)}. {choice}" for n, choice in enumerate(choices)]
    if row["question_type"] == "multi_choice":
        lines.append("Answer with the option's letter from the given choices directly.")
    elif kind == "integer":
        lines.append("Answer the question using a single integer number.")
    elif kind == "float" and precision in DIGITS:
        lines.append(f"Answer the question using a single floating-point number with {DIGITS[precision]}.")
    elif kind == "list":
        lines.append("Answer the question using a Python list.")
    answers = texts(row["answer"])
    if answers and answers[0] in choices:
        answers = (letter(choices.index(answers[0])), *answers)
    details = {"question_type": row["question_type"], "answer_type": kind, "precision": precision, "choices": list(choices)}
    return [Asked("\n".join(lines).strip(), answers, (row["metadata"] or {}).get("task") or "", details)]


def ask_refcoco(row: Row, images: tuple[Image.Image, ...]) -> list[Asked]:
    """RefCOCO, box for an expression: a question per expression; boxes are x, y, width, height in pixels there, and become
    corners between 0 and 1."""
    if not images or not row["bbox"]:
        return []
    (wide, high), (x, y, width, height) = images[0].size, row["bbox"]
    box = [x / wide, y / high, (x + width) / wide, (y + height) / high]
    written = "[" + ", ".join(f"{side:.2f}" for side in box) + "]"
    return [Asked(BOX + expression, (written,), details={"box": box}) for expression in texts(row["answer"])]


def ask_generic(row: Row, images: tuple[Image.Image, ...]) -> list[Asked]:
    """A set that is not in the table, with the columns of local data (local.py); its question is asked as it stands."""
    question = row["question"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the question is {question!r}, expected text")
    answers = row["answers"] if row.get("answers") is not None else row.get("answer")
    return [Asked(question, texts(answers))]


def generic(columns: Collection[str], images: bool = True) -> Reader:
    """The reader for a set with these columns; it asks for the plural names where neither is there. `images`: they are needed."""
    answers = "answer" if "answer" in columns and "answers" not in columns else "answers"
    image = "image" if "image" in columns and "images" not in columns else "images"
    image = image if images or image in columns else ""
    return Reader(ask_generic, ("question", answers), image=image, identity="id" if "id" in columns else "")


def letter(number: int) -> str:
    """A, B, C, ..."""
    return chr(ord("A") + number)


DOCVQA = Reader(ask_docvqa, ("question", "answers"), identity="questionId")
CAULDRON = Reader(ask_cauldron, ("texts",), image="images")
CHARTQA = Reader(ask_chartqa, ("question", "answer", "type"))
CHARTQA_TRAIN = Reader(ask_chartqa_train, ("query", "label", "human_or_machine"))
TEXTVQA = Reader(ask_textvqa, ("question", "answers"), identity="question_id")
OCRBENCH = Reader(ask_ocrbench, ("question", "answer", "question_type", "dataset"))
SCIENCEQA = Reader(ask_scienceqa, ("question", "choices", "answer", "hint", "subject"), optional_image=True)
MATHVISTA = Reader(
    ask_mathvista,
    ("question", "choices", "unit", "precision", "answer", "question_type", "answer_type", "metadata"),
    image="decoded_image",
    identity="pid",
)
REFCOCO = Reader(ask_refcoco, ("answer", "bbox"), identity="question_id")
