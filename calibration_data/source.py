"""A data set opened for reading, whatever it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .errors import EndOfData
from .sample import Sample

CALIBRATION, EVALUATION = "calibration", "evaluation"  # what samples are for; each reads splits of its own
NEW_TOKENS = 32  # what an answer may take, where a benchmark says nothing else


@dataclass(frozen=True, slots=True)
class DataSource:
    """A data set opened for reading: `sample(i)` makes or reads one, `size` of them (None: unknown, or as many as asked for).

    `revision` names the content where that is known: a commit on the Hub, or a digest of local files. `repository` is the Hub id,
    with `:CONFIG` where it has several; None for anything else. `metric` is the set's own score (rotatek_compile/scores.py), and
    `max_new_tokens` what its answers may take.
    """

    name: str
    split: str
    revision: str | None
    size: int | None
    sample: Callable[[int], Sample]
    repository: str | None = None
    metric: str = "exact_match"
    max_new_tokens: int = NEW_TOKENS

    def samples(self, count: int) -> Iterator[Sample]:
        """The first `count` samples, or all there are."""
        for number in range(count if self.size is None else min(count, self.size)):
            try:
                sample = self.sample(number)
            except EndOfData:
                return
            yield sample

    @staticmethod
    def hash_ids(ids: Sequence[str]) -> str:
        """Identifies which samples were used, in order."""
        return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
