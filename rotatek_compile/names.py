"""The names and fractions that options take, apart from what they stand for: commands check and complete them before torch is imported."""

from __future__ import annotations

from collections.abc import Collection

from .errors import UsageError

OURS = "rotatek"  # the method that is no rival
RIVAL_NAMES = (
    "int8", "int4", "fp8", "kivi4", "kivi2", "hadamard4", "hadamard2", "head-drop", "head-drop-native", "think", "paper",
    "spark-sign", "spark-mean", "svdq", "kq-svd",
)  # fmt: skip
"""Keys of RIVALS in runtime/rivals/registry.py, in its order."""
METHODS = (OURS, *RIVAL_NAMES)
BASES = ("two-sided", "pca", "paper")
ALLOCATIONS = ("allocated", "uniform", "energy")
BITS = ("native", "8", "4", "auto")
SPANS = ("visual", "all")
ASK = ("after", "with")
SUITES = {"rivals": "dense, the artifact, its bases at other keep ratios, and every rival at KV budgets from 1/2 to 1/32"}


def refuse_unknown(option: str, name: str, known: Collection[str]) -> None:
    """Refuse a name that an option does not take.

    Raises:
        UsageError: `name` is not `known`.
    """
    if name not in known:
        raise UsageError(f"unknown --{option} {name!r}; choose one of {', '.join(known)}")


def check_fraction(option: str, value: float | None) -> None:
    """Refuse a number that is no fraction; None is none given.

    Raises:
        UsageError: not above 0, or above 1.
    """
    if value is not None and not 0 < value <= 1:
        raise UsageError(f"{option} {value:g} is out of range; it is a fraction, above 0 and up to 1")
