"""Who computes what of one layer's attention: its cache cut into splits of about equal time, planned on the host.

A plan follows from the table and from the room in the windows. Tables change when something is coded; room changes while an answer grows,
and planning takes the host longer than dozens of steps of attention. So a plan is made for windows up to some size, with the splits that
are still to come first among its records: a plan for smaller windows of that class leaves the first ones out (`SplitPlan.of_windows`).
Which sizes are one class follows from the size alone, so that equal caches have equal plans, whatever came before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .decode_tuning import H100, Tuning, tuning_of
from .slabs import UNIT, Slabs, check_slabs
from .table import (
    BASIS,
    BYTE,
    COUNT,
    ENTRY,
    FIELDS,
    KEY,
    KIND,
    LENGTH,
    NATIVE,
    NIBBLE,
    NONE,
    OFFSET,
    ROW,
    SLOT,
    SPLIT_FIELDS,
    SPLIT_KIND,
    START,
    STRIDE,
    VALUE,
    Kind,
    sent,
)
from .waves import in_waves, programs_at_once, split_tokens

LEAST_TOKENS = 256  # no split is shorter unless its segment is
AHEAD_RECORDS, MOST_AHEAD, LEAST_AHEAD = 1024, 16, 2  # splits of growing windows that a plan has: over a layer, and of a row at most


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """The work list of one layer: every split is a run of tokens of one segment, or of the window, of one (b, h).

    Attributes:
        records: int64 `[N, SPLIT_FIELDS]`: splits of windows that are still to grow, those of the largest first and as many for every row;
            then the most costly first, so that the last programs to start are short ones.
        ranges: int32 `[B * Hkv + 1]`; partials of row `b * Hkv + h` lie in slots `ranges[row]` to `ranges[row + 1] - unused`.
        slots: of partials, for all rows.
        unused: the last slots of every row, for which there is no split.
        max_splits: the most splits any one row has.
        window_capacity, window_tokens: most tokens of a window, and those of each of its splits.
        key_widths, value_widths: the largest native, 8-bit and 4-bit slab of any rotated side.
        pairs: which pairs (raw Keys, raw Values) occur among the segments, the window apart.
    """

    records: Tensor
    ranges: Tensor
    slots: int
    unused: int
    max_splits: int
    window_capacity: int
    window_tokens: int
    key_widths: Slabs
    value_widths: Slabs
    pairs: frozenset[tuple[bool, bool]]

    @property
    def num_splits(self) -> int:
        return self.records.shape[0]

    def of_windows(self, capacity: int) -> SplitPlan:
        """The plan for windows of `capacity` tokens, which shares these tensors; `plan_splits` was told the least and the most of them."""
        if not self.window_tokens:
            return self
        less = -(-self.window_capacity // self.window_tokens) - -(-capacity // self.window_tokens)
        records = self.records[less * (self.ranges.shape[0] - 1) :]
        return replace(self, records=records, unused=self.unused + less, max_splits=self.max_splits - less, window_capacity=capacity)


def window_class(capacity: int, rows: int) -> tuple[int, int]:
    """The least and the most tokens of windows that share a plan with windows of `capacity` tokens; `rows`: B · Hkv.

    A split that is still to come takes a record and room for its partial, and no program: few rows get plans for longer answers.
    """
    step = LEAST_TOKENS * min(max(AHEAD_RECORDS // max(rows, 1), LEAST_AHEAD), MOST_AHEAD)
    most = -(-capacity // step) * step
    return most - step + 1 if most else 0, most


def programs_for(table: Tensor, multiprocessors: int, tuning: Tuning = H100) -> int:
    """Splits to aim for with a table [B, Hkv, Nseg, FIELDS].

    Few splits keep the merge short; many leave no tail when every row has to be cut anyway, as it has once rows alone fill the GPU.
    """
    if table.shape[0] * table.shape[1] >= multiprocessors:
        return tuning.filled_programs * multiprocessors
    coded = bool(table[..., [side + bits for side in (KEY, VALUE) for bits in (BYTE, NIBBLE)]].any())
    return (tuning.coded_programs if coded else tuning.programs) * multiprocessors


def plan_growing(
    table: np.ndarray, capacity: int, head_dim: int, itemsize: int, device: torch.device, before: SplitPlan | None = None
) -> SplitPlan:
    """The plan for windows of the class of `capacity`: `before`, a plan of this table, if it is that. The rest is as for `plan_splits`."""
    rows = table.shape[0] * table.shape[1]
    least, most = window_class(capacity, rows)
    if before is not None and before.window_capacity == most and before.ranges.shape[0] == rows + 1:
        return before
    host, tuning = torch.from_numpy(np.ascontiguousarray(table)), tuning_of(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return plan_splits(
        host,
        window_capacity=most,
        window_least=least,
        head_dim=head_dim,
        itemsize=itemsize,
        num_programs=programs_for(host, processors, tuning),
        multiprocessors=processors,
        tuning=tuning,
        device=device,
    )


def plan_splits(
    table: Tensor,
    *,
    window_capacity: int,
    window_least: int | None = None,
    head_dim: int,
    itemsize: int = 2,
    num_programs: int = 396,
    multiprocessors: int | None = None,
    min_tokens: int = LEAST_TOKENS,
    tuning: Tuning = H100,
    device: torch.device | str | None = None,
) -> SplitPlan:
    """Cut a layer's cache into splits that take about equal time; runs on the host.

    Counts follow what tokens cost rather than their number, so that heads of different ranks finish together. The plan stays valid
    until the *table* changes or windows have more room: window splits cover the capacity, and kernels clamp them to the length
    they read on the device. Rows whose tables are equal may be swapped freely.

    Args:
        table: int64 `[B, Hkv, Nseg, FIELDS]` on the CPU.
        window_capacity: C. window_least: the least room that `of_windows` will be asked for, from which on windows grow by splits that the
            others' sizes do not depend on; default C.
        itemsize: bytes of a native number.
        num_programs: splits wanted over the whole layer; about 3 per multiprocessor, 396 suits an H100 (132).
        multiprocessors: of the GPU; where rows alone fill it, splits of codes are then as many as fill whole waves best (`waves.in_waves`).
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

    length, growing = pieces[:, LENGTH], pieces[:, KIND] == int(Kind.WINDOW)
    least = window_capacity if window_least is None else window_least
    usual = np.where(growing, min(window_capacity, least + LEAST_TOKENS - 1), length)  # what splits are sized by
    stored = pieces[pieces[:, KIND] != int(Kind.WINDOW)]
    key_widths, value_widths = _widths(stored, KEY), _widths(stored, VALUE)
    token_cost = _token_costs(pieces, itemsize, key_widths, value_widths, tuning)
    work = usual * token_cost
    resident = programs_at_once(key_widths, value_widths, _pairs(stored), head_dim, itemsize, tuning)
    if multiprocessors and resident and rows >= multiprocessors:
        num_programs = in_waves(usual, work, length, ~growing, num_programs, min_tokens, multiprocessors * resident)
    tokens = split_tokens(usual, work, np.array([num_programs]), min_tokens)[0]
    count = -(-length // tokens)

    piece = np.repeat(np.arange(len(pieces)), count)
    slot = np.arange(len(piece))
    start = (slot - (count.cumsum() - count)[piece]) * tokens[piece]
    records = np.zeros((len(piece), SPLIT_FIELDS), dtype=np.int64)
    records[:, SLOT], records[:, ROW], records[:, SPLIT_KIND], records[:, ENTRY] = slot, row[piece], pieces[piece, KIND], entry[piece]
    records[:, COUNT], records[:, START] = np.minimum(tokens[piece], length[piece] - start), start
    per_row = np.bincount(row, weights=count, minlength=rows).astype(np.int64)
    ranges = np.concatenate([[0], per_row.cumsum()]).astype(np.int32)
    cost = records[:, COUNT] * token_cost[piece]
    window_tokens = int(tokens[growing][0]) if growing.any() else 0  # all windows are alike
    to_come = growing[piece] & (start >= -(-least // max(window_tokens, 1)) * window_tokens)
    order = np.lexsort((slot, np.where(to_come, -start, -cost), ~to_come))
    return SplitPlan(
        records=sent(torch.from_numpy(records[order]), device),
        ranges=sent(torch.from_numpy(ranges), device),
        slots=len(records),
        unused=0,
        max_splits=int(per_row.max()) if rows else 0,
        window_capacity=window_capacity,
        window_tokens=window_tokens,
        key_widths=key_widths,
        value_widths=value_widths,
        pairs=_pairs(stored),
    )


def _pairs(stored: np.ndarray) -> frozenset[tuple[bool, bool]]:
    """Which pairs (raw Keys, raw Values) occur."""
    return frozenset((n >= 2, n % 2 == 1) for n in _distinct((stored[:, [KEY + BASIS, VALUE + BASIS]] == NONE).astype(np.int64), 2))


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
