"""Measuring sides of segments before they are coded: with Triton on a GPU, all at once, with measure_torch.py elsewhere.

Neither waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from .codes import CLIPS, sample_step
from .encode import between, has_triton, upload
from .measure_torch import LARGEST_MEAN, Job, Measured, measure_torch

BLOCK_S = 256  # tokens of a partial sum
ROTATE_N, ROTATE_K = 64, 32
SCALE_N, SCALE_D = 64, 32
ALIGNED = 16  # bytes, for loads of whole vectors


def measure(jobs: Sequence[Job]) -> list[Measured]:
    """Measure sides that may have their own mean and scales; all of one H, D, dtype and device."""
    if jobs and jobs[0].x.is_cuda and has_triton():
        return measure_triton(jobs)
    return [measure_torch(job, own=True) for job in jobs]


def measure_triton(jobs: Sequence[Job]) -> list[Measured]:
    """As `measure_torch`; sums are made in another order, and of scales whose errors differ by less than rounding either may come out."""
    from .measure_kernels import centre_kernel, rotate_kernel, scale_kernel, sum_kernel

    parts = [_aligned(job.x) for job in jobs]
    first, count, (heads, _, dim), device = jobs[0], len(jobs), parts[0].shape, parts[0].device
    lengths = [part.shape[1] for part in parts]
    z = torch.empty(heads * dim * sum(lengths), dtype=torch.float32, device=device)
    rows, at = [], 0
    for job, x, length in zip(jobs, parts, lengths, strict=True):
        assert job.encode.is_contiguous() and job.mean.is_contiguous() and job.balance.is_contiguous()
        places = [between(job.encode, first.encode), between(job.mean, first.mean), between(job.balance, first.balance)]
        rows.append([between(x, parts[0]), x.stride(0), x.stride(1), length, *places, at, sample_step(length), *sum(job.slabs, ())])
        at += heads * dim * length
    table, width = upload(rows, device), len(rows[0])
    power = max(16, 1 << (dim - 1).bit_length())
    block_n = ROTATE_N if power <= 128 else ROTATE_N // 2
    pieces, blocks = -(-max(lengths) // BLOCK_S), -(-max(lengths) // block_n)
    floats = torch.empty(count * heads * dim * (pieces + 2 * blocks + 3), dtype=torch.float32, device=device)
    per = count * heads * dim
    sums, energies, tops, centres, figures = floats.split([per * pieces, per * blocks, per * blocks, per, 2 * per])
    own_means = torch.empty(count, heads, dim, dtype=torch.float16, device=device)
    scales = torch.empty(count, heads, dim, dtype=torch.bfloat16, device=device)
    programs = count * heads
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        sum_kernel[(programs, pieces)](parts[0], table, sums, heads, width, pieces, D=dim, DP=power, BLOCK_S=BLOCK_S, BLOCK_N=32)
        centre_kernel[(programs,)](
            table, sums, first.mean, own_means, centres, heads, width, pieces, LARGEST_MEAN, D=dim, DP=power, BLOCK_S=BLOCK_S
        )
        rotate_kernel[(programs, blocks)](
            parts[0], table, centres, first.encode, z, energies, tops, heads, width, blocks,
            D=dim, DP=power, BLOCK_N=block_n, BLOCK_K=ROTATE_K, PRECISION="tf32x3" if device.type == "cuda" else "ieee",
        )  # fmt: skip
        scale_kernel[(programs, -(-dim // SCALE_D))](
            table, z, energies, tops, first.balance, _clips(device), scales, figures, heads, width, blocks,
            BYTE_CLIPS=len(CLIPS[8]), NIBBLE_CLIPS=len(CLIPS[4]), D=dim, BLOCK_Z=block_n, BLOCK_N=SCALE_N, BLOCK_D=SCALE_D,
        )  # fmt: skip
    centres, figures = centres.view(count, heads, dim), figures.view(count, heads, 2 * dim)
    each = z.split([heads * dim * length for length in lengths])
    return [Measured(own_means[n], centres[n], each[n].view(heads, lengths[n], dim), scales[n], figures[n]) for n in range(count)]


def _aligned(x: Tensor) -> Tensor:
    """x [H, S, D] as it is, or copied so that the kernels may load whole vectors of it."""
    size = x.element_size()
    good = x.stride(2) == 1 and all(step * size % ALIGNED == 0 for step in x.stride()[:2]) and x.data_ptr() % ALIGNED == 0
    return x if good else x.contiguous()


@lru_cache(maxsize=16)
def _clips(device: torch.device) -> Tensor:
    """Shares of the maximum that are tried, fp32 [2, C]; those of 8-bit codes are fewer, and followed by zeros."""
    most = len(CLIPS[4])
    return torch.tensor([[*CLIPS[8], *[0.0] * (most - len(CLIPS[8]))], [*CLIPS[4]]], device=device)
