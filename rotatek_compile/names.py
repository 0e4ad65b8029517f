"""The names and fractions that options take, apart from what they stand for: commands check and complete them before torch is imported."""

from __future__ import annotations

from collections.abc import Collection

from .errors import UsageError

OURS = "rotatek"  # the method that is no rival
RIVAL_NAMES = (
    "int8", "int4", "fp8", "kivi4", "kivi2", "hadamard4", "hadamard2", "head-drop", "head-drop-native", "think", "paper",
    "spark-sign", "spark-mean", "svdq", "kq-svd", "leank", "leank-learned", "palu", "palu4", "native",
)  # fmt: skip
"""Keys of RIVALS in runtime/rivals/registry.py, in its order."""
LEARNED = ("leank-learned", "palu")  # rivals that a file of --learned is for (learned.py)
SHARING = ("palu4",)  # rivals that need the file of another one
METHODS = (OURS, *RIVAL_NAMES)
RAP = "rap"  # writes a smaller checkpoint; neither our coded cache nor a rival of it
STACKED = f"{RAP}+{OURS}"  # that checkpoint, and our coded cache for it
COMPILE_METHODS = (*(name for name in METHODS if name not in (*LEARNED, *SHARING)), RAP, STACKED)
RAP_SCORES = ("logit", "fisher", "fisher-weight")
RAP_BUDGETS = ("sensitivity", "published")
BASES = ("two-sided", "pca", "paper")
ALLOCATIONS = ("allocated", "uniform", "energy")
BITS = ("native", "8", "4", "auto")
SPANS = ("visual", "all")
TOKEN_METHODS = ("fastv", "visionzip", "divprune", "snapkv")
SHARED_SELECTIONS = ("fastv", "visionzip", "divprune")  # those that keep the same tokens in every head
ASK = ("after", "with")
SUITES = {
    "rivals": "dense, the artifact, its bases at other keep ratios, and every rival at KV budgets from 1/2 to 1/32",
    "proof": "the same at budgets, and Keys beside equal Values: raw, and at 4 bits on both sides",
}

POOR = 0.1  # of the answers of the uncompressed model are as expected; with fewer
SAYS_LITTLE = "KL to it says little: check that it can read such pages, and how the answers are written"


def refuse_unknown(option: str, name: str, known: Collection[str]) -> None:
    """Refuse a name that an option does not take.

    Raises:
        UsageError: `name` is not `known`.
    """
    if name not in known:
        raise UsageError(f"unknown --{option} {name!r}; choose one of {', '.join(known)}")


def check_number(option: str, value: object) -> None:
    """Refuse what is no number; None is none given. Python callers pass what they have read somewhere.

    Raises:
        UsageError: a text, a truth value or anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
        raise UsageError(f"{option} is {value!r}, expected a number")


def check_fraction(option: str, value: float | None) -> None:
    """Refuse a number that is no fraction; None is none given.

    Raises:
        UsageError: not a number, not above 0, or above 1.
    """
    check_number(option, value)
    if value is not None and not 0 < value <= 1:
        raise UsageError(f"{option} {value:g} is out of range; it is a fraction, above 0 and up to 1")


def check_selection(token_method: str | None, ratio: float | None) -> None:
    """Refuse one of --token-method and --token-keep-ratio without the other, an unknown method, and a ratio that is no fraction.

    Raises:
        UsageError: such options.
    """
    if token_method is not None:
        refuse_unknown("token-method", token_method, TOKEN_METHODS)
    check_fraction("--token-keep-ratio", ratio)
    if token_method is None and ratio is not None and ratio < 1:
        raise UsageError(f"--token-keep-ratio {ratio:g} says how many image tokens stay; say which with --token-method")
    if token_method is not None and ratio is None:
        raise UsageError(f"--token-method {token_method} says which image tokens stay; say how many with --token-keep-ratio")
