"""The Triton kernel that codes and lays out directions; its specification is `codes.pack`, which it equals bit for bit."""

import triton
import triton.language as tl

MIDDLE = tl.constexpr(7.5)  # of the 4-bit levels
TOP = tl.constexpr(127.0)
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds an fp32 number to a whole one, halves to even as torch does


@triton.jit
def pack_kernel(
    z,  # fp32 [H, S, D] contiguous
    raw,  # compute dtype [H, S, D] contiguous: what heads store that are raw as a whole
    scales,  # bf16 [H, D] contiguous
    plan,  # int32 [H, 5]: native, byte, nibble, bytes per token of all heads before, whether the head is raw
    out,  # uint8, flat
    out_native,  # the same memory in the compute dtype
    length,
    rows,  # tokens that are stored: `length`, padded
    D: tl.constexpr,
    DP: tl.constexpr,  # next power of two of D
    ITEMSIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every slab of BLOCK_N tokens of one head; grid (H, ceil(rows / BLOCK_N))."""
    i_h = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, DP)
    o_j = tl.arange(0, DP // 2)
    i_native = tl.load(plan + i_h * 5)
    i_byte = tl.load(plan + i_h * 5 + 1)
    i_nibble = tl.load(plan + i_h * 5 + 2)
    i_start = tl.load(plan + i_h * 5 + 3).to(tl.int64) * rows
    is_raw = tl.load(plan + i_h * 5 + 4)
    m_in, m_out = (o_n < length)[:, None], (o_n < rows)[:, None]
    p_z = z + i_h * length * D + o_n[:, None].to(tl.int64) * D
    p_s = scales + i_h * D

    if i_native > 0:
        m_d = (o_d < i_native)[None, :]
        p_native = out_native + i_start // ITEMSIZE + o_n[:, None].to(tl.int64) * i_native + o_d[None, :]
        if is_raw > 0:
            p_raw = raw + i_h * length * D + o_n[:, None].to(tl.int64) * D
            tl.store(p_native, tl.load(p_raw + o_d[None, :], mask=m_in & m_d, other=0.0), mask=m_out & m_d)
        else:
            b_z = tl.load(p_z + o_d[None, :], mask=m_in & m_d, other=0.0)
            tl.store(p_native, b_z.to(out_native.dtype.element_ty), mask=m_out & m_d)
    o_byte = i_start + rows.to(tl.int64) * i_native * ITEMSIZE
    if i_byte > 0:
        m_d = (o_d < i_byte)[None, :]
        b_z = tl.load(p_z + i_native + o_d[None, :], mask=m_in & m_d, other=0.0)
        b_s = tl.load(p_s + i_native + o_d, mask=o_d < i_byte, other=1.0).to(tl.float32)
        b_level = tl.div_rn(b_z, tl.broadcast_to(tl.where(b_s > 0, b_s, 1.0)[None, :], [BLOCK_N, DP]))
        # clamped first: far beyond the range the trick that rounds does not hold
        b_level = (tl.minimum(tl.maximum(b_level, -TOP), TOP) + MAGIC) - MAGIC
        p_byte = out + o_byte + o_n[:, None].to(tl.int64) * i_byte + o_d[None, :]
        tl.store(p_byte, b_level.to(tl.int8).to(tl.uint8, bitcast=True), mask=m_out & m_d)
    o_nibble = o_byte + rows.to(tl.int64) * i_byte
    if i_nibble > 0:
        i_half = i_nibble // 2
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
        p_nibble = out + o_nibble + o_n[:, None].to(tl.int64) * i_half + o_j[None, :]
        tl.store(p_nibble, b_code.to(tl.uint8), mask=m_out & m_j)
