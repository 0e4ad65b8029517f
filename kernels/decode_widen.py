"""Codes made fp16 numbers in registers, by two instructions for two numbers: an OR puts them below the bits of a power of two, whose last
place is then 1 or 16, and an FMA takes the power away. All of it is exact.

Neighbouring directions of the Values are read as one 16-bit number, because the instruction that transposes a tile on its way to the
product moves 16 bits at a time. With UPCAST, for the interpreter, the same in plain arithmetic and fp32.
"""

import triton
import triton.language as tl

_CONSTANTS = """.reg .b32 power, one, less, part, less_part;
    mov.b32 power, 0x64646464; mov.b32 one, 0x3C003C00; mov.b32 less, 0xE408E408;
    mov.b32 part, 0x2C002C00; mov.b32 less_part, 0xD480D480;"""  # 1, -1032; 1 / 16, -72: every step is exact
# Four bytes at once, into the whole numbers u - 8 of their low halves ($0, $1) and of their high halves ($2, $3).
_KEYS_4 = f"""{{
    {_CONSTANTS}
    .reg .b32 first, second;
    prmt.b32 first, $4, power, 0x4140;
    prmt.b32 second, $4, power, 0x4342;
    and.b32 $0, first, 0xFF0FFF0F;
    and.b32 $1, second, 0xFF0FFF0F;
    and.b32 $2, first, 0xFFF0FFF0;
    and.b32 $3, second, 0xFFF0FFF0;
    fma.rn.f16x2 $0, $0, one, less;
    fma.rn.f16x2 $1, $1, one, less;
    fma.rn.f16x2 $2, $2, part, less_part;
    fma.rn.f16x2 $3, $3, part, less_part;
}}"""
# lop3 with 0xEA is (a & b) | c, with 0x6A (a & b) ^ c.
# Two tokens at once, two bytes each: the low and the high half of the first byte ($0, $1), and of the second ($2, $3).
_VALUES_4 = f"""{{
    {_CONSTANTS}
    .reg .b32 second;
    mov.b32 power, 0x64006400;
    shr.u32 second, $4, 8;
    lop3.b32 $0, $4, 0x000F000F, power, 0xEA;
    lop3.b32 $1, $4, 0x00F000F0, power, 0xEA;
    lop3.b32 $2, second, 0x000F000F, power, 0xEA;
    lop3.b32 $3, second, 0x00F000F0, power, 0xEA;
    fma.rn.f16x2 $0, $0, one, less;
    fma.rn.f16x2 $1, $1, part, less_part;
    fma.rn.f16x2 $2, $2, one, less;
    fma.rn.f16x2 $3, $3, part, less_part;
}}"""
# A signed byte c with its first bit turned is c + 128; below the bits of 1024 it is 1152 + c.
_KEYS_8 = """{
    .reg .b32 turned, power, one, less;
    mov.b32 power, 0x64646464; mov.b32 one, 0x3C003C00; mov.b32 less, 0xE480E480;
    xor.b32 turned, $2, 0x80808080;
    prmt.b32 $0, turned, power, 0x4140;
    prmt.b32 $1, turned, power, 0x4342;
    fma.rn.f16x2 $0, $0, one, less;
    fma.rn.f16x2 $1, $1, one, less;
}"""
_VALUES_8 = """{
    .reg .b32 second, power, one, less;
    mov.b32 power, 0x64806480; mov.b32 one, 0x3C003C00; mov.b32 less, 0xE480E480;
    shr.u32 second, $2, 8;
    lop3.b32 $0, $2, 0x00FF00FF, power, 0x6A;
    lop3.b32 $1, second, 0x00FF00FF, power, 0x6A;
    fma.rn.f16x2 $0, $0, one, less;
    fma.rn.f16x2 $1, $1, one, less;
}"""
C_KEYS_4, C_VALUES_4 = tl.constexpr(_KEYS_4), tl.constexpr(_VALUES_4)
C_KEYS_8, C_VALUES_8 = tl.constexpr(_KEYS_8), tl.constexpr(_VALUES_8)


@triton.jit
def keys_4(b, UPCAST: tl.constexpr):
    """Low and high halves of bytes, less 8."""
    if UPCAST:
        b_low = (b & 15).to(tl.float32) - 8
        b_high = (b >> 4).to(tl.float32) - 8
    else:
        b_low, b_high = tl.inline_asm_elementwise(C_KEYS_4, "=r,=r,=r,=r,r", [b], (tl.float16, tl.float16), True, 4)
    return b_low, b_high


@triton.jit
def keys_8(b, UPCAST: tl.constexpr):
    """Signed bytes as numbers."""
    return b.to(tl.float32) if UPCAST else tl.inline_asm_elementwise(C_KEYS_8, "=r,=r,r", [b], tl.float16, True, 4)


@triton.jit
def values_4(b, UPCAST: tl.constexpr):
    """Of two bytes: low and high half of the first, low and high half of the second, less 8."""
    if UPCAST:
        b_0 = (b & 15).to(tl.float32) - 8
        b_1 = ((b >> 4) & 15).to(tl.float32) - 8
        b_2 = ((b >> 8) & 15).to(tl.float32) - 8
        b_3 = ((b >> 12) & 15).to(tl.float32) - 8
    else:
        b_0, b_1, b_2, b_3 = tl.inline_asm_elementwise(
            C_VALUES_4, "=r,=r,=r,=r,r", [b], (tl.float16, tl.float16, tl.float16, tl.float16), True, 2
        )
    return b_0, b_1, b_2, b_3


@triton.jit
def values_8(b, UPCAST: tl.constexpr):
    """Two signed bytes."""
    if UPCAST:
        b_first = b.to(tl.int8).to(tl.float32)
        b_second = (b >> 8).to(tl.int8).to(tl.float32)
    else:
        b_first, b_second = tl.inline_asm_elementwise(C_VALUES_8, "=r,=r,r", [b], (tl.float16, tl.float16), True, 2)
    return b_first, b_second
