"""Random caches for the kernel tests, and attention over them by brute force in float64, written without the package's own code.

Everything is built from plain matrices kept beside the pools, and codes are laid out byte by byte here, so a wrong layout shows as a
wrong result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rotatek_compile.kernels import table
from rotatek_compile.kernels.splits import plan_splits
from rotatek_compile.kernels.table import NONE, CacheView, Kind


class Coded(NamedTuple):
    """How one side of a segment is stored; `None` in its place means raw numbers."""

    native: int = 0
    byte: int = 0
    nibble: int = 0
    shared_mean: bool = True
    own_mean: bool = True
    own_basis: bool = False


class Segment(NamedTuple):
    """A description: `length` tokens, Keys and Values each `Coded` or raw (None). No tokens at all: an empty row of the table."""

    length: int
    key: Coded | None = None
    value: Coded | None = None


EMPTY = Segment(0)
Layout = list[list[list[Segment]]]  # [B][Hkv][segments]


@dataclass
class Piece:
    """What one segment, or a window, stands for, in float64: `keys [S, D]`, `values [S, D]`."""

    keys: Tensor
    values: Tensor


@dataclass
class Cache:
    view: CacheView
    pieces: list[list[list[Piece]]]  # [B][Hkv][segments]
    windows: list[list[Piece]]  # [B][Hkv]


class Pools:
    """Grows the pools of a view; with `poison`, gaps between segments hold NaN, or random bytes among the codes."""

    def __init__(self, generator: torch.Generator, dim: int, dtype: torch.dtype, poison: bool, full_bases: bool) -> None:
        self.generator, self.dim, self.dtype, self.poison, self.full_bases = generator, dim, dtype, poison, full_bases
        self.device = generator.device
        types = {
            "codes": torch.uint8,
            "bases": dtype,
            "own_bases": dtype,
            "scales": torch.bfloat16,
            "means": torch.float32,
            "own_means": torch.float16,
        }
        self.parts = {name: [torch.empty(0, dtype=kind, device=self.device)] for name, kind in types.items()}
        self.sizes = dict.fromkeys(types, 0)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def garbage(self, count: int) -> Tensor:
        values = torch.randint(0, 256, (count,), generator=self.generator, device=self.device, dtype=torch.uint8)
        return values if self.poison else torch.zeros_like(values)

    def add(self, pool: str, flat: Tensor, step: int = 1) -> int:
        """Appends `flat`, then a gap that leaves the next offset on a multiple of `step`; returns where `flat` begins."""
        start = self.sizes[pool]
        gap = step + -(flat.numel()) % step
        filler = self.garbage(gap) if flat.dtype is torch.uint8 else flat.new_full((gap,), float("nan") if self.poison else 0.0)
        self.parts[pool] += [flat, filler]
        self.sizes[pool] += flat.numel() + gap
        return start

    def flat(self, pool: str) -> Tensor:
        return torch.cat(self.parts[pool])

    def side(self, length: int, kept: Coded | None, fields: Tensor) -> Tensor:
        """Stores random numbers, fills `fields` of the table and returns what they stand for: `[S, D]` float64."""
        fields[:] = NONE
        fields[table.NATIVE : table.NIBBLE + 1] = 0
        if kept is None:
            raw = self.randn(length, self.dim).to(self.dtype)
            fields[table.OFFSET], fields[table.NATIVE] = self.add("codes", self.with_padding(raw), 16), self.dim
            return raw.double()
        native, byte, nibble = kept[:3]
        rank = native + byte + nibble
        numbers = self.randn(length, native).to(self.dtype)
        signed = torch.randint(-127, 128, (length, byte), generator=self.generator, device=self.device)
        unsigned = torch.randint(0, 16, (length, nibble), generator=self.generator, device=self.device)
        low, high = unsigned[:, : nibble // 2], unsigned[:, nibble // 2 :]
        slabs = [self.with_padding(x) for x in (numbers, signed.to(torch.int8), (low + 16 * high).to(torch.uint8))]
        levels = torch.cat([numbers.double(), signed.double(), unsigned.double() - 7.5], 1)
        # About unit variance whatever the precision, and different in every direction.
        tops = torch.tensor([1 / 73] * byte + [1 / 4.6] * nibble, device=self.device)
        scales = (tops * (0.3 + self.randn(byte + nibble).abs())).bfloat16()
        full = (self.randn(self.dim, self.dim) / max(rank, 1) ** 0.5).to(self.dtype)
        stored = full if self.full_bases else full[:, :rank].contiguous()
        fields[table.OFFSET] = self.add("codes", torch.cat(slabs), 16)
        fields[table.NATIVE : table.NIBBLE + 1] = torch.tensor([native, byte, nibble])
        place = self.add("own_bases" if kept.own_basis else "bases", stored.reshape(-1), 8)
        fields[table.BASIS], fields[table.STRIDE] = -8 - place if kept.own_basis else place, stored.shape[1]
        fields[table.SCALES] = self.add("scales", scales)
        mean = torch.zeros(self.dim, dtype=torch.float64, device=self.device)
        for pool, field, wanted in (("means", table.MEAN, kept.shared_mean), ("own_means", table.OWN_MEAN, kept.own_mean)):
            if wanted:
                own = self.randn(self.dim).to(self.parts[pool][0].dtype)
                fields[field] = self.add(pool, own)
                mean += own.double()
        weights = torch.cat([torch.ones(native, device=self.device), scales.float()]).double()
        return mean + (levels * weights) @ full[:, :rank].double().T

    def with_padding(self, rows: Tensor) -> Tensor:
        """A slab's bytes: tokens one after another, and one of garbage after an odd number of them."""
        flat = rows.contiguous().view(torch.uint8).reshape(-1)
        size = rows.shape[1] * rows.element_size()
        return torch.cat([flat, self.garbage(size if rows.shape[0] % 2 else 0)])


