"""The table of benchmarks that are known by name: where they lie on the Hub, which splits, which licence, how they are scored.

Ids, splits and columns are those of the data sets' cards. The `lmms-lab` repositories moved to `lmms-lab-encoder` (2026-07-30);
both names are tried. Licences are those the cards state for the repository; the pictures' own terms may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import readers
from .readers import Reader

BUFFER = 256  # rows among which a stream is shuffled: two or three row groups of the usual parquet files
WHOLE = 1000  # small benchmarks that lie sorted by kind: all of their rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """One repository of a set: `ids` are its names, newest first; `splits` those with published answers, the default first.

    `train` says whether they are for calibration or for evaluation.
    """

    ids: tuple[str, ...]
    splits: tuple[str, ...]
    reader: Reader
    config: str | None = None
    train: bool = False
    buffer: int = BUFFER


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownSet:
    """A benchmark: what it asks, its metric (rotatek_compile/scores.py), where calibration and evaluation read."""

    about: str
    metric: str
    licence: str
    evaluation: Origin
    calibration: Origin | None = None  # None: no train split is published
    max_new_tokens: int = 32


def lmms_lab(name: str) -> tuple[str, ...]:
    """Names of a repository that moved."""
    return f"lmms-lab-encoder/{name}", f"lmms-lab/{name}"


KNOWN = {
    "docvqa": KnownSet(
        about="scanned documents, one page",
        metric="anls",
        licence="apache-2.0",
        calibration=Origin(ids=("HuggingFaceM4/DocumentVQA",), splits=("train",), reader=readers.DOCVQA, train=True),
        evaluation=Origin(ids=lmms_lab("DocVQA"), config="DocVQA", splits=("validation",), reader=readers.DOCVQA),
    ),
    "infovqa": KnownSet(
        about="infographics",
        metric="anls",
        licence="apache-2.0",
        calibration=Origin(
            ids=("HuggingFaceM4/the_cauldron",), config="infographic_vqa", splits=("train",), reader=readers.CAULDRON, train=True
        ),
        evaluation=Origin(ids=lmms_lab("DocVQA"), config="InfographicVQA", splits=("validation",), reader=readers.DOCVQA),
    ),
    "chartqa": KnownSet(
        about="charts, human and generated questions",
        metric="relaxed_accuracy",
        licence="gpl-3.0",
        calibration=Origin(ids=("HuggingFaceM4/ChartQA",), splits=("train",), reader=readers.CHARTQA_TRAIN, train=True),
        evaluation=Origin(ids=lmms_lab("ChartQA"), splits=("test",), reader=readers.CHARTQA),
    ),
    "textvqa": KnownSet(
        about="photographs with text in them",
        metric="vqa_accuracy",
        licence="cc-by-4.0",
        calibration=Origin(ids=lmms_lab("textvqa"), splits=("train",), reader=readers.TEXTVQA, train=True),
        evaluation=Origin(ids=lmms_lab("textvqa"), splits=("validation",), reader=readers.TEXTVQA),
    ),
    "ocrbench": KnownSet(
        about="text recognition, key information, formulas",
        metric="ocrbench",
        licence="see the card",
        evaluation=Origin(ids=("echo840/OCRBench",), splits=("test",), reader=readers.OCRBENCH, buffer=WHOLE),
        max_new_tokens=128,
    ),
    "scienceqa": KnownSet(
        about="school science, multiple choice",
        metric="exact_choice",
        licence="cc-by-sa-4.0",
        calibration=Origin(ids=("derek-thomas/ScienceQA",), splits=("train",), reader=readers.SCIENCEQA, train=True),
        evaluation=Origin(ids=lmms_lab("ScienceQA"), config="ScienceQA-IMG", splits=("test", "validation"), reader=readers.SCIENCEQA),
        max_new_tokens=16,
    ),
    "mathvista": KnownSet(
        about="mathematics with figures",
        metric="mathvista_quick",
        licence="cc-by-sa-4.0",
        evaluation=Origin(ids=("AI4Math/MathVista",), splits=("testmini",), reader=readers.MATHVISTA, buffer=WHOLE),
    ),
    "refcoco": KnownSet(
        about="a box for an expression",
        metric="iou",
        licence="see the card",
        evaluation=Origin(ids=lmms_lab("RefCOCO"), splits=("val", "test", "testA", "testB"), reader=readers.REFCOCO),
        max_new_tokens=48,
    ),
}


def owners(hub_id: str, config: str | None) -> list[tuple[str, KnownSet, Origin]]:
    """Known sets that lie in this repository; with `config` only those of that configuration."""
    found = []
    for name, known in KNOWN.items():
        for origin in (known.evaluation, known.calibration):
            if origin is not None and hub_id.lower() in (i.lower() for i in origin.ids) and config in (None, origin.config):
                found.append((name, known, origin))
    return found
