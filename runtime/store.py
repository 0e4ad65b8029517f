"""What one cache layer has stored: a pool of codes, the table of segments, and beside them the raw text window."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..kernels.codes import native_view, pack, padded
from ..kernels.encode import Packed
from ..kernels.slabs import NATIVE_BYTES, Slabs
from ..kernels.splits import SplitPlan, plan_growing
from ..kernels.table import (
    BASIS,
    FIELDS,
    KEY,
    KIND,
    LENGTH,
    MEAN,
    NATIVE,
    NONE,
    OFFSET,
    OWN_MEAN,
    SCALES,
    STRIDE,
    VALUE,
    CacheView,
    Kind,
    own_basis,
    sent,
)
from .encode import Coordinates
from .merging import compact, merge_text
from .monitor import Monitor
from .observed import Given
from .prepared import PreparedLayer, SideBasis
from .window import Window

SIDES = (KEY, VALUE)
SIDE_FIELDS = VALUE - KEY


class Store:
    """Segments and window of one layer for B sequences. Grows by whole segments; nothing in the pool ever moves but by merging.py.

    Args:
        batch, heads, dim: B, Hkv, D.
        dtype, device: of the Keys that are stored.
        prepared: the layer's shared bases and means.
    """

    def __init__(self, batch: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device, prepared: PreparedLayer) -> None:
        self.heads, self.dim, self.dtype, self.device, self.prepared = heads, dim, dtype, device, prepared
        self.codes = torch.empty(0, dtype=torch.uint8, device=device)
        self.scales = torch.empty(0, dtype=torch.bfloat16, device=device)
        self.own_means = torch.empty(0, dtype=torch.float16, device=device)
        self.own_bases = torch.empty(0, dtype=dtype, device=device)
        self.table = np.zeros((batch, heads, 0, FIELDS), dtype=np.int64)
        self.ids = np.zeros((batch, 0), dtype=np.int64)  # per place of the table which segment it is, 0 for none; beams share segments
        self.table_on_device: Tensor | None = None
        self.monitor = Monitor.of(batch, heads)
        self.budgeted = np.zeros((batch, 2), dtype=np.int64)  # per row: coded tokens, and segments with own means and scales
        self.held: list[list[int]] = [[] for _ in range(batch)]  # per row the table places of an image that is not complete yet, raw
        self.window = Window(batch, heads, dim, dtype, device)
        self.written_in: Callable[[], list[np.ndarray]] = list  # fields of `place` that more segments are to be written with
        self.first: dict[tuple[int, str], list[np.ndarray]] = {}  # (row, token kind) -> fields of the first segment with its own parts
        self.calibrated: dict[int, int] = {}  # `SideBasis.number` -> start of its `kept_scales`, once they are needed
        self._last_id = 0
        self._pending: list[Tensor] = []
        self._end = 0  # bytes of the pool with what is pending
        self._released = False  # pool ranges lost their owner since the last flush
        self._plan: SplitPlan | None = None  # for windows that are to grow; stands until the table changes
        self._view: CacheView | None = None
        self._views = 0  # made so far
        self.selected = 0  # how often rows were selected

    @property
    def batch(self) -> int:
        return self.table.shape[0]

    def own_parts(self, row: int, tokens: int) -> bool:
        """Whether the next segment of a row, of so many tokens, may have its own mean and scales; it is counted.

        A budget has room for one set of them in so many tokens (`PreparedLayer.tokens_per_own`); the first segment always gets one,
        because a budget is promised from 512 tokens on.
        """
        self.budgeted[row, 0] += tokens
        seen, had = self.budgeted[row]
        may = bool(had == 0 or (had + 1) * self.prepared.tokens_per_own <= seen)
        self.budgeted[row, 1] += may
        return may

    def given(self, row: int, kind: str, slabs: Sequence[tuple[Slabs, ...]]) -> list[Given | None]:
        """Mean and scales of a row's first segment of a kind, for Keys and Values; None where it was not coded as planned."""
        if (row, kind) not in self.first:
            return [None, None]
        found: list[Given | None] = []
        for fields, plan in zip(self.first[row, kind], slabs, strict=True):
            if (fields[:, NATIVE:BASIS] != np.array(plan)).any() or (fields[:, BASIS] < NONE).any():
                found.append(None)
                continue
            own_mean = torch.zeros(self.heads, self.dim, dtype=torch.float16, device=self.device)
            scales = torch.ones(self.heads, self.dim, dtype=torch.bfloat16, device=self.device)
            for h, (side, one) in enumerate(zip(fields, plan, strict=True)):
                if side[OWN_MEAN] != NONE:
                    own_mean[h] = self.own_means[side[OWN_MEAN] : side[OWN_MEAN] + self.dim]
                    scales[h, one.native : one.rank] = self.scales[side[SCALES] : side[SCALES] + one.scaled]
            found.append(Given(own_mean, scales, fields))
        return found

    # -- segments -------------------------------------------------------------------------------------------------------------

    def place(self, where: Coordinates, basis: SideBasis, scales: Tensor) -> np.ndarray:
        """Store what one side's coordinates need; the side's fields [Hkv, SIDE_FIELDS], good for every segment written in them.

        Args:
            scales: bf16 [Hkv, D] as `encode.write` gave them.
        """
        fields = np.full((self.heads, SIDE_FIELDS), NONE, dtype=np.int64)
        fields[:, NATIVE:BASIS] = where.slabs
        fields[:, OFFSET] = fields[:, STRIDE] = fields[:, SCALES] = 0
        coded = [h for h, slabs in enumerate(where.slabs) if slabs.native != self.dim]
        if not coded:
            return fields
        shared = (basis.number * self.heads + np.array(coded)) * self.dim
        fields[coded, BASIS], fields[coded, STRIDE], fields[coded, MEAN] = shared * self.dim, self.dim, shared
        for h, decode in where.own.items():
            fields[h, BASIS], fields[h, STRIDE] = own_basis(self._append("own_bases", decode)), where.slabs[h].rank
        if where.given is not None:
            fields[coded, OWN_MEAN], fields[coded, SCALES] = where.given.fields[coded, OWN_MEAN], where.given.fields[coded, SCALES]
            return fields
        if where.own_mean is not None:
            means = where.own_mean if len(coded) == self.heads else where.own_mean[coded]
            fields[coded, OWN_MEAN] = self._append("own_means", means) + np.arange(len(coded)) * self.dim
        scaled = [h for h in coded if where.slabs[h].scaled]
        firsts = [where.slabs[h].native for h in scaled]
        if scaled and where.calibrated_scales:
            fields[scaled, SCALES] = self._shared_scales(basis) + basis.scale_starts[scaled] + firsts
        elif scaled:
            parts = [scales[h, first : where.slabs[h].rank] for h, first in zip(scaled, firsts, strict=True)]
            sizes = np.cumsum([0, *(part.numel() for part in parts[:-1])])
            fields[scaled, SCALES] = self._append("scales", torch.cat(parts)) + sizes
        return fields

    def add_coded(self, row: int, length: int, sides: list[tuple[np.ndarray, list[Tensor]]]) -> int:
        """Store one coded segment of a row: for Keys and Values the fields of `place` and the codes of `encode.write`. Its table place."""
        entry = self._entry(Kind.CODED, length)
        for start, (fields, codes) in zip(SIDES, sides, strict=True):
            entry[:, start : start + SIDE_FIELDS] = fields
            entry[:, start + OFFSET] = self._put(Packed.of(codes))
        return self._place(row, entry)

    def add_coded_rows(self, rows: Sequence[int], length: int, fields: Sequence[Sequence[np.ndarray]], packed: Packed) -> None:
        """Store one coded segment in each of several rows.

        Args:
            length: tokens, the same in all rows.
            fields: per row those of `place` for Keys and Values.
            packed: the codes of every row's Keys, then of every row's Values.
        """
        offsets = self._put(packed).reshape(len(SIDES), len(rows), self.heads)
        for n, (row, sides) in enumerate(zip(rows, fields, strict=True)):
            entry = self._entry(Kind.CODED, length)
            for side, (start, own) in enumerate(zip(SIDES, sides, strict=True)):
                entry[:, start : start + SIDE_FIELDS] = own
                entry[:, start + OFFSET] = offsets[side, n]
            self._place(row, entry)

    def add_dense(self, row: int, keys: Tensor, values: Tensor, kind: Kind = Kind.DENSE) -> int:
        """Store raw tokens [Hkv, S, D] as a segment of one row; escape tokens are of kind CODED. Returns its place in the table."""
        return self.add_dense_rows([row], keys.unsqueeze(0), values.unsqueeze(0), kind)[0]

    def add_dense_rows(self, rows: Sequence[int], keys: Tensor, values: Tensor, kind: Kind = Kind.DENSE) -> list[int]:
        """`add_dense` of [R, Hkv, S, D] in each of R rows; their places in the table."""
        raw, entry = Slabs(self.dim), self._entry(kind, keys.shape[2])
        entries = np.repeat(entry[None], len(rows), axis=0)
        for start, x in zip(SIDES, (keys, values), strict=True):
            entries[..., start + NATIVE] = self.dim
            entries[..., [start + BASIS, start + MEAN, start + OWN_MEAN]] = NONE
            codes = pack(x, self.scales, raw, self.dtype)
            entries[..., start + OFFSET] = self._put(Packed.of_equal(codes)).reshape(len(rows), self.heads)
        return [self._place(row, entry) for row, entry in zip(rows, entries, strict=True)]

    def _entry(self, kind: Kind, length: int) -> np.ndarray:
        entry = np.zeros((self.heads, FIELDS), dtype=np.int64)
        entry[:, KIND], entry[:, LENGTH] = int(kind), length
        return entry

    def _put(self, packed: Packed) -> np.ndarray:
        """Queue codes for the pool; where each part begins."""
        offsets = self._end + np.cumsum([0, *packed.sizes[:-1]])
        self._pending += packed.parts
        self._end += sum(packed.sizes)
        return offsets

    def _append(self, pool: str, part: Tensor) -> int:
        """Add numbers to a pool of parts; where they start, a multiple of 8."""
        old: Tensor = getattr(self, pool)
        setattr(self, pool, torch.cat([old, part.reshape(-1).to(old.dtype)]))
        return old.numel()

    def _shared_scales(self, basis: SideBasis) -> int:
        if basis.number not in self.calibrated:
            self.calibrated[basis.number] = self._append("scales", basis.kept_scales())
        return self.calibrated[basis.number]

    def new_id(self) -> int:
        """A number for one more segment."""
        self._last_id += 1
        return self._last_id

    def _place(self, row: int, entry: np.ndarray, segment: int | None = None) -> int:
        free = np.flatnonzero(self.ids[row] == 0)
        if not free.size:
            self.table = np.concatenate([self.table, np.zeros_like(self.table, shape=(self.batch, self.heads, 1, FIELDS))], axis=2)
            self.ids = np.concatenate([self.ids, np.zeros_like(self.ids, shape=(self.batch, 1))], axis=1)
            free = np.array([self.ids.shape[1] - 1])
        self.table[row, :, free[0]] = entry
        self.ids[row, free[0]] = self.new_id() if segment is None else segment
        return int(free[0])

    def clear(self, row: int, places: list[int] | int) -> None:
        """Empty places of a row's table."""
        self.table[row, :, places] = 0
        self.ids[row, places] = 0

    def hold(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Store a piece [Hkv, S, D] of an image that is not complete yet, raw."""
        self.held[row].append(self.add_dense(row, keys, values))

    def held_key(self, row: int) -> tuple[int, ...]:
        """Identifies what a row holds; rows that share it (beams) have the same. Empty if it holds nothing."""
        return tuple(self.ids[row, self.held[row]].tolist())

    def take_held(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and Values [Hkv, S, D] of the pieces a row holds, in order; they are gone from the row afterwards."""
        keys, values = self.held_parts(row)
        self.drop_held(row)
        return keys, values

    def held_parts(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and Values [Hkv, S, D] of the pieces a row holds, in order; they have to be in the pool."""
        sides = []
        for side in SIDES:
            pieces = [
                torch.stack([native_view(self.codes[int(e[side + OFFSET]) :], int(e[LENGTH]), self.dim, self.dtype) for e in entries])
                for entries in (self.table[row, :, place] for place in self.held[row])
            ]
            sides.append(torch.cat(pieces, 1))
        return sides[0], sides[1]

    def drop_held(self, row: int) -> None:
        """Forget the pieces a row holds."""
        self.clear(row, self.held[row])
        self.held[row] = []
        self._released = True

    def share(self, row: int, owner: int, place: int) -> None:
        """Give a row a segment of another one; both name the same pool ranges from now on."""
        self._place(row, self.table[owner, :, place].copy(), int(self.ids[owner, place]))

    def flush(self) -> None:
        """Move added segments into the pool; call once after a batch of `add_*`."""
        changed = bool(self._pending) or self._released
        if self._pending:
            self.codes = torch.cat([self.codes, *self._pending])
            self._pending.clear()
        if self._released:
            self._released = False
            compact(self)
        if changed:
            merge_text(self)
        self._end = self.codes.numel()
        self.table_on_device = self._plan = self._view = None

    # -- rows -----------------------------------------------------------------------------------------------------------------

    def select_rows(self, rows: Iterable[int]) -> None:
        """Keep these rows, in this order, repeats allowed (beams): segments stay shared, the window is copied."""
        order = np.asarray(list(rows), dtype=np.int64)
        self.selected += 1
        gone = set(self.ids.reshape(-1).tolist()) - set(self.ids[order].reshape(-1).tolist())
        self.table, self.ids = self.table[order], self.ids[order]
        self.budgeted = self.budgeted[order]
        self.monitor.select_rows(order.tolist())
        kept = {(new, kind): value for new, old in enumerate(order.tolist()) for (row, kind), value in self.first.items() if row == old}
        self.first = {place: [fields.copy() for fields in value] for place, value in kept.items()}
        self.held = [list(self.held[row]) for row in order]
        self.window.select_rows(order)
        if gone:  # what only dropped rows had would stay in memory, and in the count of bytes
            compact(self)
            self._end = self.codes.numel()
        self.table_on_device = self._plan = self._view = None

    # -- reading --------------------------------------------------------------------------------------------------------------

    def view(self, splits: bool) -> CacheView:
        """A snapshot for the backends; `splits` adds the Triton work list."""
        window = self.window
        # torch.compile reads no addresses; a step is compiled over a view that stands (`DecodeGraphs`)
        stands = torch.compiler.is_compiling() or (self._view is not None and self._view.windows.data_ptr() == window.buffer.data_ptr())
        if self._view is None or not stands or (splits and self._view.splits is None):
            if self.table_on_device is None:
                self.table_on_device = sent(torch.from_numpy(self.table.copy()), self.device)
            plan, room = None, window.keys.shape[2]
            if splits:
                self._plan = plan_growing(self.table, room, self.dim, self.dtype.itemsize, self.device, self._plan)
                plan = self._plan.of_windows(room)
            self._views += 1
            self._view = CacheView(
                table=self.table_on_device,
                codes=self.codes,
                bases=self.prepared.bases,
                own_bases=self.own_bases,
                scales=self.scales,
                means=self.prepared.means,
                own_means=self.own_means,
                windows=window.buffer,
                window_lengths=window.lengths,
                splits=plan,
            )
        return self._view

    @property
    def structure(self) -> int | None:
        """Stays the same while `view` does: tables, pools and the window lie where they did. None where the next view will be new."""
        return self._views if self._view is not None and self._view.windows.data_ptr() == self.window.buffer.data_ptr() else None

    def reserve(self, tokens: int, lengths: Tensor) -> None:
        """Make room for so many more tokens of text, and count them in `lengths` int32 [B] from now on."""
        self.window.reserve(tokens)  # may find no memory: nothing else has changed then
        lengths.copy_(self.window.lengths)
        self.window.lengths = lengths
        self._view = None

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor this store keeps alive for its sequences; the artifact's bases and means are not among them."""
        kept = {
            "codes": self.codes,
            "scales": self.scales,
            "own_means": self.own_means,
            "own_bases": self.own_bases,
            "windows": self.window.buffer,
            "window_lengths": self.window.lengths,
        }
        if self.table_on_device is not None:
            kept["table"] = self.table_on_device
        if self._plan is not None:
            kept["splits"], kept["ranges"] = self._plan.records, self._plan.ranges
        return kept

    def segments(self) -> Iterator[np.ndarray]:
        """Table entries [Hkv, FIELDS] of every segment; one that beams share comes once."""
        numbers, first = np.unique(self.ids, return_index=True)
        for number, at in zip(numbers, first, strict=True):
            if number:
                row, place = np.unravel_index(at, self.ids.shape)
                yield self.table[row, :, place]

    def code_bytes(self, kind: Kind) -> tuple[int, int]:
        """Bytes of the codes of all segments of a kind, native numbers at 2 bytes, and those among them that belong to no token."""
        total = slack = 0
        for heads in self.segments():
            for entry in heads[heads[:, KIND] == kind]:
                width = sum(side_slabs(entry, side).bytes_per_token(NATIVE_BYTES) for side in SIDES)
                length = int(entry[LENGTH])
                total += padded(length) * width
                slack += (padded(length) - length) * width
        return total, slack

    def coded_tokens(self) -> int:
        """Tokens of coded segments over all rows, shared ones counted once."""
        return sum(int(heads[heads[:, KIND] == Kind.CODED, LENGTH].sum()) for heads in self.segments()) // self.heads


def side_slabs(entry: np.ndarray, side: int) -> Slabs:
    """Slabs of the Keys or Values of a table entry."""
    return Slabs(*entry[side + NATIVE : side + BASIS].tolist())
