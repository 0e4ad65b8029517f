"""Text that leaves the window in blocks, and how its coding stays correct while it decodes (DESIGN.md §4.6).

A row's blocks are written in the calibrated coordinates until they discard too much. What a block discards is measured as it is discarded,
clipping included, and summed; when the mean of a head passes its bound, the next block opens new coordinates with their own mean, scales
and basis, and more directions where these do not suffice. Codes that are written stay as they are. One small copy to the host per block.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..kernels.codes import clipped_scales
from .encode import Coordinates, calibrated, choose, write
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


class TextBlocks:
    """Writes the blocks of all rows of one layer; rows that are copies of one (beams) share their coordinates until one opens its own."""

    def __init__(self, store: Store, basis: KindBasis, rules: Rules) -> None:
        self.store, self.basis, self.rules = store, basis, rules
        self.shared = [calibrated(side) for side in basis.sides]
        self.rows: dict[int, Writing] = {}
        self.opened = 0  # how often a row left the coordinates it had
        store.written_in = self.fields

    def write(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Store one block [H, S, D]."""
        exact = (keys, values)
        now = self.rows.get(row)
        if now is None or self._past_bound(now):
            if now is None:
                now = Writing(self.shared)
            else:
                chosen = choose(observe(list(zip(exact, self.basis.sides, strict=True)), self.rules))
                now = Writing([_lasting(x, where) for x, where in zip(exact, chosen, strict=True)])
                self.store.monitor.see(row, now.where, keys.shape[1])
                self.opened += 1
            self.rows[row] = now
        sides = []
        for n, (side, x) in enumerate(zip(self.basis.sides, exact, strict=True)):
            codes, scales = write(x, _with_scales(now.where[n], now.scales[n]), self.store.dtype)
            if now.fields[n] is None:
                now.fields[n], now.scales[n] = self.store.place(now.where[n], side, scales), scales
            fields = now.fields[n]
            assert fields is not None
            sides.append((fields, codes))
        self.store.add_coded(row, keys.shape[1], sides)
        self._measure(now, exact)

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

    def _measure(self, now: Writing, exact: tuple[Tensor, Tensor]) -> None:
        """Add what the block just written discarded."""
        if not self.rules.factor:
            return
        tokens = exact[0].shape[1]
        for n, (side, x) in enumerate(zip(self.basis.sides, exact, strict=True)):
            scales = now.scales[n]
            assert scales is not None
            errors = token_errors(x, now.where[n], scales, side).mean(1).tolist()
            if len(now.discarded) == n:
                now.discarded.append([0.0] * len(errors))
            now.discarded[n] = [old + error * tokens for old, error in zip(now.discarded[n], errors, strict=True)]
        now.tokens += tokens

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
