"""Find the settings of the decode kernels for this GPU: a row of kernels/decode_tuning.py.

    python benchmarks/tune_decode.py [--output benchmarks/results] [--seconds 240]
    python benchmarks/tune_decode.py --dry-run                                      # the smallest shapes, also without a GPU

One setting after the other is tried with the values below, the others as found so far; what is fastest over all shapes and plans stays
(geometric mean of the times in CUDA graphs, the append included), if it is faster by more than `GAIN`. Every setting's results are checked
against float64 before they are timed. Afterwards the row is printed as it belongs into the table, and every time is in decode_tuning.csv.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from decode_cases import CONFIGURATIONS, DIM, TIMED_LIMIT, WINDOW, Case, Layer, make_layer, our_steps, place, timed_shape_error
from decode_timing import facts, graph_us, multiprocessors

from rotatek_compile.kernels import decode
from rotatek_compile.kernels.decode_tuning import Tuning, tuning_of
from rotatek_compile.kernels.splits import plan_splits, programs_for

SHAPES = {(32, 16384): 2, (8, 8192): 8, (1, 32768): 16}  # (B, T): layers in the graph
DRY_SHAPES = {(1, 256): 2}
PLANS = ("r32", "K 32x8 V 128x8", "K 32x4 V 64x4", "mixed, mean K 32x4 V 64x4")
GAIN = 0.005
VALUES: dict[str, tuple[Any, ...]] = {
    "programs": (2, 3, 4),
    "coded_programs": (1, 2, 3),
    "filled_programs": (4, 6, 8, 12),
    "stages": (2, 3, 4),
    "large_tile": (0, 256, 1024),
    "few_registers": (128, None),
    "many_registers": (128, 168, None),
    "costs": (0.7, 1.0, 1.4),
}
"""What is tried; `costs` scales what instructions cost."""


def changed(tuning: Tuning, name: str, value: Any) -> Tuning:
    """A row with one setting of `VALUES`."""
    if name == "costs":
        return replace(tuning, **{cost: round(getattr(tuning, cost) * value, 3) for cost in ("softmax", "byte", "nibble")})
    return replace(tuning, **{name: value})


class Trial:
    """Layers of all shapes and plans, and what settings took on them."""

    def __init__(self, shapes: dict[tuple[int, int], int], began: float, seconds: float) -> None:
        self.layers = {
            (*shape, plan): [make_layer(Case(*shape), *CONFIGURATIONS[plan], seed) for seed in range(count)]
            for shape, count in shapes.items()
            for plan in PLANS
        }
        self.ends, self.rows = began + seconds, []
        self.known: dict[tuple[Any, Tuning], float] = {}

    def us(self, key: tuple[int, int, str], tuning: Tuning) -> float:
        """Microseconds of a call with these settings; infinite where they do not fit on the GPU.

        Raises:
            SystemExit: the result is wrong.
        """
        if (key, tuning) in self.known:
            return self.known[key, tuning]
        layers = planned(self.layers[key], tuning)
        plan = layers[0].view.splits
        assert plan is not None
        widths = decode.Widths.of(plan.key_widths, plan.value_widths, plan.pairs)
        options: dict[str, Any] = {"two_part_query": False, "tiles": decode.config(widths, DIM, 2, tuning=tuning)}
        try:
            error = timed_shape_error(layers[0], append=True, **options)
            if not error < TIMED_LIMIT:
                sys.exit(f"B {key[0]}, T {key[1]}, {key[2]}, {tuning}: error {error:.2e}, limit {TIMED_LIMIT}")
            found = graph_us(our_steps(layers, True, **options), ahead=place() == "cuda", enough_ms=40)
        except Exception as error:
            if type(error).__name__ != "OutOfResources":
                raise
            found = math.inf
        self.known[key, tuning] = found
        self.rows.append({"B": key[0], "T": key[1], "plan": key[2], **asdict(tuning), "us": round(found, 3)})
        return found

    def score(self, tuning: Tuning) -> float:
        """Mean of the logarithms of the times."""
        return sum(math.log(self.us(key, tuning)) for key in self.layers) / len(self.layers)

    def best(self, tuning: Tuning) -> Tuning:
        """One setting after the other, until time is up."""
        least = self.score(tuning)
        for name, values in VALUES.items():
            start = tuning
            for value in values:
                if time.perf_counter() > self.ends:
                    print(f"{name}: no time left", flush=True)
                    return tuning
                tried = changed(start, name, value)
                if tried == start:
                    continue
                score = self.score(tried)
                print(f"{name} {value}: {100 * (math.exp(score - least) - 1):+.1f} %", flush=True)
                if score < least + math.log(1 - GAIN):
                    tuning, least = tried, score
        return tuning


def planned(layers: list[Layer], tuning: Tuning) -> list[Layer]:
    """Layers with the splits of these settings."""
    programs = programs_for(layers[0].host_table, multiprocessors(), tuning)
    plan = plan_splits(layers[0].host_table, window_capacity=WINDOW, head_dim=DIM, num_programs=programs, tuning=tuning, device=place())
    return [replace(layer, view=replace(layer.view, splits=plan)) for layer in layers]


def row_text(name: str, tuning: Tuning) -> str:
    """A row of the table as it is written there: what differs from the defaults."""
    default = Tuning()
    settings = ", ".join(
        f"{field.name}={getattr(tuning, field.name)!r}"
        for field in fields(Tuning)
        if getattr(tuning, field.name) != getattr(default, field.name)
    )
    return f'"{name}": Tuning({settings}),'


def main() -> None:
    """Tune, save, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=240, help="try nothing more after so long")
    parser.add_argument("--dry-run", action="store_true", help="the smallest shapes, also without a GPU; its times say nothing")
    args = parser.parse_args()
    if place() != "cuda" and not args.dry_run:
        parser.error("this needs a CUDA GPU; --dry-run tries it out without one")
    measured_on = facts()
    print(measured_on, flush=True)
    start = tuning_of(torch.device(place(), 0) if place() == "cuda" else torch.device("cpu"))
    trial = Trial(DRY_SHAPES if args.dry_run else SHAPES, time.perf_counter(), args.seconds)
    try:
        found = trial.best(start)
    finally:
        args.output.mkdir(parents=True, exist_ok=True)
        if trial.rows:
            with (args.output / "decode_tuning.csv").open("w", newline="") as stream:
                writer = csv.DictWriter(stream, [*trial.rows[0], *measured_on], lineterminator="\n")
                writer.writeheader()
                writer.writerows(row | measured_on for row in trial.rows)
    print(row_text(str(measured_on["device"]), found))


if __name__ == "__main__":
    main()
