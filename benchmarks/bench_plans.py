"""Whether plans cost what they are predicted to cost: random plans of equal bytes, and the chosen one, on documents no plan has seen.

    python benchmarks/bench_plans.py --output benchmarks/results                                       # both bundled models, on a GPU
    python benchmarks/bench_plans.py --models tiny-llava-next --budgets 0.0625 --plans 8 --documents 9 --num-samples 16   # on a CPU
    python benchmarks/bench_plans.py --artifact ARTIFACT --budgets 0.125 --documents 504 --skip 504        # an hour on a core
    python benchmarks/bench_plans.py --merge A/plans.json B/plans.json --output ALL       # budgets that were measured one by one

For each model it measures what a compile measures, or takes it from an artifact of so many calibration documents, and for each budget it
plans as a compile plans (cuts, then a check of the whole plan and swaps). Random plans spend the same budget on KLs that are wrong by
random factors per head (`allocate.random_plan`), from nearly right to blind. KL per answer token of all of them is measured on documents
of the evaluation split. The rank correlation of predicted and measured KL is Spearman's, over the random plans alone; its interval
resamples documents and plans.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from measuring import ended

from rotatek_compile.allocate import random_plan
from rotatek_compile.api import base_source
from rotatek_compile.artifact import Artifact, read_artifact
from rotatek_compile.batches import Encoded, end_ids, rope_index
from rotatek_compile.calibrate import MomentStore, calibrate
from rotatek_compile.calibration_data.registry import open_data
from rotatek_compile.compile_options import CompileOptions
from rotatek_compile.compiler import bases_of, prefilled, shared_out
from rotatek_compile.cost_curves import dense_bytes, plan_bytes, predicted_kl
from rotatek_compile.cutter import Cutter
from rotatek_compile.deciding import plan_from
from rotatek_compile.documents import Documents, usable
from rotatek_compile.errors import RotateKError
from rotatek_compile.geometry import Geometry
from rotatek_compile.models import checked_geometry, choose_device, choose_dtype, load_config, load_model, load_processor, resolve
from rotatek_compile.plan import SIDES, Plan
from rotatek_compile.planning import Costs, searches_of_bytes
from rotatek_compile.replan import costs_of
from rotatek_compile.sensitivity import JointCheck, levels_for, measure
from rotatek_compile.statistics import Bootstrap
from rotatek_compile.whole_plans import kl_of_plans

BEST_SHARE = 0.05  # the chosen plan is to be among the best of so many
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Drawn:
    """A plan of one budget: `random`, `uniform`, `chosen` as compiled, or `unrepaired`, which cuts of single heads suggest."""

    budget: float
    kind: str
    number: int
    plan: Plan
    predicted: float
    share: float  # of the dense bytes


def plans_of(geometry: Geometry, costs: Costs, check: JointCheck, budget: float, count: int, seed: int) -> list[Drawn]:
    """The chosen plan of a budget, what it started from, the uniform one, and so many random ones."""
    options = CompileOptions(model="-", calib="-", output=Path("-"), kv_budget=budget)
    method = options.own_method()
    search = searches_of_bytes(geometry, costs, method, budget)[0]
    generator = np.random.default_rng(seed)
    some: list[tuple[str, Plan]] = [
        ("chosen", plan_from(geometry, costs, check, method)[0]),
        ("unrepaired", search.plan(search.best())),
        ("uniform", search.uniform),
        *(("random", random_plan(search.menus, search.budget, generator)) for _ in range(count)),
    ]
    dense = dense_bytes(geometry)
    return [
        Drawn(budget, kind, max(n - 2, 0), plan, predicted_kl(plan, costs.expected), plan_bytes(geometry, plan) / dense)
        for n, (kind, plan) in enumerate(some)
    ]


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks [..., N] along the last axis, equal values at the mean of theirs."""
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    return np.asarray(below + (equal - 1) / 2)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's correlation along the last axis [..., N]; not a number where one side has all values alike."""
    a, b = (r - r.mean(-1, keepdims=True) for r in (ranks(first), ranks(second)))
    with np.errstate(invalid="ignore"):
        return np.asarray((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1)))


