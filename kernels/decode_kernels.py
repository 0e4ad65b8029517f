"""The two Triton kernels of decode attention: partials of one split, and the merge of a row's partials.

Naming: i_ program ids and scalars, o_ offsets, p_ pointers, b_ register blocks, m_ masks. M rows are the packed
(new token t, query head g of the group) pairs, row = t * G + g, so that the heads of a group share every load.

A pair of raw or coded Keys with raw or coded Values is one body of the split kernel, compiled if the layer has it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode_attend import attend, coded
from .decode_codes import coded_apart
from .table import (
    BASIS,
    COUNT,
    ENTRY,
    FIELDS,
    KEY,
    NONE,
    OFFSET,
    ROW,
    SLOT,
    SPLIT_FIELDS,
    SPLIT_KIND,
    START,
    VALUE,
    Kind,
)

C_SLOT, C_ROW, C_KIND, C_COUNT = tl.constexpr(SLOT), tl.constexpr(ROW), tl.constexpr(SPLIT_KIND), tl.constexpr(COUNT)
C_START, C_ENTRY, C_RECORD, WINDOW = tl.constexpr(START), tl.constexpr(ENTRY), tl.constexpr(SPLIT_FIELDS), tl.constexpr(int(Kind.WINDOW))
C_KEY, C_VALUE, C_FIELDS, C_OFFSET = tl.constexpr(KEY), tl.constexpr(VALUE), tl.constexpr(FIELDS), tl.constexpr(OFFSET)
C_BASIS, C_NONE = tl.constexpr(BASIS), tl.constexpr(NONE)


@triton.jit
def split_kernel(
    q,
    records,
    table,
    codes,
    bases,
    own_bases,
    scales,
    means,
    own_means,
    window_keys,
    window_values,
    window_lengths,
    new_keys,  # [B, Hkv, T, D], written to the window first if APPEND; else anything
    new_values,
    part_m,  # [N, ROWS] fp32
    part_l,  # [N, ROWS] fp32
    part_acc,  # [N, ROWS, D] fp32
    scale,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_wb,
    stride_wh,
    stride_kb,  # of new_keys and new_values
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # next power of two of D
    M: tl.constexpr,  # query rows of products that take sixteen and more
    APART_M: tl.constexpr,  # of those that take eight and more
    KN: tl.constexpr,
    K8: tl.constexpr,
    K4: tl.constexpr,
    VN: tl.constexpr,
    V8: tl.constexpr,
    V4: tl.constexpr,
    CODED_KEYS: tl.constexpr,  # some segment has coded Keys and raw Values
    CODED_VALUES: tl.constexpr,  # raw Keys and coded Values
    CODED_BOTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    DENSE_BLOCK_N: tl.constexpr,
    DENSE_STAGES: tl.constexpr,
    APART: tl.constexpr,  # warps of a coded split that go their own ways, or 0
    APPEND: tl.constexpr,
    EARLY: tl.constexpr,  # the merge kernel may start before this one has ended
    TWO_PART: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partials of one split for all query heads of its group; grid (splits,)."""
    if EARLY:
        gdc_launch_dependents()
    ROWS: tl.constexpr = T * G
    TYPE: tl.constexpr = q.dtype.element_ty
    record = records + tl.program_id(0).to(tl.int64) * C_RECORD
    i_slot = tl.load(record + C_SLOT)
    i_row = tl.load(record + C_ROW)
    i_count = tl.load(record + C_COUNT).to(tl.int32)
    i_start = tl.load(record + C_START)
    i_entry = tl.load(record + C_ENTRY)
    i_b = i_row // HEADS
    i_h = i_row % HEADS
    entry = table + i_entry * C_FIELDS
    # The window has no entry, and both of its sides are raw.
    raw_keys = tl.load(entry + C_KEY + C_BASIS, mask=i_entry >= 0, other=C_NONE) == C_NONE
    raw_values = tl.load(entry + C_VALUE + C_BASIS, mask=i_entry >= 0, other=C_NONE) == C_NONE

    p_q = q + i_b * stride_qb + i_h * G * stride_qh
    i_out = i_slot * ROWS
    if raw_keys & raw_values:
        b_seen = tl.zeros([M], tl.int32) + i_count
        if tl.load(record + C_KIND) == WINDOW:
            i_length = tl.load(window_lengths + i_b)
            i_first = i_start.to(tl.int32)
            o_window = i_b * stride_wb + i_h * stride_wh + i_start * D
            p_k = window_keys + o_window
            p_v = window_values + o_window
            # The plan covers the window's capacity; what is filled is known only here.
            i_count = tl.maximum(tl.minimum(i_count, i_length - i_first), 0)
            b_seen = tl.minimum(i_length - i_first - (T - 1 - tl.arange(0, M) // G), i_count)
            if APPEND:
                i_at = i_length - T - i_first  # where the first new token goes, counted from the split's first
                _append(new_keys + i_b * stride_kb + i_h * stride_kh, stride_kt, p_k, i_at, i_count, T, D, DP)
                _append(new_values + i_b * stride_vb + i_h * stride_vh, stride_vt, p_v, i_at, i_count, T, D, DP)
                tl.debug_barrier()  # all threads see what each has written
        else:
            p_k = (codes + tl.load(entry + C_KEY + C_OFFSET) // 16 * 16).to(tl.pointer_type(TYPE)) + i_start * D
            p_v = (codes + tl.load(entry + C_VALUE + C_OFFSET) // 16 * 16).to(tl.pointer_type(TYPE)) + i_start * D
        b_q = queries(p_q, stride_qh, stride_qt, G, ROWS, D, DP, M, UPCAST)
        b_m, b_l, b_acc, _8, _a, _b = attend(
            b_q, b_q, b_q, b_q, b_q, b_q, b_q, b_q, tl.zeros([M], tl.float32), b_seen,
            p_k, p_k, p_k, p_v, p_v, p_v, D, 0, 0, D, 0, 0, i_count, scale,
            M, DP, 0, 0, DP, 0, 0, DP == D, DENSE_BLOCK_N, DENSE_STAGES, False, True, TYPE, UPCAST, PRECISION,
        )  # fmt: skip
        store(part_m, part_l, part_acc, i_out, b_m, b_l, b_acc, ROWS, D)
    else:
        # Nested, because a constant of compilation must not meet a number of the GPU in one condition.
        if CODED_BOTH:  # noqa: SIM102
            if (raw_keys | raw_values) == 0:
                _coded(
                    p_q, stride_qh, stride_qt, entry, codes, bases, own_bases, scales, means, own_means, i_start, i_count, scale,
                    part_m, part_l, part_acc, i_out, G, ROWS, D, DP, M, APART_M, KN, K8, K4, VN, V8, V4, False, False,
                    BLOCK_N, STAGES, APART, TWO_PART, TYPE, UPCAST, PRECISION,
                )  # fmt: skip
        if CODED_KEYS:  # noqa: SIM102
            if raw_values:
                _coded(
                    p_q, stride_qh, stride_qt, entry, codes, bases, own_bases, scales, means, own_means, i_start, i_count, scale,
                    part_m, part_l, part_acc, i_out, G, ROWS, D, DP, M, APART_M, KN, K8, K4, VN, V8, V4, False, True,
                    BLOCK_N, STAGES, APART, TWO_PART, TYPE, UPCAST, PRECISION,
                )  # fmt: skip
        if CODED_VALUES:  # noqa: SIM102
            if raw_keys:
                _coded(
                    p_q, stride_qh, stride_qt, entry, codes, bases, own_bases, scales, means, own_means, i_start, i_count, scale,
                    part_m, part_l, part_acc, i_out, G, ROWS, D, DP, M, APART_M, KN, K8, K4, VN, V8, V4, True, False,
                    BLOCK_N, STAGES, APART, TWO_PART, TYPE, UPCAST, PRECISION,
                )  # fmt: skip


@triton.jit
def _append(p_new, stride, p_window, i_at, i_count, T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Copies those of T new tokens that belong among `i_count` tokens of the window, the first of them to place `i_at`."""
    o_d = tl.arange(0, DP)
    for t in tl.static_range(T):
        o_to = i_at + t + tl.zeros([DP], tl.int32)
        m = (o_d < D) & (o_to >= 0) & (o_to < i_count)
        tl.store(p_window + o_to * D + o_d, tl.load(p_new + t * stride + o_d, mask=m), mask=m)


@triton.jit
def queries(
    p_q, stride_qh, stride_qt,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The group's query rows: [M, DP], zero beyond ROWS and D."""
    o_m = tl.arange(0, M)
    o_d = tl.arange(0, DP)
    o_q = o_m % G * stride_qh + o_m // G * stride_qt
    b_q = tl.load(p_q + o_q[:, None] + o_d[None, :], mask=(o_m < ROWS)[:, None] & (o_d < D)[None, :], other=0.0)
    return b_q.to(tl.float32) if UPCAST else b_q


@triton.jit
def store(part_m, part_l, part_acc, i_out, b_m, b_l, b_acc, ROWS: tl.constexpr, D: tl.constexpr):
    """Partials m, l [M] and acc [M, DP] go to rows `i_out` and following."""
    M: tl.constexpr = b_acc.shape[0]
    o_m = tl.arange(0, M)
    o_d = tl.arange(0, b_acc.shape[1])
    tl.store(part_m + i_out + o_m, b_m, mask=o_m < ROWS)
    tl.store(part_l + i_out + o_m, b_l, mask=o_m < ROWS)
    tl.store(part_acc + (i_out + o_m)[:, None] * D + o_d[None, :], b_acc, mask=(o_m < ROWS)[:, None] & (o_d < D)[None, :])


@triton.jit
def _coded(
    p_q, stride_qh, stride_qt, entry, codes, bases, own_bases, scales, means, own_means, i_start, i_count, scale,
    part_m, part_l, part_acc, i_out,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, APART_M: tl.constexpr,
    KN: tl.constexpr, K8: tl.constexpr, K4: tl.constexpr, VN: tl.constexpr, V8: tl.constexpr, V4: tl.constexpr,
    RAW_KEYS: tl.constexpr, RAW_VALUES: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, APART: tl.constexpr,
    TWO_PART: tl.constexpr, TYPE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A split of a segment of which at least one side is coded, with warps together or apart."""
    if APART:
        b_q = tl.trans(queries(p_q, stride_qh, stride_qt, G, ROWS, D, DP, APART_M, UPCAST))
        # Tiles of coded Values are halved there, and a product takes 16 and more.
        b_m, b_l, b_acc = coded_apart(
            b_q, entry, codes, bases, own_bases, scales, means, own_means, i_start, i_count, scale, D, DP, APART_M,
            DP if RAW_KEYS else KN, 0 if RAW_KEYS else K8, 0 if RAW_KEYS else K4,
            DP if RAW_VALUES else VN, 0 if RAW_VALUES else 32 if V8 == 16 else V8, 0 if RAW_VALUES else 32 if V4 == 16 else V4,
            RAW_KEYS, RAW_VALUES, BLOCK_N, STAGES, APART, TWO_PART, TYPE, UPCAST,
        )  # fmt: skip
        store(part_m, part_l, part_acc, i_out, b_m, b_l, tl.trans(b_acc), ROWS, D)
    else:
        b_q = queries(p_q, stride_qh, stride_qt, G, ROWS, D, DP, M, UPCAST)
        b_m, b_l, b_acc = coded(
            b_q, entry, codes, bases, own_bases, scales, means, own_means, i_start, i_count, scale,
            D, DP, M, KN, K8, K4, VN, V8, V4, RAW_KEYS, RAW_VALUES, BLOCK_N, STAGES, TWO_PART, TYPE, UPCAST, PRECISION,
        )  # fmt: skip
        store(part_m, part_l, part_acc, i_out, b_m, b_l, b_acc, ROWS, D)


@triton.jit(do_not_specialize=["unused"])
def merge_kernel(
    part_m,
    part_l,
    part_acc,
    ranges,
    unused,  # last slots of every row
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
    EARLY: tl.constexpr,  # started before the partials are there
):
    """Merge the partials of one row, some of its channels; grid (B * Hkv * T * G, ceil(D / BLOCK_D))."""
    i_row = tl.program_id(0) // (T * G)
    merge(
        part_m, part_l, part_acc, tl.load(ranges + i_row), tl.load(ranges + i_row + 1) - unused, out, stride_ob, stride_oh, stride_ot,
        HEADS, G, T, D, BLOCK_S, BLOCK_D, EARLY,
    )  # fmt: skip


@triton.jit
def merge(
    part_m, part_l, part_acc, i_first, i_last, out, stride_ob, stride_oh, stride_ot,
    HEADS: tl.constexpr, G: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """What a program of a merge kernel does, given that the partials of its row are `i_first` to `i_last`."""
    ROWS: tl.constexpr = T * G
    i_row = tl.program_id(0) // ROWS
    i_m = tl.program_id(0) % ROWS
    if EARLY:
        gdc_wait()
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
