"""Whole decoding steps at full size: random-weight models of two geometries, over dense and over compressed caches.

    python benchmarks/bench_steps.py --output benchmarks/results            # on a GPU of 80 GB; --seconds N begins nothing after that
    python benchmarks/bench_steps.py --points 32x4096 fullx16384 --caches dense ours --output benchmarks/results
    python benchmarks/bench_steps.py --small --output /tmp/small             # the same path with small models, on a CPU

A point is BATCHxTOKENS; `full` is the largest batch that fits in the GPU's memory, for each cache its own: computed from bytes, then tried.
Every cache is filled with random Keys and Values (nothing is prefilled; `step_caches.py`). Rows, by their name in --caches:

- *stock*: transformers' DynamicCache, step by step as `generate` runs it.
- *static*: transformers' StaticCache under its own `generate`, which compiles the decoding step (mode reduce-overhead). What the first
  steps take to compile is not counted; --compile-seconds ends it where it takes too long.
- *dense*: our own loop over a cache of fixed length in a CUDA graph, attended by the faster of SDPA's flash and cuDNN kernels. It writes
  the new token but never grows, which is less than a real loop has to do.
- *ours*: plain calls of the enabled model, captured in CUDA graphs; *eager*: the same without.

With --liger norms, RoPE and the MLP's product are kernels of liger-kernel (0.8.5 was measured), for every cache alike; such rows are a
model of their own.

Rows are saved as they come, so a run may be cut at any moment; rows of the same model, point and cache are replaced, others kept. Bytes
of a cache are those allocated at the end, room for further tokens included. Ratios are those of step_tables.py.
"""

from __future__ import annotations

import argparse
import csv
import gc
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_full_size import llava_next, qwen3_vl, random_model  # noqa: E402
from decode_timing import copy_rate  # noqa: E402
from print_decode import read  # noqa: E402
from step_caches import artifact_of, dense_token_bytes, fill_ours  # noqa: E402
from step_loops import CODED_ROWS, Bench  # noqa: E402
from step_tables import FULL, Row, steps_table  # noqa: E402

from rotatek_compile.geometry import geometry_of
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.runtime.accounting import cache_bytes
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.graphs import LEAST_STRETCH, STRETCH

GB = 1e9
POINTS = ("32x4096", "8x32768", "fullx16384", "8x8192", "1x8192")
PLANS = {"K 32x8, V 128x8": ((0, 32, 0), (0, 128, 0)), "K 32x4, V 128x4": ((0, 0, 32), (0, 0, 128))}
SMALL_PLANS = {"K 16x8, V 32x8": ((0, 16, 0), (0, 32, 0))}
CACHES = ("dense", "ours", "static", "stock", "eager")
STEPS = 40
TRIES = 8
SPARE = 2.0  # GB that the largest batch leaves for what a step computes with
COLUMNS = ("model", "point", "batch", "tokens", "cache", "ms", "tokens_per_second", "cache_gb", "weights_gb", "copy_TBps")
COLUMNS += ("device", "torch", "transformers")


def qwen3_vl_4b(small: bool) -> Any:
    """Qwen3-VL-4B: as the 8B, but narrower, with tied embeddings."""
    config = qwen3_vl(small)
    if not small:
        text = {"hidden_size": 2560, "intermediate_size": 9728}
        vision = {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "out_hidden_size": 2560,
            "deepstack_visual_indexes": [5, 11, 17],
        }
        for part, changes in ((config.text_config, text), (config.vision_config, vision)):
            for name, value in changes.items():
                setattr(part, name, value)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    return config


MODELS: dict[str, Callable[[bool], Any]] = {"llava-next-mistral-7b": llava_next, "qwen3-vl-4b": qwen3_vl_4b}
FUSED = {"llava-next-mistral-7b": ("mistral", "Mistral"), "qwen3-vl-4b": ("qwen3_vl", "Qwen3VLText")}  # modules, and how classes begin


def fused(title: str) -> str:
    """Every model of this kind that is made from now on in this process has liger-kernel's parts; returns what its rows are called."""
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb

    family, classes = FUSED[title]
    modeling = import_module(f"transformers.models.{family}.modeling_{family}")
    for name, part in {
        "apply_rotary_pos_emb": liger_rotary_pos_emb,
        f"{classes}RMSNorm": LigerRMSNorm,
        f"{classes}MLP": LigerSwiGLUMLP,
    }.items():
        getattr(modeling, name)  # where a version of transformers calls it otherwise, nothing would be replaced
        setattr(modeling, name, part)
    return f"{title}, liger-kernel"


