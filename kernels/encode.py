"""Coding all heads of sides of segments at once: with Triton on a GPU, with `codes.pack` elsewhere, to the same bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .codes import pack, padded
from .slabs import Slabs
from .table import sent

BLOCK_N = 32


@dataclass(frozen=True, slots=True)
class Packing:
    """One side of a segment that is to be laid out. H heads.

    z: directions fp32 [H, S, D], contiguous, of which a head uses its first ones. raw: [H, S, D], what a head stores whose slabs are all D
    native. scales: bf16 [H, D], contiguous. slabs: per head.
    """

    z: Tensor
    raw: Tensor
    scales: Tensor
    slabs: tuple[Slabs, ...]


@dataclass(frozen=True, slots=True)
class Packed:
    """Codes that go into a pool one behind the other, flat uint8 in as many tensors as is handy. sizes: bytes of each head."""

    parts: list[Tensor]
    sizes: list[int]

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Packed:
        """One tensor for each head."""
        return cls(list(parts), [part.numel() for part in parts])

    @classmethod
    def of_equal(cls, codes: Tensor) -> Packed:
        """uint8 [..., N], N bytes for each head."""
        return cls([codes.reshape(-1)], [codes.shape[-1]] * codes.shape[:-1].numel())


def pack_heads(jobs: Sequence[Packing], dtype: torch.dtype) -> list[list[Tensor]]:
    """For every job the codes of every head, flat uint8, laid out by `codes.pack`; all jobs of one H, D and device.

    Args:
        dtype: of native numbers.
    """
    if jobs and jobs[0].z.is_cuda and has_triton():
        return pack_heads_triton(jobs, dtype)
    return [[_pack_head(job, h, dtype) for h in range(len(job.slabs))] for job in jobs]


def pack_jobs(jobs: Sequence[Packing], dtype: torch.dtype) -> Packed:
    """As `pack_heads`, not taken apart: there may be many jobs, and what follows wants them in one piece."""
    if jobs and jobs[0].z.is_cuda and has_triton():
        return _packed(jobs, dtype)
    return Packed.of([part for codes in pack_heads(jobs, dtype) for part in codes])


def _pack_head(job: Packing, h: int, dtype: torch.dtype) -> Tensor:
    one = job.slabs[h]
    source = job.raw[h].float() if one.native == job.z.shape[-1] else job.z[h, :, : one.rank]
    return pack(source, job.scales[h, one.native : one.rank], one, dtype)


def pack_heads_triton(jobs: Sequence[Packing], dtype: torch.dtype) -> list[list[Tensor]]:
    """As `pack_heads`, in one launch; all codes are views of one tensor."""
    heads, packed = jobs[0].z.shape[0], _packed(jobs, dtype)
    codes = packed.parts[0].split(packed.sizes)
    return [list(codes[n * heads : (n + 1) * heads]) for n in range(len(jobs))]


def _packed(jobs: Sequence[Packing], dtype: torch.dtype) -> Packed:
    from .encode_kernels import pack_kernel

    first, (heads, _, dim), device = jobs[0], jobs[0].z.shape, jobs[0].z.device
    raws = [job.raw.to(dtype) if job.raw.stride(2) == 1 else job.raw.to(dtype).contiguous() for job in jobs]
    table: list[list[int]] = []
    sizes: list[int] = []
    for job, raw in zip(jobs, raws, strict=True):
        assert job.z.is_contiguous() and job.scales.is_contiguous()
        length = job.z.shape[1]
        places = [between(job.z, first.z), between(raw, raws[0]), *raw.stride()[:2], between(job.scales, first.scales)]
        row, before = [*places, sum(sizes), length, padded(length)], 0
        for one in job.slabs:
            row += [*one, before, int(one.native == dim)]
            before += one.bytes_per_token(dtype.itemsize)
            sizes.append(padded(length) * one.bytes_per_token(dtype.itemsize))
        table.append(row)
    out = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    if out.numel():
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            pack_kernel[(len(jobs) * heads, -(-max(row[7] for row in table) // BLOCK_N))](
                first.z, raws[0], first.scales, upload(table, device), out, out.view(dtype), heads, len(table[0]),
                D=dim, DP=1 << (dim - 1).bit_length(), ITEMSIZE=dtype.itemsize, BLOCK_N=BLOCK_N,
            )  # fmt: skip
    return Packed([out], sizes)


def between(tensor: Tensor, origin: Tensor) -> int:
    """How many numbers lie between the beginnings of two tensors of one dtype."""
    return (tensor.data_ptr() - origin.data_ptr()) // tensor.element_size()


def upload(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A table int64 on the device; the host does not wait for the copy."""
    return sent(torch.tensor(rows, dtype=torch.int64), device)


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
