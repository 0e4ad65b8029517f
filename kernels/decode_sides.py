"""Keys or Values of one segment as the Triton kernels see them: where the slabs lie, the basis, the mean, and codes made numbers.

A side comes in up to three slabs, native, 8 bit and 4 bit (`codes.py`). The widest slab of each kind in the layer has a tile, a power of
two from 16 on, or 0 where the slab does not occur; tiles of 4-bit slabs count bytes, so half of the directions.

Naming: i_ scalars, o_ offsets, p_ pointers, b_ register blocks, m_ masks, C_ constants of the table.
"""

import triton
import triton.language as tl

from .table import BASIS, BYTE, MEAN, NATIVE, NIBBLE, NONE, OFFSET, OWN_MEAN, STRIDE

C_OFFSET, C_NATIVE, C_BYTE, C_NIBBLE = tl.constexpr(OFFSET), tl.constexpr(NATIVE), tl.constexpr(BYTE), tl.constexpr(NIBBLE)
C_BASIS, C_STRIDE, C_NONE = tl.constexpr(BASIS), tl.constexpr(STRIDE), tl.constexpr(NONE)
C_MEAN, C_OWN_MEAN = tl.constexpr(MEAN), tl.constexpr(OWN_MEAN)

# Four bytes at once: u below the bits of a power of two whose last place is 1 is the number power + u, from which power + 8 is taken.
# A conversion of single numbers takes four times the instructions, and those are what 4-bit codes wait for.
_NIBBLES = """{{
    .reg .b32 low, high, power, one, less;
    mov.b32 power, 0x{power}; mov.b32 one, 0x{one}; mov.b32 less, 0x{less};
    and.b32 low, $4, 0x0F0F0F0F;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0F0F0F0F;
    prmt.b32 $0, low, power, 0x4140;
    prmt.b32 $1, low, power, 0x4342;
    prmt.b32 $2, high, power, 0x4140;
    prmt.b32 $3, high, power, 0x4342;
    fma.rn.{type} $0, $0, one, less;
    fma.rn.{type} $1, $1, one, less;
    fma.rn.{type} $2, $2, one, less;
    fma.rn.{type} $3, $3, one, less;
}}"""
C_NIBBLES_BF16 = tl.constexpr(_NIBBLES.format(type="bf16x2", power="43434343", one="3F803F80", less="C308C308"))  # 128, 1, -136
C_NIBBLES_FP16 = tl.constexpr(_NIBBLES.format(type="f16x2", power="64646464", one="3C003C00", less="E408E408"))  # 1024, 1, -1032


@triton.jit
def slabs(p_side, codes, i_length, i_start, TYPE: tl.constexpr):
    """Pointers to token `i_start` in each slab of a side, and the slabs' widths: numbers, codes, bytes."""
    ITEM: tl.constexpr = TYPE.primitive_bitwidth // 8
    # Widths in units, multiplied again: so the compiler sees that rows and slabs start on 16 bytes, or on 8.
    i_n = tl.load(p_side + C_NATIVE).to(tl.int32) // 8
    i_8 = tl.load(p_side + C_BYTE).to(tl.int32) // 8
    i_4 = tl.load(p_side + C_NIBBLE).to(tl.int32) // 16
    i_pairs = (i_length + 1) // 2  # an odd token is padded
    i_skipped = i_start // 2  # splits start on blocks
    p_codes = codes + tl.load(p_side + C_OFFSET) // 16 * 16
    p_n = p_codes.to(tl.pointer_type(TYPE)) + i_skipped * i_n * 16
    p_8 = p_codes + i_pairs * i_n * (16 * ITEM)
    p_4 = p_8 + i_pairs * i_8 * 16 + i_skipped * i_4 * 16
    p_8 = (p_8 + i_skipped * i_8 * 16).to(tl.pointer_type(tl.int8))
    return p_n, p_8, p_4, i_n * 8, i_8 * 8, i_4 * 8


