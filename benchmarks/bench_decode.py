"""Decode attention on a GPU: our kernel over the compact cache against the dense kernels of the installed torch.

    python tools/run_in_checkout.py benchmarks/bench_decode.py --output DIR [--sweep] [--quick]

1. Correctness against float64 over random shapes (exit 1 if it fails; nothing is timed then).
2. Timings: 32 query and 8 KV heads, D 128, bf16, one new token. Ours: T - 128 visual tokens coded, 128 in the raw window.
   Timed from the query after RoPE to the output: query rotation, splits, Value rotation and merge. "append" adds writing the new Key and
   Value: two copies before SDPA, our kernel does it itself. "graph": a CUDA graph over several layers with a cache each, more than 3x the
   L2 together; "eager": one call, L2 overwritten before each (Triton's do_bench).
3. With --sweep: tile sizes and numbers of programs of the coded configurations.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from rotatek_compile.kernels import codes, decode, table
from rotatek_compile.kernels.decode_torch import decode_attention_torch
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.kernels.table import NONE, CacheView, Kind

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels"))
from kernel_caches import Coded, Segment, brute_force, random_cache, random_layout, relative_error  # noqa: E402

QUERY_HEADS, HEADS, DIM, WINDOW = 32, 8, 128, 128
SCALING = DIM**-0.5
SHAPES = {(1, 32768): 16, (8, 8192): 8, (32, 4096): 4, (32, 16384): 2}  # (B, T): layers in the graph
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
QUICK = ("r32", "dense", "K 32x4 V 64x4")
LIMITS = {False: 1e-2, True: 1e-2}  # one or two numbers per channel of the rotated query
TIMED_LIMIT = 2e-2  # many tokens average to small outputs
Step = Callable[[], object]


@dataclass
class Layer:
    """One layer's cache, its query and the newest Key and Value."""

    view: CacheView
    host_table: Tensor
    query: Tensor
    key: Tensor
    value: Tensor

    def planned(self, programs: int) -> Layer:
        plan = table.plan_splits(self.host_table, window_capacity=WINDOW, head_dim=DIM, num_programs=programs, device="cuda")
        return replace(self, view=replace(self.view, splits=plan))


def make_layer(batch: int, tokens: int, key: Side, value: Side, seed: int) -> Layer:
    """Random data at once for all segments: one per sequence and head, Keys and Values of these slabs, or raw."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    stored, count = tokens - WINDOW, batch * HEADS
    rows = torch.zeros(batch, HEADS, 1, table.FIELDS, dtype=torch.int64)
    rows[..., table.KIND] = int(Kind.DENSE if key is RAW and value is RAW else Kind.CODED)
    rows[..., table.LENGTH] = stored
    pool, scales, size = [], [], 0
    segments = torch.arange(count).view(batch, HEADS)
    heads = torch.arange(HEADS).expand(batch, HEADS)
    for number, (side, kept) in enumerate(((table.KEY, key), (table.VALUE, value))):
        slabs = per_head(kept)
        fields = rows[..., 0, side : side + table.OWN_MEAN + 1]
        each = torch.tensor([codes.pool_bytes(stored, of_head, 2) for of_head in slabs])
        data = torch.randint(0, 256, (batch, int(each.sum())), generator=generator, device="cuda", dtype=torch.uint8)
        native = codes.padded(stored) * slabs[0].native
        if native:  # heads are alike then
            data.view(count, -1)[:, : 2 * native] = rand(count, native).view(torch.uint8)
        pool.append(data.reshape(-1))
        fields[...] = NONE
        fields[..., table.OFFSET] = size + torch.arange(batch)[:, None] * each.sum() + each.cumsum(0) - each
        fields[..., table.NATIVE : table.NIBBLE + 1] = torch.tensor(slabs)
        size += data.numel()
        if kept is RAW:
            continue
        # One calibrated basis and mean per head, shared by the batch; scales and own means are the segment's.
        fields[..., table.BASIS], fields[..., table.STRIDE] = (number * HEADS + heads) * DIM * DIM, DIM
        fields[..., table.MEAN] = (number * HEADS + heads) * DIM
        fields[..., table.OWN_MEAN] = (number * count + segments) * DIM
        fields[..., table.SCALES] = sum(x.numel() for x in scales) + segments * DIM
        of_heads = [[1 / 73] * x.byte + [1 / 4.6] * (DIM - x.byte) for x in slabs]  # about unit variance
        scales.append(torch.tensor(of_heads).reshape(-1).repeat(batch))
    view = CacheView(
        table=rows.to("cuda"),
        codes=torch.cat(pool),
        bases=torch.linalg.qr(rand(2 * HEADS, DIM, DIM, dtype=torch.float32))[0].to(torch.bfloat16).reshape(-1),
        own_bases=rand(0),
        scales=torch.cat([torch.empty(0), *scales]).to("cuda", torch.bfloat16),
        means=rand(2 * HEADS * DIM, dtype=torch.float32),
        own_means=rand(2 * count * DIM, dtype=torch.float16) / 8,
        window_keys=rand(batch, HEADS, WINDOW, DIM),
        window_values=rand(batch, HEADS, WINDOW, DIM),
        window_lengths=torch.full((batch,), WINDOW, dtype=torch.int32, device="cuda"),
    )
    return Layer(view, rows, rand(batch, QUERY_HEADS, 1, DIM), rand(batch, HEADS, DIM), rand(batch, HEADS, DIM))


def per_head(kept: Side) -> tuple[Slabs, ...]:
    """The slabs of every head."""
    return kept if isinstance(kept, tuple) and not isinstance(kept, Slabs) else (kept or Slabs(DIM),) * HEADS


def read_bytes(batch: int, tokens: int, key: Side, value: Side) -> int:
    """Bytes of Keys and Values a call must read."""
    per_token = sum(slabs.bytes_per_token() for kept in (key, value) for slabs in per_head(kept))
    return batch * ((tokens - WINDOW) * per_token + HEADS * WINDOW * 4 * DIM)


def graph_us(steps: list[Step]) -> float:
    """Microseconds per step of a CUDA graph of all steps: median of 27 replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps * 2:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(27):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(steps))
    return statistics.median(times)


