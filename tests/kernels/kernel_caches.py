"""Random caches for the kernel tests, and attention over them by brute force in float64, written without the package's own code.

Everything is built from plain `[S, R]` matrices kept beside the pools, so a wrong layout shows as a wrong result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotatek_compile.kernels import codes, table
from rotatek_compile.kernels.table import CacheView, Kind


@dataclass
class Piece:
    """One segment as plain matrices: logits are `scaling * (q . mean + (q @ decode) . key)`."""

    keys: Tensor  # [S, R] codes, or [S, D] raw Keys
    values: Tensor  # [S, D]
    decode: Tensor | None = None  # [D, R]
    mean: Tensor | None = None  # [D]


@dataclass
class Cache:
    view: CacheView
    pieces: list[list[list[Piece]]]  # [B][Hkv][segments]
    windows: list[list[Piece]]  # [B][Hkv]


def random_cache(
    segments: list[list[list[tuple[str, int, int]]]],
    windows: list[int],
    head_dim: int,
    capacity: int,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    seed: int = 0,
    poison: bool = True,
    full_bases: bool = False,
    num_programs: int = 24,
    min_tokens: int = 256,
) -> Cache:
    """A cache whose row b, head h has `segments[b][h]`, a list of `(kind, length, rank)` with kind "coded", "dense" or "empty".

    Bases are stored `[D, R]` next to each other, or as prefixes of `[D, D]` with `full_bases`. With `poison`, everything
    outside the segments (block padding, window slack, gaps) is NaN.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    batch, heads = len(segments), len(segments[0])
    count = max(len(s) for row in segments for s in row)
    rows = torch.zeros(batch, heads, count, table.FIELDS, dtype=torch.int64)
    keys, values, bases, means = [], [], [], []
    at = {"keys": 0, "values": 0, "bases": 0, "means": 0}
    fill = float("nan") if poison else 0.0

    def add(pool: str, into: list[Tensor], flat: Tensor) -> int:
        into.append(flat)
        at[pool] += flat.numel()
        return at[pool] - flat.numel()

    def packed(x: Tensor) -> Tensor:
        flat = torch.full((codes.pool_elements(*x.shape),), fill, dtype=dtype, device=device)
        codes.pack_into(flat, 0, x)
        return flat

    pieces: list[list[list[Piece]]] = []
    for b, row in enumerate(segments):
        pieces.append([])
        for h, described in enumerate(row):
            pieces[b].append([])
            for s, (kind, length, rank) in enumerate(described):
                if kind == "empty":
                    continue
                width = rank if kind == "coded" else head_dim
                piece = Piece(rand(length, width), rand(length, head_dim))
                entry = rows[b, h, s]
                entry[table.KIND], entry[table.LENGTH] = int(Kind[kind.upper()]), length
                entry[table.KEY_OFFSET] = add("keys", keys, packed(piece.keys))
                entry[table.VALUE_OFFSET] = add("values", values, packed(piece.values))
                if kind == "coded":
                    full = rand(head_dim, head_dim) / max(rank, 1) ** 0.5
                    stored = full if full_bases else full[:, :rank].contiguous()
                    piece.decode = full[:, :rank]
                    piece.mean = torch.randn(head_dim, generator=generator, device=device)
                    entry[table.RANK], entry[table.BASIS_STRIDE] = rank, stored.shape[1]
                    entry[table.BASIS_OFFSET] = add("bases", bases, stored.reshape(-1))
                    entry[table.MEAN_OFFSET] = add("means", means, piece.mean)
                pieces[b][h].append(piece)
    window_keys = torch.full((batch, heads, capacity, head_dim), fill, dtype=dtype, device=device)
    window_values = window_keys.clone()
    for b, length in enumerate(windows):
        window_keys[b, :, :length], window_values[b, :, :length] = rand(heads, length, head_dim), rand(heads, length, head_dim)
    empty = torch.empty(0, dtype=dtype, device=device)
    view = CacheView(
        table=rows.to(device),
        keys=torch.cat([empty, *keys]),
        values=torch.cat([empty, *values]),
        bases=torch.cat([empty, *bases]),
        means=torch.cat([empty.float(), *means]),
        window_keys=window_keys,
        window_values=window_values,
        window_lengths=torch.tensor(windows, dtype=torch.int32, device=device),
        splits=table.plan_splits(
            rows,
            window_capacity=capacity,
            head_dim=head_dim,
            itemsize=dtype.itemsize,
            num_programs=num_programs,
            min_tokens=min_tokens,
            device=device,
        ),
    )
    plain = [[Piece(window_keys[b, h, :n], window_values[b, h, :n]) for h in range(heads)] for b, n in enumerate(windows)]
    return Cache(view, pieces, plain)


def brute_force(q: Tensor, cache: Cache, scaling: float, causal: bool = True) -> Tensor:
    """Attention of `q` `[B, Hq, T, D]` in float64 over concatenated logits and Values, one row at a time."""
    batch, query_heads, new, _ = q.shape
    group = query_heads // len(cache.pieces[0])
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for b in range(batch):
        for head in range(query_heads):
            for t in range(new):
                x = q[b, head, t].double()
                logits, values = [], []
                for piece in cache.pieces[b][head // group]:
                    logit = piece.keys.double() @ x if piece.decode is None else piece.keys.double() @ (piece.decode.double().T @ x)
                    logits.append(logit if piece.mean is None else logit + piece.mean.double() @ x)
                    values.append(piece.values.double())
                window = cache.windows[b][head // group]
                seen = max(window.keys.shape[0] - (new - 1 - t if causal else 0), 0)
                logits.append(window.keys[:seen].double() @ x)
                values.append(window.values[:seen].double())
                weights = torch.softmax(scaling * torch.cat(logits), dim=0)
                out[b, head, t] = weights @ torch.cat(values)
    return out


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected number; NaN counts as infinite."""
    error = (out.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return float("inf") if error.isnan() else error.item()


def random_layout(generator: torch.Generator, batch: int, heads: int, dims: int, longest: int) -> list[list[list[tuple[str, int, int]]]]:
    """Ragged segments: every row and head has its own ranks and some have none; lengths are odd."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    out = []
    for _ in range(batch):
        shape = [("coded", pick(1, longest)), (("dense", "empty", "coded")[pick(0, 3)], pick(1, longest // 3 + 2))][: pick(1, 3)]
        out.append([[(kind, length, 8 * pick(0, dims // 8 + 1)) for kind, length in shape] for _ in range(heads)])
    return out
