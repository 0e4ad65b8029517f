"""Where the time of one decoding step goes: kernels by what they do, over the caches and captured steps of bench_steps.py.

    python benchmarks/step_parts.py --output benchmarks/results/step_parts.csv       # on a GPU of 80 GB, a minute or two
    python benchmarks/step_parts.py --print benchmarks/results/step_parts.csv
    python benchmarks/step_parts.py --small                                          # small models on a CPU, to try the path

A step is timed first, as bench_steps.py does, and then replayed under torch.profiler. A kernel that begins while another runs (the merge of
our splits does) counts from when that one ends, so that parts add up to the time in which anything runs; "no kernel" is the rest of the
timed step, which a profiler that slows kernels down makes too small. Parts go by the names of kernels, and the file holds the name of the
largest of each. On a CPU the outermost operators of torch stand for kernels, and attention of ours, which is many of them there, has no
part of its own.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_full_size import random_model  # noqa: E402
from bench_steps import MODELS, PLANS, SMALL_PLANS, free_bytes, fused, point_of  # noqa: E402
from measuring import Rows, add_table_options, ended, show_table  # noqa: E402
from step_loops import CODED_ROWS, WARM, Bench, now  # noqa: E402

from rotatek_compile.errors import UsageError

POINTS, SMALL_POINTS = ("32x4096", "8x32768"), ("2x192",)
PROFILED = 5  # steps
MANY = 32  # rows above which ours are copies, as at the largest batches of bench_steps.py
OTHER, IDLE = "other", "no kernel"
PARTS = {  # the first whose pattern is in the name of a kernel (GPU) or operator (CPU)
    "attention, merge": r"merge_kernel|splitkv_combine",
    "attention": r"split_kernel|sdpa|flash_fwd|fmha|cudnn|scaled_dot_product",
    "matrix products": r"gemm|gemv|nvjet|cutlass|xmma|splitkreduce|cublas|aten::(linear|matmul|mm|addmm|bmm|einsum)$",
    "copies by the driver": r"memcpy|memset",
    "RoPE, norms, elementwise": r"at::native|elementwise|reduce_kernel|rms_norm|rope|swiglu|aten::",
}
Event = tuple[str, float, float]  # name, start and end in microseconds


def part_of(name: str) -> str:
    """What a kernel does, by its name."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name.lower())), OTHER)


def parted(events: Iterable[Event], steps: int) -> dict[str, dict[str, Any]]:
    """For each part `part_ms` and `launches` of one step of `steps`, and `largest`, the kernel that took most of it. Time counts once."""
    spent: dict[str, dict[str, float]] = {part: {} for part in (*PARTS, OTHER)}
    launches = dict.fromkeys(spent, 0)
    covered = float("-inf")
    for name, start, end in sorted(events, key=lambda event: (event[1], -event[2])):
        if end > covered:
            part = part_of(name)
            spent[part][name] = spent[part].get(name, 0.0) + end - max(start, covered)
            launches[part] += 1
            covered = end
    return {
        part: {
            "part_ms": sum(names.values()) / steps / 1e3,
            "launches": launches[part] / steps,
            "largest": max(names, key=lambda name: names[name])[:120] if names else "",
        }
        for part, names in spent.items()
    }


