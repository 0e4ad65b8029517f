"""What a plan discards: dropped directions and coding errors, in the whitened coordinates of a basis (bases.py).

One account for those who plan (cost_curves.py) and for those who watch what a segment loses (runtime/rounding_error.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .kernels.slabs import Slabs

ROUNDING = {8: 1e-4, 4: 0.016}
"""Squared error of codes with the scales of `codes.clipped_scales`, as a share of a direction's energy, by bits. Normal variables have
5.6e-5 and 0.0113 (Max 1960 gives 0.0115 for 16 uniform levels), Laplacian ones 1.2e-4 and 0.024. Measured medians on both bundled models:
Keys 0.6e-4 to 0.8e-4 and 0.012 to 0.016, Values 1.1e-4 to 1.4e-4 and 0.023 to 0.026."""


def discarded_by(energy: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Energy that options discard, fp64 [N].

    Args:
        energy: per direction, in order [D].
        ends: directions up to the end of the native, the 8-bit and the 4-bit slab of each option, int64 [N, 3].
    """
    kept = np.concatenate([[0.0], np.asarray(energy, dtype=np.float64).cumsum()])
    first, second, third = kept[ends].T
    return np.asarray(np.maximum(kept[-1] - third, 0.0) + ROUNDING[8] * (second - first) + ROUNDING[4] * (third - second))


def discarded(energy: Sequence[float] | np.ndarray, slabs: Slabs) -> float:
    """Energy that slabs discard of one head's directions [D], in order."""
    return float(discarded_by(np.asarray(energy), np.cumsum(slabs)[None])[0])