def correlation_interval(predicted: np.ndarray, measured: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the rank correlation, documents and plans resampled together.

    Args:
        predicted: [N].
        measured: KL of plans on documents [N, documents], sums over answer tokens.
    """
    generator = np.random.default_rng(seed)
    count, documents = measured.shape
    found = []
    for _ in range(RESAMPLES):
        plans, read = generator.integers(count, size=count), generator.integers(documents, size=documents)
        found.append(float(rank_correlation(predicted[plans], measured[plans][:, read].sum(1))))
    said = np.array(found)[~np.isnan(found)]
    low, high = np.quantile(said, [0.025, 0.975]) if len(said) else (float("nan"), float("nan"))
    return float(low), float(high)


def figures(drawn: Sequence[Drawn], measured: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """What is said of one budget.

    Args:
        measured: KL of each plan on each document, summed over its answer tokens, fp64 [plans, documents].
        tokens: answer tokens of each document [documents].
    """
    kl = measured.sum(1) / tokens.sum()
    random = np.array([n for n, one in enumerate(drawn) if one.kind == "random"])
    at = {one.kind: n for n, one in enumerate(drawn) if one.kind != "random"}
    predicted = np.array([one.predicted for one in drawn])
    resampled = Bootstrap(len(tokens))
    best = int(random[kl[random].argmin()])
    rank = 1 + int((kl[random] < kl[at["chosen"]]).sum())
    return {
        "plans": len(random),
        "documents": len(tokens),
        "rank_correlation": float(rank_correlation(predicted[random], kl[random])),
        "rank_correlation_interval": correlation_interval(predicted[random], measured[random]),
        "chosen_rank": rank,  # among the random plans and itself
        "among_best": rank <= max(1, int(BEST_SHARE * (len(random) + 1))),
        "kl": {kind: float(kl[n]) for kind, n in at.items()},
        "kl_interval": {kind: resampled.interval(measured[n], tokens) for kind, n in at.items()},
        "predicted_kl": {kind: float(predicted[n]) for kind, n in at.items()},
        "random_kl": {name: float(np.quantile(kl[random], q)) for name, q in (("least", 0.0), ("median", 0.5), ("largest", 1.0))},
        "chosen_over_best_random": resampled.ratio(measured[at["chosen"]], measured[best]),
    }


@dataclass(frozen=True, slots=True)
class Known:
    """What plans of one model are made from."""

    cutter: Cutter
    costs: Costs
    check: JointCheck


def known_of(model: Any, geometry: Geometry, seen: Documents, pad_id: int, artifact: Artifact | None, args: argparse.Namespace) -> Known:
    """Measured on calibration documents as a compile does it, or what a compile wrote down; whole plans are checked on the same ones."""
    used, read, checked = shared_out(seen, args.sensitivity_samples)
    rows = geometry.rows_at_once(args.batch_size)
    if artifact is not None:
        bases = {side: {i: artifact.basis(i, artifact.method.kinds[0], side) for i in geometry.compressible} for side in SIDES}
    else:
        with tempfile.TemporaryDirectory() as scratch:
            moments = calibrate(model, used, geometry, MomentStore({}, Path(scratch)), args.batch_size, False, pad_id, quiet=True)
        bases = bases_of(moments, geometry, "two-sided", "text" if geometry.text_only else "visual")
    cutter = Cutter(model, geometry, bases["key"], geometry.text_only, bases["value"])
    if artifact is not None:
        costs = costs_of(artifact)
    else:
        levels = levels_for(max(geometry.layers[i].head_dim for i in geometry.compressible))
        measured = measure(cutter, read, levels, True, rows)
        spectra = {side: {i: basis.spectrum for i, basis in bases[side].items()} for side in SIDES}
        costs = Costs.of(geometry, levels, {"key": measured.key, "value": measured.value}, spectra)
    return Known(cutter, costs, JointCheck(cutter, prefilled(cutter, checked or read, rows)))


def run_model(name: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows for the table and figures by budget of one model."""
    clock = {"start": time.perf_counter()}

    def lap(what: str) -> None:
        now = time.perf_counter()
        clock[what], clock["start"] = now - clock["start"], now

    artifact = read_artifact(args.artifact) if args.artifact else None
    source = base_source(artifact, None) if artifact else resolve(name)
    config = load_config(source)
    geometry, device = checked_geometry(config), choose_device(args.device)
    model, processor = load_model(source, choose_dtype(args.dtype, config, device), device), load_processor(source)
    eos, rope = end_ids(model)[0], rope_index(model)

    def documents(split: str, count: int) -> Documents:
        data = open_data(args.data, split, args.seed, images=not geometry.text_only)
        return Documents(data, usable(data, count, geometry.text_only), processor, geometry, eos, rope)

    known = known_of(model, geometry, documents("calibration", args.num_samples), processor.tokenizer.pad_token_id or 0, artifact, args)
    lap("measuring")
    cutter, rows = known.cutter, geometry.rows_at_once(args.batch_size)
    drawn = [one for budget in args.budgets for one in plans_of(geometry, known.costs, known.check, budget, args.plans, args.seed)]
    del known  # the prefilled documents of the check
    lap("planning")
    unseen = documents("evaluation", args.skip + args.documents)[args.skip :]
    kl, tokens = measured_on(cutter, unseen, [one.plan for one in drawn], rows)
    lap("random plans")
    summary: dict[str, Any] = {"seconds": {what: round(value, 1) for what, value in clock.items() if what != "start"}}
    for budget in args.budgets:
        some = [n for n, one in enumerate(drawn) if one.budget == budget]
        summary[f"{budget:g}"] = figures([drawn[n] for n in some], kl[some], tokens)
    table = [
        {
            "model": name,
            "budget": one.budget,
            "plan": one.kind,
            "number": one.number,
            "share": one.share,
            "predicted_kl": one.predicted,
            "measured_kl": row.sum() / tokens.sum(),
        }
        for one, row in zip(drawn, kl, strict=True)
    ]
    return table, summary


def measured_on(cutter: Cutter, items: Sequence[Encoded], plans: Sequence[Plan], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """KL of plans on documents, summed over answer tokens, fp64 [plans, documents], and the numbers of these tokens [documents]."""
    kl, tokens = [], []
    for start in range(0, len(items), batch_size):
        doc = cutter.prefill(*items[start : start + batch_size])
        kl.append(kl_of_plans(cutter, doc, plans).numpy())
        tokens.append(doc.scored.sum(1).cpu().numpy())
        del doc  # before the next batch is prefilled
    return np.concatenate(kl, 1), np.concatenate(tokens)


def merged(files: Sequence[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results of runs over different models or budgets as those of one run, and the rows of their tables; devices may differ, and are said.

    Raises:
        RotateKError: runs of which anything else differs, or two of the same model and budget.
    """
    whole: dict[str, Any] | None = None
    table: list[dict[str, Any]] = []
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        with file.with_suffix(".csv").open(newline="", encoding="utf-8") as stream:
            table += list(csv.DictReader(stream))
        whole = whole or {**found, "models": {}}
        whole["device"] = ", ".join(sorted({*whole["device"].split(", "), found["device"]}))
        for key in found.keys() | whole.keys():
            if key not in ("models", "device") and found.get(key) != whole.get(key):
                raise RotateKError(f"{file} is not of the same run as {files[0]}: {key} is {found.get(key)}, not {whole.get(key)}")
        for model, by_budget in found["models"].items():
            own = whole["models"].setdefault(model, {})
            seconds = by_budget.pop("seconds")
            if twice := own.keys() & by_budget.keys():
                raise RotateKError(f"{file} has {model} at {', '.join(sorted(twice))} again; merge every budget once")
            own |= {"seconds": {what: round(own.get("seconds", {}).get(what, 0) + value, 1) for what, value in seconds.items()}} | by_budget
    assert whole is not None
    for model, own in whole["models"].items():
        budgets = sorted((budget for budget in own if budget != "seconds"), key=float, reverse=True)
        whole["models"][model] = {key: own[key] for key in ("seconds", *budgets)}
    return whole, sorted(table, key=lambda row: (row["model"], -float(row["budget"])))


def save(folder: Path, result: dict[str, Any], table: Sequence[dict[str, Any]]) -> None:
    """Both files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(result, indent=2) + "\n")
    with (folder / "plans.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def show(models: dict[str, Any]) -> None:
    """What was found, in words."""
    for name, found in models.items():
        print(f"{name}: {found['seconds']}")
        for budget in (key for key in found if key != "seconds"):
            print_line(budget, found[budget])


def main() -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny-llava-next", "tiny-qwen3-vl"], help="aliases, paths or Hub ids")
    parser.add_argument("--artifact", type=Path, help="instead of --models: one that was compiled for a KV budget, of as many documents")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JSON", help="only put these results together, into --output")
    parser.add_argument("--data", default="mixed")
    parser.add_argument("--num-samples", type=int, default=144, help="calibration documents")
    parser.add_argument("--sensitivity-samples", type=int, default=36, help="of them, documents on which heads are cut")
    parser.add_argument("--documents", type=int, default=120, help="evaluation documents")
    parser.add_argument("--skip", type=int, default=0, help="evaluation documents before these, which something else was chosen on")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1 / 8, 1 / 16, 1 / 32])
    parser.add_argument("--plans", type=int, default=40, help="random plans of each budget")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if args.merge:

        def put_together() -> int:
            whole, rows = merged(args.merge)
            save(args.output, whole, rows)
            show(whole["models"])
            return 0

        return ended(put_together)
    if args.artifact:
        args.models = [str(read_artifact(args.artifact).base_model["id"])]
    device = choose_device(args.device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": args.dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "data": args.data,
        "num_samples": args.num_samples,
        "sensitivity_samples": args.sensitivity_samples,
        "skipped": args.skip,
        "models": {},
    }
    table: list[dict[str, Any]] = []
    for name in args.models:
        rows, result["models"][name] = run_model(name, args)
        table += rows
        show({name: result["models"][name]})
    save(args.output, result, table)
    return 0


def print_line(budget: str, found: dict[str, Any]) -> None:
    """One budget in words."""
    low, high = found["rank_correlation_interval"]
    kl, random = found["kl"], found["random_kl"]
    print(
        f"  budget {budget}: rank correlation {found['rank_correlation']:.2f} [{low:.2f}, {high:.2f}] over {found['plans']} plans and "
        f"{found['documents']} documents; chosen plan at place {found['chosen_rank']}, KL {kl['chosen']:.2e} "
        f"(unrepaired {kl['unrepaired']:.2e}, uniform {kl['uniform']:.2e}; random {random['least']:.2e}, median {random['median']:.2e}, "
        f"largest {random['largest']:.2e})"
    )


if __name__ == "__main__":
    sys.exit(main())
