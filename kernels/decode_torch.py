"""Decode attention over the compact cache in plain torch: the specification the Triton kernel is tested against.

For a coded segment with Key mean `mu`, decode matrix `A [D, R]` and codes `c = (k - mu) @ encode[:, :R]`

    logit = scaling * (q . mu + (q @ A) . c),

so Keys are never rebuilt; the mean's part is a bias, needed because other segments share the softmax. Dense segments
and the window use plain `q . k`. Works on any device and dtype, computes in fp32 (fp64 for fp64 queries).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import codes
from .table import BASIS_OFFSET, BASIS_STRIDE, KEY_OFFSET, KIND, LENGTH, MEAN_OFFSET, RANK, VALUE_OFFSET, CacheView, Kind

TOKENS_AT_ONCE = 4096
"""Tokens whose logits are alive together; bounds memory when hundreds of queries meet a long segment."""

Partials = tuple[Tensor, Tensor, Tensor]
"""Running maximum `m [..., T]`, sum `l [..., T]` of `exp(logit - m)`, and `acc [..., T, D] = sum exp(logit - m) v`."""


def decode_attention_torch(q: Tensor, view: CacheView, scaling: float) -> Tensor:
    """Attention of the T newest tokens over everything stored.

    Args:
        q: `[B, Hq, T, D]` after RoPE, not rotated; the T tokens are already in the window, the last T of each row.
        view: the layer's cache.
        scaling: factor of the logits.

    Returns:
        `[B, Hq, T, D]` in q's dtype; zero where a row sees nothing.
    """
    return finish(segment_partials(q, view, scaling)).to(q.dtype)


def segment_partials(q: Tensor, view: CacheView, scaling: float, causal_window: bool = True) -> Partials:
    """Unfinished attention over all segments and the window, to be merged with that over tokens stored elsewhere.

    Args:
        q: `[B, Hq, T, D]`.
        causal_window: row t sees `window_length - (T - 1 - t)` window tokens; if false every row sees all of them.

    Returns:
        m `[B, Hq, T]`, l `[B, Hq, T]`, acc `[B, Hq, T, D]` in fp32 (fp64 for fp64 queries); m is -inf and l, acc are 0
        where nothing is seen.
    """
    batch, query_heads, new, dim = q.shape
    heads = view.num_kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = q.to(dtype).reshape(batch, heads, -1, dim)  # [B, Hkv, G*T, D], row = g*T + t
    total = _window_partials(rows, view, scaling, new, causal_window)
    parts = [_head_partials(rows[b, h], view, segments, scaling) for b, h, segments in _stored(view)]
    if any(part is not None for part in parts):
        stored = [part if part is not None else _nothing(rows[0, 0]) for part in parts]
        m, mass, acc = (torch.stack(x).unflatten(0, (batch, heads)) for x in zip(*stored, strict=True))
        total = merge_partials([total, (m, mass, acc)])
    m, mass, acc = total
    return m.reshape(batch, query_heads, new), mass.reshape(batch, query_heads, new), acc.reshape(batch, query_heads, new, dim)


def merge_partials(parts: Sequence[Partials]) -> Partials:
    """Merge partials over disjoint sets of tokens (the softmax identity of FlashAttention, arXiv 2205.14135, section 3.1)."""
    total = torch.stack([m for m, _, _ in parts]).amax(0)
    safe = total.masked_fill(total == -torch.inf, 0.0)  # -inf minus -inf would be NaN
    weights = [torch.exp(m - safe) for m, _, _ in parts]
    mass = sum(w * part[1] for w, part in zip(weights, parts, strict=True))
    acc = sum(w[..., None] * part[2] for w, part in zip(weights, parts, strict=True))
    return total, mass, acc


def finish(partials: Partials) -> Tensor:
    """The attention output `[..., T, D]` of merged partials; zero where nothing was seen."""
    _, mass, acc = partials
    return acc / mass.masked_fill(mass == 0, 1.0)[..., None]


def partials_of(logits: Tensor, values: Tensor) -> Partials:
    """Partials of `logits [..., T, S]` (-inf where masked) over `values [..., S, D]`, which must be finite."""
    m = logits.amax(-1)
    p = torch.exp(logits - m.masked_fill(m == -torch.inf, 0.0)[..., None])
    return m, p.sum(-1), p @ values


def reconstruct(view: CacheView) -> list[list[tuple[Tensor, Tensor]]]:
    """Rebuilt Keys `mean + codes @ decode[:, :R].T` and Values of every row and head, segments in order, window last.

    Returns:
        `out[b][h] = (keys [S, D], values [S, D])` in fp32 (fp64 for fp64 pools).
    """
    dtype = torch.promote_types(view.values.dtype, torch.float32)
    lengths = view.window_lengths.tolist()
    out: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(view.batch_size)]
    for b, h, segments in _stored(view):
        keys, values = [], []
        for segment in segments:
            stored, value = _load(view, segment, 0, segment[LENGTH])
            if segment[KIND] == Kind.CODED:
                basis, mean = _basis(view, segment)
                stored = mean.to(dtype) + stored.to(dtype) @ basis.to(dtype).T
            keys.append(stored.to(dtype))
            values.append(value.to(dtype))
        keys.append(view.window_keys[b, h, : lengths[b]].to(dtype))
        values.append(view.window_values[b, h, : lengths[b]].to(dtype))
        out[b].append((torch.cat(keys), torch.cat(values)))
    return out


def decode_attention_reconstruct(q: Tensor, view: CacheView, scaling: float) -> Tensor:
    """As `decode_attention_torch`, through rebuilt Keys and torch's own attention; needs the dense cache's memory, for debugging."""
    batch, _, new, dim = q.shape
    rebuilt = reconstruct(view)
    lengths = torch.tensor([[keys.shape[0] for keys, _ in row] for row in rebuilt], device=q.device)  # [B, Hkv]
    dtype = torch.promote_types(q.dtype, torch.float32)
    longest = int(lengths.max()) if lengths.numel() else 0
    keys, values = q.new_zeros(2, batch, view.num_kv_heads, longest, dim, dtype=dtype)
    for b, row in enumerate(rebuilt):
        for h, (key, value) in enumerate(row):
            keys[b, h, : key.shape[0]], values[b, h, : key.shape[0]] = key.to(dtype), value.to(dtype)
    # The window comes last, so the causal rule is the same as over the whole row.
    visible = lengths[:, :, None] - torch.arange(new - 1, -1, -1, device=q.device)  # [B, Hkv, T]
    mask = torch.arange(longest, device=q.device) < visible[..., None]
    mask = mask.repeat_interleave(q.shape[1] // view.num_kv_heads, dim=1)
    out = F.scaled_dot_product_attention(q.to(dtype), keys, values, attn_mask=mask, scale=scaling, enable_gqa=True)
    return torch.where(mask.any(-1, keepdim=True), out, 0.0).to(q.dtype)


def _stored(view: CacheView) -> Iterator[tuple[int, int, list[list[int]]]]:
    """Every (b, h) with the table rows of its segments that hold tokens."""
    for b, row in enumerate(view.table.tolist()):
        for h, segments in enumerate(row):
            yield b, h, [s for s in segments if s[KIND] != Kind.EMPTY and s[LENGTH] > 0]


def _load(view: CacheView, segment: list[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Stored Keys (codes `[S, R]` or raw `[S, D]`) and Values `[S, D]` of some of a segment's tokens."""
    dim, length = view.head_dim, segment[LENGTH]
    width = segment[RANK] if segment[KIND] == Kind.CODED else dim
    keys = codes.unpack_from(view.keys, segment[KEY_OFFSET], length, width)
    return keys[start:stop], codes.unpack_from(view.values, segment[VALUE_OFFSET], length, dim)[start:stop]


