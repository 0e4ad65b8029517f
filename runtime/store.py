"""What one cache layer has stored: pools of codes and Values, the table of segments, and beside them the raw text window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..kernels.codes import pack, pool_elements, unpack
from ..kernels.table import (
    BASIS_OFFSET,
    BASIS_STRIDE,
    BLOCK,
    FIELDS,
    KEY_OFFSET,
    KIND,
    LENGTH,
    MEAN_OFFSET,
    RANK,
    VALUE_OFFSET,
    CacheView,
    Kind,
    plan_splits,
    programs_for,
)
from .merging import compact, entry_slices, merge_text
from .online import HeadCode
from .prepared import KindBasis
from .window import Window


class Store:
    """Segments and window of one layer for B sequences. Grows by whole segments; nothing in the pools ever moves but by merging.py.

    Args:
        batch, heads, dim: B, Hkv, D.
        dtype, device: of the Keys that are stored.
    """

    def __init__(self, batch: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.heads, self.dim, self.dtype, self.device = heads, dim, dtype, device
        self.keys, self.values = self._empty(0), self._empty(0)
        self.means = torch.empty(0, dtype=torch.float32, device=device)
        self.bases = self._empty(0)
        self.owns_bases = False  # until then `bases` is the artifact's tensor, shared by all caches
        self.table = np.zeros((batch, heads, 0, FIELDS), dtype=np.int64)
        self.table_on_device: Tensor | None = None
        self.fallback = np.zeros((batch, heads), dtype=np.int64)  # segments that needed more than the plan
        self.held: list[list[int]] = [[] for _ in range(batch)]  # per row the table places of an image that is not complete yet, raw
        self.window = Window(batch, heads, dim, dtype, device)
        self._places: dict[str, int] = {}  # token kind -> start of its calibrated basis in `bases`
        self._mean_places: dict[str, int] = {}  # likewise for calibrated means
        self._pending: list[tuple[list[Tensor], list[Tensor]]] = []
        self._released = False  # pool ranges lost their owner since the last flush
        self._view: CacheView | None = None

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    @property
    def batch(self) -> int:
        return self.table.shape[0]

    # -- segments -------------------------------------------------------------------------------------------------------------

    def add_coded(self, row: int, keys: Tensor, values: Tensor, mean: Tensor, codes: list[HeadCode], basis: KindBasis) -> int:
        """Store one coded segment of one row: keys fp32 [Hkv, S, D], values [Hkv, S, D], mean fp32 [Hkv, D]. Returns its place."""
        centred = keys - mean.unsqueeze(1)
        packed = [(centred[h] @ code.encode).to(self.dtype) for h, code in enumerate(codes)]
        entry = np.zeros((self.heads, FIELDS), dtype=np.int64)
        entry[:, KIND], entry[:, LENGTH] = int(Kind.CODED), keys.shape[1]
        entry[:, RANK] = entry[:, BASIS_STRIDE] = [code.rank for code in codes]
        entry[:, MEAN_OFFSET] = self.means.numel() + np.arange(self.heads) * self.dim
        self.means = torch.cat([self.means, mean.reshape(-1)])
        entry[:, BASIS_OFFSET] = self._place_bases(codes, basis)
        self.fallback[row] += [code.fallback for code in codes]
        return self._add(row, entry, packed, values)

    def add_shared(self, row: int, keys: Tensor, values: Tensor, basis: KindBasis, ranks: tuple[int, ...]) -> None:
        """As `add_coded` with the calibrated mean and basis, so that later blocks can be merged into one segment."""
        centred = keys - basis.mean.unsqueeze(1)
        packed = [(centred[h] @ (basis.encode[h, :, :rank] * basis.scale[h, :rank])).to(self.dtype) for h, rank in enumerate(ranks)]
        entry = np.zeros((self.heads, FIELDS), dtype=np.int64)
        entry[:, KIND], entry[:, LENGTH] = int(Kind.CODED), keys.shape[1]
        entry[:, RANK] = entry[:, BASIS_STRIDE] = ranks
        entry[:, MEAN_OFFSET] = self._calibrated_means(basis) + np.arange(self.heads) * self.dim
        entry[:, BASIS_OFFSET] = self._shared_offset(basis) + basis.offsets
        self._add(row, entry, packed, values)

    def add_dense(self, row: int, keys: Tensor, values: Tensor) -> int:
        """Store raw tokens [Hkv, S, D] as a dense segment of one row. Returns its place in the table."""
        entry = np.zeros((self.heads, FIELDS), dtype=np.int64)
        entry[:, KIND], entry[:, LENGTH] = int(Kind.DENSE), keys.shape[1]
        return self._add(row, entry, list(keys.to(self.dtype)), values)

    def hold(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Store a piece [Hkv, S, D] of an image that is not complete yet, raw."""
        self.held[row].append(self.add_dense(row, keys, values))

    def held_key(self, row: int) -> tuple[int, ...]:
        """Identifies what a row holds; rows that share it (beams) have the same. Empty if it holds nothing."""
        return tuple(int(self.table[row, 0, place, VALUE_OFFSET]) for place in self.held[row])

    def take_held(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and Values [Hkv, S, D] of the pieces a row holds, in order; they are gone from the row afterwards."""
        parts = []
        for place in self.held[row]:
            heads = []
            for entry in self.table[row, :, place]:
                length, (key, value) = int(entry[LENGTH]), entry_slices(entry, self.dim)
                heads.append((unpack(self.keys[key], length, self.dim), unpack(self.values[value], length, self.dim)))
            parts.append([torch.stack(side) for side in zip(*heads, strict=True)])
        keys, values = (torch.cat(side, 1) for side in zip(*parts, strict=True))
        self.drop_held(row)
        return keys, values

    def drop_held(self, row: int) -> None:
        """Forget the pieces a row holds."""
        self.table[row, :, self.held[row]] = 0
        self.held[row] = []
        self._released = True

    def share(self, row: int, owner: int, place: int) -> None:
        """Give a row a segment of another one; both name the same pool ranges from now on."""
        self._place(row, self.table[owner, :, place].copy())

    def _add(self, row: int, entry: np.ndarray, keys: list[Tensor], values: Tensor) -> int:
        key_start = self.keys.numel() + sum(part.numel() for parts, _ in self._pending for part in parts)
        value_start = self.values.numel() + sum(part.numel() for _, parts in self._pending for part in parts)
        key_parts, value_parts = [pack(k) for k in keys], [pack(v.to(self.dtype)) for v in values]
        entry[:, KEY_OFFSET] = key_start + np.cumsum([0, *(part.numel() for part in key_parts[:-1])])
        entry[:, VALUE_OFFSET] = value_start + np.cumsum([0, *(part.numel() for part in value_parts[:-1])])
        self._pending.append((key_parts, value_parts))
        return self._place(row, entry)

    def _place(self, row: int, entry: np.ndarray) -> int:
        free = np.flatnonzero(self.table[row, 0, :, KIND] == Kind.EMPTY)
        if not free.size:
            self.table = np.concatenate([self.table, np.zeros_like(self.table, shape=(self.batch, self.heads, 1, FIELDS))], axis=2)
            free = np.array([self.table.shape[2] - 1])
        self.table[row, :, free[0]] = entry
        return int(free[0])

    def flush(self) -> None:
        """Move added segments into the pools; call once after a batch of `add_*`."""
        changed = bool(self._pending) or self._released
        if self._pending:
            keys = [self.keys, *(part for parts, _ in self._pending for part in parts)]
            values = [self.values, *(part for _, parts in self._pending for part in parts)]
            self._pending.clear()
            self.set_pools(keys, values)
            del keys, values
        if self._released:
            self._released = False
            compact(self)
        if changed:
            merge_text(self)
        self.table_on_device = None
        self._view = None

    def _place_bases(self, codes: list[HeadCode], basis: KindBasis) -> np.ndarray:
        """Offsets of every head's decode matrix; own ones are appended, which makes the pool the cache's own."""
        offsets = self._shared_offset(basis) + basis.offsets
        own = [code.own for code in codes]
        if any(part is not None for part in own):
            if not self.owns_bases:
                self.bases, self.owns_bases = self.bases.clone(), True
            start = self.bases.numel()
            parts = []
            for h, part in enumerate(own):
                if part is not None:
                    offsets[h] = start
                    parts.append(part.reshape(-1).to(self.dtype))
                    start += part.numel()
            self.bases = torch.cat([self.bases, *parts])
        return offsets

    def _shared_offset(self, basis: KindBasis) -> int:
        """Where this calibrated basis starts in `bases`; brought in at its first use."""
        if basis.kind not in self._places:
            self._places[basis.kind] = self.bases.numel()
            if self.bases.numel() == 0:
                self.bases = basis.shared
            else:
                self.bases, self.owns_bases = torch.cat([self.bases, basis.shared]), True
        return self._places[basis.kind]

    def _calibrated_means(self, basis: KindBasis) -> int:
        if basis.kind not in self._mean_places:
            self._mean_places[basis.kind] = self.means.numel()
            self.means = torch.cat([self.means, basis.mean.reshape(-1)])
        return self._mean_places[basis.kind]

    def set_pools(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """Make the pools of these parts. Both lie in one storage: allocators round each storage up, by as much as 1 MB on a GPU."""
        sizes = [sum(part.numel() for part in parts) for parts in (keys, values)]
        self.keys, self.values = torch.cat([*keys, *values, self._empty(0)]).split(sizes)

    # -- rows -----------------------------------------------------------------------------------------------------------------

    def select_rows(self, rows: Iterable[int]) -> None:
        """Keep these rows, in this order, repeats allowed (beams): segments stay shared, the window is copied."""
        order = np.asarray(list(rows), dtype=np.int64)
        gone = self._owned(self.table) - self._owned(self.table[order])
        self.table, self.fallback = self.table[order], self.fallback[order]
        self.held = [list(self.held[row]) for row in order]
        self.window.select_rows(order)
        if gone:  # what only dropped rows had would stay in memory, and in the count of bytes
            compact(self)
        self.table_on_device = None
        self._view = None

    @staticmethod
    def _owned(table: np.ndarray) -> set[int]:
        """Pool ranges that a table's rows name, by where their Values begin."""
        return set(table[:, 0, :, VALUE_OFFSET][table[:, 0, :, KIND] != Kind.EMPTY].tolist())

    # -- reading --------------------------------------------------------------------------------------------------------------

    def view(self, splits: bool) -> CacheView:
        """A snapshot for the backends; `splits` adds the Triton work list."""
        window = self.window
        grown = self._view is not None and self._view.window_keys.data_ptr() != window.keys.data_ptr()
        if self._view is None or grown or (splits and self._view.splits is None):
            host = torch.from_numpy(np.ascontiguousarray(self.table))
            if self.table_on_device is None:
                self.table_on_device = host.to(self.device, copy=True)
            plan = None
            if splits:
                processors = torch.cuda.get_device_properties(self.device).multi_processor_count if self.device.type == "cuda" else 1
                plan = plan_splits(
                    host,
                    window_capacity=window.keys.shape[2],
                    head_dim=self.dim,
                    itemsize=self.dtype.itemsize,
                    num_programs=programs_for(self.batch * self.heads, processors),
                    device=self.device,
                )
            self._view = CacheView(
                table=self.table_on_device,
                keys=self.keys,
                values=self.values,
                bases=self.bases,
                means=self.means,
                window_keys=window.keys,
                window_values=window.values,
                window_lengths=window.lengths,
                splits=plan,
            )
        return self._view

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor this store keeps alive for its sequences; the artifact's shared bases are not among them."""
        kept = {
            "keys": self.keys,
            "values": self.values,
            "means": self.means,
            "window_keys": self.window.keys,
            "window_values": self.window.values,
            "window_lengths": self.window.lengths,
        }
        if self.owns_bases:
            kept["bases"] = self.bases
        if self.table_on_device is not None:
            kept["table"] = self.table_on_device
        if self._view is not None and self._view.splits is not None:
            kept["splits"], kept["ranges"] = self._view.splits.records, self._view.splits.ranges
        return kept

    def _regions(self) -> Iterator[np.ndarray]:
        """Table entries, one per pool region: beams that share a segment count it once."""
        seen = set()
        for entry in self.table.reshape(-1, FIELDS):
            if entry[KIND] != Kind.EMPTY and (place := int(entry[VALUE_OFFSET])) not in seen:
                seen.add(place)
                yield entry

    def slack_elements(self) -> int:
        """Stored numbers that belong to no token: block padding of the pools."""
        return sum((-int(e[LENGTH]) % BLOCK) * ((int(e[RANK]) if e[KIND] == Kind.CODED else self.dim) + self.dim) for e in self._regions())

    def dense_text_elements(self) -> int:
        """Pool numbers of raw (dense) segments, padding included."""
        return sum(2 * pool_elements(int(e[LENGTH]), self.dim) for e in self._regions() if e[KIND] == Kind.DENSE)

    def coded_tokens(self) -> int:
        """Tokens of coded segments over all rows, shared ones counted once."""
        return sum(int(e[LENGTH]) for e in self._regions() if e[KIND] == Kind.CODED) // self.heads
