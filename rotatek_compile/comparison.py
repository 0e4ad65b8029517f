"""Ours beside the best rivals of the same bytes, and of more: the ratio of their KLs over the same documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .methods import DENSE, Entry
from .outcomes import Row, kl_ratio

if TYPE_CHECKING:
    from .suite import Measured

SLACK = 1e-6  # budgets are given in decimals


@dataclass(frozen=True, slots=True)
class Comparison:
    """A row of ours beside one rival.

    span: bytes of the rival's coded span over dense. kl: its KL in nats per answer token. ratio: our KL over its, with the paired 95 %
    interval over documents; None where that is no number, because the rival lost nothing.
    """

    rival: str
    span: float
    kl: float
    ratio: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Against:
    """The rivals of least KL at a budget of ours. within: of those that take no more; above: of those that cannot do with so little, each
    at the smallest that it can."""

    within: Comparison | None = None
    above: Comparison | None = None

    def to_json(self) -> dict[str, Any]:
        """Flat, as columns of results.csv are called: `rival`, `rival_span`, ... and `above`, `above_span`, ..."""
        found = {}
        for prefix, one in (("rival", self.within), ("above", self.above)):
            for field in fields(Comparison):
                name = prefix if field.name == "rival" else f"{prefix}_{field.name}"
                found[name] = getattr(one, field.name) if one else None
        return found


def against_rivals(one: Measured, every: Sequence[Measured]) -> Against | None:
    """The best rivals at the budget that `one` was asked for, in the same mode and on the same axis.

    A setting of a rival is within the budget if it was promised to be, or takes no more of these documents than the budget or than `one`
    does (short images cost every method more). Picking the best on the documents that are compared favours rivals.

    Returns:
        None for what is no row of ours at a budget, or if no rival was measured.
    """
    if not one.entry.ours or one.entry.requested_budget is None:
        return None
    allowed = max(one.entry.requested_budget, span_share(one.row)) + SLACK
    rivals = [m for m in every if m.ask == one.ask and m.entry.axis == one.entry.axis and not m.entry.ours and m.entry.method != DENSE]
    within, above = [], []
    for name in dict.fromkeys(m.entry.method for m in rivals):
        own = [m for m in rivals if m.entry.method == name]
        fitting = [m for m in own if _fits(m.entry, m.row, allowed)]
        within += fitting
        above += [] if fitting else [min(own, key=lambda m: span_share(m.row))]
    return Against(_best(one, within), _best(one, above)) if rivals else None


def _best(one: Measured, rivals: Sequence[Measured]) -> Comparison | None:
    if not rivals:
        return None
    best = min(rivals, key=lambda m: m.row.kl_per_token)
    ratio, interval = kl_ratio(one.row, best.row)
    numbers = [x if math.isfinite(x) else None for x in (ratio, *interval)]
    return Comparison(best.entry.name, span_share(best.row), best.row.kl_per_token, *numbers)


def span_share(row: Row) -> float:
    """Bytes of the coded segments over the dense bytes of the same tokens; 1 for what codes nothing."""
    dense = sum(o.bytes["span_dense"] for o in row.outcomes)
    return sum(o.bytes["span"] for o in row.outcomes) / dense if dense else 1.0


def _fits(entry: Entry, row: Row, allowed: float) -> bool:
    promised = entry.kv_budget is not None and entry.kv_budget <= allowed
    return promised or span_share(row) <= allowed
