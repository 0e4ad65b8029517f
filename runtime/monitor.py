"""What segments discard against what calibration expected, and how far they lie from the calibrated directions (DESIGN.md §4.6)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..usual import TOKENS, leading_angles
from .encode import Coordinates
from .prepared import PreparedLayer, SideBasis

DRIFT = 15.0  # degrees beyond the calibrated angle, in the median head, above which calibration on this domain is due where artifacts
# do not say how calibration documents deviate
DRIFT_TOKENS = TOKENS  # fewer say little about a subspace


@dataclass(slots=True)
class Monitor:
    """The worst segment of every (row, head, side) of one layer; side 0 are Keys, 1 Values.

    ratio: energy that the plan discards per token over what calibration expected [B, H, 2], before any fallback; 0 where nothing is coded.
    angle: degrees between the segment and the calibrated directions that the plan keeps [B, H, 2]: acos √(share of its energy they hold).
    fallback: segments whose Keys or Values needed more than the plan [B, H].
    deviation: how unlike the calibration documents each image is [B, M], in the order they came: the mean square over heads of how many
    standard deviations the angle of its Values to their leading directions is off (usual.py); 0 where a row has fewer images.
    """

    ratio: np.ndarray
    angle: np.ndarray
    fallback: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, batch: int, heads: int) -> Monitor:
        zeros = np.zeros((batch, heads, 2))
        return cls(zeros, zeros.copy(), np.zeros((batch, heads), dtype=np.int64), np.zeros((batch, 0)))

    def see(self, row: int, sides: Sequence[Coordinates], tokens: int) -> None:
        """Note a segment that was coded in these coordinates."""
        fell = np.zeros(self.fallback.shape[1], dtype=bool)
        for n, side in enumerate(sides):
            error, expected = np.array(side.planned or side.error), np.array(side.expected)
            ratio = np.divide(error, expected, out=np.zeros_like(error), where=expected > 0)
            self.ratio[row, :, n] = np.maximum(self.ratio[row, :, n], ratio)
            if tokens >= DRIFT_TOKENS:
                self.angle[row, :, n] = np.maximum(self.angle[row, :, n], [degrees(kept) for kept in side.kept])
            fell |= side.fallback
        self.fallback[row] += fell

    def compare(self, row: int, bases: Sequence[SideBasis], energies: Sequence[np.ndarray], tokens: int) -> None:
        """Note how unlike the calibration documents an image is, from its energies [H, D] of Keys and of Values, about its own mean."""
        known = [(basis.angles, energy) for basis, energy in zip(bases, energies, strict=True) if basis.angles is not None]
        if not known or tokens < DRIFT_TOKENS:
            return
        off = [(leading_angles(energy) - angles[:, 0]) / angles[:, 1] for angles, energy in known]
        place = int(np.count_nonzero(self.deviation[row]))
        if place == self.deviation.shape[1]:
            self.deviation = np.pad(self.deviation, ((0, 0), (0, 1)))
        self.deviation[row, place] = max(float(np.mean(np.square(off))), 1e-12)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        order = list(rows)
        for name in self.__slots__:
            setattr(self, name, getattr(self, name)[order])

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


def warn_of_drift(layers: dict[int, tuple[PreparedLayer, Monitor]]) -> bool:
    """Say that calibration on this domain is due, if it is; whether it was said."""
    if not is_drift(layers):
        return False
    found, angles = deviation_of(layers), drift_of(layers)
    far = f" ({angles[0]:.0f} degrees from the directions that the artifact keeps, calibrated {angles[1]:.0f})" if angles else ""
    how = f": {found[0]:.1f} standard deviations off in the mean head, where {found[1]:.1f} are usual" if found else ""
    warnings.warn(
        f"these images are unlike the documents that the artifact was calibrated on{how}{far}; answers may be worse than was measured: "
        "calibrate on documents like these (rotatek-compile --calib)",
        stacklevel=3,
    )
    return True


def is_drift(layers: dict[int, tuple[PreparedLayer, Monitor]]) -> bool:
    """Whether the images are so unlike the calibration documents that it has to be said."""
    if (found := deviation_of(layers)) is not None:
        return found[0] > found[1]
    angles = drift_of(layers)
    return angles is not None and angles[0] - angles[1] > DRIFT


def deviation_of(layers: dict[int, tuple[PreparedLayer, Monitor]]) -> tuple[float, float] | None:
    """How unlike the calibration documents the most unlike image is, and how much is usual; None if nothing tells.

    Root mean square over layers and heads of the standard deviations that the angle to the leading directions is off (usual.py).
    """
    usual = next((prepared.method.usual_deviation for prepared, _ in layers.values()), None)
    images = min((monitor.deviation.shape[1] for _, monitor in layers.values()), default=0)
    if usual is None or not images:
        return None
    squares = np.mean([monitor.deviation[:, :images] for _, monitor in layers.values()], 0)
    return (math.sqrt(float(squares.max())), usual) if squares.any() else None


def drift_of(layers: dict[int, tuple[PreparedLayer, Monitor]]) -> tuple[float, float] | None:
    """`drift` of the Keys of every layer; images where the artifact codes both images and text."""
    return drift([pair for prepared, monitor in layers.values() for pair in monitor.beyond(prepared, next(iter(prepared.kinds)))])


def stats(layers: dict[int, tuple[PreparedLayer, Monitor]], refreshes: int = 0) -> dict[str, Any]:
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
    found, deviation = drift_of(layers), deviation_of(layers)
    return {
        "fallback_heads": fallback,
        "refreshes": refreshes,
        "angle": found[0] if found else None,
        "calibrated_angle": found[1] if found else None,
        "deviation": deviation[0] if deviation else None,
        "usual_deviation": deviation[1] if deviation else None,
        "unlike_calibration": is_drift(layers),
        "layers": rows,
    }
