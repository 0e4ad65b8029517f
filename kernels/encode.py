"""Coding all heads of one side of a segment at once: with Triton on a GPU, with `codes.pack` elsewhere, to the same bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from .codes import pack, padded
from .slabs import Slabs

BLOCK_N = 32


def pack_heads(z: Tensor, raw: Tensor, scales: Tensor, slabs: Sequence[Slabs], dtype: torch.dtype) -> list[Tensor]:
    """The codes of every head, flat uint8, laid out by `codes.pack`.

    Args:
        z: directions fp32 [H, S, D], of which a head uses its first ones.
        raw: [H, S, D], what a head stores whose slabs are all D native.
        scales: bf16 [H, D].
        dtype: of native numbers.
    """
    if z.is_cuda and importlib.util.find_spec("triton") is not None:
        return pack_heads_triton(z, raw, scales, slabs, dtype)
    codes = []
    for h, one in enumerate(slabs):
        source = raw[h].float() if one.native == z.shape[-1] else z[h, :, : one.rank]
        codes.append(pack(source, scales[h, one.native : one.rank], one, dtype))
    return codes


def pack_heads_triton(z: Tensor, raw: Tensor, scales: Tensor, slabs: Sequence[Slabs], dtype: torch.dtype) -> list[Tensor]:
    """As `pack_heads`, in one launch; the heads' codes are views of one tensor."""
    from .encode_kernels import pack_kernel

    heads, length, dim = z.shape
    rows, widths = padded(length), [one.bytes_per_token(dtype.itemsize) for one in slabs]
    out = torch.empty(rows * sum(widths), dtype=torch.uint8, device=z.device)
    if out.numel():
        with torch.cuda.device(z.device) if z.is_cuda else nullcontext():
            pack_kernel[(heads, -(-rows // BLOCK_N))](
                z.contiguous(), raw.to(dtype).contiguous(), scales.contiguous(), _plan(tuple(slabs), dim, dtype.itemsize, z.device),
                out, out.view(dtype), length, rows,
                D=dim, DP=1 << (dim - 1).bit_length(), ITEMSIZE=dtype.itemsize, BLOCK_N=BLOCK_N,
            )  # fmt: skip
    return list(out.split([rows * width for width in widths]))


@lru_cache(maxsize=4096)
def _plan(slabs: tuple[Slabs, ...], dim: int, itemsize: int, device: torch.device) -> Tensor:
    """What `pack_kernel` reads about its heads; copied to the device once per plan."""
    before, rows = 0, []
    for one in slabs:
        rows.append([*one, before, int(one.native == dim)])
        before += one.bytes_per_token(itemsize)
    return torch.tensor(rows, dtype=torch.int32, device=device)
