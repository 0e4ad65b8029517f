"""What a segment shows in the coordinates it is to be coded in: the specification of measure_kernels.py, one side at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .codes import rounded, sample, scales_and_errors
from .slabs import Slabs

LARGEST_MEAN = 6e4  # an own mean is stored in fp16


@dataclass(frozen=True, slots=True)
class Job:
    """One side of a segment that is to be measured. H heads, S tokens, D directions.

    x: [H, S, D] in any floating dtype, any strides but the last, which is 1. mean fp32 [H, D]: the calibrated one; encode fp32 [H, D, D]:
    z = (x - mean) @ encode; balance fp32 [H, D]: z over whitened coordinates. slabs: per head, those it is to be coded with.
    own_mean fp16 and scales bf16 [H, D]: those of a segment before, or the calibrated ones; None for the segment's own.
    """

    x: Tensor
    mean: Tensor
    encode: Tensor
    balance: Tensor
    slabs: tuple[Slabs, ...]
    own_mean: Tensor | None = None
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found.

    own_mean: fp16 [H, D], the segment's mean less the calibrated one; None where the segment may have none. centre: fp32 [H, D], both
    together. z: fp32 [H, S, D], contiguous. scales: bf16 [H, D], 0 for directions that are native or dropped. figures: fp32 [H, 2 D]:
    mean energy per token of each direction, then the mean squared error of its codes over sampled tokens; whitened.
    """

    own_mean: Tensor | None
    centre: Tensor
    z: Tensor
    scales: Tensor
    figures: Tensor


def measure_torch(job: Job, own: bool) -> Measured:
    """Measure one side; `own`: the segment may have a mean and scales of its own."""
    own_mean = job.own_mean
    if own:
        own_mean = (job.x.mean(1, dtype=torch.float32) - job.mean).clamp(-LARGEST_MEAN, LARGEST_MEAN).half()
    centre = job.mean if own_mean is None else job.mean + own_mean
    z = (job.x - centre.unsqueeze(1)) @ job.encode
    energy = torch.linalg.vector_norm(z, dim=1).square() / job.x.shape[1]
    scales, errors = torch.zeros_like(energy, dtype=torch.bfloat16), torch.zeros_like(energy)
    for bits, coded in coded_directions(job.slabs, z.shape[-1]).items():
        if not coded.any():
            continue
        if own:
            scale, error = scales_and_errors(z, bits)
        else:
            assert job.scales is not None
            scale, some = job.scales, sample(z)
            error = (rounded(some, scale.float().unsqueeze(1), bits) - some).square().mean(1)
        where = coded.to(z.device)
        scales, errors = torch.where(where, scale, scales), torch.where(where, error, errors)
    return Measured(own_mean, centre, z, scales, torch.cat([energy, errors], -1) / job.balance.square().repeat(1, 2))


def coded_directions(slabs: Sequence[Slabs], dim: int) -> dict[int, Tensor]:
    """Which directions have 8-bit and which have 4-bit codes: bool [H, D] each."""
    place = torch.arange(dim)
    native, byte, rank = (torch.tensor(ends)[:, None] for ends in zip(*((s.native, s.native + s.byte, s.rank) for s in slabs), strict=True))
    return {8: (place >= native) & (place < byte), 4: (place >= byte) & (place < rank)}
