"""What a cache really holds, in bytes allocated."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor
from transformers.cache_utils import Cache

from ..kernels.table import Kind
from .cache import RotateKCache
from .cache_layer import RotateKLayer

DENSE_ITEMSIZE = 2  # sizes are compared at 2 bytes a number, whatever the compute dtype (DESIGN.md §3)


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Bytes of one cache. `stored` is what is allocated; the others count codes and raw numbers at 2 bytes each.

    total: everything; span: coded segments with all they need (codes, scales, means, own bases, or a rival's parts, and the tables of
    kept tokens where some are dropped); window: raw
    text (window and older dense text); basis: own bases, part of span; slack: padding and unused window, part of span or
    window; tables: segment tables, lengths and work lists; dense: the stock cache for the same tokens; span_dense: the stock cache
    for the coded tokens and those that were dropped; fallback_heads: (sequence, head, segment) triples that kept more than planned.
    """

    stored: int = 0
    total: int = 0
    span: int = 0
    span_dense: int = 0
    window: int = 0
    basis: int = 0
    slack: int = 0
    tables: int = 0
    dense: int = 0
    fallback_heads: int = 0

    def __add__(self, other: CacheBytes) -> CacheBytes:
        return CacheBytes(**{k: v + asdict(other)[k] for k, v in asdict(self).items()})


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors; views of one storage count once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def cache_tensors(cache: Cache) -> list[Tensor]:
    """Every tensor a cache keeps alive for its sequences."""
    tensors: list[Tensor] = []
    if isinstance(cache, RotateKCache):
        tensors.extend(segment.table for segment in cache.kept_segments())
    for layer in cache.layers:
        if isinstance(layer, RotateKLayer):
            tensors.extend(layer.tensors())
        else:
            tensors.extend(t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor))
    return tensors


def cache_bytes(cache: Cache, tokens: int | None = None) -> CacheBytes:
    """Count a cache, compressed or stock.

    Padding that a stock cache stores is no loss of the method it stands for: its `total` and `dense` count real tokens. `stored` is what
    is allocated.

    Args:
        tokens: real tokens over all sequences; by default what a compressed cache saw, and for a stock one batch × length, because it
            does not know which of its columns are padding.
    """
    total = CacheBytes()
    for layer in cache.layers:
        if isinstance(layer, RotateKLayer):
            if layer.is_initialized:
                total += _layer_bytes(layer, tokens)
            continue
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.numel():
            stored = storage_bytes([keys, values])
            columns = keys.shape[0] * keys.shape[2]
            # a sliding layer holds the newest tokens only, whatever was read
            real = columns if tokens is None else min(tokens, columns)
            dense = real * keys.shape[1] * (keys.shape[3] + values.shape[3]) * DENSE_ITEMSIZE
            total += CacheBytes(stored=stored, total=dense, dense=dense)
    if isinstance(cache, RotateKCache):
        index = sum(storage_bytes([segment.table]) for segment in cache.kept_segments())
        total += CacheBytes(stored=index, total=index, span=index)
    return total


def _layer_bytes(layer: RotateKLayer, tokens: int | None) -> CacheBytes:
    store = layer.store
    parts = store.tensors()
    size = DENSE_ITEMSIZE
    rival = layer.spans
    coded_tokens = store.coded_tokens() + (rival.tokens() if rival is not None else 0)
    coded_tokens += layer.kept.evicted() if layer.kept is not None else 0
    coded, coded_slack = store.code_bytes(Kind.CODED)
    raw, raw_slack = store.code_bytes(Kind.DENSE)
    basis = store.own_bases.numel() * size
    span = coded + storage_bytes([store.scales, store.own_means]) + basis + (rival.bytes() if rival is not None else 0)
    span += storage_bytes(layer.blocks.tensors()) if layer.blocks is not None else 0
    window_numbers = parts["windows"].numel()
    window = window_numbers * size + raw
    tables = storage_bytes([parts[k] for k in ("window_lengths", "table", "splits", "ranges") if k in parts])
    slack = coded_slack + raw_slack + (window_numbers - store.window.used_elements()) * size
    per_token = 2 * store.heads * store.dim * size
    real = tokens if tokens is not None else int(layer.real.sum())
    return CacheBytes(
        stored=storage_bytes(layer.tensors()),
        total=span + window + tables,
        span=span,
        span_dense=coded_tokens * per_token,
        window=window,
        basis=basis,
        slack=slack,
        tables=tables,
        dense=real * per_token,
        fallback_heads=int(store.monitor.fallback.sum()),
    )
