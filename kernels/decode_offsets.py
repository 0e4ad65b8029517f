"""Where the numbers of a tile lie, for warps that go apart (`decode_codes.py`): tokens `o_t` [W, N] are rows of Keys, columns of Values."""

import triton
import triton.language as tl


@triton.jit
def key_tile(o_t, i_width, TILE: tl.constexpr):
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
def value_tile(o_t, i_width, TILE: tl.constexpr, PER: tl.constexpr):
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
def key_rest(o_t, i_width, REST: tl.constexpr, FIRST: tl.constexpr):
    """`key_tile` of the rest from byte FIRST on: eight columns, twice."""
    o_tile = o_t
    m_tile = o_t
    if REST > 0:
        o_r = FIRST + tl.arange(0, 16) % 8
        i_width = i_width // 8 * 8
        o_tile = o_t[:, :, None] * i_width + o_r[None, None, :]
        m_tile = (o_r < i_width)[None, None, :]
    return o_tile, m_tile


@triton.jit
def value_rest(o_t, i_width, REST: tl.constexpr, FIRST: tl.constexpr):
    """`value_tile` of the rest from byte FIRST on, two bytes read as one number: eight rows, twice."""
    o_tile = o_t
    m_tile = o_t
    if REST > 0:
        o_r = FIRST // 2 + tl.arange(0, 16) % 8
        i_width = i_width // 8 * 4
        o_tile = o_t[:, None, :] * i_width + o_r[None, :, None]
        m_tile = (o_r < i_width)[None, :, None]
    return o_tile, m_tile
