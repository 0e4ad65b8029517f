"""Decode attention on a GPU: our kernel over the compact cache against the dense kernels of the installed torch.

    python tools/run_in_checkout.py benchmarks/bench_decode.py --output DIR [--sweep] [--quick]
    python tools/run_in_checkout.py benchmarks/bench_decode.py --output DIR --linear --small        # instead: curves (decode_curves.py)

1. Correctness against float64 over random shapes (exit 1 if it fails; nothing is timed then).
2. Timings: 32 query and 8 KV heads, D 128, bf16, one new token. Ours: T - 128 visual tokens coded, 128 in the raw window.
   Timed from the query after RoPE to the output: query rotation, splits, Value rotation and merge. "append" adds writing the new Key and
   Value: two copies before SDPA, our kernel does it itself. "graph": a CUDA graph over several layers with a cache each, more than 3x the
   L2 together, with the 10th and the 90th percentile of its replays; "eager": one call, L2 overwritten before each (Triton's do_bench).
   FlexAttention and FlashInfer (decode_baselines.py) are timed likewise where they run; with --only-baselines they alone, beside SDPA and
   three rows of ours, saved to decode_baselines.csv.
3. With --sweep: tile sizes and numbers of programs of the coded configurations.

With --dry-run the shapes are the smallest, and without a GPU the torch specification runs: a way to try the script out.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Collection
from pathlib import Path

import decode_curves
import print_decode
import torch
from decode_baselines import FAMILIES, missing, read_bytes, step_error
from decode_cases import (
    BASELINES,
    CONFIGURATIONS,
    RAW,
    TIMED_LIMIT,
    Case,
    Step,
    baseline,
    dense_steps,
    make_layer,
    our_steps,
    per_head,
    place,
    timed_shape_error,
)
from decode_timing import eager_us, facts, graph_times, graph_us, host_us, multiprocessors, percentiles
from triton.runtime.errors import OutOfResources

from rotatek_compile.kernels import decode
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.kernels.splits import programs_for

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels"))
from kernel_caches import Coded, Segment, brute_force, random_cache, random_layout, relative_error  # noqa: E402

SHAPES = {(1, 32768): 16, (8, 8192): 8, (32, 4096): 4, (32, 16384): 2}  # (B, T): layers in the graph
DRY_SHAPES = {(1, 256): 2, (2, 192): 2}
QUICK = ("r32", "dense", "K 32x4 V 64x4")
BESIDE = ("dense", "K 32x8 V 128x8", "K 32x4 V 64x4")  # the other baselines
LIMITS = {False: 1e-2, True: 1e-2}  # one or two numbers per channel of the rotated query


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
        heads = zip(lengths, *(per_head(kept, 8) if kept else (RAW,) * 8 for kept in (key, value)), strict=True)
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


class Table:
    """Rows measured so far; each states the device and versions when saved."""

    def __init__(self, measured_on: dict[str, object]) -> None:
        self.facts, self.rows = measured_on, []

    def add(self, batch: int, tokens: int, method: str, size: int, steps: list[Step], appended: list[Step], **more: object) -> None:
        (low, us, high), (append_low, append_us, append_high) = (percentiles(graph_times(some)) for some in (steps, appended))
        row = {"B": batch, "T": tokens, "method": method, "read_MB": round(size / 1e6, 1), "graph_us": us, "graph_append_us": append_us}
        row |= {"eager_us": eager_us(steps[0]), "eager_append_us": eager_us(appended[0]), "graph_TBps": size / us / 1e6}
        row |= {"graph_p10_us": low, "graph_p90_us": high, "graph_append_p10_us": append_low, "graph_append_p90_us": append_high, **more}
        self.rows.append(row)
        print("  " + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    def save(self, path: Path) -> None:
        names = list(dict.fromkeys(k for row in self.rows for k in (*row, *self.facts)))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in (row | self.facts).items()} for row in self.rows)

    def show(self) -> None:
        """Ratios to the best dense kernel of the same shape and the same column."""
        columns = ("graph_us", "graph_append_us", "eager_us", "eager_append_us")
        print(f"\n{'B, T':>12} {'method':24}" + "".join(f"{c:>22}" for c in columns) + f"{'TB/s (graph)':>14}{'error':>10}")
        for row in self.rows:
            same = [r for r in self.rows if (r["B"], r["T"]) == (row["B"], row["T"]) and print_decode.is_dense(r)]
            cells = [f"{row[c]:.1f} ({min(r[c] for r in same) / row[c]:.2f}x)" for c in columns]
            error = f"{row['error']:.1e}" if "error" in row else ""
            line = "".join(f"{c:>22}" for c in cells) + f"{row['graph_TBps']:>14.2f}{error:>10}"
            print(f"{row['B']:>5}, {row['T']:>5} {row['method']:24}" + line)


def measure_shape(results: Table, batch: int, tokens: int, count: int, names: Collection[str]) -> None:
    """SDPA and those configurations of ours."""
    case = Case(batch, tokens)
    for name in BASELINES:
        plain, appended = (dense_steps(case, count, append) for append in (False, True))
        with baseline(name):
            results.add(batch, tokens, name, case.dense_bytes, plain, appended)
        del plain, appended
        torch.cuda.empty_cache()
    for name, (key, value) in CONFIGURATIONS.items():
        if name not in names:
            continue
        layers = [make_layer(case, key, value, seed) for seed in range(count)]
        programs = programs_for(layers[0].host_table, multiprocessors())
        layers = [layer.planned() for layer in layers]
        size = case.read_bytes(key, value)
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


def measure_others(results: Table, batch: int, tokens: int, count: int, families: list[str]) -> None:
    """Dense baselines of other packages; those that do not run here are named."""
    case = Case(batch, tokens)
    for family, name in ((of, name) for of in families for name in FAMILIES[of]):
        reason = missing(family, case)
        try:
            if reason is None:
                plain, appended = (FAMILIES[family][name](case, count, append) for append in (False, True))
                error = step_error(plain[0], case)
                if not error < TIMED_LIMIT:
                    sys.exit(f"{name} at B {batch}, T {tokens}: error {error:.2e}, limit {TIMED_LIMIT}")
                results.add(batch, tokens, name, read_bytes(name, case), plain, appended, error=error)
                del plain, appended
        except Exception as error:  # a baseline that fails must not end a run of ours
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if reason is not None:
            print(f"  {name}: does not run here ({reason})", flush=True)
        if place() == "cuda":
            torch.cuda.empty_cache()


def sweep(output: Path | None, measured_on: dict[str, object]) -> None:
    """Graph times of tile sizes and numbers of programs; the eight best of each shape are printed, all are saved."""
    rows: list[dict[str, object]] = []
    names = [name for name, pair in CONFIGURATIONS.items() if RAW not in pair]
    for (batch, tokens), name in itertools.product(((32, 16384), (1, 32768)), names):
        key, value = CONFIGURATIONS[name]
        case = Case(batch, tokens)
        base = [make_layer(case, key, value, seed) for seed in range(SHAPES[batch, tokens])]
        size, first = case.read_bytes(key, value), len(rows)
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
                writer = csv.DictWriter(file, [*rows[0], *measured_on])
                writer.writeheader()
                writer.writerows(row | measured_on for row in rows)
        del base
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the CSV files")
    parser.add_argument("--sweep", action="store_true", help="also sweep tile sizes and numbers of programs")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument(
        "--baselines", nargs="*", choices=list(FAMILIES), default=list(FAMILIES), help="dense kernels to time beside SDPA.  [default: all]"
    )
    parser.add_argument("--only-baselines", action="store_true", help=f"of ours only {', '.join(BESIDE)}; to a file of its own")
    parser.add_argument("--gate-only", action="store_true", help="correctness only")
    parser.add_argument("--gate-shapes", type=int, default=6, help="random shapes in the gate; each compiles two kernels")
    parser.add_argument("--linear", action="store_true", help="instead of all this: cost from 16k to 128k tokens")
    parser.add_argument("--small", action="store_true", help="instead of all this: caches down to 2 MB, where dense is faster")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no point of --linear and --small after so long")
    parser.add_argument("--dry-run", action="store_true", help="the smallest shapes, also without a GPU; its times say nothing")
    args = parser.parse_args()
    if place() != "cuda" and not args.dry_run:
        parser.error("this needs a CUDA GPU; --dry-run tries it out without one")
    if args.sweep and args.dry_run:
        parser.error("--sweep has no smaller shapes to try out; leave --dry-run away")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    if args.linear or args.small:
        decode_curves.run(args.linear, args.small, args.output, args.seconds, args.dry_run)
        return
    if place() == "cuda" and not gate(args.gate_shapes):
        sys.exit(1)
    if args.gate_only:
        return
    measured_on = facts()
    print(measured_on)
    results = Table(measured_on)
    names = BESIDE if args.only_baselines else QUICK if args.quick else tuple(CONFIGURATIONS)
    for (batch, tokens), count in (DRY_SHAPES if args.dry_run else SHAPES).items():
        measure_shape(results, batch, tokens, count, names)
        measure_others(results, batch, tokens, count, args.baselines)
        if args.output:
            results.save(args.output / ("decode_baselines.csv" if args.only_baselines else "bench_decode.csv"))
    if args.sweep:
        results.show()  # now too, in case the sweep is cut short
        sweep(args.output, measured_on)
    results.show()


if __name__ == "__main__":
    main()
