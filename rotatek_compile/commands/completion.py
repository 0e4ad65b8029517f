"""What the shell's Tab offers for values: names from tables, and paths. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from .. import aliases

DTYPES, DEVICES = ("float32", "float16", "bfloat16"), ("cpu", "cuda", "auto")
Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def one_of(known: Iterable[str]) -> Complete:
    """Names of a table."""
    known = tuple(known)
    return lambda ctx, param, begun: [CompletionItem(name) for name in known if name.startswith(begun)]


def complete_model(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
    """Aliases, and folders."""
    return _or_paths(begun, aliases.ALIASES, "dir")


def complete_data(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
    """Names of data sets, and files."""
    from ..calibration_data.known_sets import KNOWN
    from ..calibration_data.registry import DATASETS

    return _or_paths(begun, (*DATASETS, *KNOWN), "file")


def paths(kind: str) -> Complete:
    """The shell's own completion of paths; `kind`: "file", which goes through folders too, or "dir"."""
    return lambda ctx, param, begun: [CompletionItem(begun, type=kind)]


def _or_paths(begun: str, known: Iterable[str], kind: str) -> list[CompletionItem]:
    """Names beside what lies here; where no name begins so, the shell completes a path: it knows `~`, quotes and folders."""
    found = [name for name in known if name.startswith(begun)]
    if not found:
        return [CompletionItem(begun, type=kind)]
    here = sorted(entry for entry in _entries() if entry.name.startswith(begun) and (kind == "file" or entry.is_dir()))
    return [CompletionItem(name) for name in (*found, *(f"{entry}/" if entry.is_dir() else str(entry) for entry in here))]


def _entries() -> list[Path]:
    try:
        return [entry for entry in Path().iterdir() if not entry.name.startswith(".")]
    except OSError:
        return []
