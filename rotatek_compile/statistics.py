"""Bootstrap intervals over documents: percentile, seeded, paired (Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13).

A quantity is a ratio of sums over documents: exact match is Σ exact / Σ 1, KL per answer token is Σ kl / Σ tokens. Every resample
draws whole documents with replacement, so tokens of one answer are never taken for independent. Two methods that answered the same
documents are compared on the same draws, which removes what the documents have in common.

With several calibrations every document was answered once for each: calibrations are drawn with replacement too, independently of the
documents, and a draw is the mean over both (crossed random effects: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 2007).
Three calibrations say little about calibrations in general; the interval says so by being wide where they differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]
RESAMPLES = 2000
COVERAGE = 0.95


class Bootstrap:
    """Draws of documents, the same for everything that is asked of one object.

    Args:
        documents: how many there are, at least 1; all arrays below hold them in one order, once for each calibration.
        seed: of the draws; equal seeds give equal intervals.
        resamples: number of draws.
        calibrations: how often each document was answered.
    """

    def __init__(self, documents: int, seed: int = 0, resamples: int = RESAMPLES, calibrations: int = 1) -> None:
        if documents < 1 or calibrations < 1:
            raise ValueError("a bootstrap needs at least one document and one calibration")
        generator = np.random.default_rng(seed)
        self.draws = generator.integers(documents, size=(resamples, documents))  # [R, N]
        self.calibrations = generator.integers(calibrations, size=(resamples, calibrations))  # [R, C]

    def interval(self, values: Sequence[float], weights: Sequence[float] | None = None) -> Interval:
        """Interval of Σ values / Σ weights; weights are 1 by default."""
        return _percentiles(self._estimates(values, weights))

    def difference(self, first: Sequence[float], second: Sequence[float], weights: Sequence[float] | None = None) -> Interval:
        """Paired interval of (Σ first - Σ second) / Σ weights."""
        return _percentiles(self._estimates(first, weights) - self._estimates(second, weights))

    def ratio(self, first: Sequence[float], second: Sequence[float]) -> Interval:
        """Paired interval of Σ first / Σ second (of KLs per token too: both have the same tokens).

        A draw where only `second` sums to zero counts as infinite, one where both do says nothing and is left out.
        """
        above, below = self._sums(first), self._sums(second)
        said = (above != 0) | (below != 0)
        if not said.any():
            return (float("nan"), float("nan"))
        with np.errstate(divide="ignore"):
            return _percentiles(above[said] / below[said])

    def _estimates(self, values: Sequence[float], weights: Sequence[float] | None) -> np.ndarray:
        count = self.draws.shape[1] * self.calibrations.shape[1]
        return self._sums(values) / (count if weights is None else self._sums(weights))

    def _sums(self, values: Sequence[float]) -> np.ndarray:
        array, (calibrations, documents) = np.asarray(values, dtype=np.float64), (self.calibrations.shape[1], self.draws.shape[1])
        if array.shape != (calibrations * documents,):
            raise ValueError(f"{array.shape} values for {documents} documents and {calibrations} calibrations")
        drawn = np.stack([own[self.draws].sum(1) for own in array.reshape(calibrations, documents)], 1)  # [R, C]
        return np.take_along_axis(drawn, self.calibrations, 1).sum(1)


def _percentiles(estimates: np.ndarray) -> Interval:
    tail = (1 - COVERAGE) / 2
    ordered = np.sort(estimates)  # an order statistic, not an interpolation: infinities stay meaningful
    last = len(ordered) - 1
    return float(ordered[int(np.floor(tail * last))]), float(ordered[int(np.ceil((1 - tail) * last))])
