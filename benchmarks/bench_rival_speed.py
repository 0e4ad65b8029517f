"""What decode attention costs for rivals with a structure to exploit, beside ours and SDPA, and at which accuracy.

    python benchmarks/bench_rival_speed.py --output benchmarks/results/rival_speed.csv      # one GPU, under three minutes
    python benchmarks/bench_rival_speed.py --print benchmarks/results/rival_speed.csv --results benchmarks/results/proof-tiny-llava-next.csv

bf16, 32 query and 8 KV heads, D 128; from post-RoPE queries to the attention output, in a CUDA graph over two layers. Rivals are attended
by the kernels of rival_kernels.py over what their own coders store; each has the best of a few tiles and splits. Ours has a raw window of
128 tokens, rotation of the query and un-rotation of the output in its time, and no choice of launch; rivals have no window, which helps
them. ThinK as it is published (and in kvpress) zeroes channels in a cache of full width: its time is that of SDPA. Every kernel is checked
against attention over the rebuilt Keys and Values before it is timed; one that is off is named and left out, the others go on, and the
exit status is 1. Without a GPU: TRITON_INTERPRET=1 and a small shape, no figures.

With --results the table has what each setting costs in answers too: KL per token at the nearest setting of that method in an evaluation of
`rotatek-eval --suite proof` or `rivals`, question asked after compression. So rows of about the same KL are to be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode_cases import BASELINES, CONFIGURATIONS, Case, baseline, dense_steps, make_layer, our_steps, place, timed_shape_error
from decode_timing import facts, graph_us, multiprocessors
from measuring import read_csv, write_csv
from torch import Tensor

from rotatek_compile.errors import RotateKError
from rotatek_compile.methods import KV
from rotatek_compile.names import OURS as OWN
from rotatek_compile.proof_suite import KEYS
from rotatek_compile.suite import ALL, read_results

SHAPES = ((1, 32768), (8, 8192), (32, 4096))
KEPT = {"think": (64, 32, 16), "spark-mean": (64, 32, 16), "spark-sign": (64, 32, 16), "kivi4": (0,), "kivi2": (0,)}
OURS = ("r64", "r32", "K 64x8 V 128x8", "K 32x4 V 128x4", "K 32x4 V 64x4")
LAUNCHES = ((64, 4), (128, 8))  # tokens of a tile, warps
LIMIT = 2e-2  # relative error of bf16 attention
HEADS, LAYERS = 8, 2
Rows = list[dict[str, Any]]


def rival_rows(batch: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Every rival at its settings, and the skeleton over a dense cache; one that is wrong or does not run has "wrong" instead of a time."""
    from rival_speed_cases import drawn

    numbers = drawn(batch * HEADS, tokens, place(), torch.bfloat16 if place() == "cuda" else torch.float32)
    for name, count in (("skeleton dense", 0), *((name, count) for name, counts in KEPT.items() for count in counts)):
        yield tried(f"{name} {count} at B {batch}, T {tokens}", partial(rival_row, name, count, *numbers))
        if place() == "cuda":
            torch.cuda.empty_cache()


