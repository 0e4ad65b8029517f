"""LeanK with its training (arXiv 2508.02215): the coder of leank.py, its masks from learned scales instead of calibrated moments.

A file of `--learned` holds, for every compressed layer, scales float32 [Hkv, D] between 0 and 1: `layers.{i}.scale` of the first stage, and
`ratios.{n}.layers.{i}.scale` of the second at the n-th ratio that was trained (learn_leank.py says how). The mask at a keep ratio is that of
`lean_masks`: the ratio · all channels of largest scale, then every head's number rounded to a multiple of 32. Kept Keys are stored as they
are: scales choose, and multiply nothing.

The second stage is for one ratio. At any other the scales of the nearest trained one are used, in the logarithm, and of two as near the
smaller: a threshold at that ratio, and no training at it. Where none was trained, those of the first stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...errors import UsageError
from ...geometry import Geometry
from ...untrusted import shown

MAX_RATIOS = 64
NO_SCALES = (
    "leank-learned needs learned scales and layer {layer} has none; train them with benchmarks/learn_leank.py and pass --learned FILE"
)


@dataclass(frozen=True, slots=True)
class LearnedScales:
    """`first`: of the first stage, by layer fp32 [Hkv, D]; `second`: by ratio and layer."""

    first: Mapping[int, Tensor]
    second: Mapping[float, Mapping[int, Tensor]]

    def at(self, ratio: float) -> Mapping[int, Tensor]:
        """Scales for a share of the channels, from 0 to 1."""
        if not self.second:
            return self.first
        wanted = math.log(max(ratio, 1e-9))
        return self.second[min(self.second, key=lambda trained: (round(abs(math.log(trained) - wanted), 9), trained))]


def tensors_of(scales: LearnedScales) -> dict[str, Tensor]:
    """What a file holds of them; ratios in the order of `second`."""
    found = {f"layers.{i}.scale": scale for i, scale in scales.first.items()}
    for number, own in enumerate(scales.second.values()):
        found |= {f"ratios.{number}.layers.{i}.scale": scale for i, scale in own.items()}
    return found


def shapes_of(geometry: Geometry, training: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a file.

    Raises:
        UsageError: `training["ratios"]` is no list of different shares.
    """
    ratios = training.get("ratios")
    if not isinstance(ratios, list) or len(ratios) > MAX_RATIOS or not all(type(r) in (int, float) and 0 < r <= 1 for r in ratios):
        raise UsageError(f"training.ratios is {shown(ratios)}, expected a list of shares above 0 and at most 1; train it again")
    if len(set(ratios)) < len(ratios):
        raise UsageError(f"training.ratios is {shown(ratios)}, one of them twice; train it again")
    prefixes = ["", *(f"ratios.{number}." for number in range(len(ratios)))]
    shapes = {i: (geometry.layers[i].kv_heads, geometry.layers[i].head_dim) for i in geometry.compressible}
    return {f"{prefix}layers.{i}.scale": shape for prefix in prefixes for i, shape in shapes.items()}


def state_of(tensors: Mapping[str, Tensor], geometry: Geometry, training: Mapping[str, Any]) -> LearnedScales:
    """Of the tensors of a file, checked."""

    def scales(prefix: str) -> dict[int, Tensor]:
        return {i: tensors[f"{prefix}layers.{i}.scale"] for i in geometry.compressible}

    return LearnedScales(scales(""), {float(ratio): scales(f"ratios.{n}.") for n, ratio in enumerate(training["ratios"])})
