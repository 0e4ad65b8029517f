"""The Triton kernel that codes and lays out directions; its specification is `codes.pack`, which it equals bit for bit."""

import triton
import triton.language as tl

MIDDLE = tl.constexpr(7.5)  # of the 4-bit levels
TOP = tl.constexpr(127.0)
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds an fp32 number to a whole one, halves to even as torch does


# fields of a job: where its tensors begin, in numbers from the first job's (codes: bytes from the start of the pool), tokens, and tokens
# that are stored; then for every head three numbers of slabs, bytes per token of all heads before, and whether the head is raw
Z, RAW, RAW_STRIDE_H, RAW_STRIDE_N, SCALES, OUT, LENGTH, ROWS = (tl.constexpr(n) for n in range(8))
HEADS = tl.constexpr(8)


@triton.jit
def pack_kernel(
    z,  # fp32 [H, S, D] contiguous, of the first job, as all that follow
    raw,  # compute dtype [H, S, D]: what heads store that are raw as a whole
    scales,  # bf16 [H, D] contiguous
    jobs,  # int64 [J, W]
    out,  # uint8, flat
    out_native,  # the same memory in the compute dtype
    heads,
    width,  # W
    D: tl.constexpr,
    DP: tl.constexpr,  # next power of two of D
    ITEMSIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every slab of BLOCK_N tokens of one head; grid (J * H, ceil(most rows / BLOCK_N))."""
    i_jh = tl.program_id(0).to(tl.int64)
    p_job = jobs + i_jh // heads * width
    i_h = i_jh % heads
    p_head = p_job + HEADS + i_h * 5
    length, rows = tl.load(p_job + LENGTH), tl.multiple_of(tl.load(p_job + ROWS), 2)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    o_d = tl.arange(0, DP)
    o_j = tl.arange(0, DP // 2)
    i_native = tl.multiple_of(tl.load(p_head), 8)
    i_byte = tl.multiple_of(tl.load(p_head + 1), 8)
    i_nibble = tl.multiple_of(tl.load(p_head + 2), 16)
    i_start = tl.multiple_of(tl.load(p_job + OUT), 16) + tl.multiple_of(tl.load(p_head + 3), 8) * rows
    is_raw = tl.load(p_head + 4)
    m_in, m_out = (o_n < length)[:, None], (o_n < rows)[:, None]
    p_z = z + tl.multiple_of(tl.load(p_job + Z), 8) + i_h * length * D + o_n[:, None] * D
    p_s = scales + tl.load(p_job + SCALES) + i_h * D

    if i_native > 0:
        m_d = (o_d < i_native)[None, :]
        p_native = out_native + i_start // ITEMSIZE + o_n[:, None] * i_native + o_d[None, :]
        if is_raw > 0:
            p_raw = raw + tl.load(p_job + RAW) + i_h * tl.load(p_job + RAW_STRIDE_H) + o_n[:, None] * tl.load(p_job + RAW_STRIDE_N)
            tl.store(p_native, tl.load(p_raw + o_d[None, :], mask=m_in & m_d, other=0.0), mask=m_out & m_d)
        else:
            b_z = tl.load(p_z + o_d[None, :], mask=m_in & m_d, other=0.0)
            tl.store(p_native, b_z.to(out_native.dtype.element_ty), mask=m_out & m_d)
    o_byte = i_start + rows * i_native * ITEMSIZE
    if i_byte > 0:
        m_d = (o_d < i_byte)[None, :]
        b_z = tl.load(p_z + i_native + o_d[None, :], mask=m_in & m_d, other=0.0)
        b_s = tl.load(p_s + i_native + o_d, mask=o_d < i_byte, other=1.0).to(tl.float32)
        b_level = tl.div_rn(b_z, tl.broadcast_to(tl.where(b_s > 0, b_s, 1.0)[None, :], [BLOCK_N, DP]))
        # clamped first: far beyond the range the trick that rounds does not hold
        b_level = (tl.minimum(tl.maximum(b_level, -TOP), TOP) + MAGIC) - MAGIC
        p_byte = out + o_byte + o_n[:, None] * i_byte + o_d[None, :]
        tl.store(p_byte, b_level.to(tl.int8).to(tl.uint8, bitcast=True), mask=m_out & m_d)
    o_nibble = o_byte + rows * i_byte
    if i_nibble > 0:
        i_half = tl.multiple_of(i_nibble // 2, 8)
        m_j = (o_j < i_half)[None, :]
        i_first = i_native + i_byte
        b_low = tl.load(p_z + i_first + o_j[None, :], mask=m_in & m_j, other=0.0)
        b_high = tl.load(p_z + i_first + i_half + o_j[None, :], mask=m_in & m_j, other=0.0)
        b_sl = tl.load(p_s + i_first + o_j, mask=o_j < i_half, other=1.0).to(tl.float32)
        b_sh = tl.load(p_s + i_first + i_half + o_j, mask=o_j < i_half, other=1.0).to(tl.float32)
        b_low = tl.div_rn(b_low, tl.broadcast_to(tl.where(b_sl > 0, b_sl, 1.0)[None, :], [BLOCK_N, DP // 2])) + MIDDLE
        b_high = tl.div_rn(b_high, tl.broadcast_to(tl.where(b_sh > 0, b_sh, 1.0)[None, :], [BLOCK_N, DP // 2])) + MIDDLE
        b_low = (tl.minimum(tl.maximum(b_low, 0.0), 2 * MIDDLE) + MAGIC) - MAGIC
        b_high = (tl.minimum(tl.maximum(b_high, 0.0), 2 * MIDDLE) + MAGIC) - MAGIC
        b_code = b_low.to(tl.int32) | (b_high.to(tl.int32) << 4)
        p_nibble = out + o_nibble + o_n[:, None] * i_half + o_j[None, :]
        tl.store(p_nibble, b_code.to(tl.uint8), mask=m_out & m_j)
