"""The contract between runtime and kernels: how one layer's cache lies in memory, and who computes which part of it.

A cache is a list of *segments* per sequence and KV head, described by an int64 table, plus a *window* of the newest
text tokens, kept raw. Letters: B sequences, Hkv KV heads, D head_dim, C window capacity, R rank of a coded segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .splits import SplitPlan

BLOCK = 64
"""Tokens per block: text leaves the window in blocks, and splits of a segment begin on them."""
TILE = 128
"""Tokens that long splits are a multiple of: what the split kernel takes at a time."""


class Kind(IntEnum):
    """What a row of the table (or of a split plan) describes; `WINDOW` occurs in split plans only."""

    EMPTY = 0
    DENSE = 1
    CODED = 2
    WINDOW = 3


KIND, LENGTH, KEY, VALUE, FIELDS = 0, 1, 2, 11, 20
"""Columns of the table: what the segment is, its tokens, where the fields of its Keys and of its Values begin, and how many there are."""

OFFSET, NATIVE, BYTE, NIBBLE, BASIS, STRIDE, SCALES, MEAN, OWN_MEAN = range(9)
"""Fields of one side: `entry[KEY + OFFSET]`.

OFFSET counts bytes of the code pool, a multiple of 16; NATIVE, BYTE and NIBBLE are the slabs. BASIS, SCALES, MEAN and OWN_MEAN count
numbers of their pools, STRIDE those between rows of the decode matrix; BASIS and STRIDE are multiples of 8. `NONE` stands for none: raw
numbers have none of the four, and every mean may be the sum of a shared and an own one. Without any scaled direction SCALES means nothing.
A BASIS below `NONE` lies in the pool of own bases, at `own_basis(BASIS)`; so do a sequence's bases stay apart from those of the artifact.
"""
NONE = -1
Place = TypeVar("Place", int, np.ndarray)


def own_basis(place: Place) -> Place:
    """BASIS of an own basis from its offset, and its offset from BASIS: multiples of 8 from 0 on become -8, -16, ..."""
    return -place - 8


SLOT, ROW, SPLIT_KIND, COUNT, START, ENTRY = range(6)
SPLIT_FIELDS = 8
"""Columns of a split record. ENTRY is the row of the flattened table [B · Hkv · Nseg, FIELDS] that the split reads, `NONE` for the
window."""


@dataclass(frozen=True, slots=True)
class CacheView:
    """A snapshot of one layer's cache on one device.

    Attributes:
        table: int64 `[B, Hkv, Nseg, FIELDS]`. Lengths and slabs may differ per row, head and segment; rows may share offsets (beams).
        codes: uint8, flat: codes of all segments, Keys and Values, laid out by `codes.pack`.
        bases: flat, compute dtype: decode matrices; element (d, r) of a side's `[D, R]` is at `BASIS + d * STRIDE + r`.
        own_bases: the same for a BASIS below `NONE`, at `own_basis(BASIS) + d * STRIDE + r`.
        scales: flat bf16: those of a side's 8-bit directions and then of its 4-bit ones start at SCALES.
        means: flat fp32: shared means `[D]`. own_means: flat fp16: what a segment's mean is beyond the shared one.
        windows: `[2, B, Hkv, C, D]`, Keys and Values, compute dtype, raw, the newest tokens included; slack may hold anything. One tensor:
            what writes two that share their memory is compiled wrongly by torch 2.11 (`decode_ops`).
        window_lengths: int32 `[B]`, valid window tokens, the newest included.
        splits: the work list for the Triton kernel; the torch twin ignores it.
    """

    table: Tensor
    codes: Tensor
    bases: Tensor
    own_bases: Tensor
    scales: Tensor
    means: Tensor
    own_means: Tensor
    windows: Tensor
    window_lengths: Tensor
    splits: SplitPlan | None = None

    @property
    def window_keys(self) -> Tensor:
        """`[B, Hkv, C, D]`"""
        return self.windows[0]

    @property
    def window_values(self) -> Tensor:
        """`[B, Hkv, C, D]`"""
        return self.windows[1]

    @property
    def batch_size(self) -> int:
        return self.windows.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.windows.shape[2]

    @property
    def head_dim(self) -> int:
        return self.windows.shape[4]

    @property
    def dtype(self) -> torch.dtype:
        """Of native numbers: the compute dtype."""
        return self.windows.dtype


def sent(host: Tensor, device: torch.device | str | None) -> Tensor:
    """A tensor of the CPU on a device; the host does not wait for what a GPU has to do first.

    While a CUDA graph is captured it is an error, as every copy from ordinary memory is: replays would read what lies there by then.
    """
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_current_stream_capturing():
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
