"""The Triton kernel that turns kept RoPE pairs; its specification is `pairs_torch.turned`, which it equals bit for bit.

Naming as in decode_kernels.py: i_ program ids and scalars, o_ offsets, p_ pointers, b_ register blocks, m_ masks.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "blocks"])
def pairs_kernel(
    q,  # [B, S, HEADS * G * 2 * PAIRS], written in place
    k,  # [B, S, HEADS * 2 * PAIRS], likewise
    cos,  # [B or 1, S, D]; a stride of 0 repeats the one of all sequences
    sin,
    pairs,  # int64 [HEADS, PAIRS], contiguous
    tokens,  # S
    blocks,  # ceil(S / BLOCK_T)
    stride_qb,
    stride_qs,
    stride_kb,
    stride_ks,
    stride_cb,
    stride_cs,
    stride_cd,
    stride_sb,
    stride_ss,
    stride_sd,
    G: tl.constexpr,
    PAIRS: tl.constexpr,
    MP: tl.constexpr,  # next power of two of PAIRS
    BLOCK_T: tl.constexpr,
    SPREAD: tl.constexpr,  # every head has a program of its own
):
    """BLOCK_T tokens of a sequence: one KV head with its G query heads, or one of these G + 1 heads.

    Grid (B * blocks, Hkv, G + 1 if SPREAD else 1).
    """
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    i_h = tl.program_id(1)
    i_g = tl.program_id(2)
    o_t = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_j = tl.arange(0, MP)
    m_j = o_j < PAIRS
    m = (o_t < tokens)[:, None] & m_j[None, :]
    b_pair = tl.load(pairs + i_h * PAIRS + o_j, mask=m_j, other=0)
    o_c = o_t[:, None] * stride_cs + b_pair[None, :] * stride_cd
    o_s = o_t[:, None] * stride_ss + b_pair[None, :] * stride_sd
    b_cos = tl.load(cos + i_b * stride_cb + o_c, mask=m, other=0.0)
    b_sin = tl.load(sin + i_b * stride_sb + o_s, mask=m, other=0.0)
    p_k = k + i_b * stride_kb + o_t[:, None] * stride_ks + (i_h * 2 * PAIRS + o_j)[None, :]
    p_q = q + i_b * stride_qb + o_t[:, None] * stride_qs + (i_h * G * 2 * PAIRS + o_j)[None, :]
    if SPREAD:
        if i_g == G:
            _turn(p_k, b_cos, b_sin, m, PAIRS)
        else:
            _turn(p_q + i_g * 2 * PAIRS, b_cos, b_sin, m, PAIRS)
    else:
        _turn(p_k, b_cos, b_sin, m, PAIRS)
        for _ in range(G):
            _turn(p_q, b_cos, b_sin, m, PAIRS)
            p_q += 2 * PAIRS


@triton.jit
def _turn(p, b_cos, b_sin, m, PAIRS: tl.constexpr):
    """Turns a block of pairs where it lies; `p` points to their first channels."""
    b_first = tl.load(p, mask=m, other=0.0)
    b_second = tl.load(p + PAIRS, mask=m, other=0.0)
    tl.store(p, _product(b_first, b_cos) - _product(b_second, b_sin), mask=m)
    tl.store(p + PAIRS, _product(b_second, b_cos) + _product(b_first, b_sin), mask=m)


@triton.jit
def _product(b_a, b_b):
    """Rounded to the dtype, as torch has it before products are added (so fp32 must not be fused either), and back in fp32."""
    return (b_a.to(tl.float32) * b_b.to(tl.float32)).to(b_a.dtype).to(tl.float32)
