"""Moving what a store's pools hold: joining text blocks into one segment, and dropping ranges that no table entry names any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..kernels.codes import pool_elements
from ..kernels.table import BASIS_OFFSET, BASIS_STRIDE, BLOCK, FIELDS, KEY_OFFSET, KIND, LENGTH, MEAN_OFFSET, RANK, VALUE_OFFSET, Kind

if TYPE_CHECKING:
    from .store import Store

MERGE_AT = 8  # retired text blocks of one row are merged when there are this many


def merge_text(store: Store) -> None:
    """Join a row's like segments of whole blocks (same kind, basis, mean) once there are `MERGE_AT` of them.

    Retired text arrives in blocks of 64 tokens; without this the table would grow by one segment per block. Pieces of an image that
    is not complete yet are left alone: they are still to become one segment.
    """
    same = [KIND, RANK, BASIS_OFFSET, BASIS_STRIDE, MEAN_OFFSET]
    joined: dict[bytes, np.ndarray] = {}  # rows that share blocks (beams) go on sharing what becomes of them
    owners: dict[int, tuple[int, ...]] = {}
    for row, place in zip(*np.nonzero(store.table[:, 0, :, KIND] != Kind.EMPTY), strict=True):
        offset = int(store.table[row, 0, place, VALUE_OFFSET])
        owners[offset] = (*owners.get(offset, ()), int(row))
    for row in range(store.batch):
        groups: dict[tuple[int, ...], list[int]] = {}
        for s in range(store.table.shape[2]):
            head = store.table[row, :, s]
            if head[0, KIND] != Kind.EMPTY and head[0, LENGTH] % BLOCK == 0 and s not in store.held[row]:
                like = (*head[:, same].reshape(-1).tolist(), *owners[int(head[0, VALUE_OFFSET])])
                groups.setdefault(like, []).append(s)
        for members in groups.values():
            if len(members) >= MERGE_AT:
                blocks = store.table[row][:, members].tobytes()
                if blocks not in joined:
                    joined[blocks] = _join(store, row, members)
                store.table[row, :, members[0]], store.table[row, :, members[1:]] = joined[blocks], 0
    if joined:
        compact(store)


def _join(store: Store, row: int, members: list[int]) -> np.ndarray:
    """Copy the members of every head one after another; returns the table entries [Hkv, FIELDS] of what they became."""
    entries = store.table[row, :, members[0]].copy()
    key_start, value_start = store.keys.numel(), store.values.numel()
    key_parts: list[Tensor] = []
    value_parts: list[Tensor] = []
    for h in range(store.heads):
        starts = key_start + sum(p.numel() for p in key_parts), value_start + sum(p.numel() for p in value_parts)
        for s in members:
            key, value = entry_slices(store.table[row, h, s], store.dim)
            key_parts.append(store.keys[key])
            value_parts.append(store.values[value])
        entry = entries[h]
        entry[LENGTH] = store.table[row, h, members, LENGTH].sum()
        entry[KEY_OFFSET], entry[VALUE_OFFSET] = starts
    store.keys, store.values = torch.cat([store.keys, *key_parts]), torch.cat([store.values, *value_parts])
    return entries


def entry_slices(entry: np.ndarray, dim: int) -> tuple[slice, slice]:
    """Pool ranges of one table entry."""
    width = int(entry[RANK]) if entry[KIND] == Kind.CODED else dim
    length = int(entry[LENGTH])
    key, value = int(entry[KEY_OFFSET]), int(entry[VALUE_OFFSET])
    return slice(key, key + pool_elements(length, width)), slice(value, value + pool_elements(length, dim))


def compact(store: Store) -> None:
    """Drop pool ranges that no table entry names any more; entries that share a range go on sharing it."""
    key_places: dict[tuple[int, int], int] = {}
    value_places: dict[tuple[int, int], int] = {}
    keys, values = [], []
    key_end = value_end = 0
    for entry in store.table.reshape(-1, FIELDS):
        if entry[KIND] == Kind.EMPTY:
            continue
        key, value = entry_slices(entry, store.dim)
        if (key.start, key.stop) not in key_places:
            key_places[key.start, key.stop] = key_end
            keys.append(store.keys[key])
            key_end += key.stop - key.start
        if (value.start, value.stop) not in value_places:
            value_places[value.start, value.stop] = value_end
            values.append(store.values[value])
            value_end += value.stop - value.start
        entry[KEY_OFFSET], entry[VALUE_OFFSET] = key_places[key.start, key.stop], value_places[value.start, value.stop]
    store.set_pools(keys, values)
