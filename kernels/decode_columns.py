"""Rotations for warps that go apart (`decode_codes.py`): the query into the coordinates of the Keys, the output out of those of the Values.

Query rows are columns here, [directions, M], and what the W warps have summed comes as [W, directions, M].
"""

import triton
import triton.language as tl

from .decode_sides import basis, two_parts


@triton.jit
def all_warps(b, WARPS: tl.constexpr):
    return tl.broadcast_to(b[None, :, :], [WARPS, b.shape[0], b.shape[1]])


@triton.jit
def met(b, b_share):
    """Sums of all warps: [W, tile, M] to [tile, M]. Halved until one is left, which brings the warps' numbers into one thread first."""
    W: tl.constexpr = b.shape[0]
    b = tl.permute(b * b_share[:, None, :], (1, 2, 0))
    if W == 8:
        b_first, b_second = tl.split(tl.reshape(b, (b.shape[0], b.shape[1], 4, 2)))
        b = b_first + b_second
    if W >= 4:
        b_first, b_second = tl.split(tl.reshape(b, (b.shape[0], b.shape[1], 2, 2)))
        b = b_first + b_second
    b_first, b_second = tl.split(b)
    return b_first + b_second


@triton.jit
def product(b_left, b_right, WARPS: tl.constexpr):
    """[R, K] times [K, M], fp32. From 64 rows on each warp has its own: else Triton takes the instructions of a group of warps, which gave
    wrong results (Triton 3.6 on an H100)."""
    R: tl.constexpr = b_left.shape[0]
    if R >= 64:
        b_left = tl.reshape(b_left, (WARPS, R // WARPS, b_left.shape[1]))
        b_product = tl.reshape(tl.dot(b_left, all_warps(b_right, WARPS)), (R, b_right.shape[1]))
    else:
        b_product = tl.dot(b_left, b_right)
    return b_product


@triton.jit
def rotated(
    b_q, p_basis, i_stride, i_width, p_scales, scale,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr, WARPS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The query [DP, M] in the coordinates of one slab of the Keys, times `scale` and the codes' scales: [TILE, M] fp32."""
    b_rotated = product(tl.trans(basis(p_basis, i_stride, i_width, D, DP, TILE, UPCAST)), b_q, WARPS) * scale
    if SCALED:
        o_r = tl.arange(0, TILE)
        b_rotated *= tl.load(p_scales + o_r, mask=o_r < i_width, other=0.0).to(tl.float32)[:, None]
    return b_rotated


@triton.jit
def unrotated(b_total, b_basis, b_levels, WARPS: tl.constexpr, TYPE: tl.constexpr, UPCAST: tl.constexpr):
    """Adds what mean levels [tile, M] of some Values contribute in the model's coordinates, from their columns [DP, tile] of the basis."""
    b_high, b_low = two_parts(b_levels, TYPE, UPCAST)
    return b_total + product(b_basis, b_high, WARPS) + product(b_basis, b_low, WARPS)


@triton.jit
def unrotated_pairs(
    b_total, b_even, b_odd, b_share, less, p_basis, i_stride, i_width, p_scales,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, WARPS: tl.constexpr, TYPE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same for codes, of which even and odd directions [W, TILE / 2, M] were summed apart."""
    o_r = tl.arange(0, TILE)
    b_scale = tl.load(p_scales + o_r, mask=o_r < i_width, other=0.0).to(tl.float32)
    b_scale_even, b_scale_odd = tl.split(tl.reshape(b_scale, (TILE // 2, 2)))
    b_basis = basis(p_basis, i_stride, i_width, D, DP, TILE, UPCAST)
    b_basis_even, b_basis_odd = tl.split(tl.reshape(b_basis, (DP, TILE // 2, 2)))
    b_total = unrotated(b_total, b_basis_even, (met(b_even, b_share) + less) * b_scale_even[:, None], WARPS, TYPE, UPCAST)
    return unrotated(b_total, b_basis_odd, (met(b_odd, b_share) + less) * b_scale_odd[:, None], WARPS, TYPE, UPCAST)
