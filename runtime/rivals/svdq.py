"""SVDq (arXiv 2502.15304): Keys in the directions of their own singular vectors, more bits for larger ones, the rest dropped.

Formula: K - mean(K) = U Σ Vᵀ over the segment; L = (K - mean(K)) V in eight equal groups of directions, the group of largest singular
values first, coded at bits b_1 >= ... >= b_8 >= 0; K̂ = mean(K) + L̂ Vᵀ. Each direction has one fp16 scale and zero point for the whole
image; V is native, for the directions kept; the mean is fp32. All of it counts, for every head and image. Values stay native.
The schedule of 2 bits on average is published, (8, 4, 2, 1, 1, 0, 0, 0); the others have that shape and are ours.
Where it differs: Keys are taken after RoPE, where the cache sees them, the paper's before. A direction is rounded over its whole range or
with the uniform step of least error for a Gaussian (Max 1960), whichever errs less on it, which favours the method: with one scale for
an image, one bit over the range loses more than dropping the direction. Eigenvectors of the covariance are those of an SVD of K.
Limits: Values are untouched, so at least half of the bytes stay; Keys get 8 bits at most, whatever the budget. The published 410x
includes dropped tokens. Queries are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..coder import NATIVE_BYTES, CodedSegment
from .base import RivalCoder
from .rounding import SCALE_BYTES, dequantise, pack_bits, packed_bytes, quantise, unpack_bits

GROUPS = 8
SCHEDULES = (
    (2, 0, 0, 0, 0, 0, 0, 0),
    (4, 0, 0, 0, 0, 0, 0, 0),
    (4, 2, 0, 0, 0, 0, 0, 0),
    (4, 2, 1, 1, 0, 0, 0, 0),
    (4, 2, 2, 1, 1, 0, 0, 0),
    (4, 4, 2, 1, 1, 0, 0, 0),
    (8, 4, 2, 1, 1, 0, 0, 0),
    (8, 4, 4, 2, 1, 1, 0, 0),
    (8, 4, 4, 4, 2, 2, 0, 0),
    (8, 8, 4, 4, 2, 2, 0, 0),
    (8, 8, 4, 4, 4, 2, 2, 0),
    (8, 8, 8, 4, 4, 4, 2, 2),
    (8, 8, 8, 8, 4, 4, 4, 4),
    (8, 8, 8, 8, 8, 8, 4, 4),
    (8, 8, 8, 8, 8, 8, 8, 8),
)
"""Bits of the eight groups, fewest first: nested, so that a larger one never codes a direction worse."""
SHARES = tuple(sum(bits) / GROUPS / (8 * NATIVE_BYTES) for bits in SCHEDULES)  # of the bits of native Keys, codes alone
GAUSSIAN_STEP = {1: 1.596, 2: 0.9957, 4: 0.3352}  # in standard deviations, for 2, 4 and 16 even levels


@dataclass(frozen=True, kw_only=True)
class SvdqCoder(RivalCoder):
    """Codes of `bits[i]` bits for the i-th eighth of the directions; the head dimension is a multiple of 8."""

    bits: tuple[int, ...]

    def widths(self, dim: int) -> dict[int, int]:
        """Directions coded at each width, most bits first: {bits: directions}."""
        return {bits: self.bits.count(bits) * (dim // GROUPS) for bits in sorted({*self.bits} - {0}, reverse=True)}

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        dim, exact = keys.shape[-1], keys.float()
        widths, mean = self.widths(dim), exact.mean(1)
        centred = exact - mean.unsqueeze(1)
        basis = principal(centred)[..., : sum(widths.values())].to(keys.dtype)  # [H, D, R]
        coded = [_least_error(part, bits) for part, bits in _split((centred @ basis.float()).mT, widths)]
        parts = {f"codes{bits}": pack_bits(codes.mT, bits) for bits, (codes, _, _) in zip(widths, coded, strict=True)}
        parts["scale"], parts["zero"] = (torch.cat([one[i].squeeze(-1) for one in coded], 1) for i in (1, 2))  # [H, R]
        parts |= {"basis": basis, "mean": mean, "values": values}
        return CodedSegment(keys.shape[1], parts, frozenset({"basis", "values"}), partial(_rebuild, widths=widths))

    def bytes_of(self, tokens: int, layer: int) -> int:
        shape = self.shape(layer)
        dim, widths = shape.head_dim, self.widths(shape.head_dim)
        token = sum(packed_bytes(count, bits) for bits, count in widths.items()) + NATIVE_BYTES * dim
        return shape.kv_heads * (tokens * token + sum(widths.values()) * (SCALE_BYTES + NATIVE_BYTES * dim) + 4 * dim)


def principal(centred: Tensor) -> Tensor:
    """Right singular vectors of [H, S, D] as columns fp32 [H, D, D], largest singular value first."""
    largest = centred.abs().amax((1, 2), keepdim=True)
    even = centred / torch.where(largest > 0, largest, 1.0)  # LAPACK returns NaN for what rounding leaves of equal Keys
    return torch.linalg.eigh(even.mT @ even).eigenvectors.flip(-1)


def schedule(share: float) -> tuple[int, ...]:
    """The largest of `SCHEDULES` whose codes take at most `share` of the bits of native Keys."""
    return SCHEDULES[max(i for i, least in enumerate(SHARES) if i == 0 or least <= share + 1e-9)]


def _split(x: Tensor, widths: Mapping[int, int]) -> list[tuple[Tensor, int]]:
    """Directions x [H, R, ...] by their width."""
    return list(zip(x.split(list(widths.values()), 1), widths, strict=True))


def _least_error(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `quantise` along the last axis, or with the Gaussian step where that has the smaller squared error."""
    covering = quantise(x, bits)
    if bits not in GAUSSIAN_STEP:
        return covering
    levels = 2**bits - 1
    scale = (GAUSSIAN_STEP[bits] * x.pow(2).mean(-1, keepdim=True).sqrt()).half()
    zero = (scale.float() * (-levels / 2)).half()
    step = torch.where(scale > 0, scale.float(), 1.0)
    clipping = ((x - zero.float()) / step).round().clamp(0, levels).to(torch.uint8), scale, zero
    errors = [(dequantise(*one) - x).pow(2).sum(-1, keepdim=True) for one in (covering, clipping)]
    better = errors[1] < errors[0]  # [H, R, 1]
    codes, scale, zero = (torch.where(better, ours, theirs) for ours, theirs in zip(clipping, covering, strict=True))
    return codes, scale, zero


def _rebuild(parts: Mapping[str, Tensor], tokens: int, widths: Mapping[int, int]) -> tuple[Tensor, Tensor]:
    codes = torch.cat([unpack_bits(parts[f"codes{bits}"], bits, count) for bits, count in widths.items()], -1)  # [H, S, R]
    latent = dequantise(codes, parts["scale"].unsqueeze(1), parts["zero"].unsqueeze(1))
    return parts["mean"].unsqueeze(1) + latent @ parts["basis"].float().mT, parts["values"].float()
