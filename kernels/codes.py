"""Codes of a segment's directions and how they lie in memory: the one module, with the kernels, that knows the layout.

A segment of S tokens takes up to three slabs, one behind the other in a pool of bytes: native numbers, 8-bit codes, 4-bit codes. Inside
a slab tokens follow one another, each with its directions side by side. An odd number of tokens is padded by one, so that every slab
starts on 16 bytes. A byte of the 4-bit slab holds direction j in its low half and direction j + nibble / 2 in its high half.

    8 bit: z ≈ c · scale, c from -127 to 127                4 bit: z ≈ (u - 7.5) · scale, u from 0 to 15

Scales are bf16, one per direction. Levels of 4 bits lie symmetrically about zero without holding it: with so few, a sixteenth level is
worth more than an exact zero (uniform quantisers of even size, Max 1960).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .slabs import Slabs

MIDDLE = 7.5  # of the 4-bit levels
TOP = {8: 127.0, 4: MIDDLE}  # largest level
CLIPS = {8: (0.55, 0.7, 0.85, 1.0), 4: (0.15, 0.2, 0.26, 0.33, 0.4, 0.47, 0.55, 0.63, 0.72, 0.81, 0.9, 1.0)}  # shares of the maximum tried
SAMPLE = 512  # tokens whose error decides where to clip
ALIGN = 2  # tokens are padded to a multiple


def clipped_scales(z: Tensor, bits: int) -> Tensor:
    """The scale of each direction that has the least squared error among `CLIPS`: z fp32 [..., S, R] -> bf16 [..., R].

    The maximum is taken over all tokens, the error over at most `SAMPLE` of them, evenly spread. A direction that is zero has scale 0.
    """
    return scales_and_errors(z, bits)[0]


def scales_and_errors(z: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`clipped_scales`, and the mean squared error per token of codes with them, over the sampled tokens: fp32 [..., R]."""
    top, some = torch.linalg.vector_norm(z, ord=torch.inf, dim=-2), sample(z)
    tried = (_clips(bits, z.device).view(-1, *(1,) * top.dim()) * (top / TOP[bits])).bfloat16()  # [C, ..., R]
    errors = (rounded(some, tried.float().unsqueeze(-2), bits) - some).square().mean(-2)
    least = errors.min(0)
    return tried.gather(0, least.indices.unsqueeze(0)).squeeze(0), least.values


@lru_cache(maxsize=64)
def _clips(bits: int, device: torch.device) -> Tensor:
    return torch.tensor(CLIPS[bits], device=device)  # a copy to a GPU waits for all that the GPU has to do, so only once


def sample(z: Tensor) -> Tensor:
    """At most `SAMPLE` tokens of z [..., S, R], evenly spread."""
    return z[..., :: sample_step(z.shape[-2]), :]


def sample_step(tokens: int) -> int:
    """Every how many of these tokens one is sampled."""
    return max(1, -(-tokens // SAMPLE))


def levels(z: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The level of each number, fp32: whole numbers from -127 to 127, or from -7.5 to 7.5 in steps of 1."""
    ratio = z / torch.where(scale > 0, scale, 1.0)
    if bits == 8:
        return ratio.round().clamp(-TOP[8], TOP[8])
    return (ratio + MIDDLE).round().clamp(0, 2 * MIDDLE) - MIDDLE


def rounded(z: Tensor, scale: Tensor, bits: int) -> Tensor:
    """What is left of z after coding: fp32, the shape of z and scale broadcast."""
    return levels(z, scale, bits) * scale


def pool_bytes(length: int, slabs: Slabs, itemsize: int) -> int:
    """Bytes that a segment's codes take in the pool, padding included."""
    return padded(length) * slabs.bytes_per_token(itemsize)


def padded(length: int) -> int:
    """Tokens that are stored for a segment of `length`."""
    return -(-length // ALIGN) * ALIGN


def pack(z: Tensor, scales: Tensor, slabs: Slabs, dtype: torch.dtype) -> Tensor:
    """Code and lay out directions z fp32 [..., S, rank]: uint8 [..., pool_bytes].

    Args:
        scales: bf16 [..., byte + nibble].
        dtype: of native numbers.
    """
    native, byte, nibble = slabs
    lead, length = z.shape[:-2], z.shape[-2]
    z = torch.nn.functional.pad(z, (0, 0, 0, padded(length) - length))
    scale = scales.float().unsqueeze(-2)
    coded = z[..., native:]
    parts = [z[..., :native].to(dtype).contiguous().view(torch.uint8).flatten(-2)] if native else []
    if byte:
        parts.append(levels(coded[..., :byte], scale[..., :byte], 8).to(torch.int8).view(torch.uint8).flatten(-2))
    if nibble:
        u = (levels(coded[..., byte:], scale[..., byte:], 4) + MIDDLE).to(torch.uint8)
        low, high = u.chunk(2, -1)
        parts.append((low | high << 4).flatten(-2))
    return torch.cat(parts, -1) if parts else z.new_zeros(*lead, 0, dtype=torch.uint8)


def unpack(flat: Tensor, length: int, slabs: Slabs, dtype: torch.dtype) -> Tensor:
    """Levels [S, rank] of a pool slice that starts at a segment: native numbers as they are, others without their scale.

    fp32, or the native dtype where that is wider.

    Raises:
        ValueError: the slice is shorter than the segment.
    """
    native, byte, nibble = slabs
    rows, needed = padded(length), pool_bytes(length, slabs, dtype.itemsize)
    if flat.numel() < needed:
        raise ValueError(f"a segment of {length} tokens with slabs {tuple(slabs)} takes {needed} bytes, the slice has {flat.numel()}")
    wide = torch.promote_types(dtype, torch.float32)
    first, second, third = flat[:needed].split((rows * native * dtype.itemsize, rows * byte, rows * nibble // 2))
    parts = [flat.new_zeros(rows, 0, dtype=wide)]
    if native:
        parts.append(first.view(dtype).view(rows, native).to(wide))
    if byte:
        parts.append(second.view(torch.int8).view(rows, byte).to(wide))
    if nibble:
        packed = third.view(rows, nibble // 2)
        parts.append(torch.cat([packed & 15, packed >> 4], -1).to(wide) - MIDDLE)
    return torch.cat(parts, -1)[:length]


def native_view(flat: Tensor, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Raw numbers [S, D] of a segment that is native as a whole; shares the pool's memory."""
    return flat[: length * dim * dtype.itemsize].view(dtype).view(length, dim)
