"""Bases in two bytes a number, where that is exact enough."""

from __future__ import annotations

import torch
from torch import Tensor

WORST = 1e-2  # largest change of any direction, relative to itself, that a stored basis may have suffered


def compact(name: str, tensor: Tensor) -> Tensor:
    """A tensor of the artifact as it is stored: encoding matrices [H, D, D] in float16 if that moves no direction by more than `WORST`.

    What rounding does to an encoding matrix E is E → E (I + Δ): the norm of Δ = E⁻¹ (round(E) - E) bounds how far any direction moves,
    the smallest included, which is what a large condition endangers. The error of truncated logits grows with its square. Bases for
    which float16 is too coarse, or its range too small, stay in float32. (bfloat16 has an eighth of the precision.)
    """
    if not name.endswith("_encode") or not bool(torch.isfinite(tensor).all()):
        return tensor
    exact, half = tensor.double(), tensor.half()
    moved, info = torch.linalg.solve_ex(exact, half.double() - exact)
    fine = not bool(info.any()) and bool(torch.isfinite(moved).all()) and float(torch.linalg.matrix_norm(moved, 2).max()) <= WORST
    return half if fine else tensor
