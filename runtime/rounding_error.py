"""What a plan is expected to discard of a segment, and how much more is too much (coding_error.py has the account)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..coding_error import ROUNDING, discarded
from ..kernels.slabs import Slabs

SLACK = 1e-3  # share of a head's calibrated energy that no bound is below, so that a nearly exact plan does not fall back for nothing


def expected_errors(spectrum: Tensor, slabs: Sequence[Slabs]) -> Tensor:
    """`discarded` on the calibration data for every head: spectrum [H, D] -> fp64 [H]."""
    rows: list[list[float]] = spectrum.double().tolist()
    return torch.tensor([discarded(row, one) for row, one in zip(rows, slabs, strict=True)], dtype=torch.float64)


def usual_ratios(spectrum: Tensor, slabs: Sequence[Slabs], tails: Tensor | None, codes: Tensor | None) -> list[float]:
    """How many times what is expected of a head (`discarded`) single calibration documents discard at most.

    Args:
        spectrum: [H, D]. tails, codes: tail and code ratios [H, D] (usual.py); None where they are not known, then every ratio is 1.

    Each slab errs as the directions from its first one on do, of which it has the most; 8-bit codes in proportion to their energy.
    """
    if tails is None or codes is None:
        return [1.0] * len(slabs)
    found = []
    for h, (native, byte, nibble) in enumerate(slabs):
        energy, first, rank = spectrum[h].tolist(), native + byte, native + byte + nibble
        parts = [
            (tails, native, ROUNDING[8] * sum(energy[native:first])),
            (codes, first, ROUNDING[4] * sum(energy[first:rank])),
            (tails, rank, sum(energy[rank:])),
        ]
        total = sum(lost for *_, lost in parts)
        found.append(sum(float(ratio[h, start]) * lost for ratio, start, lost in parts if lost > 0) / total if total > 0 else 1.0)
    return found


def bound(expected: float, spectrum_sum: float, factor: float) -> float:
    """Discarded energy above which a head keeps more; `expected` is the calibrated one times its usual ratio."""
    return factor * expected + SLACK * spectrum_sum
