"""The curves of bench_decode.py: cost from 16k to 128k tokens (`--linear`), and small caches, where dense is faster (`--small`).

Timed like its main table, append included: CUDA graphs of several layers, each with its own cache, together four times the L2. Here the
launch of a graph is hidden behind other work, because some replays are short. Every point is checked against the specification before it
is timed. What does not fit in memory is named and left out; the CSV is saved after every point. Tables and plot: print_decode.py.
"""

from __future__ import annotations

import csv
import gc
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import print_decode
import torch
from decode_cases import (
    BASELINES,
    CONFIGURATIONS,
    TIMED_LIMIT,
    Case,
    Layer,
    baseline,
    dense_steps,
    make_layer,
    our_steps,
    timed_shape_error,
)
from decode_timing import facts, graph_us, l2_bytes, multiprocessors

from rotatek_compile.kernels.splits import programs_for

LINEAR_PLANS = ("K 32x8 V 128x8", "K 32x4 V 64x4", "dense")
LINEAR_CASES = [Case(batch, tokens) for batch in (1, 8) for tokens in (16384, 32768, 65536, 131072)]
LINEAR_DRY = [Case(batch, tokens) for batch in (1, 2) for tokens in (256, 512, 1024)]
SMALL_PLANS = ("K 32x8 V 128x8",)
HEADS = ((32, 8), (28, 4), (32, 32))  # query and KV heads: LLaVA-NeXT and Qwen3-VL, InternVL3, no grouping
SMALL_CASES = [
    Case(batch, tokens, *heads) for heads, batch, tokens in itertools.product(HEADS, (1, 4, 16, 64), (1024, 2048, 4096, 8192, 16384, 32768))
]
SMALL_DRY = [Case(batch, tokens, *heads) for heads, batch, tokens in itertools.product(((8, 2), (7, 1)), (1, 2), (256, 384))]
LEAST_STEPS, MOST_LAYERS = 8, 320  # calls in a graph, and caches
LARGE = 1 << 28  # bytes of dense cache from which memory is given back after each method
Row = dict[str, Any]


def run(linear: bool, small: bool, output: Path | None, seconds: float, dry: bool) -> None:
    """Measure the parts that are wanted, save them to `output` and print their tables last."""
    began, measured_on, tables = time.perf_counter(), facts(), []
    print(measured_on, flush=True)
    in_time = partial(still, began + seconds)
    if linear:
        found = measured(LINEAR_DRY if dry else LINEAR_CASES, LINEAR_PLANS, in_time)
        rows = kept(found, measured_on, output and output / "decode_linear.csv", print_decode.with_slopes)
        tables.append(print_decode.linear_table(rows) if rows else ["--linear: nothing was measured"])
    if small:
        # Small ones first: that is where the question is, and they are quick.
        found = measured(sorted(SMALL_DRY if dry else SMALL_CASES, key=lambda case: case.dense_bytes), SMALL_PLANS, in_time)
        rows = kept(found, measured_on, output and output / "decode_small.csv")
        tables.append(print_decode.small_table(rows) if rows else ["--small: nothing was measured"])
    for lines in tables:
        print("\n" + "\n".join(lines))


def still(end: float) -> bool:
    return time.perf_counter() < end


def kept(found: Iterator[Row], measured_on: Row, file: Path | None, finished: Callable[[list[Row]], list[Row]] = list) -> list[Row]:
    """Rows with what they were measured on, as text, printed and saved as they come; `finished` adds columns to all rows so far."""
    rows: list[Row] = []
    whole: list[Row] = []
    for row in found:
        rows.append(row | measured_on)
        whole = [{name: f"{x:.5g}" if isinstance(x, float) else str(x) for name, x in row.items()} for row in finished(rows)]
        print("  " + "  ".join(f"{name} {whole[-1][name]}" for name in row), flush=True)
        if file:
            with file.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(whole[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(whole)
    return whole


def measured(cases: list[Case], plans: tuple[str, ...], in_time: Callable[[], bool]) -> Iterator[Row]:
    """A row for each case and method, dense baselines first; those that do not run here or do not fit are named."""
    for case in cases:
        if not in_time():
            print(f"  {shape(case)}: no time left", flush=True)
            continue
        methods = {name: partial(dense, case, name) for name in BASELINES} | {f"ours {name}": partial(ours, case, name) for name in plans}
        for name, measure in methods.items():
            row = None
            try:
                row = measure()
            except torch.cuda.OutOfMemoryError:
                print(f"  {shape(case)}, {name}: does not fit in memory", flush=True)
            except RuntimeError as error:
                if name not in BASELINES:
                    raise
                print(f"  {shape(case)}, {name}: does not run here ({str(error).splitlines()[0]})", flush=True)
            if row is None:
                gc.collect()
            if torch.cuda.is_available() and (row is None or case.dense_bytes > LARGE):
                torch.cuda.empty_cache()
            if row is not None:
                at = {"B": case.batch, "T": case.tokens, "query_heads": case.query_heads, "heads": case.heads}
                yield at | {"method": name, "dense_MB": case.dense_bytes / 1e6} | row


def dense(case: Case, name: str) -> Row:
    """Time of an SDPA backend with its append."""
    count = layers_for(case.dense_bytes)
    with baseline(name):
        us = graph_us(repeated(dense_steps(case, count, True)), ahead=True, enough_ms=60)
    return {"layers": count, "programs": "", "splits": "", "error": "", **rates(case, case.dense_bytes, us)}


def ours(case: Case, name: str) -> Row:
    """Time and error of our kernel under a plan, its append included."""
    key, value = CONFIGURATIONS[name]
    first = make_layer(case, key, value, seed=0)
    programs = programs_for(first.host_table, multiprocessors())
    first = first.planned()
    error = timed_shape_error(first, append=True, two_part_query=False)
    if not error < TIMED_LIMIT:
        sys.exit(f"ours {name} at {shape(case)}: error {error:.2e}, limit {TIMED_LIMIT}")
    size = case.read_bytes(key, value)
    layers: list[Layer] = [first, *(first.copy() for _ in range(layers_for(size) - 1))]
    us = graph_us(repeated(our_steps(layers, True, two_part_query=False)), ahead=True, enough_ms=60)
    splits = first.view.splits.num_splits
    return {"layers": len(layers), "programs": programs, "splits": splits, "error": error, **rates(case, size, us)}


def rates(case: Case, size: int, us: float) -> Row:
    return {"read_MB": size / 1e6, "ms": us / 1e3, "us_per_1k_tokens": us / case.tokens * 1e3, "TBps": size / us / 1e6}


def layers_for(size: int) -> int:
    """Layers of `size` bytes that take four times the L2 together, at most 320."""
    return min(max(1, math.ceil(4 * l2_bytes() / size)), MOST_LAYERS)


def repeated(steps: list[Any]) -> list[Any]:
    """At least 8 calls, in the order of the layers."""
    return steps * math.ceil(LEAST_STEPS / len(steps))


def shape(case: Case) -> str:
    return f"{case.query_heads}/{case.heads} heads, B {case.batch}, T {case.tokens}"
