"""What segments discard against what calibration expected, and how far they lie from the calibrated directions (DESIGN.md §4.6)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .encode import Coordinates
from .prepared import PreparedLayer

DRIFT = 15.0  # degrees beyond the calibrated angle, in the median head, above which calibration on this domain is due
DRIFT_TOKENS = 64  # fewer say little about a subspace


@dataclass(slots=True)
class Monitor:
    """The worst segment of every (row, head, side) of one layer; side 0 are Keys, 1 Values.

    ratio: energy that the plan discards per token over what calibration expected [B, H, 2], before any fallback; 0 where nothing is coded.
    angle: degrees between the segment and the calibrated directions that the plan keeps [B, H, 2]: acos √(share of its energy they hold).
    fallback: segments whose Keys or Values needed more than the plan [B, H].
    """

    ratio: np.ndarray
    angle: np.ndarray
    fallback: np.ndarray

    @classmethod
    def of(cls, batch: int, heads: int) -> Monitor:
        return cls(np.zeros((batch, heads, 2)), np.zeros((batch, heads, 2)), np.zeros((batch, heads), dtype=np.int64))

    def see(self, row: int, sides: Sequence[Coordinates], tokens: int) -> None:
        """Note a segment that was coded in these coordinates."""
        for n, side in enumerate(sides):
            for h, (error, expected, kept) in enumerate(zip(side.planned or side.error, side.expected, side.kept, strict=True)):
                if expected > 0:
                    self.ratio[row, h, n] = max(self.ratio[row, h, n], error / expected)
                if tokens >= DRIFT_TOKENS:
                    self.angle[row, h, n] = max(self.angle[row, h, n], degrees(kept))
                self.fallback[row, h] += side.fallback[h] and not (n and sides[0].fallback[h])

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        order = list(rows)
        self.ratio, self.angle, self.fallback = self.ratio[order], self.angle[order], self.fallback[order]

    def beyond(self, prepared: PreparedLayer, kind: str) -> list[tuple[float, float]]:
        """Angle and calibrated angle of every head whose Keys are rotated and not dropped, the worst row each."""
        basis = prepared.kinds[kind].key
        found = []
        for h, slabs in enumerate(basis.slabs):
            if slabs.rank > 0 and slabs.native != basis.spectrum.shape[1] and self.angle.shape[0]:
                energy = basis.spectrum[h]
                total = float(energy.sum())
                found.append((float(self.angle[:, h, 0].max()), degrees(float(energy[: slabs.rank].sum()) / total if total else 1.0)))
        return [pair for pair in found if pair[0] > 0]


def degrees(share: float) -> float:
    """Angle between a distribution and a subspace that holds this share of its energy."""
    return math.degrees(math.acos(math.sqrt(min(max(share, 0.0), 1.0))))


def drift(pairs: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Median angle and median calibrated angle over heads; None without heads."""
    if not pairs:
        return None
    seen, calibrated = (float(np.median(side)) for side in zip(*pairs, strict=True))
    return seen, calibrated


def warn_of_drift(found: tuple[float, float] | None) -> bool:
    """Say once that calibration on this domain is due; whether it was said."""
    if found is None or found[0] - found[1] <= DRIFT:
        return False
    warnings.warn(
        f"the Keys of these images lie {found[0]:.0f} degrees from the directions that the artifact keeps, {found[1]:.0f} on its "
        "calibration data: heads keep more where they must, but calibrate on documents like these (rotatek-compile --calib)",
        stacklevel=2,
    )
    return True


def drift_of(layers: dict[int, tuple[PreparedLayer, Monitor]]) -> tuple[float, float] | None:
    """`drift` of the Keys of every layer; images where the artifact codes both images and text."""
    return drift([pair for prepared, monitor in layers.values() for pair in monitor.beyond(prepared, next(iter(prepared.kinds)))])


def stats(layers: dict[int, tuple[PreparedLayer, Monitor]]) -> dict[str, Any]:
    """What the monitors of a cache say, as plain numbers; described in `RotateKCache.stats`."""
    rows, fallback = [], 0
    for index, (_, monitor) in layers.items():
        fallback += int(monitor.fallback.sum())
        worst = monitor.ratio.max(0) if len(monitor.ratio) else monitor.ratio.reshape(0, 2)
        rows.append(
            {
                "layer": index,
                "fallback": monitor.fallback.sum(0).tolist(),
                "key_error_over_expected": worst[:, 0].tolist(),
                "value_error_over_expected": worst[:, 1].tolist(),
                "key_angle": monitor.angle[:, :, 0].max(0).tolist() if len(monitor.angle) else [],
            }
        )
    found = drift_of(layers)
    return {
        "fallback_heads": fallback,
        "angle": found[0] if found else None,
        "calibrated_angle": found[1] if found else None,
        "layers": rows,
    }
