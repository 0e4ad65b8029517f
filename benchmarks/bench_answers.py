"""Whole long answers at full size: what a step takes within a captured stretch, and what it takes over hundreds of tokens.

    python benchmarks/bench_answers.py --output benchmarks/results [--seconds 300]      # on a GPU of 80 GB
    python benchmarks/bench_answers.py --print benchmarks/results/answers.csv
    python benchmarks/bench_answers.py --small --output /tmp/small                      # the same path with small models, on a CPU

Models, caches and points are those of bench_steps.py, whose figures are of steps within one stretch. An answer has more in it: room in
the windows, ordinary steps between two stretches, captures, and text that leaves. Rows, all over the same pages:

- *dense*: a step over a cache of fixed length in a CUDA graph; it has nothing else in it.
- *text stays*: raw text of an answer stays in the windows, as it does.
- *text leaves*: the same, but it is moved out of them between stretches, as it was before 2026-11-22.
- *text coded*: an artifact for `--span all`, where it has to leave.

step_ms is the mean of the first steps of the first stretch, answer_ms that of all of the answer's from there on; both by the wall clock.
captures: how many stretches begin within the answer. What is between two of them is the difference of the two, over all of the answer's
steps, divided by that.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_full_size import random_model  # noqa: E402
from bench_steps import MODELS, PLANS, SMALL_PLANS, point_of  # noqa: E402
from decode_timing import clock as sm_clock  # noqa: E402
from measuring import read_csv, write_csv  # noqa: E402
from step_loops import WARM, Bench, now  # noqa: E402

from rotatek_compile.runtime.cache_layer import RotateKLayer
from rotatek_compile.runtime.graphs import DecodeGraphs

POINTS = ("32x4096", "8x32768")
STEPS, TOKENS = 40, 520  # TOKENS has two captures in it where a stretch is of 256
KINDS = {"text stays": "visual", "text leaves": "visual", "text coded": "all"}  # and the artifact's span
COLUMNS = ("model", "point", "cache", "text", "tokens", "captures", "step_ms", "answer_ms", "cache_gb")
COLUMNS += ("device", "sm_MHz", "torch", "transformers")
Row = dict[str, Any]


class Answer(Bench):
    """A bench whose clock goes on to the end of an answer of `tokens`.

    step_s: the mean of the first `steps`. captures: of the answer.
    """

    def __init__(self, model: Any, batch: int, context: int, steps: int, tokens: int) -> None:
        super().__init__(model, batch, context, steps)
        self.answer, self.step_s, self.captures = tokens, 0.0, 0

    def clock(self, step: Callable[[int], Any], steps: int, warm: int = WARM) -> float:
        """Seconds of a step, mean over the answer."""
        self.step_s = super().clock(step, steps, warm)
        with mock.patch.object(DecodeGraphs, "_captured", self._counted(DecodeGraphs._captured)):
            start = now(self.device)
            for number in range(warm + steps, warm + self.answer):
                step(number)
            return (now(self.device) - start + steps * self.step_s) / self.answer

    def _counted(self, capture: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.captures += 1
            return capture(*args)

        return counted


def measured(model: Any, point: str, plan: tuple[Any, Any] | None, text: str, args: argparse.Namespace) -> Row:
    """A row's figures; without a plan those of the dense cache."""
    batch, context = map(int, point.split("x"))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if plan is None:
        seconds, held = Bench(model, batch, context, args.steps).dense()
        return {"tokens": args.steps, "captures": 0, "step_ms": seconds * 1e3, "answer_ms": seconds * 1e3, "cache_gb": held / 1e9}
    bench = Answer(model, batch, context, args.steps, args.tokens)
    stays = RotateKLayer.text_stays if text == "text stays" else lambda layer: False
    with mock.patch.object(RotateKLayer, "text_stays", stays):
        seconds, held = bench.ours(plan, graphs=True, span=KINDS[text])
    figures = {"tokens": args.tokens, "captures": bench.captures, "step_ms": bench.step_s * 1e3, "answer_ms": seconds * 1e3}
    return figures | {"cache_gb": held / 1e9}


def table(rows: list[Row]) -> list[str]:
    """Answers as markdown: over the step within a stretch, and over the dense step of the same point."""
    first = rows[0]
    lines = [f"{first['device']}, torch {first['torch']}, transformers {first['transformers']}; answers of {tokens_of(rows)} tokens", ""]
    head = "model | B x T | cache | text | step, ms | answer, ms a step | stretches begun | between two, ms | dense step over the answer's"
    lines += [f"| {head} |", "|" + "---|" * 9]
    for row in rows:
        step, answer = float(row["step_ms"]), float(row["answer_ms"])
        dense = [float(r["step_ms"]) for r in rows if not r["text"] and all(r[name] == row[name] for name in ("model", "point"))]
        cells = [str(row[name]) for name in ("model", "point", "cache", "text")] + [f"{step:.2f}"]
        begun = int(row["captures"])
        between = f"{(answer - step) * int(row['tokens']) / begun:.0f}" if begun else ""
        cells += [f"{answer:.2f}", str(begun), between, f"{dense[0] / answer:.2f}" if dense else ""] if row["text"] else [""] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def tokens_of(rows: list[Row]) -> str:
    return ", ".join(dict.fromkeys(str(row["tokens"]) for row in rows if row["text"]))


@torch.no_grad()
def main() -> None:
    """Measure, save, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small models and short caches, to try the path")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--points", nargs="+", type=point_of, default=POINTS, help="batch x tokens")
    parser.add_argument("--steps", type=int, default=STEPS, help="of step_ms")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of an answer")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so long")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--print", type=Path, dest="table", metavar="FILE", help="only print the table of this CSV")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(read_csv(args.table))))
        return
    if args.tokens <= args.steps:
        parser.error(f"an answer of {args.tokens} tokens has no more than the {args.steps} steps of --steps; pass more --tokens")
    began, on_gpu = time.perf_counter(), torch.cuda.is_available() and not args.small
    device = torch.device("cuda" if on_gpu else "cpu")
    record = {"device": torch.cuda.get_device_name() if on_gpu else platform.machine(), "sm_MHz": sm_clock() if on_gpu else 0}
    record |= {"torch": torch.__version__, "transformers": transformers.__version__}
    plans, points = (SMALL_PLANS, ("2x192",)) if args.small else (PLANS, args.points)
    first = next(iter(plans))
    rows: list[Row] = []
    for title in args.models:
        model = random_model(MODELS[title](args.small), device)
        for point in points:
            wanted = [("dense", ""), *((name, text) for name in plans for text in KINDS if name == first or text == "text stays")]
            for name, text in wanted:
                if time.perf_counter() - began > args.seconds:
                    print(f"{title}, {point}, {name} {text}: no time left", flush=True)
                    continue
                figures = measured(model, point, plans.get(name), text, args)
                row = {"model": title, "point": point, "cache": name, "text": text} | figures | record
                rows.append({name: f"{x:.5g}" if isinstance(x, float) else x for name, x in row.items()})
                write_csv(args.output / "answers.csv", rows, COLUMNS)
                print(f"{title}, {point}, {name} {text}: {figures['step_ms']:.2f}, {figures['answer_ms']:.2f} ms", flush=True)
        del model
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
