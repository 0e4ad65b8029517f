"""Decode attention over what rivals store, in Triton: how fast their structure allows attention to be, for bench_rival_speed.py.

One skeleton for all (tokens split over programs, one softmax, partials merged by a second kernel), so that they differ in how a tile of
Keys and Values comes from memory:

    dense       native Keys [S, D]: what the skeleton itself costs beside SDPA
    think       native Keys [S, C] of the same C channels in every token (ThinK, LeanK); the query is gathered
    spark-mean  C native numbers of each token's own channels, a mask of D bits, one mean: places are counted from the mask
    spark-sign  the same, and a sign for every other channel, a size for the token and one for the channel
    kivi        codes of 4 or 2 bits: Keys per channel in groups of 32 tokens, Values per token in groups of 32 channels; rebuilt Values are
                fp16 as their scales are, for in bf16 those of 2 bits shift by 4e-4 on the mean: 2.8e-2 of an output over 32k tokens

Stored forms are those of `runtime/rivals/` as their coders make them; `reference` rebuilds them as the coders do. No window, no append.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # query rows of a tile, of which G are used
LOG2E = 1.4426950408889634


@triton.jit
def _spark_keys(keys, channels, signs, size, channel_size, fill, i_n, o_t, b_real, S, C, D: tl.constexpr, SIGNS: tl.constexpr):
    """A tile [T, D] of Keys from kept numbers and masks."""
    o_d = tl.arange(0, D)
    i_row = (i_n * S + o_t)[:, None]
    b_mask = tl.load(channels + i_row * (D // 8) + (o_d // 8)[None, :], mask=b_real[:, None], other=0).to(tl.int32)
    b_bit = (b_mask >> (o_d % 8)[None, :]) & 1
    b_rank = tl.cumsum(b_bit, axis=1) - b_bit  # kept channels before this one
    b_kept = tl.load(keys + i_row * C + b_rank, mask=(b_bit > 0) & b_real[:, None], other=0.0).to(tl.float32)
    if SIGNS:
        b_place = o_d[None, :] - b_rank
        b_sign = tl.load(signs + i_row * ((D - C + 7) // 8) + b_place // 8, mask=(b_bit == 0) & b_real[:, None], other=0).to(tl.int32)
        b_positive = (b_sign >> (b_place % 8)) & 1
        b_size = tl.load(size + i_n * S + o_t, mask=b_real, other=0.0).to(tl.float32)
        b_channel = tl.load(channel_size + i_n * D + o_d).to(tl.float32)
        b_other = b_size[:, None] * b_channel[None, :] * (2 * b_positive - 1).to(tl.float32)
    else:
        b_other = tl.load(fill + i_n * S + o_t, mask=b_real, other=0.0).to(tl.float32)[:, None]
    return tl.where(b_bit > 0, b_kept, b_other)


@triton.jit
def _kivi_keys(codes, scale, zero, i_n, o_t, b_real, S, D: tl.constexpr, BITS: tl.constexpr):
    """A tile [T, D]: groups of 32 tokens of a channel share a scale."""
    o_d = tl.arange(0, D)
    i_group = i_n * (S // 32) + o_t // 32
    i_channel = i_group[:, None] * D + o_d[None, :]
    o_bit = (o_t % 32) * BITS
    b_byte = tl.load(codes + i_channel * (4 * BITS) + (o_bit // 8)[:, None], mask=b_real[:, None], other=0).to(tl.int32)
    b_code = (b_byte >> (o_bit % 8)[:, None]) & (2**BITS - 1)
    b_scale = tl.load(scale + i_channel, mask=b_real[:, None], other=0.0).to(tl.float32)
    b_zero = tl.load(zero + i_channel, mask=b_real[:, None], other=0.0).to(tl.float32)
    return b_code.to(tl.float32) * b_scale + b_zero


@triton.jit
def _kivi_values(codes, scale, zero, i_n, o_t, b_real, S, D: tl.constexpr, BITS: tl.constexpr):
    """A tile [T, D]: groups of 32 channels of a token share a scale."""
    o_d = tl.arange(0, D)
    i_row = (i_n * S + o_t)[:, None]
    b_byte = tl.load(codes + i_row * (D * BITS // 8) + (o_d * BITS // 8)[None, :], mask=b_real[:, None], other=0).to(tl.int32)
    b_code = (b_byte >> (o_d * BITS % 8)[None, :]) & (2**BITS - 1)
    i_group = i_row * (D // 32) + (o_d // 32)[None, :]
    b_scale = tl.load(scale + i_group, mask=b_real[:, None], other=0.0).to(tl.float32)
    b_zero = tl.load(zero + i_group, mask=b_real[:, None], other=0.0).to(tl.float32)
    return b_code.to(tl.float32) * b_scale + b_zero


@triton.jit
def split_kernel(
    q,  # [N, G, D]
    keys,  # native numbers, or codes
    values,
    channels,  # masks, or places of the kept channels int32 [N, C]
    signs,
    size,  # of a token; scales of Key codes
    channel_size,  # of a channel; zero points of Key codes
    fill,
    value_scale,
    value_zero,
    part_m,  # fp32 [N, splits, ROWS]
    part_l,
    part_acc,  # fp32 [N, splits, ROWS, D]
    S,
    C,  # kept numbers of a Key
    splits,
    scaling,
    G: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # C, where it is the width of a tile
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_n, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_r, o_d, o_c = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, WIDTH)
    b_rows = o_r < G
    if KIND == "think":
        b_places = tl.load(channels + i_n * C + o_c)
        b_q = tl.load(q + i_n * G * D + o_r[:, None] * D + b_places[None, :], mask=b_rows[:, None], other=0.0)
    else:
        b_q = tl.load(q + i_n * G * D + o_r[:, None] * D + o_d[None, :], mask=b_rows[:, None], other=0.0)
    b_m = tl.full([ROWS], -float("inf"), tl.float32)
    b_l = tl.zeros([ROWS], tl.float32)
    b_acc = tl.zeros([ROWS, D], tl.float32)
    i_tiles = tl.cdiv(S, TILE)
    for i_tile in range(i_split, i_tiles, splits):
        o_t = i_tile * TILE + tl.arange(0, TILE)
        b_real = o_t < S
        i_row = (i_n * S + o_t)[:, None]
        if KIND == "think":
            b_k = tl.load(keys + i_row * C + o_c[None, :], mask=b_real[:, None], other=0.0)
        elif KIND == "dense":
            b_k = tl.load(keys + i_row * D + o_d[None, :], mask=b_real[:, None], other=0.0)
        elif KIND == "kivi":
            b_k = _kivi_keys(keys, size, channel_size, i_n, o_t, b_real, S, D, BITS)
        else:
            b_k = _spark_keys(keys, channels, signs, size, channel_size, fill, i_n, o_t, b_real, S, C, D, KIND == "spark-sign")
        if KIND == "kivi":
            b_v = _kivi_values(values, value_scale, value_zero, i_n, o_t, b_real, S, D, BITS)
        else:
            b_v = tl.load(values + i_row * D + o_d[None, :], mask=b_real[:, None], other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype))) * scaling
        b_s = tl.where(b_real[None, :], b_s, -float("inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_scale = tl.exp2(b_m - b_new)
        b_l = b_l * b_scale + tl.sum(b_p, 1)
        if KIND == "kivi" and b_q.dtype == tl.bfloat16:
            # 2 bits have few levels, whose rounding to bf16 has a mean; unlike other rounding that does not average out over tokens
            b_sum = tl.dot(b_p.to(tl.float16), b_v.to(tl.float16))
        else:
            b_sum = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype))
        b_acc = b_acc * b_scale[:, None] + b_sum
        b_m = b_new
    i_out = (i_n * splits + i_split) * ROWS + o_r
    tl.store(part_m + i_out, b_m)
    tl.store(part_l + i_out, b_l)
    tl.store(part_acc + i_out[:, None] * D + o_d[None, :], b_acc)


@triton.jit
def merge_kernel(part_m, part_l, part_acc, out, G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """One softmax of all splits: a program for each head and query row."""
    i_n, i_row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_s, o_d = tl.arange(0, SPLITS), tl.arange(0, D)
    i_part = (i_n * SPLITS + o_s) * ROWS + i_row
    b_m, b_l = tl.load(part_m + i_part), tl.load(part_l + i_part)
    b_scale = tl.exp2(b_m - tl.max(b_m, 0))
    b_acc = tl.load(part_acc + i_part[:, None] * D + o_d[None, :])
    b_out = tl.sum(b_acc * b_scale[:, None], 0) / tl.sum(b_l * b_scale, 0)
    tl.store(out + (i_n * G + i_row) * D + o_d, b_out.to(out.dtype.element_ty))


@dataclass(frozen=True)
class Stored:
    """What a rival keeps of N heads of S tokens, as its coder made it. kind: of the list above; C: kept numbers of a Key; bits: of kivi."""

    kind: str
    parts: Mapping[str, Tensor]
    tokens: int
    kept: int
    bits: int = 4

    def bytes(self) -> int:
        """That a step reads."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())


