"""Moving what a store's pool holds: joining text blocks into one segment, and dropping ranges that no table entry names any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..kernels.codes import pool_bytes
from ..kernels.slabs import Slabs
from ..kernels.table import (
    BASIS,
    BLOCK,
    FIELDS,
    KEY,
    KIND,
    LENGTH,
    NATIVE,
    NONE,
    OFFSET,
    OWN_MEAN,
    SCALES,
    STRIDE,
    VALUE,
    Kind,
    own_basis,
)

if TYPE_CHECKING:
    from .store import Store

MERGE_AT = 8  # retired text blocks of one row are merged when there are this many
SIDES = (KEY, VALUE)
LIKE = [field for field in range(FIELDS) if field not in (LENGTH, KEY + OFFSET, VALUE + OFFSET)]


def merge_text(store: Store) -> None:
    """Join a row's like segments of whole blocks (same slabs, basis, mean, scales) once there are `MERGE_AT` of them.

    Retired text arrives in blocks of 64 tokens; without this the table would grow by one segment per block. Pieces of an image that
    is not complete yet are left alone: they are still to become one segment.
    """
    joined: dict[tuple[int, ...], tuple[np.ndarray, int]] = {}  # rows that share blocks (beams) go on sharing what becomes of them
    owners: dict[int, tuple[int, ...]] = {}
    for row, place in zip(*np.nonzero(store.ids), strict=True):
        segment = int(store.ids[row, place])
        owners[segment] = (*owners.get(segment, ()), int(row))
    for row in range(store.batch):
        groups: dict[tuple[int, ...], list[int]] = {}
        for s in np.flatnonzero(store.ids[row]).tolist():
            heads = store.table[row, :, s]
            if not (heads[:, LENGTH] % BLOCK).any() and s not in store.held[row]:
                like = (*heads[:, LIKE].reshape(-1).tolist(), *owners[int(store.ids[row, s])])
                groups.setdefault(like, []).append(s)
        for members in groups.values():
            if len(members) >= MERGE_AT:
                blocks = tuple(store.ids[row, members].tolist())
                if blocks not in joined:
                    joined[blocks] = _join(store, row, members), store.new_id()
                store.clear(row, members)
                store.table[row, :, members[0]], store.ids[row, members[0]] = joined[blocks]
    if joined:
        compact(store)


def _join(store: Store, row: int, members: list[int]) -> np.ndarray:
    """Copy the members of every head one after another; returns the table entries [Hkv, FIELDS] of what they became."""
    entries = store.table[row, :, members[0]].copy()
    entries[:, LENGTH] = store.table[row, :, members, LENGTH].sum(0)
    end, parts = store.codes.numel(), [store.codes]
    for side in SIDES:
        for h in range(store.heads):
            entries[h, side + OFFSET] = end
            slabs = Slabs(*entries[h, side + NATIVE : side + BASIS].tolist())
            parts += _slab_runs(store, store.table[row, h, members], side, slabs)
            end += pool_bytes(int(entries[h, LENGTH]), slabs, store.dtype.itemsize)
    store.codes = torch.cat(parts)
    return entries


def _slab_runs(store: Store, blocks: np.ndarray, side: int, slabs: Slabs) -> list[Tensor]:
    """The codes of blocks one behind the other, slab by slab."""
    widths = (slabs.native * store.dtype.itemsize, slabs.byte, slabs.nibble // 2)
    runs = []
    for n, width in enumerate(widths):
        for block in blocks:
            length = int(block[LENGTH])
            start = int(block[side + OFFSET]) + length * sum(widths[:n])
            runs.append(store.codes[start : start + length * width])
    return runs


def compact(store: Store) -> None:
    """Drop pool ranges that no table entry names any more; entries that share a range go on sharing it."""
    sides = [
        entry[start : start + VALUE - KEY] for entry in store.table.reshape(-1, FIELDS) if entry[KIND] != Kind.EMPTY for start in SIDES
    ]
    lengths = [int(entry[LENGTH]) for entry in store.table.reshape(-1, FIELDS) if entry[KIND] != Kind.EMPTY for _ in SIDES]
    codes = _Moved(store.codes)
    for side, length in zip(sides, lengths, strict=True):
        side[OFFSET] = codes.place(int(side[OFFSET]), pool_bytes(length, _slabs(side), store.dtype.itemsize))
    store.codes = codes.pool()
    named = [*store.written_in(), *(fields for pair in store.first.values() for fields in pair)]  # what later segments may name again
    sides += [fields for side in named for fields in side]
    means, bases, scales = _Moved(store.own_means), _Moved(store.own_bases), _Moved(store.scales)
    sizes = {number: int(store.prepared.side(number).scale_starts[-1]) for number in store.calibrated}
    shared = {number: (start, scales.place(start, sizes[number])) for number, start in store.calibrated.items()}
    for side in sides:
        if side[OWN_MEAN] != NONE:
            side[OWN_MEAN] = means.place(int(side[OWN_MEAN]), store.dim)
        if side[BASIS] < NONE:
            side[BASIS] = own_basis(bases.place(own_basis(int(side[BASIS])), int(side[STRIDE]) * store.dim))
        if side[BASIS] != NONE and _slabs(side).scaled:
            at = int(side[SCALES])
            moved = [new + at - old for number, (old, new) in shared.items() if old <= at < old + sizes[number]]
            side[SCALES] = moved[0] if moved else scales.place(at, _slabs(side).scaled)
    store.own_means, store.own_bases, store.scales = means.pool(), bases.pool(), scales.pool()
    store.calibrated = {number: new for number, (_, new) in shared.items()}


class _Moved:
    """A pool in the making, of ranges of an old one."""

    def __init__(self, old: Tensor) -> None:
        self.old, self.parts, self.end = old, [old[:0]], 0
        self.places: dict[tuple[int, int], int] = {}

    def place(self, start: int, size: int) -> int:
        """Where a range is from now on; what takes no room may lie anywhere."""
        if (start, size) not in self.places:
            self.places[start, size] = self.end
            self.parts.append(self.old[start : start + size])
            self.end += size
        return self.places[start, size]

    def pool(self) -> Tensor:
        return torch.cat(self.parts)


def _slabs(side: np.ndarray) -> Slabs:
    return Slabs(*side[NATIVE:BASIS].tolist())
