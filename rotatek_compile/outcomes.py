"""What an evaluation found: one outcome per document and method, and the rows that are summed from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .runtime.accounting import CacheBytes
from .statistics import Bootstrap

BYTE_KEYS = {
    "kv_bytes": "total",
    "kv_bytes_dense": "dense",
    "kv_bytes_stored": "stored",
    "span_bytes": "span",
    "span_bytes_dense": "span_dense",
    "window_bytes": "window",
    "basis_bytes": "basis",
    "slack_bytes": "slack",
    "table_bytes": "tables",
}
"""Names of byte counts in results (DESIGN.md §7), and in `CacheBytes`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One document answered by one method.

    score: by the data set's own metric (scores.py), which `metric` names.
    kl: sum over the answer tokens of KL(dense || method) in nats; bytes: the fields of `CacheBytes`. A batch is one cache: a
    document's bytes are its part of the batch's, by real tokens, so that sums over documents are exact.
    """

    id: str
    skill: str
    method: str
    exact: bool
    anls: float
    kl: float
    answer_tokens: int
    text: str
    bytes: dict[str, float]
    score: float = 0.0
    metric: str = "exact_match"

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        """Inverse of `dataclasses.asdict`; KeyError for anything else."""
        return cls(**{f.name: data[f.name] for f in fields(cls)})


def shares(whole: CacheBytes, tokens: Sequence[int]) -> list[dict[str, float]]:
    """A batch's bytes split over its documents by their real tokens."""
    total = max(sum(tokens), 1)
    return [{name: value * own / total for name, value in asdict(whole).items()} for own in tokens]


@dataclass(slots=True)
class Row:
    """One method over documents, in one order for all methods; with several calibrations all documents of the first, then of the next."""

    method: str
    outcomes: list[Outcome] = field(default_factory=list)
    calibrations: int = 1

    @property
    def samples(self) -> int:
        """Documents."""
        return len(self.outcomes) // self.calibrations

    @property
    def texts(self) -> list[str]:
        return [o.text for o in self.outcomes]

    @property
    def kl(self) -> float:
        """Sum over all answer tokens."""
        return sum(o.kl for o in self.outcomes)

    @property
    def answer_tokens(self) -> int:
        return sum(o.answer_tokens for o in self.outcomes)

    @property
    def kl_per_token(self) -> float:
        """Nats per answer token."""
        return self.kl / max(self.answer_tokens, 1)

    @property
    def skills(self) -> list[str]:
        """Skills that the documents name, sorted; empty if they name none."""
        return sorted({o.skill for o in self.outcomes} - {""})

    def of_skill(self, skill: str) -> Row:
        """The same method on the documents of one skill."""
        return Row(self.method, [o for o in self.outcomes if o.skill == skill], self.calibrations)

    def repeated(self, calibrations: int) -> Row:
        """The same outcomes once for each of so many calibrations, to stand beside a row that has them.

        Raises:
            ValueError: it has several itself, of another number.
        """
        if self.calibrations not in (1, calibrations):
            raise ValueError(f"rows of {self.calibrations} and of {calibrations} calibrations cannot be compared")
        return self if self.calibrations == calibrations else Row(self.method, self.outcomes * calibrations, calibrations)

    def bootstrap(self) -> Bootstrap:
        """Draws for its outcomes."""
        return Bootstrap(self.samples, calibrations=self.calibrations)

    def accuracy(self) -> dict[str, Any]:
        """Scores with 95 % intervals over documents: the data set's own metric, exact match, ANLS, and KL in nats per answer token."""
        outcomes = self.outcomes
        if not outcomes:
            return {"samples": 0, "metric": "exact_match", "score": 0.0, "exact_match": 0.0, "anls": 0.0, "kl": 0.0}
        draws, tokens = self.bootstrap(), [o.answer_tokens for o in outcomes]
        exact, similar, kl = [o.exact for o in outcomes], [o.anls for o in outcomes], [o.kl for o in outcomes]
        own = [o.score for o in outcomes]
        return {
            "samples": self.samples,
            "metric": outcomes[0].metric,
            "score": sum(own) / len(outcomes),
            "score_interval": list(draws.interval(own)),
            "exact_match": sum(exact) / len(outcomes),
            "exact_match_interval": list(draws.interval(exact)),
            "anls": sum(similar) / len(outcomes),
            "anls_interval": list(draws.interval(similar)),
            "kl": self.kl_per_token,
            "kl_interval": list(draws.interval(kl, tokens)),
        }

    def sizes(self) -> dict[str, float]:
        """Mean bytes per document at the end of generation, and how many heads fell back in all."""
        n = max(len(self.outcomes), 1)
        found: dict[str, float] = {key: sum(o.bytes[name] for o in self.outcomes) / n for key, name in BYTE_KEYS.items()}
        return found | {"fallback_heads": round(sum(o.bytes["fallback_heads"] for o in self.outcomes))}

    def to_json(self) -> dict[str, Any]:
        """The row of DESIGN.md §7."""
        skills = {skill: self.of_skill(skill).accuracy() for skill in self.skills}
        return {"method": self.method} | self.accuracy() | self.sizes() | {"skills": skills}


def pooled(rows: Sequence[Row]) -> Row:
    """One method calibrated several times, on the same documents.

    Raises:
        ValueError: the rows hold different documents.
    """
    for row in rows[1:]:
        _require_same(rows[0], row)
    return Row(rows[0].method, [o for row in rows for o in row.outcomes], len(rows))


def exact_match_loss(reference: Row, row: Row) -> tuple[float, tuple[float, float]]:
    """Exact match that a method loses against another on the same documents, with the paired interval.

    Raises:
        ValueError: the rows hold different documents.
    """
    reference, row = _beside(reference, row)
    first, second = ([o.exact for o in r.outcomes] for r in (reference, row))
    return (sum(first) - sum(second)) / max(len(first), 1), row.bootstrap().difference(first, second)


def kl_ratio(row: Row, other: Row) -> tuple[float, tuple[float, float]]:
    """KL per token of one method over that of another on the same documents, with the paired interval; NaN where both lost nothing.

    Raises:
        ValueError: the rows hold different documents.
    """
    row, other = _beside(row, other)
    above, below = row.kl, other.kl
    ratio = above / below if below > 0 else math.inf if above > 0 else math.nan
    return ratio, row.bootstrap().ratio([o.kl for o in row.outcomes], [o.kl for o in other.outcomes])


def _beside(first: Row, second: Row) -> tuple[Row, Row]:
    """Both with as many calibrations: what does not depend on calibration is the same in all of them."""
    most = max(first.calibrations, second.calibrations)
    first, second = first.repeated(most), second.repeated(most)
    _require_same(first, second)
    return first, second


def _require_same(first: Row, second: Row) -> None:
    if [o.id for o in first.outcomes] != [o.id for o in second.outcomes]:
        raise ValueError("rows of different documents cannot be compared")