@triton.jit
def place(p_side, bases, own_bases):
    """The decode matrix of a side, among the shared bases or the sequence's own, and the stride of its rows."""
    i_basis = tl.load(p_side + C_BASIS)
    p_basis = bases + i_basis // 8 * 8
    if i_basis < C_NONE:
        p_basis = own_bases + (-1 - i_basis // 8) * 8  # as `table.own_basis`
    return p_basis, tl.load(p_side + C_STRIDE).to(tl.int32) // 8 * 8


@triton.jit
def basis(p_basis, i_stride, i_width, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr):
    """The decode matrix's columns of one slab: [DP, TILE], zero beyond D and i_width."""
    o_d = tl.arange(0, DP)
    o_r = tl.arange(0, TILE)
    m = (o_d < D)[:, None] & (o_r < i_width)[None, :]
    b_basis = tl.load(p_basis + o_d[:, None] * i_stride + o_r[None, :], mask=m, other=0.0)
    if UPCAST:
        b_basis = b_basis.to(tl.float32)
    return b_basis


@triton.jit
def two_parts(b, TYPE: tl.constexpr, UPCAST: tl.constexpr):
    """A block in fp32 as the sum of two of `TYPE`."""
    b_high = b.to(TYPE)
    b_low = (b - b_high.to(tl.float32)).to(TYPE)
    if UPCAST:
        b_high = b_high.to(tl.float32)
        b_low = b_low.to(tl.float32)
    return b_high, b_low


@triton.jit
def largest(b):
    """The largest magnitude of a block [R, C]."""
    return tl.max(tl.max(tl.abs(b), 1), 0)


@triton.jit
def headroom(i_top):
    """The least power of two by which numbers up to `i_top` are divided to stay below 2**15, so that fp16 has them; at least 1."""
    return tl.exp2(tl.ceil(tl.log2(tl.maximum(i_top * (1.0 / 32768.0), 1.0))))


@triton.jit
def rotated(
    b_q,  # [M, DP]
    p_basis,
    i_stride,
    i_width,
    p_scales,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    SCALED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The query in the coordinates of one slab of the Keys, the codes' scales folded in: [M, TILE] fp32."""
    b_rotated = tl.dot(b_q, basis(p_basis, i_stride, i_width, D, DP, TILE, UPCAST), input_precision=PRECISION)
    if SCALED:
        o_r = tl.arange(0, TILE)
        b_rotated *= tl.load(p_scales + o_r, mask=o_r < i_width, other=0.0).to(tl.float32)[None, :]
    return b_rotated


@triton.jit
def unrotated(
    b_total,  # [M, DP] fp32
    b_levels,  # [M, TILE] fp32, mean levels of one slab of the Values
    p_basis,
    i_stride,
    i_width,
    p_scales,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    SCALED: tl.constexpr,
    TYPE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what the slab contributes in the model's coordinates."""
    if SCALED:
        o_r = tl.arange(0, TILE)
        b_levels *= tl.load(p_scales + o_r, mask=o_r < i_width, other=0.0).to(tl.float32)[None, :]
    b_basis = tl.trans(basis(p_basis, i_stride, i_width, D, DP, TILE, UPCAST))
    b_high, b_low = two_parts(b_levels, TYPE, UPCAST)
    b_total = tl.dot(b_high, b_basis, b_total, input_precision=PRECISION)
    return tl.dot(b_low, b_basis, b_total, input_precision=PRECISION)


@triton.jit
def mean(p_side, means, own_means, D: tl.constexpr, DP: tl.constexpr):
    """A side's mean [DP] fp32: the shared one and the segment's own, either of which may be missing."""
    o_d = tl.arange(0, DP)
    i_shared = tl.load(p_side + C_MEAN)
    i_own = tl.load(p_side + C_OWN_MEAN)
    b_shared = tl.load(means + i_shared + o_d, mask=o_d < tl.where(i_shared >= 0, D, 0), other=0.0)
    b_own = tl.load(own_means + i_own + o_d, mask=o_d < tl.where(i_own >= 0, D, 0), other=0.0)
    return b_shared + b_own.to(tl.float32)


@triton.jit
def nibbles(b_codes, TYPE: tl.constexpr):
    """Both halves of bytes of 4-bit codes, as whole numbers u - 8."""
    if tl.bfloat16 == TYPE:
        b_low, b_high = tl.inline_asm_elementwise(C_NIBBLES_BF16, "=r,=r,=r,=r,r", [b_codes], (tl.bfloat16, tl.bfloat16), True, 4)
    elif tl.float16 == TYPE:
        b_low, b_high = tl.inline_asm_elementwise(C_NIBBLES_FP16, "=r,=r,=r,=r,r", [b_codes], (tl.float16, tl.float16), True, 4)
    else:
        b_signed = (b_codes ^ 0x88).to(tl.int8, bitcast=True)  # u ^ 8 is u - 8 in two's complement
        b_low = ((b_signed << 4) >> 4).to(TYPE)
        b_high = (b_signed >> 4).to(TYPE)
    return b_low, b_high