@dataclass(frozen=True)
class Launch:
    """How a call is divided: tokens of a tile, programs for each head, warps."""

    tile: int = 64
    splits: int = 8
    warps: int = 4


def splits_for(heads: int, tokens: int, multiprocessors: int, tile: int, waves: int = 4) -> int:
    """A power of two of programs for each head, so that a few of them wait for every multiprocessor and none is without tokens."""
    wanted = max(1, min(waves * multiprocessors // heads, -(-tokens // tile)))
    return 1 << (wanted.bit_length() - 1)


def attention(query: Tensor, stored: Stored, launch: Launch) -> Tensor:
    """Attention of queries [N, G, D] over what is stored: [N, G, D]."""
    heads, group, dim = query.shape
    parts, splits = stored.parts, launch.splits
    part_m, part_l = (torch.empty(heads, splits, ROWS, device=query.device) for _ in range(2))
    part_acc = torch.empty(heads, splits, ROWS, dim, device=query.device)
    out = torch.empty_like(query)
    kivi = stored.kind == "kivi"
    names = {
        "keys": "key_codes" if kivi else "keys",
        "values": "value_codes" if kivi else "values",
        "channels": "channels",
        "signs": "signs",
        "size": "key_scale" if kivi else "size",
        "channel_size": "key_zero" if kivi else "channel_size",
        "fill": "fill",
        "value_scale": "value_scale",
        "value_zero": "value_zero",
    }
    tensors = {name: parts.get(part, query) for name, part in names.items()}  # what a kind has not is not read
    split_kernel[heads, splits](
        query,
        **tensors,
        part_m=part_m,
        part_l=part_l,
        part_acc=part_acc,
        S=stored.tokens,
        C=stored.kept,
        splits=splits,
        scaling=dim**-0.5 * LOG2E,
        G=group,
        D=dim,
        WIDTH=stored.kept if stored.kind == "think" else ROWS,
        KIND=stored.kind,
        BITS=stored.bits,
        TILE=launch.tile,
        ROWS=ROWS,
        num_warps=launch.warps,
    )
    merge_kernel[heads, group](part_m, part_l, part_acc, out, G=group, D=dim, SPLITS=splits, ROWS=ROWS)
    return out
