"""What bench_decode.py times: caches of random data under given plans, dense caches of the same shape, and one call over each.

Bytes are those of Keys and Values that a call must read, the raw window of 128 tokens included. Without a GPU the calls are those of the
torch specification: a way to try the scripts out, whose times say nothing.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rotatek_compile.kernels import codes, decode, table
from rotatek_compile.kernels.decode_torch import decode_attention_torch
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.kernels.splits import plan_growing, plan_splits
from rotatek_compile.kernels.table import NONE, CacheView, Kind

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels"))
from kernel_caches import relative_error  # noqa: E402

DIM, WINDOW = 128, 128
SCALING = DIM**-0.5
RAW = None
Side = Slabs | tuple[Slabs, ...] | None  # of all heads, or one per head
MIXED = tuple(Slabs(0, 0, n) for n in (16, 16, 32, 32, 32, 32, 48, 48)), tuple(Slabs(0, 0, n) for n in (32, 96, 32, 64, 64, 96, 32, 96))
CONFIGURATIONS: dict[str, tuple[Side, Side]] = {  # Keys and Values: native, 8 bit, 4 bit
    "r32": (Slabs(32), RAW),
    "r64": (Slabs(64), RAW),
    "dense": (RAW, RAW),
    "K 64x8 V 128x8": (Slabs(0, 64), Slabs(0, 128)),
    "K 32x8 V 128x8": (Slabs(0, 32), Slabs(0, 128)),
    "K 32x4 V 128x4": (Slabs(0, 0, 32), Slabs(0, 0, 128)),
    "K 32x4 V 64x4": (Slabs(0, 0, 32), Slabs(0, 0, 64)),
    "mixed, mean K 32x4 V 64x4": MIXED,
    "K, V 16x8 48x4": (Slabs(0, 16, 48), Slabs(0, 16, 48)),
}
BASELINES = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}
TIMED_LIMIT = 2e-2  # many tokens average to small outputs
Step = Callable[[], object]


@functools.cache
def place() -> str:
    """The device of everything here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """One shape: B sequences of T tokens, of which 128 are in the raw window."""

    batch: int
    tokens: int
    query_heads: int = 32
    heads: int = 8

    @property
    def dense_bytes(self) -> int:
        return self.read_bytes(RAW, RAW)

    def read_bytes(self, key: Side, value: Side) -> int:
        """Bytes of Keys and Values a call must read."""
        per_token = sum(slabs.bytes_per_token() for kept in (key, value) for slabs in per_head(kept, self.heads))
        return self.batch * ((self.tokens - WINDOW) * per_token + self.heads * WINDOW * 4 * DIM)


@dataclass
class Layer:
    """One layer's cache, its query and the newest Key and Value."""

    view: CacheView
    host_table: Tensor
    query: Tensor
    key: Tensor
    value: Tensor

    def planned(self, programs: int | None = None) -> Layer:
        """With splits as a cache that goes on has them, or with so many programs."""
        if programs is None:
            plan = plan_growing(self.host_table.numpy(), WINDOW, DIM, 2, torch.device(place())).of_windows(WINDOW)
        else:
            plan = plan_splits(self.host_table, window_capacity=WINDOW, head_dim=DIM, num_programs=programs, device=place())
        return replace(self, view=replace(self.view, splits=plan))

    def copy(self) -> Layer:
        """The same numbers elsewhere in memory; only the split plan is shared."""
        view = {field.name: getattr(self.view, field.name) for field in fields(self.view)}
        copied = replace(self.view, **{name: x.clone() for name, x in view.items() if isinstance(x, Tensor)})
        return Layer(copied, self.host_table, self.query.clone(), self.key.clone(), self.value.clone())


