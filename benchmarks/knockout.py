"""Does a model spread its reading? Knock-outs of every (layer, KV head) pair, and of all but the best or random ones.

    python benchmarks/knockout.py --model MODEL --data NAME --output benchmarks/results/knockout.csv    # measure (a GPU; 200 documents)
    python benchmarks/knockout.py --print benchmarks/results/knockout.csv                               # the tables as Markdown

A knocked-out pair has its image Keys and Values replaced by their means over each image, before the question is read; the rest is at
native precision. Best pairs are those whose single knock-out costs most on calibration documents; everything shown is measured on
evaluation documents. KL is in nats per answer token, intervals are 95 % bootstrap intervals over documents, random rows are means over
several sets.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rotatek_compile.batches import end_ids, rope_index
from rotatek_compile.calibration_data.registry import open_data
from rotatek_compile.cutter import Cutter
from rotatek_compile.documents import Documents, usable
from rotatek_compile.knockout import MATTERS, all_pairs, diagnosis, drop_all_but_best, knock_out, measure_knockouts, random_drops
from rotatek_compile.models import DTYPES, checked_geometry, choose_device, load_config, load_model, load_processor, resolve
from rotatek_compile.scores import exact_match
from rotatek_compile.statistics import Bootstrap

FRACTIONS = (0.125, 0.25, 0.5)
FIELDS = (
    "model", "data", "skill", "documents", "kind", "layer", "head", "kept", "pairs", "sets", "kl", "kl_low", "kl_high",
    "exact_match", "exact_low", "exact_high", "calibration_kl", "calibration_documents", "device", "dtype", "torch", "transformers",
)  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Measure and save the CSV."""
    start = time.perf_counter()
    device = choose_device(args.device)
    source = resolve(args.model)
    config = load_config(source)
    geometry = checked_geometry(config)
    model, processor = load_model(source, DTYPES[args.dtype], device), load_processor(source)
    eos, rope, pairs = end_ids(model), rope_index(model), all_pairs(geometry)

    def documents(split: str, count: int) -> Documents:
        data = open_data(args.data, split, args.seed)
        return Documents(data, usable(data, count), processor, geometry, eos[0], rope)

    cutter = Cutter(model, geometry, {}, span_all=False)
    calibration, evaluation = documents("calibration", args.calibration), documents("evaluation", args.documents)
    chosen = measure_knockouts(cutter, calibration, args.quiet, args.batch_size)
    print(f"{len(pairs)} pairs on {len(calibration)} calibration documents at {time.perf_counter() - start:.0f} s", flush=True)
    single = knock_out(cutter, evaluation, [[pair] for pair in pairs], args.batch_size, quiet=args.quiet)
    print(f"the same on {len(evaluation)} evaluation documents at {time.perf_counter() - start:.0f} s", flush=True)

    groups = [("dense", len(pairs), [[]]), ("none", 0, [pairs])]
    for fraction in FRACTIONS:
        best = drop_all_but_best(chosen, fraction)
        groups.append(("best", len(pairs) - len(best), [best]))
        groups.append(("random", len(pairs) - len(best), random_drops(geometry, fraction, args.random, args.seed)))
    sets = [dropped for _, _, group in groups for dropped in group]
    many = knock_out(cutter, evaluation, sets, args.batch_size, eos, args.max_new_tokens, args.quiet)
    samples = [evaluation.data.sample(place) for place in evaluation.places]
    exact = np.array([[_right(processor, ids, eos, s.answers) for ids in row] for row, s in zip(many.answers, samples, strict=True)], float)
    print(f"{len(sets)} sets with greedy answers at {time.perf_counter() - start:.0f} s", flush=True)

    common = {
        "model": source.name if not source.is_local else Path(source.name).name,
        "data": args.data if not Path(args.data).exists() else Path(args.data).name,
        "pairs": len(pairs),
        "calibration_documents": len(calibration),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "dtype": args.dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    own = {pair: float(chosen[pair[0]][pair[1]]) for pair in pairs}
    skills = [getattr(s, "skill", "") or "" for s in samples]
    rows = []
    for skill in ["all", *sorted({s for s in skills if s})]:
        where = np.array([skill in ("all", s) for s in skills])
        summary = Summary(where, many.tokens.numpy(), args.seed)
        about = common | {"skill": skill, "documents": int(where.sum())}
        for column, (layer, head) in enumerate(pairs):
            costs = summary.kl(single.kl[:, column : column + 1].numpy())
            rows.append(about | costs | {"kind": "single", "layer": layer, "head": head, "calibration_kl": own[layer, head]})
        at = 0
        for kind, kept, group in groups:
            columns, at = slice(at, at + len(group)), at + len(group)
            costs = summary.kl(many.kl[:, columns].numpy()) | summary.exact(exact[:, columns])
            rows.append(about | costs | {"kind": kind, "kept": kept, "sets": len(group)})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


class Summary:
    """Means and intervals over some of the documents; columns are sets whose mean per document counts."""

    def __init__(self, where: np.ndarray, tokens: np.ndarray, seed: int) -> None:
        self.where, self.tokens, self.bootstrap = where, tokens[where], Bootstrap(int(where.sum()), seed)

    def kl(self, sums: np.ndarray) -> dict[str, float]:
        """KL per answer token of sums per document [M, sets]."""
        own = sums[self.where].mean(1)
        low, high = self.bootstrap.interval(own, self.tokens)
        return {"kl": own.sum() / self.tokens.sum(), "kl_low": low, "kl_high": high}

    def exact(self, right: np.ndarray) -> dict[str, float]:
        """Exact match of [M, sets]."""
        own = right[self.where].mean(1)
        low, high = self.bootstrap.interval(own)
        return {"exact_match": own.mean(), "exact_low": low, "exact_high": high}


def _right(processor: Any, ids: Sequence[int], eos: Sequence[int], answers: Sequence[str]) -> bool:
    return exact_match(processor.tokenizer.decode([i for i in ids if i not in eos], skip_special_tokens=True), answers)


def show(file: Path) -> None:
    """The tables of one CSV as Markdown."""
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    first = rows[0]
    versions = f"torch {first['torch']}, transformers {first['transformers']}"
    skills = list(dict.fromkeys(row["skill"] for row in rows))
    print(
        f"{first['model']} on {first['data']}: {first['documents']} evaluation documents, pairs chosen on {first['calibration_documents']} "
        f"calibration documents; {first['device'] or 'cpu'}, {first['dtype']}, {versions}\n"
    )
    print(f"| skill | documents | pairs | share with KL >= {MATTERS} alone | max | median | pairs with 90 % of the sum |")
    print("|---|---|---|---|---|---|---|")
    for skill in skills:
        own = [row for row in rows if row["skill"] == skill and row["kind"] == "single"]
        found = diagnosis({0: torch.tensor([float(row["kl"]) for row in own], dtype=torch.float64)})
        numbers = f"{found['share_above']:.2f} | {found['max']:.3f} | {found['median']:.4f} | {found['pairs_for_90_percent']}"
        print(f"| {skill} | {own[0]['documents']} | {found['pairs']} | {numbers} |")
    print("\n| pairs kept | best: exact match | best: KL | random: exact match | random: KL |")
    print("|---|---|---|---|---|")
    whole = {(row["kind"], int(row["kept"])): row for row in rows if row["skill"] == "all" and row["kind"] != "single"}
    pairs = int(first["pairs"])
    for kind, kept in whole:
        if kind == "random":
            continue
        beside = whole.get(("random", kept))
        cells = [_cells(whole[kind, kept]), _cells(beside) if beside else "| - | -"]
        print(f"| {kept} of {pairs}{' (dense)' if kind == 'dense' else ''} {cells[0]} {cells[1]} |")
    if len(skills) > 1:
        kinds = [(kind, kept) for kind, kept in whole if kind != "random"]
        print("\n| exact match, pairs kept | " + " | ".join(str(kept) for _, kept in kinds) + " |")
        print("|---" * (len(kinds) + 1) + "|")
        for skill in skills:
            own = {(row["kind"], int(row["kept"])): row for row in rows if row["skill"] == skill and row["kind"] != "single"}
            print(f"| {skill} | " + " | ".join(f"{float(own[place]['exact_match']):.2f}" for place in kinds) + " |")


def _cells(row: dict[str, str]) -> str:
    exact, low, high, kl, kl_low, kl_high = (
        float(row[name]) for name in ("exact_match", "exact_low", "exact_high", "kl", "kl_low", "kl_high")
    )
    return f"| {exact:.3f} [{low:.3f}, {high:.3f}] | {kl:.3g} [{kl_low:.3g}, {kl_high:.3g}]"


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llava-next", help="alias, path or Hub id")
    parser.add_argument("--data", default="forms", help="data set name or path")
    parser.add_argument("--documents", type=int, default=200, help="evaluation documents")
    parser.add_argument("--calibration", type=int, default=64, help="calibration documents, which choose the best pairs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/knockout.csv"))
    parser.add_argument("--print", type=Path, dest="table", help="only print the tables of this CSV")
    parser.add_argument("--random", type=int, default=8, help="random sets per size")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args()
    if not args.table:
        run(args)
    show(args.table or args.output)


if __name__ == "__main__":
    main()