def tried(what: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row that `run` gives, or one that says why there is none: the others are not lost."""
    try:
        return run()
    except Exception as error:  # also what a compiler or a driver raises
        return {"wrong": f"{what}: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"}


def rival_row(name: str, count: int, keys: Tensor, values: Tensor, query: Tensor) -> dict[str, Any]:
    """One of them, at the best of its launches.

    Raises:
        RotateKError: a launch gives something else than attention over what the coder rebuilds.
    """
    from rival_kernels import Launch, attention, splits_for
    from rival_speed_cases import coded, dense, expected

    heads, tokens = keys.shape[:2]
    if name == "skeleton dense":
        stored = dense(keys, values)
        wanted = expected(query[:2], lambda: (keys[:2], values[:2]))
    else:
        stored = coded(name, count, keys, values, query)[0]
        few = coded(name, count, keys[:2], values[:2], query[:2])[1]  # of two heads: all rebuilt would not fit beside the rest
        wanted = expected(query[:2], few.rebuild)
        del few
    copies = [stored]
    copies += [replace(stored, parts={k: v.clone() for k, v in stored.parts.items()}) for _ in range(LAYERS - 1)]
    best: dict[str, Any] = {}
    for tile, warps in LAUNCHES:
        launch = Launch(tile, splits_for(heads, tokens, multiprocessors(), tile), warps)
        got = attention(query, stored, launch)[:2].double()
        error = float((got - wanted).norm() / wanted.norm())
        if not error < LIMIT:
            raise RotateKError(f"{launch}: error {error:.2e}, limit {LIMIT}")
        us = graph_us([partial(attention, query, one, launch) for one in copies], enough_ms=60)
        if not best or us < best["graph_us"]:
            best = {"graph_us": us, "error": error, "launch": f"{launch.tile}x{launch.splits}x{launch.warps}"}
    return {"method": name, "kept": count or "", "read_MB": stored.bytes() / 1e6, **best}


def our_rows(batch: int, tokens: int) -> Iterator[dict[str, Any]]:
    """SDPA and ours, as bench_decode.py times them."""
    case = Case(batch, tokens)
    for name in BASELINES:
        with baseline(name):
            yield {
                "method": name,
                "kept": "",
                "read_MB": case.dense_bytes / 1e6,
                "graph_us": graph_us(dense_steps(case, LAYERS, False), enough_ms=60),
            }
    for name in OURS:
        yield tried(f"ours {name} at B {batch}, T {tokens}", partial(our_row, case, name))


def our_row(case: Case, name: str) -> dict[str, Any]:
    """Ours at one configuration.

    Raises:
        RotateKError: it gives something else than attention over what is rebuilt.
    """
    key, value = CONFIGURATIONS[name]
    layers = [make_layer(case, key, value, seed) for seed in range(LAYERS)]
    layers = [layer.planned() for layer in layers]
    error = timed_shape_error(layers[0])
    if not error < LIMIT:
        raise RotateKError(f"error {error:.2e}, limit {LIMIT}")
    us = graph_us(our_steps(layers, False), enough_ms=60)
    return {"method": f"ours {name}", "kept": "", "read_MB": case.read_bytes(key, value) / 1e6, "graph_us": us, "error": error}


def measure(args: argparse.Namespace) -> tuple[Rows, int]:
    """All shapes, and how many rows are missing, named on stderr; the file grows, so that a run that is cut off leaves what it has."""
    rows: Rows = []
    missing = 0
    seen = facts()
    names = ("B", "T", "method", "kept", "read_MB", "graph_us", "ratio", "error", "launch", *seen)
    for batch, tokens in args.shapes:
        own: Rows = []
        for row in (*our_rows(batch, tokens), *rival_rows(batch, tokens)):
            if "wrong" in row:
                missing += 1
                print(f"error: {row['wrong']}", file=sys.stderr, flush=True)
                continue
            own.append({"B": batch, "T": tokens, **row})
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in own[-1].items()), flush=True)
        dense = min(row["graph_us"] for row in own if row["method"] in BASELINES)
        rows += [row | {"ratio": dense / row["graph_us"]} | seen for row in own]
        if args.output:
            write_csv(args.output, [{k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows], names)
    return rows, missing


def losses(results: list[dict[str, str]]) -> dict[tuple[str, float], tuple[float, float]]:
    """KL per token by method and by share of the coded span that it stores, from an evaluation: {(method, share): (KL, exact match)}.

    Of a suite with several axes, those of what is timed: Keys and Values of ours, and rivals as they are, not beside other Values.
    """
    found = {}
    for row in results:
        axes = (KV,) if row["method"] == OWN else (KV, KEYS)
        if row["skill"] == ALL and row["ask"] == "after" and (row.get("axis") or KV) in axes and float(row["span_bytes_dense"] or 0):
            share = float(row["span_bytes"]) / float(row["span_bytes_dense"])
            found[row["method"], share] = float(row["kl"]), float(row["exact_match"])
    return found


def loss_of(row: dict[str, Any], known: dict[tuple[str, float], tuple[float, float]], dense: float) -> str:
    """KL of a timed row at the evaluated setting of the same method whose bytes come nearest, within a tenth; a dash for none.

    Args:
        dense: MB that the dense cache of the same shape takes.
    """
    name = OWN if row["method"].startswith("ours") else row["method"]
    share = float(row["read_MB"]) / dense
    near = min(((abs(at / share - 1), kl, exact, at) for (method, at), (kl, exact) in known.items() if method == name), default=None)
    return f"{near[1]:.1e}, {near[2]:.3f} (at {near[3]:.3f})" if near is not None and near[0] <= 0.1 else "-"


def markdown(rows: Rows, results: list[dict[str, str]]) -> str:
    """One table: methods by shapes."""
    shapes = list(dict.fromkeys((row["B"], row["T"]) for row in rows))
    known, first = losses(results), rows[0]
    what = "microseconds of a step, and times the speed of the faster SDPA"
    lines = [f"{first['device']}, torch {first['torch']}, Triton {first['triton']}; {what}"]
    if results:
        lines[0] += f"; answers: {results[0]['model']}, {results[0]['samples']} documents of {results[0]['data']}"
    columns = ["method", "kept of 128", *(f"B {b}, T {t}" for b, t in shapes), "bytes / dense"] + (["KL, exact match"] if known else [])
    lines += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name, kept in dict.fromkeys((row["method"], str(row["kept"])) for row in rows):
        own = {(row["B"], row["T"]): row for row in rows if (row["method"], str(row["kept"])) == (name, kept)}
        at = next(shape for shape in reversed(shapes) if shape in own)  # a row may be missing at the last
        last = own[at]
        dense = next(float(row["read_MB"]) for row in rows if row["method"] in BASELINES and (row["B"], row["T"]) == at)
        cells = [f"{float(own[s]['graph_us']):.0f} us, {float(own[s]['ratio']):.2f}x" if s in own else "-" for s in shapes]
        more = [f"{float(last['read_MB']) / dense:.3f}"] + ([loss_of(last, known, dense)] if known else [])
        lines.append(f"| {' | '.join([name, kept or '-', *cells, *more])} |")
    return "\n".join(lines)


def shape(text: str) -> tuple[int, int]:
    """BxT."""
    batch, _, tokens = text.partition("x")
    return int(batch), int(tokens)


def main() -> int:
    """Measure and save, or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="CSV to write")
    parser.add_argument("--print", type=Path, metavar="CSV", dest="table", help="only print the table of this CSV")
    parser.add_argument("--results", type=Path, help="an evaluation's results.csv, for what each setting loses")
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="BxT", help="tokens are a multiple of 32")
    args = parser.parse_args()
    try:
        results = read_results(args.results) if args.results else []
        rows, missing = (read_csv(args.table), 0) if args.table else measure(args)
        print(markdown(rows, results))
    except (RotateKError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
