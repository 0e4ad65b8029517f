"""One split of a segment with codes: every warp attends to tokens of its own, and the warps meet once, at the end.

There are so few bytes to wait for that warps which share a tile would wait for each other most of the time. So blocks have three
dimensions, [W, ...], of which Triton gives each of the W warps one; maxima, sums and products stay within a warp. Products are turned
round, Keys times query and Values times probabilities: the query's rows are then the narrow side of a matrix instruction, which takes 8
of them where the other side takes 16, and few are needed.
"""

import triton
import triton.language as tl

from .decode_columns import all_warps, met, rotated, unrotated, unrotated_pairs
from .decode_sides import basis, headroom, largest, mean, place, slabs, two_parts
from .decode_widen import keys_4, keys_8, values_4, values_8
from .table import KEY, LENGTH, SCALES, VALUE

C_LENGTH, C_KEY, C_VALUE, C_SCALES = tl.constexpr(LENGTH), tl.constexpr(KEY), tl.constexpr(VALUE), tl.constexpr(SCALES)

LIFT = tl.constexpr(12.0)  # probabilities are kept times 2**LIFT: what is 2**-26 of the largest is still a normal number of fp16


@triton.jit
def _step(
    state,  # m [W, M], l [W, 16, M] and the sums [W, tile, M] of native, even and odd 8-bit, and the four kinds of 4-bit Values
    queries,  # native, what rounding it lost, 8 bit, low and high halves of 4 bit: [W, tile, M]
    keys,  # pointers [W, N, tile] to the tile's Keys in each slab
    values,  # pointers [W, tile, N]
    m_keys,  # which directions there are, [1, 1, tile]
    m_values,  # [1, tile, 1]
    o_t,  # [W, N] token of the tile
    i_left,  # tokens left
    scale,
    RESCALED: tl.constexpr,  # the logits are not yet whole: by `scale`
    KN: tl.constexpr,
    K8: tl.constexpr,
    K4: tl.constexpr,
    VN: tl.constexpr,
    V8: tl.constexpr,
    V4: tl.constexpr,
    LAST: tl.constexpr,  # some of the tile's tokens are beyond the end
    TWO_PART: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The softmax goes on over one tile."""
    b_m, b_l, b_an, b_ae, b_ao, b_a0, b_a1, b_a2, b_a3 = state
    W: tl.constexpr = o_t.shape[0]
    N: tl.constexpr = o_t.shape[1]
    M: tl.constexpr = b_m.shape[1]
    CODE: tl.constexpr = tl.float32 if UPCAST else tl.float16
    m_t = o_t < i_left
    m_k = m_t[:, :, None]
    m_v = m_t[:, None, :]
    # Past the end Keys and Values are 0: a probability of 0 times a NaN would be NaN.
    if KN > 0:
        b_kn = tl.load(keys[0], mask=m_k & m_keys[0] if LAST else m_keys[0], other=0.0)
    if K8 > 0:
        b_k8 = tl.load(keys[1], mask=m_k & m_keys[1] if LAST else m_keys[1], other=0)
    if K4 > 0:
        b_k4 = tl.load(keys[2], mask=m_k & m_keys[2] if LAST else m_keys[2], other=0)
    if VN > 0:
        b_vn = tl.load(values[0], mask=m_v & m_values[0] if LAST else m_values[0], other=0.0)
    if V8 > 0:
        b_v8 = tl.load(values[1], mask=m_v & m_values[1] if LAST else m_values[1], other=0)
    if V4 > 0:
        b_v4 = tl.load(values[2], mask=m_v & m_values[2] if LAST else m_values[2], other=0)

    b_s = tl.zeros([W, N, M], tl.float32)
    if KN > 0:
        if UPCAST:
            b_kn = b_kn.to(tl.float32)
        b_s = tl.dot(b_kn, queries[0], b_s)
        if TWO_PART:
            b_s = tl.dot(b_kn, queries[1], b_s)
    if K8 > 0:
        b_s = tl.dot(keys_8(b_k8, UPCAST), queries[2], b_s)
    if K4 > 0:
        b_low, b_high = keys_4(b_k4, UPCAST)
        b_s = tl.dot(b_low, queries[3], b_s)
        b_s = tl.dot(b_high, queries[4], b_s)
    if RESCALED:  # else all of it is in the queries
        b_s *= scale
    if LAST:
        b_s = tl.where(m_k, b_s, float("-inf"))
    b_top = tl.maximum(b_m, tl.max(b_s, 1))
    # A row that has seen nothing keeps -inf; subtracting -LIFT instead avoids -inf minus -inf.
    b_safe = (tl.where(b_top == float("-inf"), 0.0, b_top) if LAST else b_top) - LIFT
    b_keep = tl.exp2(b_m - LIFT - b_safe)[:, None, :]
    b_p = tl.exp2(b_s - b_safe[:, None, :])
    b_w = b_p.to(CODE)
    # The sum too is a product: of sixteen rows of ones, because the instruction has as many.
    b_l = tl.dot(tl.full([W, 16, N], 1.0, CODE), b_w, b_l * b_keep)
    if VN > 0:
        if UPCAST:
            b_vn = b_vn.to(tl.float32)
        b_an = tl.dot(b_vn, b_p.to(b_vn.dtype), b_an * b_keep)
    if V8 > 0:
        b_even, b_odd = values_8(b_v8, UPCAST)
        b_ae = tl.dot(b_even, b_w, b_ae * b_keep)
        b_ao = tl.dot(b_odd, b_w, b_ao * b_keep)
    if V4 > 0:
        b_0, b_1, b_2, b_3 = values_4(b_v4, UPCAST)
        b_a0 = tl.dot(b_0, b_w, b_a0 * b_keep)
        b_a1 = tl.dot(b_1, b_w, b_a1 * b_keep)
        b_a2 = tl.dot(b_2, b_w, b_a2 * b_keep)
        b_a3 = tl.dot(b_3, b_w, b_a3 * b_keep)
    return b_top, b_l, b_an, b_ae, b_ao, b_a0, b_a1, b_a2, b_a3


@triton.jit
def _key_tile(o_t, i_width, TILE: tl.constexpr):
    """Offsets [W, N, TILE] in a tile of a slab of Keys of this width, and which of its columns there are; nothing without a tile."""
    o_tile = o_t
    m_tile = o_t
    if TILE > 0:
        o_r = tl.arange(0, TILE)
        i_width = i_width // 8 * 8  # so the compiler sees its multiple
        o_tile = o_t[:, :, None] * i_width + o_r[None, None, :]
        m_tile = (o_r < i_width)[None, None, :]
    return o_tile, m_tile


@triton.jit
def _value_tile(o_t, i_width, TILE: tl.constexpr, PER: tl.constexpr):
    """Offsets [W, TILE, N] in a tile of a slab of Values, PER of its numbers read as one, and which of its rows there are."""
    o_tile = o_t
    m_tile = o_t
    if TILE > 0:
        o_r = tl.arange(0, TILE)
        i_width = i_width // 8 * (8 // PER)
        o_tile = o_t[:, None, :] * i_width + o_r[None, :, None]
        m_tile = (o_r < i_width)[None, :, None]
    return o_tile, m_tile


@triton.jit
def coded_apart(
    b_q,  # [DP, M]
    entry,  # the segment's row of the table
    codes,
    bases,
    own_bases,
    scales,
    means,
    own_means,
    i_start,
    i_count,  # tokens of the split, at least one
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
    BLOCK_N: tl.constexpr,  # tokens of all warps together
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    TWO_PART: tl.constexpr,  # of the query that meets native Keys; fp16, for codes, is fine enough
    TYPE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Partials m, l [M] and acc [DP, M] of a split of which at least one side is coded; KN to V4 are tiles, 0 without such a slab."""
    CODE: tl.constexpr = tl.float32 if UPCAST else tl.float16
    i_length = tl.load(entry + C_LENGTH)
    p_key = entry + C_KEY
    p_value = entry + C_VALUE
    p_kn, p_k8, p_k4, i_kn, i_k8, i_k4 = slabs(p_key, codes, i_length, i_start, TYPE)
    p_vn, p_v8, p_v4, i_vn, i_v8, i_v4 = slabs(p_value, codes, i_length, i_start, TYPE)
    b_bias = tl.zeros([M], tl.float32)
    b_qn = b_q
    b_ln = b_q
    b_q8 = b_q
    b_qa = b_q
    b_qb = b_q
    if not RAW_KEYS:
        p_basis, i_stride = place(p_key, bases, own_bases)
        p_scales = scales + tl.load(p_key + C_SCALES)
        b_bias = tl.sum(b_q.to(tl.float32) * mean(p_key, means, own_means, D, DP)[:, None], 0) * scale
        i_top = tl.zeros([], tl.float32)
        if KN > 0:
            b_qn = rotated(b_q, p_basis, i_stride, i_kn, p_scales, scale, D, DP, KN, False, WARPS, UPCAST)
            i_top = tl.maximum(i_top, largest(b_qn))
        if K8 > 0:
            b_q8 = rotated(b_q, p_basis + i_kn, i_stride, i_k8, p_scales, scale, D, DP, K8, True, WARPS, UPCAST)
            i_top = tl.maximum(i_top, largest(b_q8))
        if K4 > 0:
            p_basis += i_kn + i_k8
            p_scales += i_k8
            b_qa = rotated(b_q, p_basis, i_stride, i_k4, p_scales, scale, D, DP, K4, True, WARPS, UPCAST)
            b_qb = rotated(b_q, p_basis + i_k4, i_stride, i_k4, p_scales + i_k4, scale, D, DP, K4, True, WARPS, UPCAST)
            i_top = tl.maximum(i_top, tl.maximum(largest(b_qa), largest(b_qb)))
        # in a cache of fp16 only: elsewhere it would cost a product per tile
        i_less = headroom(i_top) if tl.float16 == TYPE else 1.0
        if KN > 0:
            b_qn, b_ln = two_parts(b_qn / i_less, TYPE, UPCAST)
        if K8 > 0:
            b_q8 = (b_q8 / i_less).to(CODE)
        if K4 > 0:
            b_qa = (b_qa / i_less).to(CODE)
            b_qb = (b_qb / i_less).to(CODE)
            b_bias += 0.5 * i_less * tl.sum(b_qa.to(tl.float32) + b_qb.to(tl.float32), 0)
        scale = i_less  # the rest is in the queries
    RESCALED: tl.constexpr = RAW_KEYS or tl.float16 == TYPE
    queries = (all_warps(b_qn, WARPS), all_warps(b_ln, WARPS), all_warps(b_q8, WARPS), all_warps(b_qa, WARPS), all_warps(b_qb, WARPS))

    N: tl.constexpr = BLOCK_N // WARPS
    o_t = tl.arange(0, WARPS)[:, None] * N + tl.arange(0, N)[None, :]
    o_kn, m_kn = _key_tile(o_t, D if RAW_KEYS else i_kn, KN)
    o_k8, m_k8 = _key_tile(o_t, i_k8, K8)
    o_k4, m_k4 = _key_tile(o_t, i_k4, K4)
    o_vn, m_vn = _value_tile(o_t, D if RAW_VALUES else i_vn, VN, 1)
    o_v8, m_v8 = _value_tile(o_t, i_v8, V8 // 2, 2)
    o_v4, m_v4 = _value_tile(o_t, i_v4, V4 // 2, 2)
    p_v8 = p_v8.to(tl.pointer_type(tl.int16))
    p_v4 = p_v4.to(tl.pointer_type(tl.int16))
    m_keys = (m_kn, m_k8, m_k4)
    m_values = (m_vn, m_v8, m_v4)
    b_m = tl.full([WARPS, M], float("-inf"), tl.float32)
    b_l = tl.zeros([WARPS, 16, M], tl.float32)
    # The conditional expressions only give a slab that does not occur a shape; it is not carried through the loop.
    b_an = tl.zeros([WARPS, VN if VN > 0 else 16, M], tl.float32)
    b_ae = tl.zeros([WARPS, V8 // 2 if V8 > 0 else 16, M], tl.float32)
    b_ao = b_ae
    b_a0 = tl.zeros([WARPS, V4 // 2 if V4 > 0 else 16, M], tl.float32)
    b_a1 = b_a0
    b_a2 = b_a0
    b_a3 = b_a0
    for _ in tl.range(0, i_count // BLOCK_N, num_stages=STAGES):
        b_m, b_l, b_an, b_ae, b_ao, b_a0, b_a1, b_a2, b_a3 = _step(
            (b_m, b_l, b_an, b_ae, b_ao, b_a0, b_a1, b_a2, b_a3), queries, (p_kn + o_kn, p_k8 + o_k8, p_k4 + o_k4),
            (p_vn + o_vn, p_v8 + o_v8, p_v4 + o_v4), m_keys, m_values, o_t, i_count, scale,
            RESCALED, KN, K8, K4, VN, V8, V4, False, False if RAW_KEYS else TWO_PART, UPCAST,
        )  # fmt: skip
        p_kn += BLOCK_N * (D if RAW_KEYS else i_kn)
        p_k8 += BLOCK_N * i_k8
        p_k4 += BLOCK_N * i_k4
        p_vn += BLOCK_N * (D if RAW_VALUES else i_vn)
        p_v8 += BLOCK_N // 2 * i_v8
        p_v4 += BLOCK_N // 2 * i_v4
    i_left = i_count % BLOCK_N
    if i_left > 0:
        b_m, b_l, b_an, b_ae, b_ao, b_a0, b_a1, b_a2, b_a3 = _step(
            (b_m, b_l, b_an, b_ae, b_ao, b_a0, b_a1, b_a2, b_a3), queries, (p_kn + o_kn, p_k8 + o_k8, p_k4 + o_k4),
            (p_vn + o_vn, p_v8 + o_v8, p_v4 + o_v4), m_keys, m_values, o_t, i_left, scale,
            RESCALED, KN, K8, K4, VN, V8, V4, True, False if RAW_KEYS else TWO_PART, UPCAST,
        )  # fmt: skip

    b_top = tl.max(b_m, 0)  # some warp has seen a token
    b_share = tl.exp2(b_m - b_top[None, :])
    b_mass = tl.sum(tl.max(b_l, 1) * b_share, 0)  # sixteen equal rows
    # Means over the split, so that they fit fp16 whatever its length.
    b_share *= (1.0 / b_mass)[None, :]
    if RAW_VALUES:
        b_acc = met(b_an, b_share)
    else:
        p_basis, i_stride = place(p_value, bases, own_bases)
        p_scales = scales + tl.load(p_value + C_SCALES)
        b_acc = tl.zeros([DP, M], tl.float32) + mean(p_value, means, own_means, D, DP)[:, None]
        if VN > 0:
            b_acc = unrotated(b_acc, basis(p_basis, i_stride, i_vn, D, DP, VN, UPCAST), met(b_an, b_share), WARPS, TYPE, UPCAST)
        if V8 > 0:
            b_acc = unrotated_pairs(
                b_acc, b_ae, b_ao, b_share, 0.0, p_basis + i_vn, i_stride, i_v8, p_scales, D, DP, V8, WARPS, TYPE, UPCAST
            )
        if V4 > 0:
            p_basis += i_vn + i_v8
            p_scales += i_v8
            b_acc = unrotated_pairs(b_acc, b_a0, b_a2, b_share, 0.5, p_basis, i_stride, i_v4, p_scales, D, DP, V4, WARPS, TYPE, UPCAST)
            p_basis += i_v4
            p_scales += i_v4
            b_acc = unrotated_pairs(b_acc, b_a1, b_a3, b_share, 0.5, p_basis, i_stride, i_v4, p_scales, D, DP, V4, WARPS, TYPE, UPCAST)
    return b_top - LIFT + b_bias, b_mass, b_acc * b_mass[None, :]
