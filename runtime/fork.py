"""Cheap copies of a compressed cache: what never changes in place is shared, what does is copied.

Codes, scales, own means and own bases are only ever replaced by longer ones (store.py, merging.py), and the coordinates of text blocks are
frozen. The window is written in place; tables, lengths and sums are small. So a fork costs its window.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from .accounting import cache_tensors, storage_bytes
from .cache_layer import RotateKLayer
from .text_blocks import TextBlocks

POOLS = ("codes", "scales", "own_means", "own_bases")


def fork(cache: Cache) -> Any:
    """A copy of a compressed cache that shares its pools; both go on independently, as copies of one sequence would.

    Raw text of a long answer leaves the cache's windows first, so that it is shared. A fork that codes text of its own (its window
    overflows) gets pools of its own then. Layers that keep their stock cache are copied.
    """
    for layer in cache.layers:
        if isinstance(layer, RotateKLayer):
            layer.share_text()
    shared = [one for layer in cache.layers if isinstance(layer, RotateKLayer) and layer.is_initialized for one in _unchanging(layer)]
    return copy.deepcopy(cache, {id(one): one for one in shared})


def cache_bytes_of(caches: Iterable[Cache]) -> int:
    """Bytes allocated for several caches together; what forks share counts once."""
    tensors: list[Tensor] = [tensor for cache in caches for tensor in cache_tensors(cache)]
    return storage_bytes(tensors)


def _unchanging(layer: RotateKLayer) -> Iterator[Any]:
    """Everything of a layer that is never written in place."""
    yield from (getattr(layer.store, name) for name in POOLS)
    yield from layer.media.queries.values()
    if layer.blocks is not None:
        yield from _of_blocks(layer.blocks)


def _of_blocks(blocks: TextBlocks) -> Iterator[Any]:
    yield blocks.basis  # the artifact's
    yield blocks.shared
    for now in blocks.rows.values():
        yield now.where
        yield from (scales for scales in now.scales if scales is not None)
