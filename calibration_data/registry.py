"""Names of data sets, and one way to open any of them: a bundled generator, or local files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import DataError
from .forms import Forms
from .local import open_local
from .sample import Sample

DATASETS = {"forms": "generated documents of 1 to 3 pages, one field looked up; bundled, no download"}


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
    """Open a data set by name or path. `split` is `calibration` or `evaluation`; local files have only one and ignore it.

    Raises:
        DataError: unknown name, missing path, unreadable file or missing columns; for a path it is checked here, before any work.
    """
    if name == "forms":
        return DataSource(name, split, None, None, Forms(split, seed).sample)
    path = Path(name).expanduser()
    if name.strip() and path.exists():
        content = open_local(path)
        return DataSource(str(path), "local", content.digest, len(content.rows), content.sample)
    if name.startswith((".", "/", "~")) or path.suffix or "/" in name:
        raise DataError(f"data path {name} does not exist; check the path, or use one of {', '.join(DATASETS)}")
    raise DataError(f"unknown data set {name!r}; use one of {', '.join(DATASETS)}, or a path to a .jsonl, .parquet or folder of them")