def _basis(view: CacheView, segment: list[int]) -> tuple[Tensor, Tensor]:
    """Decode matrix `[D, R]` and Key mean `[D]` of a coded segment."""
    dim, rank = view.head_dim, segment[RANK]
    basis = view.bases.as_strided((dim, rank), (segment[BASIS_STRIDE], 1), view.bases.storage_offset() + segment[BASIS_OFFSET])
    return basis, view.means[segment[MEAN_OFFSET] : segment[MEAN_OFFSET] + dim]


def _head_partials(rows: Tensor, view: CacheView, segments: list[list[int]], scaling: float) -> Partials | None:
    """Partials of one (b, h): `rows [N, D]` over all of its segments, or None if there are none."""
    parts = []
    for segment in segments:
        query, bias = rows, None
        if segment[KIND] == Kind.CODED:
            basis, mean = _basis(view, segment)
            query, bias = rows @ basis.to(rows.dtype), rows @ mean.to(rows.dtype)
        for start in range(0, segment[LENGTH], TOKENS_AT_ONCE):
            keys, values = _load(view, segment, start, min(start + TOKENS_AT_ONCE, segment[LENGTH]))
            logits = query @ keys.to(rows.dtype).T
            if bias is not None:
                logits = logits + bias[:, None]
            parts.append(partials_of(scaling * logits, values.to(rows.dtype)))
            if len(parts) == 2:
                parts = [merge_partials(parts)]
    return parts[0] if parts else None


def _window_partials(rows: Tensor, view: CacheView, scaling: float, new: int, causal: bool) -> Partials:
    """Partials of `rows [B, Hkv, G*T, D]` over the window."""
    lengths = view.window_lengths.to(torch.int64)
    longest = int(lengths.max()) if lengths.numel() else 0
    if longest == 0:
        return _nothing(rows)
    keys, values = view.window_keys[:, :, :longest].to(rows.dtype), view.window_values[:, :, :longest].to(rows.dtype)
    position = torch.arange(longest, device=rows.device)
    behind = torch.arange(new - 1, -1, -1, device=rows.device) if causal else torch.zeros(new, dtype=torch.int64, device=rows.device)
    visible = (lengths[:, None] - behind).repeat(1, rows.shape[2] // new)  # [B, G*T]
    masked = position >= visible[:, None, :, None]
    logits = (scaling * rows @ keys.transpose(-1, -2)).masked_fill(masked, -torch.inf)
    slack = (position >= lengths[:, None])[:, None, :, None]
    return partials_of(logits, values.masked_fill(slack, 0.0))  # slack may hold NaN, and 0 * NaN is NaN


def _nothing(rows: Tensor) -> Partials:
    return rows.new_full(rows.shape[:-1], -torch.inf), rows.new_zeros(rows.shape[:-1]), torch.zeros_like(rows)