def free_bytes(device: torch.device) -> int:
    """What a cache could take; on a CPU room for six dense rows of the small model."""
    if device.type != "cuda":
        return int(SPARE * GB) + 30_000_000
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def row_bytes(model: Any, tokens: int, plan: tuple[Any, Any] | None) -> int:
    """Bytes that a row of a cache takes: dense, or coded by a plan with the window and its room for a captured stretch."""
    geometry, like = geometry_of(model.config), next(model.parameters())
    if plan is None:
        return tokens * dense_token_bytes(geometry, like.element_size())
    with enable(model, artifact_of(geometry, Slabs(*plan[0]), Slabs(*plan[1])), graphs=False) as enabled:
        cache = enabled.new_cache()
        fill_ours(cache, geometry, 1, tokens, like)
        stretch = min(STRETCH, max(LEAST_STRETCH, tokens // 8))
        return int(cache_bytes(cache).stored) + stretch * dense_token_bytes(geometry, like.element_size())


def largest(model: Any, tokens: int, steps: int, plan: tuple[Any, Any] | None) -> Iterator[tuple[int, Callable[[], tuple[float, int]]]]:
    """Batches to try, the largest that bytes allow first and then smaller ones, and how to time each."""
    room = free_bytes(next(model.parameters()).device) - SPARE * GB
    unit = 1 if plan is None else CODED_ROWS
    batch = int(room / row_bytes(model, tokens, plan)) // unit * unit
    for _ in range(TRIES):
        if batch < unit:
            return
        bench = Bench(model, batch, tokens, steps)
        yield batch, bench.dense if plan is None else partial(bench.ours, plan, True, True)
        batch = min(batch - unit, int(batch * 0.96)) // unit * unit


def ways_at(model: Any, point: str, plans: dict[str, Any], args: argparse.Namespace) -> Iterator[tuple[str, list[Any]]]:
    """For each row of a point its name and the (batch, measurement) pairs of which the first that fits is taken."""
    batch, tokens = point.split("x")
    if batch == FULL:
        if "dense" in args.caches:
            yield "dense, captured", largest(model, int(tokens), args.steps, None)  # type: ignore[misc]
        for name, plan in plans.items():
            if "ours" in args.caches:
                yield f"ours {name}, captured", largest(model, int(tokens), args.steps, plan)  # type: ignore[misc]
        return
    bench = Bench(model, int(batch), int(tokens), args.steps)
    for kind in args.caches:
        if kind == "dense":
            yield "dense, captured", [(bench.batch, bench.dense)]
        elif kind == "static":
            yield "static, compiled", [(bench.batch, partial(bench.static, args.compile_seconds))]
        elif kind == "stock":
            yield "stock", [(bench.batch, bench.stock)]
        else:
            for name, plan in plans.items():
                captured = kind == "ours"
                yield f"ours {name}" + ", captured" * captured, [(bench.batch, partial(bench.ours, plan, captured))]


def row_of(point: str, name: str, tries: Any) -> Row | None:
    """The first of `tries` that fits, measured; None, and why, if none does."""
    tokens = int(point.split("x")[1])
    for batch, measure in tries:
        try:
            seconds, held = measure()
        except RuntimeError as error:
            full, tight = point.startswith(FULL), isinstance(error, torch.OutOfMemoryError)
            if not tight and not full and not name.startswith(("static", "stock")):
                raise
            # out of memory inside a capture ends in other errors
            why = "does not fit in memory" if tight else f"does not run here ({type(error).__name__}: {error})".splitlines()[0][:200]
            print(f"{point}, {name}, B {batch}: {why}", flush=True)
            continue
        except Exception as error:
            if not name.startswith(("static", "stock")):
                raise
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"{point}, {name}, B {batch}: does not run here ({why})", flush=True)
            return None
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        measured = {"ms": seconds * 1e3, "tokens_per_second": batch / seconds, "cache_gb": held / GB}
        return {"point": point, "batch": batch, "tokens": tokens, "cache": name} | measured
    print(f"{point}, {name}: no batch fits in memory", flush=True)
    return None


class Saved:
    """Rows of a CSV, rewritten whenever one comes. Rows without a model, of an older form of the file, are dropped."""

    def __init__(self, file: Path) -> None:
        self.file, self.rows = file, [row for row in read(file) if row.get("model")] if file.exists() else []
        file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        key = ("model", "point", "cache")
        self.rows = [old for old in self.rows if [old[name] for name in key] != [row[name] for name in key]] + [row]
        with self.file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in one.items()} for one in self.rows)


def measure_model(title: str, points: Any, plans: dict[str, Any], args: Any, saved: Saved, record: Row, began: float) -> None:
    """All rows of one model, which is gone from memory afterwards."""
    name_of_rows = fused(title) if args.liger else title
    model = random_model(MODELS[title](args.small), torch.device("cuda" if torch.cuda.is_available() and not args.small else "cpu"))
    record = record | {"model": name_of_rows, "weights_gb": sum(p.nbytes for p in model.model.language_model.parameters()) / GB}
    for point in points:
        for name, tries in ways_at(model, point, plans, args):
            spent = time.perf_counter() - began
            if spent > args.seconds:
                print(f"{name_of_rows}, {point}, {name}: no time left", flush=True)
                continue
            row = row_of(point, name, tries)
            if row is not None:
                saved.add(row | record)
                took = time.perf_counter() - began - spent
                print(f"{name_of_rows}, {point}, {name}: B {row['batch']}, {row['ms']:.2f} ms ({took:.0f} s)", flush=True)


def point_of(text: str) -> str:
    """A point as it was written, if it is one."""
    batch, _, tokens = text.partition("x")
    if not tokens.isdigit() or not (batch == FULL or batch.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no point; write BATCHxTOKENS, for instance 32x4096 or fullx16384")
    return f"{batch}x{tokens}"


@torch.no_grad()
def main() -> None:
    """Measure, save, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small models and short caches, to try the path")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--points", nargs="+", type=point_of, default=POINTS, help="batch x tokens; the batch may be full")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--liger", action="store_true", help="models whose norms, RoPE and MLP are those of liger-kernel")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so long")
    parser.add_argument("--compile-seconds", type=float, default=180, help="most for a row of --caches static")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if args.liger and find_spec("liger_kernel") is None:
        parser.error("--liger needs the package liger-kernel; install it, or leave --liger away")
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.small else "cpu")
    plans, points = (SMALL_PLANS, ("2x192", "fullx3072")) if args.small else (PLANS, args.points)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    record = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__, "copy_TBps": copy_rate()}
    saved = Saved(args.output / "steps.csv")
    for title in args.models:
        measure_model(title, points, plans, args, saved, record, began)
        free_bytes(device)
    print("\n".join(steps_table(saved.rows)))


if __name__ == "__main__":
    main()