def eager_us(step: Step) -> float:
    return do_bench(step, warmup=20, rep=80, return_mode="median") * 1e3


def host_us(step: Step, calls: int = 200) -> float:
    """Microseconds the host needs to launch one call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / calls * 1e6


def copy_rate() -> float:
    """TB/s of a device copy, bytes read plus written."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / (do_bench(lambda: y.copy_(x), return_mode="median") * 1e-3) / 1e12


def gate(shapes: int) -> bool:
    """Errors against float64 over random caches, NaN wherever nothing is stored; True if all are small."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty returns NaN
    worst = {False: 0.0, True: 0.0}
    for seed in range(shapes):
        generator = torch.Generator().manual_seed(seed)
        group, dim, new = (1, 4, 7, 8, 3, 5)[seed % 6], (128, 64, 128, 96, 256)[seed % 5], (1, 1, 3)[seed % 3]
        layout = random_layout(generator, 3, 2, min(dim, 64), 3000)
        windows = torch.randint(new, 129, (3,), generator=generator).tolist()
        cache = random_cache(layout, windows, dim, 128, torch.bfloat16, device="cuda", seed=seed, num_programs=(40, 200)[seed % 2])
        worst = measure(worst, cache, group, new, dim, f"seed {seed} G {group} D {dim} T {new}")
    for group in (1, 4, 7, 8):
        layout = [[[Segment(700 + rank, Coded(rank), None), Segment(65)] for rank in range(0, 136, 8)]]
        cache = random_cache(layout, [77], 128, 128, torch.bfloat16, device="cuda", num_programs=100)
        worst = measure(worst, cache, group, 1, 128, f"every rank G {group}")
    for name, (key, value) in CONFIGURATIONS.items():
        lengths = (1, 63, 65, 1000, 4097, 128, 129, 2000)
        heads = zip(lengths, *(per_head(kept) if kept else (RAW,) * HEADS for kept in (key, value)), strict=True)
        layout = [[[Segment(length, *(kept and Coded(*kept) for kept in sides))] for length, *sides in heads]]
        cache = random_cache(layout, [77], 128, 128, torch.bfloat16, device="cuda", num_programs=100)
        worst = measure(worst, cache, 4, 1, 128, name)
    torch.use_deterministic_algorithms(False)
    found = f"{worst[False]:.2e}, with a two-part query {worst[True]:.2e}"
    print(f"gate, bf16 against float64: largest relative error {found} (limits {LIMITS})", flush=True)
    return all(worst[two_part] < limit for two_part, limit in LIMITS.items())


def measure(worst: dict[bool, float], cache, group: int, new: int, dim: int, name: str) -> dict[bool, float]:
    view = cache.view
    q = torch.randn(view.batch_size, view.num_kv_heads * group, new, dim, device="cuda").to(torch.bfloat16)
    expected = brute_force(q, cache, dim**-0.5)
    found = {}
    for two_part in (False, True):
        out = decode.decode_attention(q, view, dim**-0.5, two_part_query=two_part)
        found[two_part] = relative_error(out, expected)
        if not found[two_part] < LIMITS[two_part]:
            print(f"  FAILED {name} two_part={two_part}: {found[two_part]:.2e}")
    return {two_part: max(worst[two_part], found[two_part]) for two_part in found}


def timed_shape_error(layer: Layer, **options: object) -> float:
    """Error at a timed shape, first and last sequence, against the fp32 twin."""
    out = decode.decode_attention(layer.query, layer.view, SCALING, **options)
    errors = []
    for row in (slice(0, 1), slice(-1, None)):
        cut = {"table": layer.view.table[row].cpu(), "window_lengths": layer.view.window_lengths[row]}
        view = replace(layer.view, **cut, window_keys=layer.view.window_keys[row], window_values=layer.view.window_values[row])
        expected = decode_attention_torch(layer.query[row].double(), view, SCALING)
        errors.append(relative_error(out[row], expected))
    return max(errors)


def dense_steps(batch: int, tokens: int, layers: int, append: bool) -> list[Step]:
    """SDPA over `[B, Hkv, T, D]`, its query and data as random as ours."""

    def step(query: Tensor, key: Tensor, value: Tensor, new: Tensor) -> Tensor:
        if append:
            key[:, :, -1].copy_(new)
            value[:, :, -1].copy_(new)
        return F.scaled_dot_product_attention(query, key, value, scale=SCALING, enable_gqa=True)

    def rand(heads: int, length: int) -> Tensor:
        return torch.randn(batch, heads, length, DIM, device="cuda", dtype=torch.bfloat16)

    return [partial(step, rand(QUERY_HEADS, 1), rand(HEADS, tokens), rand(HEADS, tokens), rand(HEADS, 1)[:, :, 0]) for _ in range(layers)]


def our_steps(layers: list[Layer], append: bool, **options: object) -> list[Step]:
    def step(layer: Layer) -> Tensor:
        new = (layer.key.unsqueeze(2), layer.value.unsqueeze(2)) if append else None
        return decode.decode_attention(layer.query, layer.view, SCALING, new=new, **options)

    return [partial(step, layer) for layer in layers]


class Table:
    """Rows measured so far; each states the device and versions when saved."""

    def __init__(self, facts: dict[str, object]) -> None:
        self.facts, self.rows = facts, []

    def add(self, batch: int, tokens: int, method: str, size: int, steps: list[Step], appended: list[Step], **more: object) -> None:
        row = {"B": batch, "T": tokens, "method": method, "read_MB": round(size / 1e6, 1), "graph_us": graph_us(steps)}
        row |= {"graph_append_us": graph_us(appended), "eager_us": eager_us(steps[0]), "eager_append_us": eager_us(appended[0])}
        row |= {"graph_TBps": size / row["graph_us"] / 1e6, **more}
        self.rows.append(row)
        print("  " + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    def save(self, path: Path) -> None:
        names = list(dict.fromkeys(k for row in self.rows for k in (*row, *self.facts)))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in (row | self.facts).items()} for row in self.rows)

    def show(self) -> None:
        """Ratios to the best SDPA of the same shape and the same column."""
        columns = ("graph_us", "graph_append_us", "eager_us", "eager_append_us")
        print(f"\n{'B, T':>12} {'method':24}" + "".join(f"{c:>22}" for c in columns) + f"{'TB/s (graph)':>14}{'error':>10}")
        for row in self.rows:
            same = [r for r in self.rows if (r["B"], r["T"]) == (row["B"], row["T"]) and r["method"].startswith("SDPA")]
            cells = [f"{row[c]:.1f} ({min(r[c] for r in same) / row[c]:.2f}x)" for c in columns]
            error = f"{row['error']:.1e}" if "error" in row else ""
            line = "".join(f"{c:>22}" for c in cells) + f"{row['graph_TBps']:>14.2f}{error:>10}"
            print(f"{row['B']:>5}, {row['T']:>5} {row['method']:24}" + line)


def measure_shape(results: Table, batch: int, tokens: int, count: int, quick: bool) -> None:
    dense_bytes = read_bytes(batch, tokens, RAW, RAW)
    for name, backend in (("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION), ("SDPA flash", SDPBackend.FLASH_ATTENTION)):
        plain, appended = (dense_steps(batch, tokens, count, append) for append in (False, True))
        with sdpa_kernel(backend):
            results.add(batch, tokens, name, dense_bytes, plain, appended)
        del plain, appended
        torch.cuda.empty_cache()
    for name, (key, value) in CONFIGURATIONS.items():
        if quick and name not in QUICK:
            continue
        layers = [make_layer(batch, tokens, key, value, seed) for seed in range(count)]
        programs = table.programs_for(layers[0].host_table, torch.cuda.get_device_properties(0).multi_processor_count)
        layers = [layer.planned(programs) for layer in layers]
        size = read_bytes(batch, tokens, key, value)
        for two_part in (False, True) if name == "r32" else (False,):  # codes have one part
            options = {"two_part_query": two_part}
            error = timed_shape_error(layers[0], **options)
            if not error < TIMED_LIMIT:
                sys.exit(f"ours {name} at B {batch}, T {tokens}: error {error:.2e}, limit {TIMED_LIMIT}")
            steps = (our_steps(layers, append, **options) for append in (False, True))
            more = {"error": error, "programs": programs, "splits": layers[0].view.splits.num_splits}
            results.add(batch, tokens, f"ours {name}" + (" two-part" if two_part else ""), size, *steps, **more)
        if name == "r32":
            print(f"  host time of one call: {host_us(our_steps(layers, False)[0]):.1f} us")
        del layers
        torch.cuda.empty_cache()


def sweep(output: Path | None, facts: dict[str, object]) -> None:
    """Graph times of tile sizes and numbers of programs; the eight best of each shape are printed, all are saved."""
    rows: list[dict[str, object]] = []
    names = [name for name, pair in CONFIGURATIONS.items() if RAW not in pair]
    for (batch, tokens), name in itertools.product(((32, 16384), (1, 32768)), names):
        key, value = CONFIGURATIONS[name]
        base = [make_layer(batch, tokens, key, value, seed) for seed in range(SHAPES[batch, tokens])]
        size, first = read_bytes(batch, tokens, key, value), len(rows)
        apart = key.native == 0 if isinstance(key, Slabs) else True
        tried = itertools.product((64, 128, 256), (3, 4), (128, 168, None)) if apart else itertools.product((32, 64, 128), (2, 3), (None,))
        for block_n, stages, registers in tried:
            tiles = decode.Config(block_n, stages, 32, 2, 4, apart, registers)
            for programs in (132, 264, 396, 528, 792, 1056):
                layers = [layer.planned(programs) for layer in base]
                try:
                    us = graph_us(our_steps(layers, False, tiles=tiles))
                except OutOfResources as error:
                    print(f"  {name} {tiles} does not fit: {error}")
                    break
                row = {"B": batch, "T": tokens, "method": name, "block_n": block_n, "stages": stages, "registers": registers or ""}
                rows.append(row | {"programs": programs, "graph_us": round(us, 2), "graph_TBps": round(size / us / 1e6, 3)})
        print("sweep", batch, tokens, name)
        for row in sorted(rows[first:], key=lambda r: r["graph_us"])[:8]:
            print("  ", {k: row[k] for k in ("block_n", "stages", "registers", "programs", "graph_us", "graph_TBps")}, flush=True)
        if output:
            with (output / "bench_decode_sweep.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, [*rows[0], *facts])
                writer.writeheader()
                writer.writerows(row | facts for row in rows)
        del base
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the CSV files")
    parser.add_argument("--sweep", action="store_true", help="also sweep tile sizes and numbers of programs")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--gate-only", action="store_true", help="correctness only")
    parser.add_argument("--gate-shapes", type=int, default=6, help="random shapes in the gate; each compiles two kernels")
    args = parser.parse_args()
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    if not gate(args.gate_shapes):
        sys.exit(1)
    if args.gate_only:
        return
    device = torch.cuda.get_device_properties(0)
    facts = {
        "device": device.name, "multiprocessors": device.multi_processor_count, "torch": torch.__version__, "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(), "sm_MHz": clock(), "copy_TBps": round(copy_rate(), 3), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(facts)
    results = Table(facts)
    for (batch, tokens), count in SHAPES.items():
        measure_shape(results, batch, tokens, count, args.quick)
        if args.output:
            results.save(args.output / "bench_decode.csv")
    if args.sweep:
        results.show()  # now too, in case the sweep is cut short
        sweep(args.output, facts)
    results.show()


def clock() -> int:
    """The SM clock just after some work, or 0 where the driver does not tell."""
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(50):
        x @ x
    torch.cuda.synchronize()
    if shutil.which("nvidia-smi") is None:
        return 0
    command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return int(answer[0]) if answer and answer[0].isdigit() else 0


if __name__ == "__main__":
    main()
