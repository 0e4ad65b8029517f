"""Moving what a store's pool holds: joining text blocks into one segment, and dropping ranges that no table entry names any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..kernels.codes import padded, pool_bytes
from ..kernels.slabs import Slabs
from ..kernels.table import (
    BASIS,
    BLOCK,
    BYTE,
    FIELDS,
    KEY,
    KIND,
    LENGTH,
    NATIVE,
    NIBBLE,
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
WIDTHS = [KIND, *(side + field for side in SIDES for field in range(NATIVE, BASIS))]
Blocks = tuple[int, list[int]]  # a row, and the places of its table that are to become one segment


def merge_text(store: Store) -> None:
    """Join a row's like segments of whole blocks (same slabs, basis, mean, scales) once there are `MERGE_AT` of them.

    Retired text arrives in blocks of 64 tokens; without this the table would grow by one segment per block. Pieces of an image that
    is not complete yet are left alone: they are still to become one segment. Rows whose blocks are alike in number and length, as those
    of a batch are that decodes, are joined by the same few copies.
    """
    parts, end = [store.codes], store.codes.numel()
    for joined in _alike(store):
        entries, codes = _join(store, [copies[0] for copies in joined], end)
        parts += codes
        end += sum(part.numel() for part in codes)
        for copies, entry in zip(joined, entries, strict=True):
            segment = store.new_id()
            for row, members in copies:
                store.clear(row, members)
                store.table[row, :, members[0]], store.ids[row, members[0]] = entry, segment
    if len(parts) > 1:
        store.codes = torch.cat(parts)
        parts.clear()  # the old pool is not needed while the new one is made
        compact(store)


def _alike(store: Store) -> list[list[list[Blocks]]]:
    """What is to be joined: groups of equal slabs and lengths, of segments to be, of the rows that share one (beams)."""
    whole = (store.ids != 0) & (store.table[..., LENGTH] % BLOCK == 0).all(1)  # [B, places]
    for row, places in enumerate(store.held):
        whole[row, places] = False
    rows = np.flatnonzero(whole.sum(1) >= MERGE_AT)
    if not rows.size:
        return []
    owners = _owners(store.ids)
    shared: dict[tuple[int, ...], list[Blocks]] = {}
    for row in rows.tolist():
        groups: dict[tuple[bytes, tuple[int, ...]], list[int]] = {}
        for s in np.flatnonzero(whole[row]).tolist():
            like = store.table[row][:, s][:, LIKE].tobytes(), owners[int(store.ids[row, s])]
            groups.setdefault(like, []).append(s)
        for members in groups.values():
            if len(members) >= MERGE_AT:
                shared.setdefault(tuple(store.ids[row, members].tolist()), []).append((row, members))
    alike: dict[tuple[bytes, bytes], list[list[Blocks]]] = {}
    for copies in shared.values():
        row, members = copies[0]
        entry = store.table[row][:, members]
        alike.setdefault((entry[:, 0][:, WIDTHS].tobytes(), entry[0, :, LENGTH].tobytes()), []).append(copies)
    return list(alike.values())


def _owners(ids: np.ndarray) -> dict[int, tuple[int, ...]]:
    """The rows that have each segment."""
    found: dict[int, tuple[int, ...]] = {}
    for row, place in zip(*np.nonzero(ids), strict=True):
        segment = int(ids[row, place])
        found[segment] = (*found.get(segment, ()), int(row))
    return found


def _join(store: Store, joining: Sequence[Blocks], end: int) -> tuple[np.ndarray, list[Tensor]]:
    """The members of R rows, one after another: table entries [R, Hkv, FIELDS] of what they become, and its codes from `end` on.

    Slabs are alike in all rows, and so are the lengths of their members.
    """
    members = np.stack([store.table[row][:, places] for row, places in joining])  # [R, H, members, FIELDS]
    entries = members[:, :, 0].copy()
    entries[..., LENGTH] = members[..., LENGTH].sum(2)
    lengths, codes = members[0, 0, :, LENGTH], []
    for side in SIDES:
        for h in range(store.heads):
            slabs = _slabs(entries[0, h, side:])
            size = pool_bytes(int(lengths.sum()), slabs, store.dtype.itemsize)
            entries[:, h, side + OFFSET] = end + size * np.arange(len(joining))
            codes.append(_slab_runs(store, members[:, h, :, side + OFFSET], lengths, slabs))
            end += size * len(joining)
    return entries, codes


def _slab_runs(store: Store, offsets: np.ndarray, lengths: np.ndarray, slabs: Slabs) -> Tensor:
    """The codes of blocks at `offsets` [R, members], slab by slab, flat, one row behind the other."""
    widths = (slabs.native * store.dtype.itemsize, slabs.byte, slabs.nibble // 2)
    runs = []
    for n, width in enumerate(widths):
        for block, length in enumerate(lengths.tolist()):
            if width:
                runs.append(_ranges(store.codes, offsets[:, block] + length * sum(widths[:n]), length * width))
    return torch.cat(runs, 1).reshape(-1) if runs else store.codes[:0]


def _ranges(codes: Tensor, starts: np.ndarray, size: int) -> Tensor:
    """The ranges [R, size] that begin at `starts` [R]: no copy where they lie in equal distances, as what was stored at once does."""
    steps = np.unique(np.diff(starts))
    if steps.size <= 1 and (not steps.size or steps[0] > 0):
        return codes.as_strided((len(starts), size), (int(steps[0]) if steps.size else size, 1), codes.storage_offset() + int(starts[0]))
    return torch.stack([codes[start : start + size] for start in starts.tolist()])


def compact(store: Store) -> None:
    """Drop pool ranges that no table entry names any more; entries that share a range go on sharing it."""
    entries = store.table.reshape(-1, FIELDS)
    live = np.flatnonzero(entries[:, KIND] != Kind.EMPTY)
    of_table = [entries[:, start : start + VALUE - KEY] for start in SIDES]
    sizes = [_bytes(side[live], entries[live, LENGTH], store.dtype.itemsize) for side in of_table]
    codes = _Moved(store.codes, [(side[live, OFFSET], size) for side, size in zip(of_table, sizes, strict=True)])
    for side in of_table:
        side[live, OFFSET] = codes.place(side[live, OFFSET])
    store.codes = codes.pool()

    named = [*store.written_in(), *(fields for pair in store.first.values() for fields in pair)]  # what later segments may name again
    sides = [(side, live) for side in of_table] + [(fields, np.arange(len(fields))) for fields in named]
    with_mean = [(side, at[side[at, OWN_MEAN] != NONE]) for side, at in sides]
    means = _Moved(store.own_means, [(side[at, OWN_MEAN], np.full(len(at), store.dim)) for side, at in with_mean])
    for side, at in with_mean:
        side[at, OWN_MEAN] = means.place(side[at, OWN_MEAN])
    with_basis = [(side, at[side[at, BASIS] < NONE]) for side, at in sides]
    bases = _Moved(store.own_bases, [(own_basis(side[at, BASIS]), side[at, STRIDE] * store.dim) for side, at in with_basis])
    for side, at in with_basis:
        side[at, BASIS] = own_basis(bases.place(own_basis(side[at, BASIS])))
    _move_scales(store, [(side, at[side[at, BASIS] != NONE]) for side, at in sides])
    store.own_means, store.own_bases = means.pool(), bases.pool()


def _move_scales(store: Store, sides: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """The scales of these entries of sides, and the calibrated ones, of which entries name parts."""
    scaled = [(side, at[side[at][:, [BYTE, NIBBLE]].sum(1) > 0]) for side, at in sides]
    ranges = [(side[at, SCALES], side[at][:, [BYTE, NIBBLE]].sum(1)) for side, at in scaled]
    for number, start in store.calibrated.items():
        ranges.append((np.array([start]), np.array([int(store.prepared.side(number).scale_starts[-1])])))
    scales = _Moved(store.scales, ranges)
    for side, at in scaled:
        side[at, SCALES] = scales.place(side[at, SCALES])
    store.calibrated = {number: int(scales.place(np.array([start]))[0]) for number, start in store.calibrated.items()}
    store.scales = scales.pool()


def _bytes(sides: np.ndarray, lengths: np.ndarray, itemsize: int) -> np.ndarray:
    """`codes.pool_bytes` of many sides [N, fields]."""
    widths = sides[:, NATIVE] * itemsize + sides[:, BYTE] + sides[:, NIBBLE] // 2
    return np.array([padded(length) for length in lengths.tolist()], dtype=np.int64) * widths


class _Moved:
    """Ranges of an old pool, and where they are in one that holds nothing else.

    Ranges that touch or overlap move as one: a range stays whole wherever others begin, also in the table of a saved cache that lies.

    Args:
        ranges: pairs of (starts, sizes), int64 [N] each. A range comes as often as it is named; what takes no room may lie anywhere.
    """

    def __init__(self, old: Tensor, ranges: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        none = np.zeros(0, dtype=np.int64)
        starts, sizes = (np.concatenate(part) for part in zip((none, none), *ranges, strict=True))
        order = np.flatnonzero(sizes > 0)
        order = order[np.argsort(starts[order], kind="stable")]
        starts, ends = starts[order], np.maximum.accumulate((starts + sizes)[order])
        first = np.flatnonzero(np.append(-1, ends[:-1]) < starts)  # of each run
        self.old, self.starts = old, starts[first]
        self.sizes = ends[np.append(first[1:], len(ends)) - 1] - self.starts if len(ends) else none
        self.moved = np.cumsum(self.sizes) - self.sizes

    def place(self, starts: np.ndarray) -> np.ndarray:
        """Where what began at `starts`, or lay there within a range, is from now on."""
        if not self.starts.size:
            return np.zeros_like(starts)
        at = np.maximum(np.searchsorted(self.starts, starts, side="right") - 1, 0)
        inside = (starts >= self.starts[at]) & (starts < self.starts[at] + self.sizes[at])
        return np.where(inside, self.moved[at] + starts - self.starts[at], 0)

    def pool(self) -> Tensor:
        """The new pool; the old one if nothing is dropped."""
        if self.sizes.sum() == self.old.numel():
            return self.old
        runs = zip(self.starts.tolist(), self.sizes.tolist(), strict=True)
        return torch.cat([self.old[:0], *(self.old[start : start + size] for start, size in runs)])


def _slabs(side: np.ndarray) -> Slabs:
    return Slabs(*side[NATIVE:BASIS].tolist())
