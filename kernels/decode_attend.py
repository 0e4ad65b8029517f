"""One split of a segment in Triton: the online softmax over its tokens, and the rotations before and after it.

KN, K8, K4 and VN, V8, V4 are the tiles of native, 8-bit and 4-bit Keys and Values (`decode_sides.py`). Raw numbers are a native slab of
width D. 4-bit levels u - 7.5 enter the products as whole numbers u - 8; the missing half is added to the sums, from the query as it was
rounded and from the probabilities as they were rounded, so nothing is lost by it.
"""

import triton
import triton.language as tl

from .decode_sides import headroom, largest, mean, nibbles, place, rotated, slabs, two_parts, unrotated
from .table import KEY, LENGTH, SCALES, VALUE

C_LENGTH, C_KEY, C_VALUE, C_SCALES = tl.constexpr(LENGTH), tl.constexpr(KEY), tl.constexpr(VALUE), tl.constexpr(SCALES)


@triton.jit
def _score(b_s, b_high, b_low, b_k, TWO_PART: tl.constexpr, PRECISION: tl.constexpr):
    """Adds the logits of one slab of the Keys, [M, BLOCK_N]."""
    b_s = tl.dot(b_high, tl.trans(b_k), b_s, input_precision=PRECISION)
    if TWO_PART:
        b_s = tl.dot(b_low, tl.trans(b_k), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def attend(
    b_qn,  # [M, KN] query in the coordinates of the native Keys
    b_ln,  # what rounding it lost, read if TWO_PART
    b_q8,  # [M, K8]
    b_l8,
    b_qa,  # [M, K4] of the low halves of the 4-bit Keys
    b_la,
    b_qb,  # [M, K4] of the high halves
    b_lb,
    b_bias,  # [M] fp32, already times the scale
    b_seen,  # [M] int32, tokens of this split each row may see
    p_kn,  # the split's first token in each slab
    p_k8,
    p_k4,
    p_vn,
    p_v8,
    p_v4,
    i_kn,  # the slabs' widths in memory
    i_k8,
    i_k4,
    i_vn,
    i_v8,
    i_v4,
    i_count,  # tokens of the split
    scale,  # logit scale times log2(e)
    M: tl.constexpr,
    KN: tl.constexpr,
    K8: tl.constexpr,
    K4: tl.constexpr,
    VN: tl.constexpr,
    V8: tl.constexpr,
    V4: tl.constexpr,
    VALUES_FILL: tl.constexpr,  # native Values are as wide as their tile
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    TWO_PART: tl.constexpr,
    CAUSAL: tl.constexpr,
    TYPE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over one split: m [M] in log2 units, l [M], and per slab of the Values acc [M, tile], all fp32."""
    OPERAND: tl.constexpr = tl.float32 if UPCAST else TYPE
    o_n = tl.arange(0, BLOCK_N)
    b_m = tl.full([M], float("-inf"), tl.float32)
    b_l = tl.zeros([M], tl.float32)
    # The conditional expressions only give a slab that does not occur a shape; it is not carried through the loop.
    b_an = tl.zeros([M, VN if VN > 0 else 16], tl.float32)
    b_a8 = tl.zeros([M, V8 if V8 > 0 else 16], tl.float32)
    b_aa = tl.zeros([M, V4 if V4 > 0 else 16], tl.float32)
    b_ab = tl.zeros([M, V4 if V4 > 0 else 16], tl.float32)
    # Lanes past a slab's width are masked: they move no bytes, and their queries, scales or bases are zero.
    if KN > 0:
        o_kn = tl.arange(0, KN)
        p_kn += o_n[:, None] * i_kn + o_kn[None, :]
    if K8 > 0:
        o_k8 = tl.arange(0, K8)
        p_k8 += o_n[:, None] * i_k8 + o_k8[None, :]
    if K4 > 0:
        o_k4 = tl.arange(0, K4)
        p_k4 += o_n[:, None] * i_k4 + o_k4[None, :]
    if VN > 0:
        o_vn = tl.arange(0, VN)
        p_vn += o_n[:, None] * i_vn + o_vn[None, :]
    if V8 > 0:
        o_v8 = tl.arange(0, V8)
        p_v8 += o_n[:, None] * i_v8 + o_v8[None, :]
    if V4 > 0:
        o_v4 = tl.arange(0, V4)
        p_v4 += o_n[:, None] * i_v4 + o_v4[None, :]
    for i_n in tl.range(0, i_count, BLOCK_N, num_stages=STAGES):
        m_n = i_n + o_n < i_count
        if KN > 0:
            b_kn = tl.load(p_kn, mask=m_n[:, None] & (o_kn < i_kn)[None, :], other=0.0).to(OPERAND)
            p_kn += BLOCK_N * i_kn
        if K8 > 0:
            b_k8 = tl.load(p_k8, mask=m_n[:, None] & (o_k8 < i_k8)[None, :], other=0).to(OPERAND)
            p_k8 += BLOCK_N * i_k8
        if K4 > 0:
            b_k4 = tl.load(p_k4, mask=m_n[:, None] & (o_k4 < i_k4)[None, :], other=0)
            p_k4 += BLOCK_N * i_k4
        if VN > 0:
            # Masked past the end too: a probability of 0 times a NaN is NaN.
            m_vn = m_n[:, None] if VALUES_FILL else m_n[:, None] & (o_vn < i_vn)[None, :]
            b_vn = tl.load(p_vn, mask=m_vn, other=0.0).to(OPERAND)
            p_vn += BLOCK_N * i_vn
        if V8 > 0:
            b_v8 = tl.load(p_v8, mask=m_n[:, None] & (o_v8 < i_v8)[None, :], other=0).to(OPERAND)
            p_v8 += BLOCK_N * i_v8
        if V4 > 0:
            b_v4 = tl.load(p_v4, mask=m_n[:, None] & (o_v4 < i_v4)[None, :], other=0)
            p_v4 += BLOCK_N * i_v4

        b_s = tl.zeros([M, BLOCK_N], tl.float32)
        if KN > 0:
            b_s = _score(b_s, b_qn, b_ln, b_kn, TWO_PART, PRECISION)
        if K8 > 0:
            b_s = _score(b_s, b_q8, b_l8, b_k8, TWO_PART, PRECISION)
        if K4 > 0:
            b_ka, b_kb = nibbles(b_k4, OPERAND)
            b_s = _score(b_s, b_qa, b_la, b_ka, TWO_PART, PRECISION)
            b_s = _score(b_s, b_qb, b_lb, b_kb, TWO_PART, PRECISION)
        b_s = b_s * scale + b_bias[:, None]
        m_s = (i_n + o_n)[None, :] < b_seen[:, None] if CAUSAL else m_n[None, :]
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_top = tl.maximum(b_m, tl.max(b_s, 1))
        # A row that has seen nothing keeps -inf; subtracting 0 instead avoids -inf minus -inf.
        b_safe = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_alpha = tl.exp2(b_m - b_safe)
        b_p = tl.exp2(b_s - b_safe[:, None])
        b_m = b_top
        b_w = b_p.to(OPERAND)
        # The halves that 4-bit Values lack make l / 2, and there l has to be the sum of what the product sees.
        b_l = b_l * b_alpha + tl.sum(b_w.to(tl.float32) if V4 > 0 else b_p, 1)
        if VN > 0:
            b_an = tl.dot(b_w, b_vn, b_an * b_alpha[:, None], input_precision=PRECISION)
        if V8 > 0:
            b_a8 = tl.dot(b_w, b_v8, b_a8 * b_alpha[:, None], input_precision=PRECISION)
        if V4 > 0:
            b_va, b_vb = nibbles(b_v4, OPERAND)
            b_aa = tl.dot(b_w, b_va, b_aa * b_alpha[:, None], input_precision=PRECISION)
            b_ab = tl.dot(b_w, b_vb, b_ab * b_alpha[:, None], input_precision=PRECISION)
    return b_m, b_l, b_an, b_a8, b_aa, b_ab


@triton.jit
def coded(
    b_q,  # [M, DP]
    entry,  # the segment's row of the table
    codes,
    bases,
    own_bases,
    scales,
    means,
    own_means,
    i_start,
    i_count,
    scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    KN: tl.constexpr,
    K8: tl.constexpr,
    K4: tl.constexpr,
    VN: tl.constexpr,
    V8: tl.constexpr,
    V4: tl.constexpr,
    RAW_KEYS: tl.constexpr,
    RAW_VALUES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    TWO_PART: tl.constexpr,
    TYPE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partials m, l [M] and acc [M, DP] of a split of which at least one side is coded."""
    i_length = tl.load(entry + C_LENGTH)
    p_key = entry + C_KEY
    p_value = entry + C_VALUE
    p_kn, p_k8, p_k4, i_kn, i_k8, i_k4 = slabs(p_key, codes, i_length, i_start, TYPE)
    p_vn, p_v8, p_v4, i_vn, i_v8, i_v4 = slabs(p_value, codes, i_length, i_start, TYPE)
    b_bias = tl.zeros([M], tl.float32)
    b_qn = b_q
    b_ln = b_q
    b_q8 = b_q
    b_l8 = b_q
    b_qa = b_q
    b_la = b_q
    b_qb = b_q
    b_lb = b_q
    if not RAW_KEYS:
        p_basis, i_stride = place(p_key, bases, own_bases)
        p_scales = scales + tl.load(p_key + C_SCALES)
        b_bias = tl.sum(b_q.to(tl.float32) * mean(p_key, means, own_means, D, DP)[None, :], 1)
        i_top = tl.zeros([], tl.float32)
        if KN > 0:
            b_qn = rotated(b_q, p_basis, i_stride, i_kn, p_scales, D, DP, KN, False, UPCAST, PRECISION)
            i_top = tl.maximum(i_top, largest(b_qn))
        if K8 > 0:
            b_q8 = rotated(b_q, p_basis + i_kn, i_stride, i_k8, p_scales, D, DP, K8, True, UPCAST, PRECISION)
            i_top = tl.maximum(i_top, largest(b_q8))
        if K4 > 0:
            p_basis += i_kn + i_k8
            p_scales += i_k8
            b_qa = rotated(b_q, p_basis, i_stride, i_k4, p_scales, D, DP, K4, True, UPCAST, PRECISION)
            b_qb = rotated(b_q, p_basis + i_k4, i_stride, i_k4, p_scales + i_k4, D, DP, K4, True, UPCAST, PRECISION)
            i_top = tl.maximum(i_top, tl.maximum(largest(b_qa), largest(b_qb)))
        i_less = headroom(i_top) if tl.float16 == TYPE else 1.0
        if KN > 0:
            b_qn, b_ln = two_parts(b_qn / i_less, TYPE, UPCAST)
        if K8 > 0:
            b_q8, b_l8 = two_parts(b_q8 / i_less, TYPE, UPCAST)
        if K4 > 0:
            b_qa, b_la = two_parts(b_qa / i_less, TYPE, UPCAST)
            b_qb, b_lb = two_parts(b_qb / i_less, TYPE, UPCAST)
            b_half = tl.sum(b_qa.to(tl.float32) + b_qb.to(tl.float32), 1)
            if TWO_PART:
                b_half += tl.sum(b_la.to(tl.float32) + b_lb.to(tl.float32), 1)
            b_bias += 0.5 * i_less * b_half
        b_bias *= scale
        scale *= i_less
    b_m, b_l, b_an, b_a8, b_aa, b_ab = attend(
        b_qn, b_ln, b_q8, b_l8, b_qa, b_la, b_qb, b_lb, b_bias, tl.zeros([M], tl.int32),
        p_kn, p_k8, p_k4, p_vn, p_v8, p_v4, D if RAW_KEYS else i_kn, i_k8, i_k4, D if RAW_VALUES else i_vn, i_v8, i_v4, i_count, scale,
        M, DP if RAW_KEYS else KN, 0 if RAW_KEYS else K8, 0 if RAW_KEYS else K4,
        DP if RAW_VALUES else VN, 0 if RAW_VALUES else V8, 0 if RAW_VALUES else V4, RAW_VALUES and DP == D,
        BLOCK_N, STAGES, False if RAW_KEYS else TWO_PART, False, TYPE, UPCAST, PRECISION,
    )  # fmt: skip
    if RAW_VALUES:
        b_acc = b_an
    else:
        p_basis, i_stride = place(p_value, bases, own_bases)
        p_scales = scales + tl.load(p_value + C_SCALES)
        # Means over the split, so that they fit fp16 whatever its length. The split is not empty: l is at least about 1.
        b_part = (1.0 / b_l)[:, None]
        b_acc = tl.zeros([M, DP], tl.float32) + mean(p_value, means, own_means, D, DP)[None, :]
        if VN > 0:
            b_acc = unrotated(b_acc, b_an * b_part, p_basis, i_stride, i_vn, p_scales, D, DP, VN, False, TYPE, UPCAST, PRECISION)
        if V8 > 0:
            b_acc = unrotated(b_acc, b_a8 * b_part, p_basis + i_vn, i_stride, i_v8, p_scales, D, DP, V8, True, TYPE, UPCAST, PRECISION)
        if V4 > 0:
            p_basis += i_vn + i_v8
            p_scales += i_v8
            b_aa = b_aa * b_part + 0.5
            b_ab = b_ab * b_part + 0.5
            b_acc = unrotated(b_acc, b_aa, p_basis, i_stride, i_v4, p_scales, D, DP, V4, True, TYPE, UPCAST, PRECISION)
            p_basis += i_v4
            p_scales += i_v4
            b_acc = unrotated(b_acc, b_ab, p_basis, i_stride, i_v4, p_scales, D, DP, V4, True, TYPE, UPCAST, PRECISION)
        b_acc *= b_l[:, None]
    return b_m, b_l, b_acc