def make_layer(case: Case, key: Side, value: Side, seed: int) -> Layer:
    """Random data at once for all segments: one per sequence and head, Keys and Values of these slabs, or raw."""
    device, batch, kv_heads = place(), case.batch, case.heads
    generator = torch.Generator(device).manual_seed(seed)

    def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    stored, count = case.tokens - WINDOW, batch * kv_heads
    rows = torch.zeros(batch, kv_heads, 1, table.FIELDS, dtype=torch.int64)
    rows[..., table.KIND] = int(Kind.DENSE if key is RAW and value is RAW else Kind.CODED)
    rows[..., table.LENGTH] = stored
    pool, scales, size = [], [], 0
    segments = torch.arange(count).view(batch, kv_heads)
    heads = torch.arange(kv_heads).expand(batch, kv_heads)
    for number, (side, kept) in enumerate(((table.KEY, key), (table.VALUE, value))):
        slabs = per_head(kept, kv_heads)
        row = rows[..., 0, side : side + table.OWN_MEAN + 1]
        each = torch.tensor([codes.pool_bytes(stored, of_head, 2) for of_head in slabs])
        data = torch.randint(0, 256, (batch, int(each.sum())), generator=generator, device=device, dtype=torch.uint8)
        native = codes.padded(stored) * slabs[0].native
        if native:  # heads are alike then
            data.view(count, -1)[:, : 2 * native] = rand(count, native).view(torch.uint8)
        pool.append(data.reshape(-1))
        row[...] = NONE
        row[..., table.OFFSET] = size + torch.arange(batch)[:, None] * each.sum() + each.cumsum(0) - each
        row[..., table.NATIVE : table.NIBBLE + 1] = torch.tensor(slabs)
        size += data.numel()
        if kept is RAW:
            continue
        # One calibrated basis and mean per head, shared by the batch; scales and own means are the segment's.
        row[..., table.BASIS], row[..., table.STRIDE] = (number * kv_heads + heads) * DIM * DIM, DIM
        row[..., table.MEAN] = (number * kv_heads + heads) * DIM
        row[..., table.OWN_MEAN] = (number * count + segments) * DIM
        row[..., table.SCALES] = sum(x.numel() for x in scales) + segments * DIM
        of_heads = [[1 / 73] * x.byte + [1 / 4.6] * (DIM - x.byte) for x in slabs]  # about unit variance
        scales.append(torch.tensor(of_heads).reshape(-1).repeat(batch))
    view = CacheView(
        table=rows.to(device),
        codes=torch.cat(pool),
        bases=torch.linalg.qr(rand(2 * kv_heads, DIM, DIM, dtype=torch.float32))[0].to(torch.bfloat16).reshape(-1),
        own_bases=rand(0),
        scales=torch.cat([torch.empty(0), *scales]).to(device, torch.bfloat16),
        means=rand(2 * kv_heads * DIM, dtype=torch.float32),
        own_means=rand(2 * count * DIM, dtype=torch.float16) / 8,
        windows=rand(2, batch, kv_heads, WINDOW, DIM),
        window_lengths=torch.full((batch,), WINDOW, dtype=torch.int32, device=device),
    )
    return Layer(view, rows, rand(batch, case.query_heads, 1, DIM), rand(batch, kv_heads, DIM), rand(batch, kv_heads, DIM))


def per_head(kept: Side, heads: int) -> tuple[Slabs, ...]:
    """The slabs of every head."""
    return kept if isinstance(kept, tuple) and not isinstance(kept, Slabs) else (kept or Slabs(DIM),) * heads


def timed_shape_error(layer: Layer, append: bool = False, **options: object) -> float:
    """Error at a timed shape, first and last sequence, against the specification in float64 over the window as it is afterwards."""
    out = our_steps([layer], append, **options)[0]()
    errors = []
    for row in (slice(0, 1), slice(-1, None)):
        cut = {"table": layer.view.table[row].cpu(), "window_lengths": layer.view.window_lengths[row]}
        view = replace(layer.view, **cut, windows=layer.view.windows[:, row])
        expected = decode_attention_torch(layer.query[row].double(), view, SCALING)
        errors.append(relative_error(out[row], expected))
    return max(errors)


def dense_steps(case: Case, layers: int, append: bool) -> list[Step]:
    """SDPA over `[B, Hkv, T, D]`, its query and data as random as ours."""

    def step(query: Tensor, key: Tensor, value: Tensor, new: Tensor) -> Tensor:
        if append:
            key[:, :, -1].copy_(new)
            value[:, :, -1].copy_(new)
        return F.scaled_dot_product_attention(query, key, value, scale=SCALING, enable_gqa=True)

    def rand(heads: int, length: int) -> Tensor:
        return torch.randn(case.batch, heads, length, DIM, device=place(), dtype=torch.bfloat16)

    def layer() -> Step:
        return partial(step, rand(case.query_heads, 1), *(rand(case.heads, case.tokens) for _ in "kv"), rand(case.heads, 1)[:, :, 0])

    return [layer() for _ in range(layers)]


def baseline(name: str) -> contextlib.AbstractContextManager[None]:
    """Where SDPA takes this backend; a CPU has none to choose."""
    return sdpa_kernel(BASELINES[name]) if place() == "cuda" else contextlib.nullcontext()


def our_steps(layers: list[Layer], append: bool, **options: object) -> list[Step]:
    """Our kernel, which appends by itself; without a GPU the specification, after two copies."""

    def step(layer: Layer) -> Tensor:
        new = (layer.key.unsqueeze(2), layer.value.unsqueeze(2)) if append else None
        return decode.decode_attention(layer.query, layer.view, SCALING, new=new, **options)

    def specified(layer: Layer) -> Tensor:
        if append:
            layer.view.window_keys[:, :, -1].copy_(layer.key)
            layer.view.window_values[:, :, -1].copy_(layer.value)
        return decode_attention_torch(layer.query, layer.view, SCALING)

    return [partial(step if place() == "cuda" else specified, layer) for layer in layers]