class Profiled(Bench):
    """A bench that keeps, of every loop it times, the seconds of a step and its parts."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.found: list[tuple[float, dict[str, dict[str, Any]]]] = []

    def clock(self, step: Callable[[int], Any], steps: int, warm: int = WARM) -> float:
        seconds = super().clock(step, steps, warm)
        cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            for number in range(warm + steps, warm + steps + PROFILED):
                step(number)
            now(self.device)
        kind = DeviceType.CUDA if cuda else DeviceType.CPU
        taken = [event for event in profiler.events() or () if event.device_type == kind and not event.is_user_annotation]
        if not taken:
            raise UsageError("torch.profiler saw no kernel: it needs CUPTI, and no other profiler at work")
        self.found.append((seconds, parted([(x.name, x.time_range.start, x.time_range.end) for x in taken], PROFILED)))
        return seconds


def profiled(title: str, model: Any, point: str, plans: dict[str, Any], steps: int) -> Rows:
    """Rows of dense and of each plan at one point, a row per part."""
    batch, tokens = (int(x) for x in point.split("x"))
    copied = batch > MANY and batch % CODED_ROWS == 0
    ways: dict[str, Callable[[Profiled], Any]] = {"dense, captured": lambda bench: bench.dense()}
    for name, plan in plans.items():
        ways[f"ours {name}, captured"] = lambda bench, plan=plan: bench.ours(plan, True, copied)  # type: ignore[misc]
    rows = []
    for name, measure in ways.items():
        bench = Profiled(model, batch, tokens, steps)
        measure(bench)
        seconds, parts = min(bench.found, key=lambda one: one[0])  # dense has two kernels to choose from
        made = {"model": title, "point": point, "batch": batch, "tokens": tokens, "cache": name, "step_ms": seconds * 1e3}
        rows += [made | {"part": part} | found for part, found in parts.items()]
        print(f"{title}, {point}, {name}: {seconds * 1e3:.2f} ms", file=sys.stderr, flush=True)
        free_bytes(bench.device)
    return rows


@torch.no_grad()
def measured(options: argparse.Namespace) -> Rows:
    """All rows.

    Raises:
        UsageError: a point whose batch is `full`; a package that is missing.
    """
    if options.liger and find_spec("liger_kernel") is None:
        raise UsageError("--liger needs the package liger-kernel; install it, or leave --liger away")
    points = SMALL_POINTS if options.small else options.points
    if any(not point.split("x")[0].isdigit() for point in points):
        raise UsageError("a point needs a batch here; bench_steps.py prints the largest that fits")
    device = torch.device("cuda" if torch.cuda.is_available() and not options.small else "cpu")
    record = {"device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()}
    record |= {"torch": torch.__version__, "transformers": transformers.__version__}
    rows: Rows = []
    for title in options.models:
        name = fused(title) if options.liger else title
        model = random_model(MODELS[title](options.small), device)
        for point in points:
            rows += profiled(name, model, point, SMALL_PLANS if options.small else PLANS, options.steps)
        del model
        free_bytes(device)
    return [{name: f"{x:.5g}" if isinstance(x, float) else x for name, x in (row | record).items()} for row in rows]


def printed(rows: Rows) -> str:
    """Markdown, a table for each model and point: milliseconds of a step and, in brackets, launches."""
    lines = [f"{rows[0]['device']}, torch {rows[0]['torch']}, transformers {rows[0]['transformers']}; ms of one step (launches)"]
    for model, point in dict.fromkeys((row["model"], row["point"]) for row in rows):
        here = [row for row in rows if (row["model"], row["point"]) == (model, point)]
        caches = list(dict.fromkeys(row["cache"] for row in here))
        cells = {(row["part"], row["cache"]): f"{float(row['part_ms']):.2f} ({float(row['launches']):.0f})" for row in here}
        steps = {row["cache"]: float(row["step_ms"]) for row in here}
        lines += [
            "",
            f"{model}, B {here[0]['batch']}, T {here[0]['tokens']}",
            "",
            f"| | {' | '.join(caches)} |",
            "|---" * (1 + len(caches)) + "|",
        ]
        for part in dict.fromkeys(row["part"] for row in here):
            lines.append(f"| {part} | {' | '.join(cells[part, cache] for cache in caches)} |")
        idle = {cache: steps[cache] - sum(float(row["part_ms"]) for row in here if row["cache"] == cache) for cache in caches}
        lines.append(f"| {IDLE} | {' | '.join(f'{idle[cache]:.2f}' for cache in caches)} |")
        lines.append(f"| step | {' | '.join(f'{steps[cache]:.2f}' for cache in caches)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small models and short caches on a CPU, to try the path")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--points", nargs="+", type=point_of, default=POINTS, help="batch x tokens")
    parser.add_argument("--liger", action="store_true", help="as for bench_steps.py")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed before some are profiled")
    add_table_options(parser)
    show_table(parser.parse_args(arguments), measured, printed)
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
