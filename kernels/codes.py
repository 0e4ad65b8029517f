"""Packs and unpacks the pool: the one module, with the kernels, that knows how a segment's numbers lie in memory.

Layout: blocks of 64 tokens follow one another; inside a block tokens follow one another, each with its `rank` numbers
side by side (token-major). The last block is padded. A tile of 64 tokens is then one unbroken run of `64 * rank`
numbers, and because ranks are multiples of 8 every token starts on 16 bytes (2-byte dtypes), which is what lets the
kernel copy 16 bytes per thread for ranks 8, 24 or 40 as well as for powers of two. Raw Keys and Values are stored the
same way with `rank = D`. Directions are ordered by importance, so a smaller rank keeps a prefix of each token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .table import BLOCK, UNIT


def pool_elements(length: int, rank: int) -> int:
    """Numbers a segment of `length` tokens takes in the pool, block padding included."""
    _check_rank(rank)
    return -(-length // BLOCK) * BLOCK * rank


def pack(codes: Tensor) -> Tensor:
    """Lay out `codes` `[S, R]` as a flat pool slice `[pool_elements(S, R)]`; padding is zero.

    Raises:
        ValueError: R is not a multiple of 8.
    """
    length, rank = codes.shape
    flat = codes.new_zeros(pool_elements(length, rank))
    flat[: length * rank] = codes.reshape(-1)
    return flat


def unpack(flat: Tensor, length: int, rank: int) -> Tensor:
    """The codes `[S, R]` of a flat pool slice that starts at a segment; may share its memory, and may be longer than the segment.

    Raises:
        ValueError: R is not a multiple of 8, or the slice is shorter than the segment.
    """
    needed = pool_elements(length, rank)
    if flat.numel() < needed:
        raise ValueError(f"a segment of {length} tokens at rank {rank} takes {needed} numbers, the slice has {flat.numel()}")
    return flat[: length * rank].view(length, rank)


def pack_into(pool: Tensor, offset: int, codes: Tensor) -> int:
    """Write `codes` `[S, R]` to `pool` at `offset`, casting to its dtype; padding is left as it is. Returns the offset after the segment.

    Raises:
        ValueError: R or the offset is not a multiple of 8, or the segment passes the end of the pool.
    """
    length, rank = codes.shape
    end = offset + pool_elements(length, rank)
    if offset % UNIT or end > pool.numel():
        where = f"at offset {offset} of a pool of {pool.numel()} (offsets are multiples of {UNIT})"
        raise ValueError(f"no room for {length} tokens at rank {rank} {where}")
    pool[offset : offset + length * rank].view(length, rank).copy_(codes)
    return end


def unpack_from(pool: Tensor, offset: int, length: int, rank: int) -> Tensor:
    """The codes `[S, R]` stored in `pool` at `offset`; shares its memory."""
    return unpack(pool[offset : offset + pool_elements(length, rank)], length, rank)


def new_pool(segments: list[tuple[int, int]], dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, list[int]]:
    """An uninitialised pool for segments `(length, rank)` one after another, and their offsets."""
    offsets, total = [], 0
    for length, rank in segments:
        offsets.append(total)
        total += pool_elements(length, rank)
    return torch.empty(total, dtype=dtype, device=device), offsets


def _check_rank(rank: int) -> None:
    if rank < 0 or rank % UNIT:
        raise ValueError(f"a rank must be a multiple of {UNIT}, zero included, got {rank}")
