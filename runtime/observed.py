"""What one side of a segment shows in the calibrated coordinates: on the device, and the figures of it that the host decides by.

Nothing here waits for the device but `Figures.arrive`. All energies are those of whitened coordinates (bases.py), where the squared error
of a direction is the squared error of a logit (Keys), or of the layer's output (Values).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from ..kernels.measure import measure
from ..kernels.measure_torch import Job, Measured, measure_torch
from ..kernels.slabs import NIBBLE_UNIT, UNIT, Slabs
from .online import corrected_directions
from .prepared import SideBasis
from .rounding_error import bound

UNUSUAL = 1.5  # times what is expected: an own basis is not looked for below


@dataclass(frozen=True, slots=True)
class Rules:
    """How far a segment may depart from the plan.

    prior_tokens: what the calibrated covariance counts for in an own basis; 0 means never an own one.
    factor: a head that discards more than this many times what calibration expects keeps more; 0 means never.
    own_parts: the segment may have its own mean and scales; if not, it is coded with `Given` ones, or with the artifact's.
    same_bytes: an own basis is paid for with directions.
    """

    prior_tokens: int
    factor: float
    own_parts: bool = True
    same_bytes: bool = False


@dataclass(frozen=True, slots=True)
class Given:
    """Mean and scales of an earlier segment of the same sequence: own_mean fp16 and scales bf16 [H, D], and their fields in the table."""

    own_mean: Tensor
    scales: Tensor
    fields: np.ndarray


@dataclass(frozen=True, slots=True)
class Shown:
    """Figures of one side on the host, fp64. H heads.

    energy: of each direction [H, D]. error: what the plan discards per token [H]; usual: up to where that is nothing unusual [H]; most: up
    to where it is allowed [H]. kept: share of the energy that the plan's calibrated directions hold [H].
    """

    energy: np.ndarray
    error: np.ndarray
    usual: np.ndarray
    most: np.ndarray
    kept: np.ndarray


class Figures:
    """Tables of numbers [H, n] on their way to the host, which can do something else meanwhile."""

    def __init__(self, tables: Sequence[Tensor]) -> None:
        self._widths = [table.shape[-1] for table in tables]
        flat = torch.cat(list(tables), -1)
        self._there: torch.cuda.Event | None = None
        if flat.is_cuda:
            self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(flat.device))
        else:
            self._host = flat.cpu()

    def arrive(self) -> list[np.ndarray]:
        """The tables, fp64; waits until they are there."""
        if self._there is not None:
            self._there.synchronize()
        return np.split(self._host.double().numpy(), np.cumsum(self._widths)[:-1], axis=-1)


class Observed:
    """One side of a segment in the calibrated coordinates.

    Attributes:
        x: [H, S, D] in any floating dtype. measured: see measure_torch.py, with the plan's slabs.
        given: mean and scales of the segment before that were used; None if the segment has its own, or the artifact's.
    """

    def __init__(self, x: Tensor, basis: SideBasis, rules: Rules, given: Given | None, measured: Measured) -> None:
        self.x, self.basis, self.rules, self.given, self.measured = x, basis, rules, given, measured
        self.z, self.centre, self.own_mean = measured.z, measured.centre, measured.own_mean

    def shown(self, figures: np.ndarray) -> Shown:
        """The measured figures [H, 2 D], once they are on the host."""
        basis = self.basis
        energy, coding = np.split(figures, 2, axis=-1)
        dropped = _dropped(basis.slabs, energy.shape[1])
        total, lost = energy.sum(1), (energy * dropped).sum(1)
        share = np.divide(total - lost, total, out=np.ones_like(total), where=total > 0)
        expected, times, sums = np.array(basis.expected), np.array(basis.usual), basis.spectrum.sum(1).tolist()
        usual = [bound(e, one, 1.0) for e, one in zip(expected * np.maximum(times, UNUSUAL), sums, strict=True)]
        most = [bound(e, one, self.rules.factor) for e, one in zip(expected * times, sums, strict=True)]
        return Shown(energy, lost + coding.sum(1), np.array(usual), np.array(most), share)

    # -- an own basis ---------------------------------------------------------------------------------------------------------

    @cached_property
    def top(self) -> int:
        """Most directions that an own basis would have, 0 for none."""
        tokens, dim = self.x.shape[1:]
        if not self.rules.prior_tokens or not self.rules.own_parts:
            return 0
        fitting = (affordable(one, dim, tokens) if self.rules.same_bytes else one for one in self.basis.slabs)
        return max((one.rank for one in fitting if one is not None and 0 < one.rank < dim), default=0)

    @cached_property
    def _moment(self) -> Tensor:
        whitened = self.z / self.basis.balance.unsqueeze(1)
        return whitened.mT @ whitened / whitened.shape[1]

    @cached_property
    def directions(self) -> Tensor:
        """Corrected directions [H, D, top] in whitened coordinates."""
        spectrum = self.basis.spectrum.to(self.z.device, torch.float32)
        return corrected_directions(self._moment, spectrum, self.z.shape[1], self.rules.prior_tokens, self.top)

    @cached_property
    def captured(self) -> Tensor:
        """Energy of each corrected direction [H, top]."""
        return ((self._moment @ self.directions) * self.directions).sum(-2).clamp_min(0)


def observe(sides: Sequence[tuple[Tensor, SideBasis]], rules: Rules, given: Sequence[Given | None] = ()) -> list[Observed]:
    """Measure sides (Keys and Values of one segment or of several), all under the same rules.

    Args:
        sides: x [H, S, D] and the basis, of one H, D and device.
        given: for every side what may be used where the rules allow no own mean and scales; by default the artifact's.
    """
    if rules.own_parts:
        jobs = [Job(x, basis.mean, basis.encode, basis.balance, basis.slabs) for x, basis in sides]
        measured = measure(jobs)
        return [Observed(x, basis, rules, None, one) for (x, basis), one in zip(sides, measured, strict=True)]
    found = []
    for (x, basis), like in zip(sides, given or [None] * len(sides), strict=True):
        own_mean, scales = (like.own_mean, like.scales) if like is not None else (None, basis.plan_scales)
        job = Job(x, basis.mean, basis.encode, basis.balance, basis.slabs, own_mean, scales)
        found.append(Observed(x, basis, rules, like, measure_torch(job, own=False)))
    return found


@lru_cache(maxsize=1024)
def _dropped(slabs: tuple[Slabs, ...], dim: int) -> np.ndarray:
    """Which directions heads do not keep: [H, D] of zeros and ones."""
    return (np.arange(dim) >= np.array([[one.rank] for one in slabs])).astype(float)


def affordable(slabs: Slabs, dim: int, tokens: int) -> Slabs | None:
    """The slabs that an own basis of D · R numbers leaves of a head's bytes over S tokens; None if it leaves nothing.

    The least important directions go first.
    """
    native, byte, nibble = slabs
    had = slabs.bytes_per_token() * tokens
    while True:
        left = Slabs(native, byte, nibble)
        if left.rank == 0:
            return None
        if left.bytes_per_token() * tokens + 2 * dim * left.rank <= had:
            return left
        if nibble:
            nibble -= NIBBLE_UNIT
        elif byte:
            byte -= UNIT
        else:
            native -= UNIT
