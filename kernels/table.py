"""The contract between runtime and kernels: how one layer's cache lies in memory, and who computes which part of it.

A cache is a list of *segments* per sequence and KV head, described by an int64 table, plus a *window* of the newest
text tokens, kept raw. Letters: B sequences, Hkv KV heads, D head_dim, C window capacity, R rank of a coded segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

BLOCK = 64
"""Tokens per pool block; every segment is padded to whole blocks."""


class Kind(IntEnum):
    """What a row of the table (or of a split plan) describes; `WINDOW` occurs in split plans only."""

    EMPTY = 0
    DENSE = 1
    CODED = 2
    WINDOW = 3


KIND, KEY_OFFSET, VALUE_OFFSET, LENGTH, RANK, BASIS_OFFSET, BASIS_STRIDE, MEAN_OFFSET = range(8)
FIELDS = 8
"""Columns of the table. Offsets and the stride count elements and are multiples of 8 (16 bytes in bf16), MEAN_OFFSET any."""

SLOT, ROW, SPLIT_KIND, COUNT, START, KEY_UNITS, VALUE_UNITS, RANK_UNITS, BASIS_UNITS, STRIDE_UNITS, MEAN = range(11)
SPLIT_FIELDS = 16
"""Columns of a split record, padded to 128 bytes. "Units" are 8 elements: multiplied by 8 inside a kernel they prove alignment."""
UNIT = 8


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """The work list of one layer: every split is a run of tokens of one segment, or of the window, of one (b, h).

    Attributes:
        records: int64 `[N, SPLIT_FIELDS]`, the most bytes first, so that the last programs to start are short ones.
        ranges: int32 `[B * Hkv + 1]`; partials of row `b * Hkv + h` lie in slots `ranges[row]` to `ranges[row + 1]`.
        max_rank: the largest rank of a coded segment, 0 if there is none.
        max_splits: the most splits any one row has.
        has_coded, has_dense: whether any split is coded, or is a dense segment (the window apart).
    """

    records: Tensor
    ranges: Tensor
    max_rank: int
    max_splits: int
    has_coded: bool
    has_dense: bool

    @property
    def num_splits(self) -> int:
        return self.records.shape[0]


@dataclass(frozen=True, slots=True)
class CacheView:
    """A snapshot of one layer's cache; tensors share one device, and pools, bases and window one dtype.

    Attributes:
        table: int64 `[B, Hkv, Nseg, FIELDS]`. Lengths and ranks may differ per row, head and segment; rows may share offsets (beams).
        keys: flat pool; a DENSE segment holds raw Keys at width D, a CODED one codes at width RANK, laid out by `codes.pack`.
        values: flat pool of raw Values at width D, laid out by `codes.pack`.
        bases: flat pool of decode matrices; element (d, r) of a segment's `[D, R]` is at `BASIS_OFFSET + d * BASIS_STRIDE + r`.
        means: flat fp32 pool; the Key mean `[D]` of a coded segment starts at MEAN_OFFSET.
        window_keys, window_values: `[B, Hkv, C, D]`, raw, the newest tokens included; slack may hold anything.
        window_lengths: int32 `[B]`, valid window tokens, the newest included.
        splits: the work list for the Triton kernel; the torch twin ignores it.
    """

    table: Tensor
    keys: Tensor
    values: Tensor
    bases: Tensor
    means: Tensor
    window_keys: Tensor
    window_values: Tensor
    window_lengths: Tensor
    splits: SplitPlan | None = None

    @property
    def batch_size(self) -> int:
        return self.window_keys.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.window_keys.shape[1]

    @property
    def head_dim(self) -> int:
        return self.window_keys.shape[3]


def programs_for(rows: int, multiprocessors: int) -> int:
    """Splits to aim for with `rows` (b, h) pairs: 3 per multiprocessor, 8 once the rows alone fill the GPU.

    Few splits keep the merge short; many leave no tail when every row has to be cut anyway (H100, bench_decode.py --sweep).
    """
    return (8 if rows >= multiprocessors else 3) * multiprocessors


def plan_splits(
    table: Tensor,
    *,
    window_capacity: int,
    head_dim: int,
    itemsize: int = 2,
    num_programs: int = 396,
    min_tokens: int = 256,
    device: torch.device | str | None = None,
) -> SplitPlan:
    """Cut a layer's cache into splits of about equal bytes; runs on the host.

    Counts follow bytes rather than tokens, so that heads of different ranks finish together. The plan stays valid until the
    *table* changes or the window is reallocated: window splits cover the capacity, and kernels clamp them to the length they
    read on the device. Rows whose tables are equal may be swapped freely.

    Args:
        table: int64 `[B, Hkv, Nseg, FIELDS]` on the CPU.
        window_capacity: C.
        itemsize: bytes per stored number.
        num_programs: splits wanted over the whole layer; about 3 per multiprocessor, 396 suits an H100 (132).
        min_tokens: no split is shorter unless its segment is.
        device: where records and ranges go; default the CPU.

    Raises:
        ValueError: a rank, offset or stride is not a multiple of 8, or a rank exceeds D.
    """
    batch, heads, segments, _ = table.shape
    rows = batch * heads
    window = torch.zeros(rows, 1, FIELDS, dtype=torch.int64)
    window[..., KIND], window[..., LENGTH] = int(Kind.WINDOW), window_capacity
    pieces = torch.cat([table.reshape(rows, segments, FIELDS).to(torch.int64), window], dim=1).reshape(-1, FIELDS)
    row = torch.arange(rows).repeat_interleave(segments + 1)
    keep = (pieces[:, KIND] != int(Kind.EMPTY)) & (pieces[:, LENGTH] > 0)
    pieces, row = pieces[keep], row[keep]
    coded = pieces[:, KIND] == int(Kind.CODED)
    _check(pieces, coded, head_dim)

    length = pieces[:, LENGTH]
    width = torch.where(coded, pieces[:, RANK], head_dim)
    token_bytes = (width + head_dim) * itemsize
    wanted = (length * token_bytes).sum().item() / max(num_programs, 1)
    count = ((length * token_bytes) / max(wanted, 1.0)).round().long()
    count = count.clamp(min=1).minimum((length // min_tokens).clamp(min=1))
    tokens = _ceil(_ceil(length, count), BLOCK) * BLOCK  # per split: even, whole blocks
    count = _ceil(length, tokens)

    piece = torch.arange(len(pieces)).repeat_interleave(count)
    slot = torch.arange(len(piece))
    start = (slot - (count.cumsum(0) - count)[piece]) * tokens[piece]
    records = torch.zeros(len(piece), SPLIT_FIELDS, dtype=torch.int64)
    records[:, SLOT], records[:, ROW], records[:, SPLIT_KIND] = slot, row[piece], pieces[piece, KIND]
    records[:, COUNT], records[:, START] = torch.minimum(tokens[piece], length[piece] - start), start
    # Splits start on block boundaries, and blocks follow one another whatever their inside looks like.
    records[:, KEY_UNITS] = (pieces[piece, KEY_OFFSET] + start * width[piece]) // UNIT
    records[:, VALUE_UNITS] = (pieces[piece, VALUE_OFFSET] + start * head_dim) // UNIT
    records[:, RANK_UNITS] = torch.where(coded[piece], pieces[piece, RANK], 0) // UNIT
    records[:, BASIS_UNITS] = pieces[piece, BASIS_OFFSET] // UNIT
    records[:, STRIDE_UNITS] = pieces[piece, BASIS_STRIDE] // UNIT
    records[:, MEAN] = pieces[piece, MEAN_OFFSET]
    per_row = torch.zeros(rows, dtype=torch.int64).index_add_(0, row, count)
    ranges = torch.cat([torch.zeros(1, dtype=torch.int64), per_row.cumsum(0)]).to(torch.int32)
    longest_first = torch.argsort(records[:, COUNT] * token_bytes[piece], descending=True, stable=True)
    return SplitPlan(
        records=records[longest_first].to(device),
        ranges=ranges.to(device),
        max_rank=int(pieces[coded, RANK].max()) if bool(coded.any()) else 0,
        max_splits=int(per_row.max()) if rows else 0,
        has_coded=bool(coded.any()),
        has_dense=bool((pieces[:, KIND] == int(Kind.DENSE)).any()),
    )


def _ceil(a: Tensor, b: Tensor | int) -> Tensor:
    return (a + b - 1) // b


def _check(pieces: Tensor, coded: Tensor, head_dim: int) -> None:
    if head_dim % UNIT:
        raise ValueError(f"head_dim {head_dim} is not a multiple of {UNIT}; use the torch backend")
    ranks = pieces[coded, RANK]
    if bool(((ranks % UNIT != 0) | (ranks < 0) | (ranks > head_dim)).any()):
        raise ValueError(f"ranks must be multiples of {UNIT} from 0 to {head_dim}, got {sorted(set(ranks.tolist()))}")
    aligned = {"KEY_OFFSET": KEY_OFFSET, "VALUE_OFFSET": VALUE_OFFSET, "BASIS_OFFSET": BASIS_OFFSET, "BASIS_STRIDE": BASIS_STRIDE}
    for name, column in aligned.items():
        values = pieces[:, column]
        if bool((values % UNIT != 0).any()):
            raise ValueError(f"{name} must be a multiple of {UNIT} elements, got {int(values[values % UNIT != 0][0])}")
