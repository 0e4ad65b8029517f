"""The two Triton kernels of decode attention: partials of one split, and the merge of a row's partials.

Naming: i_ program ids and scalars, o_ offsets, p_ pointers, b_ register blocks, m_ masks. M rows are the packed
(new token t, query head g of the group) pairs, row = t * G + g, so that the heads of a group share every load.
"""

import triton
import triton.language as tl

from .table import (
    BASIS_UNITS,
    COUNT,
    KEY_UNITS,
    MEAN,
    RANK_UNITS,
    ROW,
    SLOT,
    SPLIT_FIELDS,
    SPLIT_KIND,
    START,
    STRIDE_UNITS,
    UNIT,
    VALUE_UNITS,
    Kind,
)

C_SLOT, C_ROW, C_KIND, C_COUNT = tl.constexpr(SLOT), tl.constexpr(ROW), tl.constexpr(SPLIT_KIND), tl.constexpr(COUNT)
C_START, C_KEY, C_VALUE, C_RANK = tl.constexpr(START), tl.constexpr(KEY_UNITS), tl.constexpr(VALUE_UNITS), tl.constexpr(RANK_UNITS)
C_BASIS, C_STRIDE, C_MEAN = tl.constexpr(BASIS_UNITS), tl.constexpr(STRIDE_UNITS), tl.constexpr(MEAN)
C_FIELDS, C_UNIT = tl.constexpr(SPLIT_FIELDS), tl.constexpr(UNIT)
CODED, WINDOW = tl.constexpr(int(Kind.CODED)), tl.constexpr(int(Kind.WINDOW))


