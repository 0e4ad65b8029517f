"""The two Triton kernels of decode attention over stock caches with Keys and Values of different width.

The loop over tokens is `decode_attend.attend` with native Keys and Values alone, the merge `decode_kernels.merge`. Every row (batch, KV
head) is cut into equally many splits, so neither kernel reads a table. Naming as in decode_kernels.py.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .decode_attend import attend
from .decode_kernels import merge, queries, store


@triton.jit(
    do_not_specialize=["stored", "per_split", "splits", "stride_kb", "stride_kh", "stride_vb", "stride_vh", "stride_qb"]
)  # a cache that grows must not compile anew
def narrow_split_kernel(
    q,  # [B, HEADS * G, T, K]
    keys,  # [B, HEADS, S, K], the tokens of a head one behind the other
    values,  # [B, HEADS, S, V], likewise
    part_m,  # [N, ROWS] fp32, N = B * HEADS * splits
    part_l,
    part_acc,  # [N, ROWS, V] fp32
    scale,  # logit scale times log2(e)
    stored,  # S
    per_split,  # tokens of a split, the last one's may be fewer
    splits,  # of a row
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,  # in units, of keys and values
    stride_kh,
    stride_vb,
    stride_vh,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KN: tl.constexpr,  # powers of two
    VN: tl.constexpr,
    M: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partials of one split for all query heads of its group; grid (B * HEADS * splits,)."""
    if EARLY:
        gdc_launch_dependents()
    TYPE: tl.constexpr = q.dtype.element_ty
    i_slot = tl.program_id(0).to(tl.int64)
    i_row = i_slot // splits
    i_b = i_row // HEADS
    i_h = i_row % HEADS
    i_start = i_slot % splits * per_split
    i_count = tl.minimum(stored - i_start, per_split).to(tl.int32)
    # Multiplied again here, so that the compiler sees that rows start on 16 bytes whatever S is.
    p_k = keys + (i_b * stride_kb + i_h * stride_kh) * UNIT + i_start * K
    p_v = values + (i_b * stride_vb + i_h * stride_vh) * UNIT + i_start * V
    b_q = queries(q + i_b * stride_qb + i_h * G * stride_qh, stride_qh, stride_qt, G, T * G, K, KN, M, UPCAST)
    # Queries are the last T of S: query t does not see the T - 1 - t tokens behind it.
    b_seen = tl.minimum((stored - i_start).to(tl.int32) - (T - 1 - tl.arange(0, M) // G), i_count)
    b_m, b_l, b_acc, _8, _a, _b = attend(
        b_q, b_q, b_q, b_q, b_q, b_q, b_q, b_q, tl.zeros([M], tl.float32), b_seen,
        p_k, p_k, p_k, p_v, p_v, p_v, K, 0, 0, V, 0, 0, i_count, scale,
        M, KN, 0, 0, VN, 0, 0, VN == V, BLOCK_N, STAGES, False, True, TYPE, UPCAST, PRECISION,
    )  # fmt: skip
    store(part_m, part_l, part_acc, i_slot * (T * G), b_m, b_l, b_acc, T * G, V)


@triton.jit(do_not_specialize=["splits"])
def narrow_merge_kernel(
    part_m,
    part_l,
    part_acc,
    out,  # [B, T, HEADS * G, V]
    splits,
    stride_ob,
    stride_oh,
    stride_ot,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Merge the partials of one row, some of its channels; grid (B * HEADS * T * G, ceil(V / BLOCK_D))."""
    i_first = tl.program_id(0) // (T * G) * splits
    merge(
        part_m, part_l, part_acc, i_first, i_first + splits, out, stride_ob, stride_oh, stride_ot, HEADS, G, T, V, BLOCK_S, BLOCK_D, EARLY
    )
