"""Text that leaves the window in blocks, and how its coding stays correct while it decodes (DESIGN.md §4.6).

A row's blocks are written in the calibrated coordinates until they discard too much. What a block discards is measured as it is discarded,
clipping included, and summed; when the mean of a head passes its bound, the next block opens new coordinates with their own mean, scales
and basis, and more directions where these do not suffice. Codes that are written stay as they are. One small copy to the host per block
of all rows that write in the calibrated coordinates; rows with their own take one each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..kernels.codes import clipped_scales
from ..kernels.encode import pack_jobs
from .encode import Coordinates, calibrated, choose, packings
from .observed import Rules, observe
from .prepared import KindBasis
from .residual import token_errors
from .rounding_error import bound
from .scales import lasting_scales, merged_scales, used_bits
from .store import Store


@dataclass(slots=True)
class Writing:
    """The coordinates that a row's blocks are written in: for Keys and Values the coordinates, their fields in the table and their scales.

    discarded: per side and head the energy discarded so far, of `tokens` tokens. Fields and scales are None until the first block.
    """

    where: list[Coordinates]
    fields: list[np.ndarray | None] = field(default_factory=lambda: [None, None])
    scales: list[Tensor | None] = field(default_factory=lambda: [None, None])
    discarded: list[list[float]] = field(default_factory=list)
    tokens: int = 0

    def count(self, means: Sequence[Sequence[float]], tokens: int) -> None:
        """Add what a block of so many tokens discarded per token, by side and head."""
        old = self.discarded or [[0.0] * len(side) for side in means]
        self.discarded = [[total + mean * tokens for total, mean in zip(*sides, strict=True)] for sides in zip(old, means, strict=True)]
        self.tokens += tokens


class TextBlocks:
    """Writes the blocks of all rows of one layer; rows that are copies of one (beams) share their coordinates until one opens its own."""

    def __init__(self, store: Store, basis: KindBasis, rules: Rules) -> None:
        self.store, self.basis, self.rules = store, basis, rules
        self.shared = [calibrated(side) for side in basis.sides]
        self.rows: dict[int, Writing] = {}
        self.opened = 0  # how often a row left the coordinates it had
        store.written_in = self.fields

    def write(self, rows: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Store one block [R, H, S, D] of R rows; rows that write in the same coordinates are written at once."""
        together: dict[int, list[int]] = {}
        for at, row in enumerate(rows):
            now = self.rows.get(row)
            if now is None:
                self.rows[row] = now = Writing(self.shared)
            elif self._past_bound(now):
                self.rows[row] = now = self._opened(row, (keys[at], values[at]))
            together.setdefault(id(now.where) if now.where is self.shared else id(now), []).append(at)
        for places in together.values():
            some = slice(None) if len(places) == len(rows) else places
            self._write([rows[at] for at in places], (keys[some], values[some]))

    def _opened(self, row: int, exact: tuple[Tensor, Tensor]) -> Writing:
        """New coordinates for a row, from its next block [H, S, D]."""
        chosen = choose(observe(list(zip(exact, self.basis.sides, strict=True)), self.rules))
        now = Writing([_lasting(x, where) for x, where in zip(exact, chosen, strict=True)])
        self.store.monitor.see(row, now.where, exact[0].shape[1])
        self.opened += 1
        return now

    def _write(self, rows: Sequence[int], exact: tuple[Tensor, Tensor]) -> None:
        """Blocks [R, H, S, D] of rows that have the same coordinates and scales."""
        writings = [self.rows[row] for row in rows]
        jobs, discarded, tokens = [], [], exact[0].shape[2]
        for n, (side, x) in enumerate(zip(self.basis.sides, exact, strict=True)):
            where = _with_scales(writings[0].where[n], writings[0].scales[n])
            z = (x - where.centre.unsqueeze(1)) @ where.encode
            jobs += (own := packings(z, x, where))
            scales = own[0].scales
            for now in writings:
                if now.fields[n] is None:
                    now.fields[n], now.scales[n] = self.store.place(now.where[n], side, scales), scales
            if self.rules.factor:
                discarded.append(token_errors(x, where, scales, side, z).mean(2))
        fields = [[side for side in now.fields if side is not None] for now in writings]
        self.store.add_coded_rows(rows, tokens, fields, pack_jobs(jobs, self.store.dtype))
        if discarded:
            found = torch.stack(discarded, 1).tolist()  # [R, 2, H]
            for now, means in zip(writings, found, strict=True):
                now.count(means, tokens)

    def select_rows(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        self.rows = {new: _copy(self.rows[old]) for new, old in enumerate(rows) if old in self.rows}

    def fields(self) -> list[np.ndarray]:
        """Fields of the coordinates that rows write in: what they name must stay, though no segment may name it any more."""
        return [fields for writing in self.rows.values() for fields in writing.fields if fields is not None]

    def tensors(self) -> list[Tensor]:
        """What this keeps for its sequences: the coordinates that rows opened."""
        found: list[Tensor] = []
        for writing in self.rows.values():
            if writing.where is not self.shared:
                found += [scales for scales in writing.scales if scales is not None]
                for where in writing.where:
                    own = [] if where.own_mean is None else [where.own_mean]
                    found += [where.encode, where.centre, *own, *where.own.values()]
        calibrated = {x.untyped_storage().data_ptr() for side in self.basis.sides for x in (side.encode, side.mean)}
        return [x for x in found if x.untyped_storage().data_ptr() not in calibrated]

    def _past_bound(self, now: Writing) -> bool:
        """Whether some head discards more than its bound; of own coordinates more than they did when they were opened, too."""
        if not self.rules.factor or not now.tokens:
            return False
        for side, where, sums in zip(self.basis.sides, now.where, now.discarded, strict=True):
            totals = side.spectrum.sum(1).tolist()
            for h, total in enumerate(sums):
                most = bound(max(where.expected[h], where.error[h]) * side.usual[h], totals[h], self.rules.factor)
                if total / now.tokens > most:
                    return True
        return False


def _lasting(x: Tensor, where: Coordinates) -> Coordinates:
    """Coordinates whose scales leave room for the blocks that follow: the largest of 64 numbers is soon passed."""
    if not (bits := sorted(used_bits(where.slabs))):
        return where
    z = (x - where.centre.unsqueeze(1)) @ where.encode
    found = {n: torch.maximum(clipped_scales(z, n), lasting_scales(z.std(1), n)) for n in bits}
    return replace(where, scales=merged_scales(found, where.slabs), calibrated_scales=False)


def _with_scales(where: Coordinates, scales: Tensor | None) -> Coordinates:
    if scales is None:
        return where
    return replace(where, scales=scales)


def _copy(now: Writing) -> Writing:
    fields = [None if side is None else side.copy() for side in now.fields]
    return Writing(now.where, fields, list(now.scales), [list(side) for side in now.discarded], now.tokens)
