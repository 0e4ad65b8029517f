"""Names of data sets, and one way to open any of them: a bundled generator, a known benchmark, any Hub repository, or local files."""

from __future__ import annotations

from pathlib import Path

from .bundled import SETS, BundledSet
from .errors import DataError, UnknownDataError, did_you_mean
from .hub_data import is_hub_id
from .hub_source import open_hub, open_known, written
from .known_sets import KNOWN
from .local import BUILDERS, open_local
from .source import DataSource

__all__ = ["DATASETS", "DataSource", "listing", "open_data", "refuse_unknown", "table"]

DATASETS = {
    "forms": "pages of key: value fields; look-up, missing keys, larger of two, which page",
    "tables": "pages with a table; a cell by row and column, counting",
    "letters": "pages of text lines; copy one by its first word or its number",
    "charts": "pages with a bar chart; read a value",
    "mixed": "documents of all these pages, all skills in turn",
}


def open_data(name: str, split: str, seed: int = 0, revision: str | None = None, images: bool = True) -> DataSource:
    """Open a data set.

    Args:
        name: a bundled set or NAME:SKILL of it, a known benchmark or NAME:SPLIT of it, a path, or a Hub id (ID:CONFIG).
        split: `calibration` or `evaluation`. Calibration reads train splits only. Local files have only one and ignore it.
        seed: makes bundled documents, and shuffles what comes from the Hub. Local files are read in their order.
        revision: branch, tag or commit; for the Hub only.
        images: local files need a column of images; False for a text-only model.

    Raises:
        UnknownDataError: a name that is none of these.
        DataError: missing path, unreadable file or missing columns; for files and the Hub it is checked here, before any work.
    """
    refuse_unknown(name)
    bundled, _, part = name.partition(":")
    if bundled in SETS:
        _refuse_revision(name, revision, "bundled")
        return DataSource(name, split, None, None, BundledSet(bundled, split, seed, part or None).sample)
    if bundled in KNOWN:
        return open_known(name, split, seed, revision)
    path = Path(name).expanduser()
    if name.strip() and path.exists():
        _refuse_revision(name, revision, "a local path")
        content = open_local(path, images)
        return DataSource(str(path), "local", content.digest, len(content.rows), content.sample)
    return open_hub(name, split, seed, revision, images)


def refuse_unknown(name: str) -> None:
    """Refuse a name that no data set can have; nothing is read.

    Raises:
        UnknownDataError: neither a known name, nor the form of a Hub id or path; or an unknown skill of a bundled set.
        DataError: a path that does not exist.
    """
    bundled, colon, part = name.partition(":")
    if bundled in SETS:
        skills = SETS[bundled][1]
        if colon and part not in skills:
            has = ", ".join(f"{bundled}:{known}" for known in skills)
            raise UnknownDataError(f"unknown skill in {name!r}; {bundled} has {has}{did_you_mean(part, skills)}")
        return
    path = Path(name).expanduser()
    if bundled in KNOWN or (name.strip() and path.exists()) or (is_hub_id(bundled) and path.suffix not in BUILDERS):
        return
    choices = ", ".join((*DATASETS, *KNOWN))
    if name.startswith((".", "/", "~")) or path.suffix or "/" in name:
        raise DataError(f"data path {name} does not exist; check the path, or use one of {choices}")
    ways = f"use one of {choices}, a Hub id, or a path to a .jsonl, .parquet or folder of them"
    raise UnknownDataError(f"unknown data set {name!r}; {ways}{did_you_mean(bundled, (*DATASETS, *KNOWN))}")


def listing() -> dict[str, dict[str, str]]:
    """What `--list-data` shows: what a set is, Hub id and splits for calibration and for evaluation, licence, metric."""
    made = {"calibration": "generated", "evaluation": "generated", "licence": "apache-2.0", "metric": "exact_match"}
    shown = {name: {"about": about} | made for name, about in DATASETS.items()}
    for name, known in KNOWN.items():
        shown[name] = {
            "about": known.about,
            "calibration": f"{written(known.calibration)} {known.calibration.splits[0]}" if known.calibration else "none",
            "evaluation": f"{written(known.evaluation)} {', '.join(known.evaluation.splits)}",
            "licence": known.licence,
            "metric": known.metric,
        }
    return shown


def table() -> str:
    """`listing` as lines of columns under a heading."""
    shown = listing()
    heads = ("name", *next(iter(shown.values())))
    rows = [heads, *((name, *row.values()) for name, row in shown.items())]
    rows = [tuple(row[heads.index(head)] for head in (*heads[:1], *heads[2:], heads[1])) for row in rows]  # the description last
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _refuse_revision(name: str, revision: str | None, kind: str) -> None:
    if revision is not None:
        raise DataError(f"a revision ({revision}) is for data on the Hub, but {name} is {kind}; leave it out")
