"""Names of data sets, and one way to open any of them: a bundled generator, or local files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .bundled import SETS, BundledSet
from .errors import DataError
from .local import open_local
from .sample import Sample

DATASETS = {
    "forms": "pages of key: value fields; look-up, missing keys, larger of two, which page",
    "tables": "pages with a table; a cell by row and column, counting",
    "letters": "pages of text lines; copy one by its first word or its number",
    "charts": "pages with a bar chart; read a value",
    "mixed": "documents of all these pages, all skills in turn",
}


@dataclass(frozen=True, slots=True)
class DataSource:
    """A data set opened for reading: `sample(i)` makes or reads one, `size` of them (None: as many as asked for).

    `revision` names the content where that is known.
    """

    name: str
    split: str
    revision: str | None
    size: int | None
    sample: Callable[[int], Sample]

    def samples(self, count: int) -> Iterator[Sample]:
        """The first `count` samples, or all there are."""
        for number in range(count if self.size is None else min(count, self.size)):
            yield self.sample(number)

    @staticmethod
    def hash_ids(ids: Sequence[str]) -> str:
        """Identifies which samples were used, in order."""
        return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def open_data(name: str, split: str, seed: int = 0) -> DataSource:
    """Open a data set by name, NAME:SKILL (one skill of a bundled set) or path.

    `split` is `calibration` or `evaluation`; local files have only one and ignore it.

    Raises:
        DataError: unknown name, missing path, unreadable file or missing columns; for a path it is checked here, before any work.
    """
    bundled, _, skill = name.partition(":")
    if bundled in SETS:
        skills = SETS[bundled][1]
        if ":" in name and skill not in skills:
            raise DataError(f"unknown skill in {name!r}; {bundled} has {', '.join(f'{bundled}:{known}' for known in skills)}")
        return DataSource(name, split, None, None, BundledSet(bundled, split, seed, skill or None).sample)
    path = Path(name).expanduser()
    if name.strip() and path.exists():
        content = open_local(path)
        return DataSource(str(path), "local", content.digest, len(content.rows), content.sample)
    if name.startswith((".", "/", "~")) or path.suffix or "/" in name:
        raise DataError(f"data path {name} does not exist; check the path, or use one of {', '.join(DATASETS)}")
    raise DataError(f"unknown data set {name!r}; use one of {', '.join(DATASETS)}, or a path to a .jsonl, .parquet or folder of them")
