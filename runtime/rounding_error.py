"""What a plan discards: dropped directions and coding errors, in the whitened coordinates of a basis (bases.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.slabs import Slabs

# Squared error of codes with the scales of `codes.clipped_scales`, as a share of the energy: normal variables have 0.0113 at 4 bits and
# 5.6e-5 at 8 (Max 1960 gives 0.0115 for 16 uniform levels), Laplacian ones 0.024 and 1.2e-4; Keys and Values lie between.
ROUNDING = {8: 1e-4, 4: 0.016}
SLACK = 1e-3  # share of a head's calibrated energy that no bound is below, so that a nearly exact plan does not fall back for nothing


def discarded(
    energy: Sequence[float], slabs: Slabs, byte_error: Sequence[float] | None = None, nibble_error: Sequence[float] | None = None
) -> float:
    """Energy that slabs discard of one head's directions.

    Args:
        energy: per direction, in order [D].
        byte_error, nibble_error: measured squared errors per direction of 8- and 4-bit codes; by default `ROUNDING` times the energy.
    """
    native, byte, nibble = slabs
    first, second = native + byte, slabs.rank
    in_bytes = sum(byte_error[native:first]) if byte_error is not None else ROUNDING[8] * sum(energy[native:first])
    in_nibbles = sum(nibble_error[first:second]) if nibble_error is not None else ROUNDING[4] * sum(energy[first:second])
    return float(in_bytes + in_nibbles + sum(energy[second:]))


def expected_errors(spectrum: Tensor, slabs: Sequence[Slabs]) -> Tensor:
    """`discarded` on the calibration data for every head: spectrum [H, D] -> fp64 [H]."""
    rows: list[list[float]] = spectrum.double().tolist()
    return torch.tensor([discarded(row, one) for row, one in zip(rows, slabs, strict=True)], dtype=torch.float64)


def bound(expected: float, spectrum_sum: float, factor: float) -> float:
    """Discarded energy above which a head keeps more."""
    return factor * expected + SLACK * spectrum_sum
