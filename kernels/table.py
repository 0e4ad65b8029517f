"""The contract between runtime and kernels: how one layer's cache lies in memory, and who computes which part of it.

A cache is a list of *segments* per sequence and KV head, described by an int64 table, plus a *window* of the newest
text tokens, kept raw. Letters: B sequences, Hkv KV heads, D head_dim, C window capacity, R rank of a coded segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .decode_tuning import H100, Tuning
from .slabs import UNIT, Slabs, check_slabs

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
class SplitPlan:
    """The work list of one layer: every split is a run of tokens of one segment, or of the window, of one (b, h).

    Attributes:
        records: int64 `[N, SPLIT_FIELDS]`, the most costly first, so that the last programs to start are short ones.
        ranges: int32 `[B * Hkv + 1]`; partials of row `b * Hkv + h` lie in slots `ranges[row]` to `ranges[row + 1]`.
        max_splits: the most splits any one row has.
        key_widths, value_widths: the largest native, 8-bit and 4-bit slab of any rotated side.
        pairs: which pairs (raw Keys, raw Values) occur among the segments, the window apart.
    """

    records: Tensor
    ranges: Tensor
    max_splits: int
    key_widths: Slabs
    value_widths: Slabs
    pairs: frozenset[tuple[bool, bool]]

    @property
    def num_splits(self) -> int:
        return self.records.shape[0]


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


def programs_for(table: Tensor, multiprocessors: int, tuning: Tuning = H100) -> int:
    """Splits to aim for with a table [B, Hkv, Nseg, FIELDS].

    Few splits keep the merge short; many leave no tail when every row has to be cut anyway, as it has once rows alone fill the GPU.
    """
    if table.shape[0] * table.shape[1] >= multiprocessors:
        return tuning.filled_programs * multiprocessors
    coded = bool(table[..., [side + bits for side in (KEY, VALUE) for bits in (BYTE, NIBBLE)]].any())
    return (tuning.coded_programs if coded else tuning.programs) * multiprocessors


def plan_splits(
    table: Tensor,
    *,
    window_capacity: int,
    head_dim: int,
    itemsize: int = 2,
    num_programs: int = 396,
    min_tokens: int = 256,
    tuning: Tuning = H100,
    device: torch.device | str | None = None,
) -> SplitPlan:
    """Cut a layer's cache into splits that take about equal time; runs on the host.

    Counts follow what tokens cost rather than their number, so that heads of different ranks finish together. The plan stays valid
    until the *table* changes or the window is reallocated: window splits cover the capacity, and kernels clamp them to the length
    they read on the device. Rows whose tables are equal may be swapped freely.

    Args:
        table: int64 `[B, Hkv, Nseg, FIELDS]` on the CPU.
        window_capacity: C.
        itemsize: bytes of a native number.
        num_programs: splits wanted over the whole layer; about 3 per multiprocessor, 396 suits an H100 (132).
        min_tokens: no split is shorter unless its segment is.
        tuning: of the GPU: what tokens cost.
        device: where records and ranges go; default the CPU.

    Raises:
        ValueError: a slab, offset or stride is off its step, or a rank exceeds D.
    """
    batch, heads, segments, _ = table.shape
    rows = batch * heads
    pieces = np.zeros((rows, segments + 1, FIELDS), dtype=np.int64)  # in numpy: many small steps, which torch takes longer to begin
    pieces[:, :segments] = table.reshape(rows, segments, FIELDS).numpy()
    pieces[:, segments, KIND], pieces[:, segments, LENGTH] = int(Kind.WINDOW), window_capacity
    for side in (KEY, VALUE):
        pieces[:, segments, side + NATIVE] = head_dim
        pieces[:, segments, side + BASIS] = NONE
    row, at = np.nonzero((pieces[..., KIND] != int(Kind.EMPTY)) & (pieces[..., LENGTH] > 0))
    pieces, entry = pieces[row, at], np.where(at == segments, NONE, row * segments + at)
    _check(pieces, head_dim)

    length = pieces[:, LENGTH]
    stored = pieces[pieces[:, KIND] != int(Kind.WINDOW)]
    key_widths, value_widths = _widths(stored, KEY), _widths(stored, VALUE)
    token_cost = _token_costs(pieces, itemsize, key_widths, value_widths, tuning)
    wanted = float((length * token_cost).sum()) / max(num_programs, 1)
    count = (length * token_cost / max(wanted, 1.0)).round().astype(np.int64)
    count = np.minimum(count.clip(min=1), (length // min_tokens).clip(min=1))
    tokens = -(-length // count)  # per split: even, whole blocks, and whole tiles where that changes little
    step = np.where(tokens >= 4 * TILE, TILE, BLOCK)
    tokens = -(-tokens // step) * step
    count = -(-length // tokens)

    piece = np.repeat(np.arange(len(pieces)), count)
    slot = np.arange(len(piece))
    start = (slot - (count.cumsum() - count)[piece]) * tokens[piece]
    records = np.zeros((len(piece), SPLIT_FIELDS), dtype=np.int64)
    records[:, SLOT], records[:, ROW], records[:, SPLIT_KIND], records[:, ENTRY] = slot, row[piece], pieces[piece, KIND], entry[piece]
    records[:, COUNT], records[:, START] = np.minimum(tokens[piece], length[piece] - start), start
    per_row = np.bincount(row, weights=count, minlength=rows).astype(np.int64)
    ranges = np.concatenate([[0], per_row.cumsum()]).astype(np.int32)
    longest_first = np.argsort(-records[:, COUNT] * token_cost[piece], kind="stable")
    return SplitPlan(
        records=sent(torch.from_numpy(records[longest_first]), device),
        ranges=sent(torch.from_numpy(ranges), device),
        max_splits=int(per_row.max()) if rows else 0,
        key_widths=key_widths,
        value_widths=value_widths,
        pairs=frozenset((n >= 2, n % 2 == 1) for n in _distinct((stored[:, [KEY + BASIS, VALUE + BASIS]] == NONE).astype(np.int64), 2)),
    )


def sent(host: Tensor, device: torch.device | str | None) -> Tensor:
    """A tensor of the CPU on a device; the host does not wait for what a GPU has to do first.

    While a CUDA graph is captured it is an error, as every copy from ordinary memory is: replays would read what lies there by then.
    """
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_current_stream_capturing():
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def _token_costs(pieces: np.ndarray, itemsize: int, key_widths: Slabs, value_widths: Slabs, tuning: Tuning) -> np.ndarray:
    """What a token of each piece costs, fp64, in bytes read: its own, or those of the same time where instructions take longer.

    All heads of a layer go through tiles as wide as its widest slabs, so for codes that time is one for all (H100, three budgets).
    """
    halves = np.array([2 * itemsize, 2, 1])  # half bytes of a direction
    read, instructions = np.zeros(len(pieces)), np.full(len(pieces), float(tuning.softmax))  # of scores and softmax
    for side, widths in ((KEY, key_widths), (VALUE, value_widths)):
        read += pieces[:, side + NATIVE : side + BASIS] @ halves / 2
        of_tile = tuning.byte * _tile(widths.byte) + tuning.nibble * _tile(widths.nibble // 2)
        instructions += (pieces[:, side + BASIS] != NONE) * of_tile
    coded = (pieces[:, [KEY + BYTE, KEY + NIBBLE, VALUE + BYTE, VALUE + NIBBLE]] > 0).any(1)
    return np.maximum(read, np.where(coded, instructions, 1.0))  # a segment without any direction takes a little time too


def _distinct(rows: np.ndarray, base: int) -> list[int]:
    """Different rows of numbers [N, n] from 0 to base - 1, each as one number of n digits."""
    digits = np.array([base**n for n in reversed(range(rows.shape[1]))])
    found: list[int] = np.unique(rows @ digits).tolist()
    return found


def _tile(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length()) if width else 0


def _widths(pieces: np.ndarray, side: int) -> Slabs:
    """The largest slab of each precision among the rotated sides."""
    rotated = pieces[pieces[:, side + BASIS] != NONE, side + NATIVE : side + BASIS]
    return Slabs(*rotated.max(0).tolist()) if len(rotated) else Slabs()


def _check(pieces: np.ndarray, head_dim: int) -> None:
    if head_dim % UNIT:
        raise ValueError(f"head_dim {head_dim} is not a multiple of {UNIT}; use the torch backend")
    for side in (KEY, VALUE):
        slabs = pieces[:, side + NATIVE : side + BASIS]
        if ((slabs < 0) | (slabs > head_dim)).any():  # no number of these names one triple
            found = slabs.tolist()
        else:
            base = head_dim + 1
            found = [(n // base**2, n // base % base, n % base) for n in _distinct(slabs, base)]
        for one in found:
            check_slabs(Slabs(*one), head_dim)
        rotated = pieces[pieces[:, side + BASIS] != NONE]
        for name, held, field, step in (("OFFSET", pieces, OFFSET, 16), ("BASIS", rotated, BASIS, UNIT), ("STRIDE", rotated, STRIDE, UNIT)):
            values = held[:, side + field]
            if (values % step != 0).any():
                raise ValueError(f"{name} must be a multiple of {step}, got {int(values[values % step != 0][0])}")