def random_cache(
    segments: Layout,
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
    grows_to: int | None = None,
) -> Cache:
    """A cache whose row b, head h has the segments `segments[b][h]` and `windows[b]` tokens in its window.

    Decode matrices are stored `[D, R]` one behind the other, or as prefixes of `[D, D]` with `full_bases`. With `poison`, whatever
    lies outside the segments (padding, window slack, gaps) is NaN, and random bytes in the pool of codes. With `grows_to`, the plan is
    that of windows of so many tokens, at this capacity.
    """
    pools = Pools(torch.Generator(device=device).manual_seed(seed), head_dim, dtype, poison, full_bases)
    batch, heads = len(segments), len(segments[0])
    rows = torch.zeros(batch, heads, max(len(s) for row in segments for s in row), table.FIELDS, dtype=torch.int64)
    pieces: list[list[list[Piece]]] = [[[] for _ in range(heads)] for _ in range(batch)]
    for b, row in enumerate(segments):
        for h, described in enumerate(row):
            for s, (length, key, value) in enumerate(described):
                if not length:
                    continue
                fields = rows[b, h, s]
                kind = Kind.DENSE if key is None and value is None else Kind.CODED
                fields[table.KIND], fields[table.LENGTH] = int(kind), length
                keys = pools.side(length, key, fields[table.KEY : table.VALUE])
                pieces[b][h].append(Piece(keys, pools.side(length, value, fields[table.VALUE :])))
    window = torch.full((2, batch, heads, capacity, head_dim), float("nan") if poison else 0.0, dtype=dtype, device=device)
    for b, length in enumerate(windows):
        window[:, b, :, :length] = pools.randn(2, heads, length, head_dim).to(dtype)
    plan = plan_splits(
        rows, window_capacity=grows_to or capacity, window_least=capacity, head_dim=head_dim, itemsize=dtype.itemsize,
        num_programs=num_programs, min_tokens=min_tokens, device=device,
    ).of_windows(capacity)  # fmt: skip
    view = CacheView(
        table=rows.to(device),
        **{name: pools.flat(name) for name in pools.parts},
        windows=window,
        window_lengths=torch.tensor(windows, dtype=torch.int32, device=device),
        splits=plan,
    )
    plain = [[Piece(window[0, b, h, :n].double(), window[1, b, h, :n].double()) for h in range(heads)] for b, n in enumerate(windows)]
    return Cache(view, pieces, plain)


def brute_force(q: Tensor, cache: Cache, scaling: float, causal: bool = True) -> Tensor:
    """Attention of `q` `[B, Hq, T, D]` in float64 over concatenated Keys and Values, one row at a time; zero where nothing is seen."""
    batch, query_heads, new, _ = q.shape
    group = query_heads // len(cache.pieces[0])
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for b in range(batch):
        for head in range(query_heads):
            stored, window = cache.pieces[b][head // group], cache.windows[b][head // group]
            keys = torch.cat([piece.keys for piece in [*stored, window]])
            values = torch.cat([piece.values for piece in [*stored, window]])
            for t in range(new):
                hidden = min(new - 1 - t, window.keys.shape[0]) if causal else 0
                seen = keys.shape[0] - hidden
                weights = torch.softmax(scaling * (keys[:seen] @ q[b, head, t].double()), dim=0)
                out[b, head, t] = weights @ values[:seen]
    return out


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected number; NaN counts as infinite."""
    error = (out.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return float("inf") if error.isnan() else error.item()


def random_layout(generator: torch.Generator, batch: int, heads: int, dim: int, longest: int) -> Layout:
    """Ragged segments: lengths are odd and even, some sequences have few, and every row and head has its own slabs on either side."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def side() -> Coded | None:
        if pick(0, 4) == 0:
            return None
        native = 8 * pick(0, dim // 16 + 1) * pick(0, 2)
        byte = 8 * pick(0, (dim - native) // 8 + 1) * pick(0, 2)
        nibble = 16 * pick(0, (dim - native - byte) // 16 + 1) * pick(0, 2)
        return Coded(native, byte, nibble, *(bool(pick(0, 3)) for _ in range(3)))

    out: Layout = []
    for _ in range(batch):
        lengths = [pick(1, longest), pick(1, longest // 3 + 2), pick(1, 40)][: pick(1, 4)]
        out.append([[Segment(length * bool(pick(0, 6)), side(), side()) for length in lengths] for _ in range(heads)])
    return out
