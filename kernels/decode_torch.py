"""Decode attention over the compact cache in plain torch: the specification the Triton kernel is tested against.

A coded side (Keys or Values) of a segment has a mean `mu`, a decode matrix `A [D, R]`, scales `s [R]` and levels `c [S, R]`, so that a
vector is rebuilt as `mu + A (s c)`. Nothing is rebuilt, though: with probabilities p of the segment's tokens

    logit = scaling * (q . mu_k + ((q A_k) s_k) . c_k),        output = mu_v sum(p) + A_v (s_v (c_v^T p)).

The Key mean's part is a bias, needed because other segments share the softmax; the Value rotation is undone once per segment. Raw sides
and the window use plain `q . k` and `p . v`. Works on any device and dtype, computes in fp32 (fp64 for fp64 queries).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import codes
from .slabs import Slabs
from .table import BASIS, KEY, KIND, LENGTH, MEAN, NATIVE, NONE, OFFSET, OWN_MEAN, SCALES, STRIDE, VALUE, CacheView, Kind, own_basis

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


@torch.no_grad()
def append_newest(view: CacheView, keys: Tensor, values: Tensor) -> None:
    """Write the T newest tokens [B, Hkv, T, D] to the end of the window, whose lengths count them already: the kernel does so itself."""
    new = keys.shape[2]
    rows = torch.arange(view.batch_size, device=keys.device)[:, None]
    where = view.window_lengths.long()[:, None] - new + torch.arange(new, device=keys.device)
    view.window_keys[rows, :, where] = keys.transpose(1, 2)
    view.window_values[rows, :, where] = values.transpose(1, 2)


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
    mass = cast(Tensor, sum(w * part[1] for w, part in zip(weights, parts, strict=True)))
    acc = cast(Tensor, sum(w[..., None] * part[2] for w, part in zip(weights, parts, strict=True)))
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
    """Rebuilt Keys and Values of every row and head, segments in order, window last.

    Returns:
        `out[b][h] = (keys [S, D], values [S, D])` in fp32 (fp64 for fp64 caches).
    """
    dtype = torch.promote_types(view.dtype, torch.float32)
    lengths = view.window_lengths.tolist()
    out: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(view.batch_size)]
    for b, h, segments in _stored(view):
        sides = []
        for side, window in ((KEY, view.window_keys), (VALUE, view.window_values)):
            parts = [load_side(view, segment, side).rebuilt(dtype) for segment in segments]
            sides.append(torch.cat([*parts, window[b, h, : lengths[b]].to(dtype)]))
        out[b].append((sides[0], sides[1]))
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


@dataclass(frozen=True, slots=True)
class Side:
    """Keys or Values of one segment: levels `[S, R]`; decode `[D, R]` with the scales folded in and mean `[D]`, None for raw numbers."""

    levels: Tensor
    decode: Tensor | None
    mean: Tensor | None

    def rebuilt(self, dtype: torch.dtype) -> Tensor:
        """The vectors `[S, D]` that the codes stand for."""
        if self.decode is None or self.mean is None:
            return self.levels.to(dtype)
        return self.mean.to(dtype) + self.levels.to(dtype) @ self.decode.to(dtype).T


def load_side(view: CacheView, segment: Sequence[int], side: int) -> Side:
    """The Keys (`side` = KEY) or Values of one table row."""
    dim, length = view.head_dim, segment[LENGTH]
    slabs = Slabs(*segment[side + NATIVE : side + NATIVE + 3])
    levels = codes.unpack(view.codes[segment[side + OFFSET] :], length, slabs, view.dtype)
    if segment[side + BASIS] == NONE:
        return Side(levels, None, None)
    pool, place = view.bases, segment[side + BASIS]
    if place < NONE:
        pool, place = view.own_bases, own_basis(place)
    decode = pool.as_strided((dim, slabs.rank), (segment[side + STRIDE], 1), pool.storage_offset() + place).to(levels.dtype)
    if slabs.scaled:
        first = segment[side + SCALES]
        scales = view.scales[first : first + slabs.scaled].to(levels.dtype)
        decode = decode * torch.cat([scales.new_ones(slabs.native), scales])
    mean = levels.new_zeros(dim)
    for pool, place in ((view.means, segment[side + MEAN]), (view.own_means, segment[side + OWN_MEAN])):
        if place != NONE:
            mean = mean + pool[place : place + dim].to(mean.dtype)
    return Side(levels, decode, mean)


def _head_partials(rows: Tensor, view: CacheView, segments: list[list[int]], scaling: float) -> Partials | None:
    """Partials of one (b, h): `rows [N, D]` over all of its segments, or None if there are none."""
    parts = []
    for segment in segments:
        key, value = load_side(view, segment, KEY), load_side(view, segment, VALUE)
        query, bias = rows, None
        if key.decode is not None and key.mean is not None:
            query, bias = rows @ key.decode.to(rows.dtype), rows @ key.mean.to(rows.dtype)
        own = []
        for start in range(0, segment[LENGTH], TOKENS_AT_ONCE):
            some = slice(start, start + TOKENS_AT_ONCE)
            logits = query @ key.levels[some].to(rows.dtype).T
            if bias is not None:
                logits = logits + bias[:, None]
            own.append(partials_of(scaling * logits, value.levels[some].to(rows.dtype)))
            if len(own) == 2:
                own = [merge_partials(own)]
        m, mass, acc = own[0]
        if value.decode is not None and value.mean is not None:
            acc = mass[..., None] * value.mean.to(rows.dtype) + acc @ value.decode.to(rows.dtype).T
        parts.append((m, mass, acc))
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
