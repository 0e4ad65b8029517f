"""The Triton kernels that measure segments; their specification is measure_torch.py.

All sides of all segments of a call are measured by three launches: their sizes and places stand in a table of jobs. Sums are made block by
block and added in a fixed order, so that results do not change from run to run.
"""

import triton
import triton.language as tl

from .encode_kernels import MAGIC, MIDDLE, TOP

# fields of a job: where its tensors begin, in numbers from the first job's; then three numbers of slabs for every head
X, STRIDE_H, STRIDE_N, LENGTH, ENCODE, MEAN, BALANCE, Z, STEP = (tl.constexpr(n) for n in range(9))
SLABS = tl.constexpr(9)


@triton.jit
def sum_kernel(
    x,  # compute dtype: of the first job
    jobs,  # int64 [J, W]
    sums,  # out, fp32 [J, H, blocks, D]
    heads,
    width,  # W
    blocks,
    D: tl.constexpr,
    DP: tl.constexpr,  # next power of two
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum of BLOCK_S tokens of one head; grid (J * H, blocks)."""
    i_jh, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_job = jobs + i_jh // heads * width
    length = tl.load(p_job + LENGTH)
    o_d = tl.arange(0, DP)
    if i_b * BLOCK_S < length:
        p_x = x + tl.multiple_of(tl.load(p_job + X), 8) + i_jh % heads * tl.multiple_of(tl.load(p_job + STRIDE_H), 8)
        stride = tl.multiple_of(tl.load(p_job + STRIDE_N), 8)
        b_sum = tl.zeros([DP], dtype=tl.float32)
        for i_n in range(i_b * BLOCK_S, i_b * BLOCK_S + BLOCK_S, BLOCK_N):
            o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
            mask = (o_n < length)[:, None] & (o_d < D)[None, :]
            b_sum += tl.sum(tl.load(p_x + o_n[:, None] * stride + o_d[None, :], mask=mask, other=0.0).to(tl.float32), 0)
        tl.store(sums + (i_jh * blocks + i_b) * D + o_d, b_sum, mask=o_d < D)


@triton.jit
def centre_kernel(
    jobs,
    sums,  # fp32 [J, H, blocks, D]
    mean,  # fp32 [H, D] of the first job
    own_means,  # out, fp16 [J, H, D]
    centres,  # out, fp32 [J, H, D]
    heads,
    width,
    blocks,
    largest,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Own mean and centre of one head; grid (J * H,)."""
    i_jh = tl.program_id(0).to(tl.int64)
    p_job = jobs + i_jh // heads * width
    length = tl.load(p_job + LENGTH)
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    b_sum = tl.zeros([DP], dtype=tl.float32)
    for i_b in range(0, tl.cdiv(length, BLOCK_S)):
        b_sum += tl.load(sums + (i_jh * blocks + i_b) * D + o_d, mask=m_d, other=0.0)
    b_mean = tl.load(mean + tl.load(p_job + MEAN) + i_jh % heads * D + o_d, mask=m_d, other=0.0)
    b_own = tl.minimum(tl.maximum(b_sum / length.to(tl.float32) - b_mean, -largest), largest).to(tl.float16)
    tl.store(own_means + i_jh * D + o_d, b_own, mask=m_d)
    tl.store(centres + i_jh * D + o_d, b_mean + b_own.to(tl.float32), mask=m_d)


@triton.jit
def rotate_kernel(
    x,
    jobs,
    centres,  # fp32 [J, H, D]
    encode,  # fp32 [H, D, D] of the first job
    z,  # out, fp32, flat: every job [H, S, D]
    energies,  # out, fp32 [J, H, blocks, D]: squares of a block's tokens, summed
    tops,  # out, fp32 [J, H, blocks, D]: their largest magnitude
    heads,
    width,
    blocks,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,  # of the product: three of tf32 on a GPU
):
    """z of BLOCK_N tokens of one head; grid (J * H, blocks)."""
    i_jh, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_job = jobs + i_jh // heads * width
    length = tl.load(p_job + LENGTH)
    i_h = i_jh % heads
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    if i_b * BLOCK_N < length:
        p_x = x + tl.multiple_of(tl.load(p_job + X), 8) + i_h * tl.multiple_of(tl.load(p_job + STRIDE_H), 8)
        stride = tl.multiple_of(tl.load(p_job + STRIDE_N), 8)
        p_w = encode + tl.multiple_of(tl.load(p_job + ENCODE), 8) + i_h * D * D
        o_n = i_b * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        m_n = (o_n < length)[:, None]
        b_z = tl.zeros([BLOCK_N, DP], dtype=tl.float32)
        for i_k in range(0, D, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            m_k = o_k < D
            b_x = tl.load(p_x + o_n[:, None] * stride + o_k[None, :], mask=m_n & m_k[None, :], other=0.0).to(tl.float32)
            b_c = tl.load(centres + i_jh * D + o_k, mask=m_k, other=0.0)
            b_x = tl.where(m_n, b_x - b_c[None, :], 0.0)
            b_w = tl.load(p_w + o_k[:, None] * D + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)
            b_z = tl.dot(b_x, b_w, b_z, input_precision=PRECISION)
        p_z = z + tl.multiple_of(tl.load(p_job + Z), 8) + i_h * length * D + o_n[:, None] * D + o_d[None, :]
        tl.store(p_z, b_z, mask=m_n & m_d[None, :])
        o_out = (i_jh * blocks + i_b) * D + o_d
        tl.store(energies + o_out, tl.sum(b_z * b_z, 0), mask=m_d)
        tl.store(tops + o_out, tl.max(tl.abs(b_z), 0), mask=m_d)


@triton.jit
def scale_kernel(
    jobs,
    z,
    energies,
    tops,
    balance,  # fp32 [H, D] of the first job
    clips,  # fp32 [2, C]: shares of the maximum that are tried, of 8-bit and of 4-bit codes
    scales,  # out, bf16 [J, H, D]
    figures,  # out, fp32 [J, H, 2, D]
    heads,
    width,
    blocks,
    BYTE_CLIPS: tl.constexpr,
    NIBBLE_CLIPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Z: tl.constexpr,  # tokens of a block of `energies`
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Energies, scales and coding errors of BLOCK_D directions of one head; grid (J * H, ceil(D / BLOCK_D))."""
    i_jh = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_job = jobs + i_jh // heads * width
    i_h = i_jh % heads
    length, step = tl.load(p_job + LENGTH), tl.load(p_job + STEP)
    p_slabs = p_job + SLABS + 3 * i_h
    first = tl.load(p_slabs)
    second = first + tl.load(p_slabs + 1)
    rank = second + tl.load(p_slabs + 2)
    b_energy, b_top = tl.zeros([BLOCK_D], dtype=tl.float32), tl.zeros([BLOCK_D], dtype=tl.float32)
    for i_b in range(0, tl.cdiv(length, BLOCK_Z)):
        o_in = (i_jh * blocks + i_b) * D + o_d
        b_energy += tl.load(energies + o_in, mask=m_d, other=0.0)
        b_top = tl.maximum(b_top, tl.load(tops + o_in, mask=m_d, other=0.0))
    is_byte, is_nibble = (o_d >= first) & (o_d < second), (o_d >= second) & (o_d < rank)
    sampled = tl.cdiv(length, step)
    tries = tl.where(tl.max(is_nibble.to(tl.int32)) > 0, NIBBLE_CLIPS, tl.where(tl.max(is_byte.to(tl.int32)) > 0, BYTE_CLIPS, 0))
    b_scale, b_least = tl.zeros([BLOCK_D], dtype=tl.float32), tl.full([BLOCK_D], float("inf"), dtype=tl.float32)
    p_z = z + tl.multiple_of(tl.load(p_job + Z), 8) + i_h * length * D
    for i_c in range(0, tries):
        clip_byte = tl.load(clips + tl.minimum(i_c, BYTE_CLIPS - 1))
        clip_nibble = tl.load(clips + NIBBLE_CLIPS + i_c)
        b_try = tl.where(is_byte, clip_byte * tl.div_rn(b_top, TOP), clip_nibble * tl.div_rn(b_top, MIDDLE))
        b_try = b_try.to(tl.bfloat16).to(tl.float32)
        b_inverse = (1.0 / tl.where(b_try > 0, b_try, 1.0))[None, :]
        b_error = tl.zeros([BLOCK_D], dtype=tl.float32)
        for i_n in range(0, sampled, BLOCK_N):
            o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
            m_n = (o_n < sampled)[:, None]
            b_z = tl.load(p_z + o_n[:, None] * step * D + o_d[None, :], mask=m_n & m_d[None, :], other=0.0)
            b_level = b_z * b_inverse
            b_as_byte = (tl.minimum(tl.maximum(b_level, -TOP), TOP) + MAGIC) - MAGIC
            b_as_nibble = (tl.minimum(tl.maximum(b_level + MIDDLE, 0.0), 2 * MIDDLE) + MAGIC) - MAGIC - MIDDLE
            b_left = tl.where(is_byte[None, :], b_as_byte, b_as_nibble) * b_try[None, :] - b_z
            b_error += tl.sum(tl.where(m_n, b_left * b_left, 0.0), 0)
        better = b_error < b_least
        b_least, b_scale = tl.where(better, b_error, b_least), tl.where(better, b_try, b_scale)
    coded = is_byte | is_nibble
    tl.store(scales + i_jh * D + o_d, tl.where(coded, b_scale, 0.0).to(tl.bfloat16), mask=m_d)
    b_balance = tl.load(balance + tl.load(p_job + BALANCE) + i_h * D + o_d, mask=m_d, other=1.0)
    b_square = b_balance * b_balance
    p_figures = figures + i_jh * 2 * D + o_d
    tl.store(p_figures, b_energy / length.to(tl.float32) / b_square, mask=m_d)
    tl.store(p_figures + D, tl.where(coded, b_least / sampled.to(tl.float32) / b_square, 0.0), mask=m_d)
