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
the logarithm of perplexity. Models with q/k-norm (tiny-qwen3-vl) are refused: dropping a pair changes the norm of all others.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import ended, read_csv, record_of, versions, write_csv
from torch import Tensor

from rotatek_compile.batches import Encoded, end_ids, rope_index
from rotatek_compile.calibration_data.registry import open_data
from rotatek_compile.compile_rap import pruned_copy
from rotatek_compile.documents import Documents, usable
from rotatek_compile.errors import RotateKError
from rotatek_compile.geometry import Geometry
from rotatek_compile.models import checked_geometry, choose_device, choose_dtype, load_config, load_model, load_processor, resolve
from rotatek_compile.rap_maps import REPAIRS, make_plan
from rotatek_compile.rap_measure import Measure
from rotatek_compile.rap_plan import RapPlan
from rotatek_compile.rap_reading import patched, read
from rotatek_compile.rap_recover import recover
from rotatek_compile.rap_statistics import RapStatistics, collect
from rotatek_compile.statistics import Bootstrap

SETTINGS = ("calib", "seed", "measured_on", "recover_batch")  # columns of older results do not have


@dataclass(frozen=True, slots=True)
class Way:
    """One row: how a plan is made, and whether it is trained afterwards."""

    score: str
    budget: str
    repairs: tuple[str, ...] = ()
    trained: bool = False

    @property
    def name(self) -> str:
        return f"{self.score} / {self.budget}"


PUBLISHED = Way("fisher", "published")
OURS = Way("logit", "sensitivity", REPAIRS)
TRAINED = {Way("fisher", "published", (), True): "published", Way("logit", "sensitivity", REPAIRS, True): "ours"}
WAYS = (
    PUBLISHED,
    Way("fisher-weight", "published"),
    Way("logit", "published"),
    *(Way("logit", "published", (repair,)) for repair in REPAIRS),
    Way("fisher", "published", REPAIRS),
    Way("logit", "published", REPAIRS),
    Way("fisher", "sensitivity"),
    Way("fisher", "sensitivity", REPAIRS),
    Way("logit", "sensitivity"),
    OURS,
    *TRAINED,
)


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


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One model's table as markdown, from rows as a CSV has them."""
    first = rows[0]
    trained = any(int(row["trained"]) for row in rows)
    steps = f", recovery of {first['recover']} steps at the best of {first['rates']}" if trained else ""
    head = f"{first['model']}, {first['documents']} documents of {first['data']}, {versions(dict(first))}{steps}"
    out = [
        head,
        "",
        "| keep ratio | score / budget | repair | trained | KL per token | perplexity | exact match | closed: KL, log perplexity |",
    ]
    out.append("|---|---|---|---|---|---|---|---|")
    for ratio, group in itertools.groupby(rows, key=lambda row: float(row["keep_ratio"])):
        own = list(group)
        published = [row for row in own if (row["way"], row["repairs"]) == (PUBLISHED.name, "")]
        ends = {int(row["trained"]): row for row in published}
        for row in own:
            repaired = "all" if row["repairs"] == "+".join(REPAIRS) else row["repairs"] or "-"
            kl = f"{float(row['kl']):.2g} [{float(row['kl_low']):.2g}, {float(row['kl_high']):.2g}]"
            cells = [f"{ratio:g}", row["way"], repaired, "yes" if int(row["trained"]) else "-", kl]
            cells += [f"{float(row['perplexity']):.4g}", f"{float(row['exact_match']):.3f}", closed(row, ends)]
            out.append(f"| {' | '.join(cells)} |")
    return out


def closed(row: Mapping[str, Any], ends: Mapping[int, Mapping[str, Any]]) -> str:
    """How far a row goes from the published method without training to that with training, in KL and in log perplexity."""
    if len(ends) < 2:
        return "-"
    found = []
    for name, scale in (("kl", float), ("perplexity", lambda x: math.log(float(x)))):
        begin, end, here = (scale(r[name]) for r in (ends[0], ends[1], row))
        found.append(f"{(begin - here) / (begin - end):.2f}" if begin > end else "-")
    return ", ".join(found)


def merged(files: Sequence[Path]) -> list[dict[str, str]]:
    """Rows of runs over different ratios, the largest first; the dense row is that of the first.

    Raises:
        RotateKError: runs of other documents, devices or settings, or a ratio that two of them have.
    """
    rows: list[dict[str, str]] = []
    ratios: set[str] = set()
    about = ("model", "data", "device", "dtype", "torch", "transformers", "num_samples", "recover", "rates", "documents", *SETTINGS)
    for file in files:
        own = read_csv(file)
        if rows and any(own[0].get(key) != rows[0].get(key) for key in (*about, "perplexity")):
            raise RotateKError(f"{file} is not of the same run as {files[0]}")
        pruned = [row for row in own if row["way"] != "dense"]
        if twice := ratios & {row["keep_ratio"] for row in pruned}:
            raise RotateKError(f"{file} has ratio {', '.join(sorted(twice))} again; merge every ratio once")
        ratios |= {row["keep_ratio"] for row in pruned}
        rows += pruned if rows else own
    return sorted(rows, key=lambda row: -float(row["keep_ratio"]))


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
            write_csv(args.output, rows)
        else:
            rows.extend(run(args))
        return 0

    if status := ended(measured_or_merged):
        sys.exit(status)
    print("\n".join(lines([{name: str(value) for name, value in row.items()} for row in rows])))


if __name__ == "__main__":
    main()
