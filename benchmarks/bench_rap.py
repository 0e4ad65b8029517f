"""What pruning RoPE pairs and Values costs: the published method with and without training beside ours, and each part on its own.

    python benchmarks/bench_rap.py --output benchmarks/results/rap-tiny-llava-next.csv                # mixed; minutes on a GPU
    python tools/train_tiny_text.py --seconds 200 --output TEXT --work WORK
    python benchmarks/bench_rap.py --model TEXT --calib TEXT/calibration.jsonl --data TEXT/evaluation.jsonl --output ...
    python benchmarks/bench_rap.py --ratios 0.7 --trained published --output ...                      # a ratio by itself, and then
    python benchmarks/bench_rap.py --merge A.csv B.csv --output benchmarks/results/rap-text.csv
    python benchmarks/bench_rap.py --print benchmarks/results/rap-*.csv

Rows: `score / budget`, what is repaired, and steps of recovery (LoRA distillation, needs peft). Figures on documents of the evaluation
split: KL to the dense model per scored token with its bootstrap interval over documents, perplexity (of answers, or of all text for a
model that reads text alone), and exact match: every token of the answer is the most likely one given those before, which is what greedy
decoding checks. `closed` is how much of the way from the published method without training to that with training a row goes, in KL and in
the logarithm of perplexity; "-" where that way is less than a hundredth of what pruning costs. Models with q/k-norm (tiny-qwen3-vl) are
refused: dropping a pair changes the norm of all others. `--merge` puts ratios together, and adds rows to ratios of another run if a file
repeats a row of each figure for figure.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import ended, read_csv, record_of, write_csv
from rap_tables import OURS, PUBLISHED, SETTINGS, TRAINED, WAYS, Way, columns, lines, merged
from torch import Tensor

from rotatek_compile.batches import Encoded, end_ids, rope_index
from rotatek_compile.calibration_data.registry import open_data
from rotatek_compile.compile_rap import pruned_copy
from rotatek_compile.documents import Documents, usable
from rotatek_compile.geometry import Geometry
from rotatek_compile.models import checked_geometry, choose_device, choose_dtype, load_config, load_model, load_processor, resolve
from rotatek_compile.rap_maps import make_plan
from rotatek_compile.rap_measure import Measure
from rotatek_compile.rap_plan import RapPlan
from rotatek_compile.rap_reading import patched, read
from rotatek_compile.rap_recover import recover
from rotatek_compile.rap_statistics import RapStatistics, collect
from rotatek_compile.statistics import Bootstrap


@dataclass(frozen=True, slots=True)
class Found:
    """Sums by document."""

    kl: list[float]
    loss: list[float]
    tokens: list[int]
    exact: list[float]


class Judge:
    """Reads evaluation documents with the dense model once, then with any other."""

    def __init__(self, model: Any, items: Sequence[Encoded], geometry: Geometry, pad_id: int) -> None:
        self.geometry, self.pad_id, self.items = geometry, pad_id, list(items)
        self.reference = [self._logprobs(model, item)[0].cpu() for item in self.items]

    @torch.inference_mode()
    def _logprobs(self, model: Any, item: Encoded) -> tuple[Tensor, Tensor]:
        batch = read(model, [item], self.geometry, self.pad_id, None)
        logits = model(**batch.inputs, logits_to_keep=batch.last).logits
        scored = batch.scored[:, -batch.last :]
        return logits[scored.to(logits.device)].float().log_softmax(-1), batch.targets[:, -batch.last :][scored].to(logits.device)

    def __call__(self, model: Any) -> Found:
        found = Found([], [], [], [])
        for item, reference in zip(self.items, self.reference, strict=True):
            got, targets = self._logprobs(model, item)
            dense = reference.to(got.device)
            found.kl.append(float((dense.exp() * (dense - got)).sum().clamp_min(0)))
            found.loss.append(-float(got.gather(-1, targets[:, None]).sum()))
            found.tokens.append(len(targets))
            found.exact.append(float((got.argmax(-1) == targets).all()))
        return found


def row_of(found: Found, way: Way | None, keep_ratio: float, plan: RapPlan | None, seconds: float) -> dict[str, Any]:
    """Columns of one row; `way` None is the dense model."""
    tokens, resampled = sum(found.tokens), Bootstrap(len(found.tokens))
    low, high = resampled.interval(found.kl, found.tokens)
    layers = list(plan.layers.values()) if plan is not None else []
    return {
        "keep_ratio": keep_ratio,
        "way": way.name if way else "dense",
        "repairs": "+".join(way.repairs) if way else "",
        "trained": int(way.trained) if way else 0,
        "pairs": " ".join(str(layer.kept_pairs) for layer in layers),
        "values": " ".join(str(layer.value_width) for layer in layers),
        "documents": len(found.tokens),
        "kl": sum(found.kl) / tokens,
        "kl_low": low,
        "kl_high": high,
        "perplexity": math.exp(sum(found.loss) / tokens),
        "exact_match": sum(found.exact) / len(found.exact),
        "seconds": round(seconds, 1),
    }


def measured(
    model: Any, statistics: RapStatistics, measure: Measure, judge: Judge, geometry: Geometry, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """All rows of one model, as they are found."""
    yield row_of(judge(model), None, 1.0, None, 0.0)
    for ratio in args.ratios:
        plans: dict[Way, RapPlan] = {}
        for way in (PUBLISHED, OURS, *TRAINED) if args.brief else WAYS:
            start = time.perf_counter()
            if way.trained and (not args.recover or TRAINED[way] not in args.trained):
                continue
            plain = Way(way.score, way.budget, way.repairs)
            if plain not in plans:
                plans[plain] = make_plan(
                    model,
                    statistics,
                    geometry,
                    keep_ratio=ratio,
                    score=way.score,
                    budget=way.budget,
                    repair=way.repairs,
                    measure=measure,
                )
            plan = plans[plain]
            if way.trained:
                found = judge(trained(model, plan, statistics, geometry, args))
            else:
                with patched(model, plan.layers, geometry):
                    found = judge(model)
            yield row_of(found, way, ratio, plan, time.perf_counter() - start)


def trained(model: Any, plan: RapPlan, statistics: RapStatistics, geometry: Geometry, args: argparse.Namespace) -> Any:
    """The pruned model after `--recover` steps, at the rate of `--rates` that brings it nearest to the dense one on held-out documents."""
    found = []
    for rate in args.rates:
        pruned = pruned_copy(model, plan, geometry)
        sizes = {"batch_size": args.recover_batch, "pad_id": statistics.pad_id}
        _, left = recover(pruned, model, statistics.documents, args.recover, geometry=geometry, quiet=args.quiet, rate=rate, **sizes)
        found.append((left, pruned))
    return min(found, key=lambda one: one[0])[1].eval()


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Load, read the calibration documents, measure, and write what is found."""
    source = resolve(args.model)
    config = load_config(source)
    geometry, device = checked_geometry(config), choose_device(args.device)
    dtype = choose_dtype(args.dtype, config, device)
    model, processor = load_model(source, dtype, device), load_processor(source)
    eos, rope, pad_id = end_ids(model)[0], rope_index(model), processor.tokenizer.pad_token_id or 0

    def documents(name: str, split: str, count: int) -> list[Encoded]:
        data = open_data(name, split, args.seed, images=not geometry.text_only)
        return list(Documents(data, usable(data, count, geometry.text_only), processor, geometry, eos, rope))

    seen = documents(args.calib, "calibration", args.num_samples)
    statistics = collect(model, seen, geometry, batch_size=args.batch_size, pad_id=pad_id, quiet=args.quiet, gradients=True)
    measure = Measure(model, seen[: args.measured_on], geometry, args.batch_size, pad_id)
    judge = Judge(model, documents(args.data, "evaluation", args.documents), geometry, pad_id)
    facts = record_of(source, Path(args.data).name, device, dtype) | {
        "num_samples": len(seen),
        "recover": args.recover,
        "rates": " ".join(map(str, args.rates)),
        **{name: Path(value).name if name == "calib" else value for name, value in vars(args).items() if name in SETTINGS},
    }
    rows = []
    for row in measured(model, statistics, measure, judge, geometry, args):
        rows.append(facts | row)
        if args.output:  # after every row: a run that is cut short leaves what it has
            write_csv(args.output, rows)
        if not args.quiet:
            print(f"{row['keep_ratio']:g} {row['way']} {row['repairs']}: {row['kl']:.2g}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Measure and save, or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", type=Path, nargs="+", metavar="CSV", dest="files", help="only print these results")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="CSV", help="only put these results together, into --output")
    parser.add_argument("--model", default="tiny-llava-next")
    parser.add_argument("--calib", default="mixed")
    parser.add_argument("--data", default="mixed")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.7, 0.6])
    parser.add_argument("--num-samples", type=int, default=72, help="calibration documents")
    parser.add_argument("--measured-on", type=int, default=24, help="of them, those that budgets by sensitivity are measured on")
    parser.add_argument("--documents", type=int, default=120, help="evaluation documents")
    parser.add_argument("--recover", type=int, default=300, metavar="STEPS", help="0: no row with training")
    parser.add_argument("--trained", nargs="+", choices=("published", "ours"), default=["published", "ours"], help="rows with training")
    parser.add_argument("--brief", action="store_true", help="only the published row, ours, and those with training")
    parser.add_argument("--recover-batch", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-4, 1e-4], help="peak learning rates that recovery tries")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.files:
        for file in args.files:
            print("\n".join([*lines(read_csv(file)), ""]))
        return
    if args.merge and not args.output:
        parser.error("pass --output, the CSV to write")
    rows: list[dict[str, Any]] = []

    def measured_or_merged() -> int:
        if args.merge:
            rows.extend(merged(args.merge))
            write_csv(args.output, rows, columns(rows))
        else:
            rows.extend(run(args))
        return 0

    if status := ended(measured_or_merged):
        sys.exit(status)
    print("\n".join(lines([{name: str(value) for name, value in row.items()} for row in rows])))


if __name__ == "__main__":
    main()
