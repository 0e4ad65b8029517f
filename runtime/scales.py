"""Scales of coded directions: calibrated ones, and which of a segment's belong to which direction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels.slabs import Slabs

GAUSSIAN_STEP = {8: 6.0 / 127, 4: 0.36}  # step over standard deviation: a little above the best of a normal variable, for longer tails


def calibrated_scales(spectrum: Tensor, balance: Tensor, bits: int) -> Tensor:
    """Scales for balanced codes whose energies are the calibrated ones: spectrum and balance [H, D] -> bf16 [H, D]."""
    return lasting_scales(spectrum.sqrt().to(balance) * balance, bits)


def lasting_scales(deviation: Tensor, bits: int) -> Tensor:
    """Scales for codes [..., R] of this standard deviation that have not been seen yet: bf16 [..., R]."""
    return (GAUSSIAN_STEP[bits] * deviation).bfloat16()


def merged_scales(by_bits: dict[int, Tensor], slabs: Sequence[Slabs]) -> Tensor:
    """The scale of each direction at the precision it has: bf16 [H, D] each -> bf16 [H, D]."""
    first = next(iter(by_bits.values()))
    if len(by_bits) == 1:
        return first
    return torch.where(_in_bytes(tuple(slabs), first.shape[-1], first.device), by_bits[8], by_bits[4])


@lru_cache(maxsize=1024)
def _in_bytes(slabs: tuple[Slabs, ...], dim: int, device: torch.device) -> Tensor:
    """Which directions [H, D] lie before the end of the 8-bit slab; kept, because a copy to a GPU waits for all it has to do."""
    ends = torch.tensor([one.native + one.byte for one in slabs])
    return (torch.arange(dim) < ends[:, None]).to(device)


def used_bits(slabs: Sequence[Slabs]) -> set[int]:
    """Precisions with scales that some head uses."""
    return {bits for bits, used in ((8, any(one.byte for one in slabs)), (4, any(one.nibble for one in slabs))) if used}