@triton.jit
def _attend(
    b_q,  # [M, K] query in the coordinates of the stored Keys
    b_low,  # [M, K] what rounding b_q lost, read if TWO_PART
    b_bias,  # [M] fp32, already times the scale
    b_seen,  # [M] int32, tokens of this split each row may see
    p_k,  # first Key of the split
    p_v,  # first Value of the split
    i_count,  # tokens of the split
    i_width,  # numbers stored per Key, a multiple of 8, at most K
    scale,  # logit scale times log2(e)
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    TWO_PART: tl.constexpr,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over one split: m [M] in log2 units, l [M], acc [M, DP], all fp32."""
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, K)
    o_d = tl.arange(0, DP)
    b_m = tl.full([M], float("-inf"), tl.float32)
    b_l = tl.zeros([M], tl.float32)
    b_acc = tl.zeros([M, DP], tl.float32)
    # Lanes past the stored width are masked: they move no bytes and add zero.
    p_k += o_n[:, None] * i_width + o_k[None, :]  # [BLOCK_N, K]
    p_v += o_n[:, None] * D + o_d[None, :]  # [BLOCK_N, DP]
    m_k = (o_k < i_width)[None, :]
    m_d = (o_d < D)[None, :]
    for i_n in tl.range(0, i_count, BLOCK_N, num_stages=STAGES):
        m_n = i_n + o_n < i_count
        b_k = tl.load(p_k, mask=m_n[:, None] & m_k, other=0.0)
        # Values past the end are masked too: a probability of 0 times a NaN is NaN.
        m_v = m_n[:, None] if DP == D else m_n[:, None] & m_d
        b_v = tl.load(p_v, mask=m_v, other=0.0)
        if UPCAST:
            b_k = b_k.to(tl.float32)
            b_v = b_v.to(tl.float32)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [M, BLOCK_N]
        if TWO_PART:
            b_s = tl.dot(b_low, tl.trans(b_k), b_s, input_precision=PRECISION)
        b_s = b_s * scale + b_bias[:, None]
        m_s = (i_n + o_n)[None, :] < b_seen[:, None] if CAUSAL else m_n[None, :]
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_top = tl.maximum(b_m, tl.max(b_s, 1))
        # A row that has seen nothing keeps -inf; subtracting 0 instead avoids -inf minus -inf.
        b_safe = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_alpha = tl.exp2(b_m - b_safe)
        b_p = tl.exp2(b_s - b_safe[:, None])
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_acc = b_acc * b_alpha[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        b_m = b_top
        p_k += BLOCK_N * i_width
        p_v += BLOCK_N * D
    return b_m, b_l, b_acc


@triton.jit
def split_kernel(
    q,
    records,
    keys,
    values,
    bases,
    means,
    window_keys,
    window_values,
    window_lengths,
    part_m,  # [N, ROWS] fp32
    part_l,  # [N, ROWS] fp32
    part_acc,  # [N, ROWS, D] fp32
    scale,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_wb,
    stride_wh,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # next power of two of D
    M: tl.constexpr,
    RANK_TILE: tl.constexpr,  # 0: no coded segments
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    DENSE_BLOCK_N: tl.constexpr,
    DENSE_STAGES: tl.constexpr,
    TWO_PART: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partials of one split for all query heads of its group; grid (splits,)."""
    ROWS: tl.constexpr = T * G
    record = records + tl.program_id(0).to(tl.int64) * C_FIELDS
    i_slot = tl.load(record + C_SLOT)
    i_row = tl.load(record + C_ROW)
    i_kind = tl.load(record + C_KIND)
    i_count = tl.load(record + C_COUNT).to(tl.int32)
    # Stored in units of 8 elements, so that the compiler sees that every access is 16-byte aligned.
    o_key = tl.load(record + C_KEY) * C_UNIT
    o_value = tl.load(record + C_VALUE) * C_UNIT
    i_b = i_row // HEADS
    i_h = i_row % HEADS

    o_m = tl.arange(0, M)
    o_d = tl.arange(0, DP)
    m_m = o_m < ROWS
    m_d = o_d < D
    o_q = (i_h * G + o_m % G) * stride_qh + (o_m // G) * stride_qt  # [M]
    b_q = tl.load(q + i_b * stride_qb + o_q[:, None] + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)  # [M, DP]

    if (i_kind == CODED) & (RANK_TILE > 0):
        # The conditional expressions only keep an unused body compilable when RANK_TILE is 0.
        WIDTH: tl.constexpr = RANK_TILE if RANK_TILE > 0 else 16
        i_rank = tl.load(record + C_RANK).to(tl.int32) * C_UNIT
        o_basis = tl.load(record + C_BASIS) * C_UNIT
        i_stride = tl.load(record + C_STRIDE).to(tl.int32) * C_UNIT
        o_r = tl.arange(0, WIDTH)
        p_basis = bases + o_basis + o_d[:, None] * i_stride + o_r[None, :]
        b_basis = tl.load(p_basis, mask=m_d[:, None] & (o_r < i_rank)[None, :], other=0.0)  # [DP, WIDTH]
        b_mean = tl.load(means + tl.load(record + C_MEAN) + o_d, mask=m_d, other=0.0)  # [DP]
        b_bias = tl.sum(b_q.to(tl.float32) * b_mean[None, :], 1) * scale  # [M]
        if UPCAST:
            b_rotated = tl.dot(b_q.to(tl.float32), b_basis.to(tl.float32), input_precision=PRECISION)
        else:
            b_rotated = tl.dot(b_q, b_basis, input_precision=PRECISION)  # [M, WIDTH] fp32
        b_high = b_rotated.to(keys.dtype.element_ty)
        b_low = (b_rotated - b_high.to(tl.float32)).to(keys.dtype.element_ty)
        if UPCAST:
            b_high = b_high.to(tl.float32)
            b_low = b_low.to(tl.float32)
        b_seen = tl.zeros([M], tl.int32) + i_count
        b_m, b_l, b_acc = _attend(
            b_high, b_low, b_bias, b_seen, keys + o_key, values + o_value, i_count, i_rank, scale,
            D, DP, M, WIDTH, BLOCK_N, STAGES, TWO_PART, False, UPCAST, PRECISION,
        )  # fmt: skip
    else:
        p_k = keys + o_key
        p_v = values + o_value
        b_seen = tl.zeros([M], tl.int32) + i_count
        if i_kind == WINDOW:
            i_start = tl.load(record + C_START).to(tl.int32)
            i_length = tl.load(window_lengths + i_b)
            o_window = i_b * stride_wb + i_h * stride_wh + i_start.to(tl.int64) * D
            p_k = window_keys + o_window
            p_v = window_values + o_window
            # The plan covers the window's capacity; what is filled is known only here.
            i_count = tl.maximum(tl.minimum(i_count, i_length - i_start), 0)
            b_seen = tl.minimum(i_length - i_start - (T - 1 - o_m // G), i_count)
        if UPCAST:
            b_q = b_q.to(tl.float32)
        b_bias = tl.zeros([M], tl.float32)
        b_m, b_l, b_acc = _attend(
            b_q, b_q, b_bias, b_seen, tl.multiple_of(p_k, 16), tl.multiple_of(p_v, 16), i_count, D, scale,
            D, DP, M, DP, DENSE_BLOCK_N, DENSE_STAGES, False, True, UPCAST, PRECISION,
        )  # fmt: skip

    o_out = i_slot * ROWS + o_m
    tl.store(part_m + o_out, b_m, mask=m_m)
    tl.store(part_l + o_out, b_l, mask=m_m)
    tl.store(part_acc + o_out[:, None] * D + o_d[None, :], b_acc, mask=m_m[:, None] & m_d[None, :])


@triton.jit
def merge_kernel(
    part_m,
    part_l,
    part_acc,
    ranges,
    out,
    stride_ob,
    stride_oh,
    stride_ot,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge the partials of one row, some of its channels; grid (B * Hkv * T * G, ceil(D / BLOCK_D))."""
    ROWS: tl.constexpr = T * G
    i_row = tl.program_id(0) // ROWS
    i_m = tl.program_id(0) % ROWS
    i_first = tl.load(ranges + i_row)
    i_last = tl.load(ranges + i_row + 1)
    o_s = tl.arange(0, BLOCK_S)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_top = tl.full([], float("-inf"), tl.float32)
    i_mass = tl.zeros([], tl.float32)
    b_acc = tl.zeros([BLOCK_D], tl.float32)
    for i_s in range(i_first, i_last, BLOCK_S):
        m_s = i_s + o_s < i_last
        o_part = (i_s + o_s).to(tl.int64) * ROWS + i_m
        b_m = tl.load(part_m + o_part, mask=m_s, other=float("-inf"))
        b_l = tl.load(part_l + o_part, mask=m_s, other=0.0)
        b_part = tl.load(part_acc + o_part[:, None] * D + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0)
        i_new = tl.maximum(i_top, tl.max(b_m, 0))
        i_safe = tl.where(i_new == float("-inf"), 0.0, i_new)
        i_alpha = tl.exp2(i_top - i_safe)
        b_w = tl.exp2(b_m - i_safe)
        i_mass = i_mass * i_alpha + tl.sum(b_w * b_l, 0)
        b_acc = b_acc * i_alpha + tl.sum(b_w[:, None] * b_part, 0)
        i_top = i_new
    # A row that sees nothing at all gets zeros.
    b_out = b_acc / tl.where(i_mass == 0.0, 1.0, i_mass)
    i_b = (i_row // HEADS).to(tl.int64)
    i_h = (i_row % HEADS) * G + i_m % G
    p_out = out + i_b * stride_ob + i_h * stride_oh + (i_m // G) * stride_ot + o_d
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_d)
