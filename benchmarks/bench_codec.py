"""The codec over many documents: ours and the best rivals at each KV budget, and what each of its parts is worth.

    python benchmarks/bench_codec.py ARTIFACT --output DIR --part curve --budgets 0.0625 --samples 500      # ours and rivals at 1/16
    python benchmarks/bench_codec.py ARTIFACT --output DIR --part ablations --budgets 0.0625 \\
        --pca ARTIFACT2 --other-domain ARTIFACT3                                                           # one part changed at a time
    python benchmarks/print_codec.py DIR/*.csv                                                             # the tables

ARTIFACT is compiled for any KV budget; every other is planned from its sensitivities. Each part and budget can be a process of its own:
all of them see the same documents, and each writes one CSV (rotatek-eval's results.csv with two columns more). `--suite` names the
results of `rotatek-eval --suite rivals` for this model, of which the rivals that did best at each budget are measured again; without it
every rival is.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rotatek_compile.api import base_source, load_base
from rotatek_compile.artifact import Artifact, read_artifact
from rotatek_compile.batches import end_ids, rope_index
from rotatek_compile.calibration_data.errors import DataError
from rotatek_compile.calibration_data.registry import open_data
from rotatek_compile.comparison import SLACK, against_rivals
from rotatek_compile.documents import Documents, usable
from rotatek_compile.errors import RotateKError
from rotatek_compile.evaluate import Evaluator
from rotatek_compile.methods import OWN_BUDGETS, Entry, Methods, distinct
from rotatek_compile.names import ASK, OURS, RIVAL_NAMES
from rotatek_compile.outcomes import Row
from rotatek_compile.replan import replanned
from rotatek_compile.runtime.cache import RotateKCache
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.prepared import PreparedArtifact
from rotatek_compile.runtime.rivals.registry import PROMISED_FROM, smallest_budget
from rotatek_compile.suite import ALL, Measured, facts_of, read_results, run_entries, write_results

PARTS = ("curve", "ablations")
WITHOUT_FALLBACK = (1 / 8, 1 / 32)  # budgets where the curve also shows ours held to its plan
SLICE = 40  # documents between two looks at the clock
BEST = 1  # rivals of each kind that are measured again
KEEP_RATIO = 0.125  # of the ablation of own bases: there a plan is in directions, and an own basis comes on top
ESCAPES = (1 / 128, 1 / 64, 1 / 16)


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of ours: what is changed, which question that belongs to, and what the row does not show."""

    group: str
    words: str
    artifact: Artifact
    does_not_show: str


def changed(artifact: Artifact, budget: float, **method: Any) -> Artifact:
    """Planned for a KV budget with parts of the method changed; bits count here, unlike in `replanned` of an artifact for a keep ratio."""
    return replanned(replace(artifact, method=replace(artifact.method, kv_budget=budget, **method)), kv_budget=budget)


def held(artifact: Artifact, **method: Any) -> Artifact:
    """A plan as it is, run otherwise."""
    return replace(artifact, method=replace(artifact.method, **method))


def curve(artifact: Artifact, budget: float) -> Iterator[Variant]:
    """Ours at one budget."""
    plan = changed(artifact, budget)
    compiled = artifact.method.kv_budget
    if compiled is not None and abs(compiled - budget) < SLACK and artifact.method.max_kl is None:
        yield Variant(
            "curve", "as compiled", artifact, "what a plan for another budget is worth: this one was checked on documents kept aside"
        )
    yield Variant("curve", "", plan, "that the budget holds where heads fall back: they take more, which the coded span says")
    if any(abs(budget - one) < SLACK for one in WITHOUT_FALLBACK):
        alone = "documents unlike the calibration data, for which the fallback is there"
        yield Variant("curve", "no fallback", held(plan, fallback_factor=0.0), alone)


def ablations(artifact: Artifact, budget: float, pca: Artifact | None, other: Artifact | None) -> Iterator[Variant]:
    """One part changed at a time, at one budget, without fallback where that would repair what is taken away."""
    plain = held(artifact, fallback_factor=0.0)
    base = changed(plain, budget)
    yield Variant("as compiled", "", base, "how plans checked on documents kept aside do: all rows are planned from stored sensitivities")
    for how in ("energy", "uniform"):
        say = "whether more calibration documents would change the order; the bundled models have 20 heads"
        yield Variant("allocation", f"allocation by {how}" if how == "energy" else "same plan in every head",
                      changed(plain, budget, allocation=how), say)  # fmt: skip
    for bits in ("native", "8", "4"):
        words = "native directions only" if bits == "native" else f"{bits}-bit directions only"
        say = "speed: what a precision costs while decoding is in bench_decode"
        yield Variant("precision", words, changed(plain, budget, key_bits=bits, value_bits=bits), say)
    if pca is not None:
        say = "the basis alone: its sensitivities were measured with it, so its plan differs too"
        yield Variant("basis", "basis pca", changed(held(pca, fallback_factor=0.0), budget), say)
    yield from _own_bases(plain, budget)
    yield from _escapes(plain, budget)
    if other is not None:
        say = "a domain that looks different: the other pages are drawn with the same glyphs"
        yield Variant("other domain", "calibrated on another domain, no fallback", changed(held(other, fallback_factor=0.0), budget), say)
        yield Variant("other domain", "calibrated on another domain, with fallback", changed(other, budget), say)
    yield Variant("fallback", "with fallback", changed(artifact, budget), "inputs built to break the calibration: bench_broken_inputs")


def _own_bases(plain: Artifact, budget: float) -> Iterator[Variant]:
    calibrated = "calibrated bases only (prior 0 means never an own one)"
    choices = ((0, calibrated), (1, "own bases, the calibrated one worth 1 token"), (256, "own bases, the calibrated one worth 256 tokens"))
    say = "long segments, where an own basis is cheap: these pages have about 500 tokens, so paying for one leaves few directions"
    for prior, words in choices:
        if prior != plain.method.prior_tokens:
            yield Variant("own bases", f"{words}, within the budget", held(changed(plain, budget), prior_tokens=prior), say)
    if budget == OWN_BUDGETS[3]:  # the plan by directions knows no budget: once is enough
        nested = replanned(plain, keep_ratio=KEEP_RATIO)
        say = "equal bytes: own bases come on top of the plan here, see the coded span"
        for prior, words in choices:
            yield Variant("own bases", f"{words}, keep ratio {KEEP_RATIO:g}", held(nested, prior_tokens=prior), say)


def _escapes(plain: Artifact, budget: float) -> Iterator[Variant]:
    say = "documents where single tokens carry the answer in full; print spreads over many tokens here"
    for share in ESCAPES:
        words = f"1/{round(1 / share)} of the tokens raw"
        if share < budget * 0.75:
            yield Variant("escape tokens", f"{words}, of the same bytes", held(changed(plain, budget - share), escape_ratio=share), say)
        on_top = f"{say}; nor equal bytes: these tokens come on top"
        yield Variant("escape tokens", f"{words}, on top", held(changed(plain, budget), escape_ratio=share), on_top)


def best_rivals(rows: Sequence[dict[str, str]], budget: float, ask: str, count: int = BEST) -> list[dict[str, str]]:
    """Rows of a suite with the least KL: of the rivals within a budget, and of those that cannot do with so little, at their smallest."""
    own = [r for r in rows if r["skill"] == ALL and r["ask"] == ask and r["method"] in RIVAL_NAMES]

    def span(row: dict[str, str]) -> float:
        return float(row["span_bytes"]) / float(row["span_bytes_dense"])

    def fits(row: dict[str, str]) -> bool:
        return span(row) <= budget + SLACK or bool(row["kv_budget"] and float(row["kv_budget"]) <= budget + SLACK)

    names = dict.fromkeys(r["method"] for r in own)
    within = {n: [r for r in own if r["method"] == n and fits(r)] for n in names}
    fitting = [min(found, key=lambda r: float(r["kl"])) for found in within.values() if found]
    above = [min((r for r in own if r["method"] == n), key=span) for n, found in within.items() if not found]
    chosen = [sorted(group, key=lambda r: float(r["kl"]))[:count] for group in (fitting, above)]
    return [row for group in chosen for row in group]


def rivals(methods: Methods, budget: float, known: Sequence[dict[str, str]] | None, ask: str) -> list[Entry]:
    """Those that a suite found best, or every one at the budget or the smallest it can do with."""
    geometry = methods.artifact.geometry
    if known is not None:
        rows = best_rivals(known, budget, ask)
        numbers = [{name: float(row[name]) if row[name] else None for name in ("kv_budget", "keep_ratio")} for row in rows]
        return [methods.rival(row["method"], requested=budget, **own) for row, own in zip(rows, numbers, strict=True)]
    entries = []
    for name in RIVAL_NAMES:
        try:
            least = smallest_budget(name, geometry, PROMISED_FROM)
            entries.append(methods.rival(name, kv_budget=min(max(budget, least + 1e-6), 1.0), requested=budget))
        except RotateKError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
    return entries


def entry_of(active: enable, variant: Variant, budget: float) -> Entry:
    """A row to be of one variant."""
    prepared, config, backend = PreparedArtifact(variant.artifact), active.model.config, active.backend
    make: Callable[[], RotateKCache] = lambda: RotateKCache(config, prepared, backend)  # noqa: E731
    setting = f"KV budget {budget:g}" + (f", {variant.words}" if variant.words else "")
    return Entry(OURS, make, setting, budget, budget, ours=True)


def in_time(evaluator: Evaluator, entries: Sequence[Entry], items: Documents, args: argparse.Namespace) -> list[Measured]:
    """All entries on as many documents as the time allows, in the order of the data, in which skills take turns."""
    began, rows = time.monotonic(), [Row(entry.method) for entry in entries]
    for start in range(0, len(items), SLICE):
        found = run_entries([evaluator], entries, items[start : start + SLICE], args.batch_size, quiet=args.quiet)
        for row, one in zip(rows, found, strict=True):
            row.outcomes += one.row.outcomes
        done, spent = rows[0].samples, time.monotonic() - began
        print(f"{args.part}: {done} of {len(items)} documents in {spent:.0f} s", file=sys.stderr, flush=True)
        if args.seconds and spent * (1 + SLICE / done) > args.seconds:
            break
    measured = [Measured(args.ask, entry, row, rows[0]) for entry, row in zip(entries, rows, strict=True)]
    return [replace(one, against=against_rivals(one, measured)) for one in measured]


def measure(args: argparse.Namespace, budget: float) -> Path:
    """One part at one budget, written as one CSV; returns it."""
    artifact = read_artifact(args.artifact)
    pca, other = (read_artifact(path) if path else None for path in (args.pca, args.other_domain))
    known = read_results(args.suite) if args.suite else None
    data = open_data(args.data, "evaluation", args.seed)
    places = usable(data, args.samples, artifact.geometry.text_only)
    model, processor = load_base(artifact, model=args.model, dtype=args.dtype, device=args.device)
    eos = end_ids(model)
    items = Documents(data, places, processor, artifact.geometry, eos[0], rope_index(model))
    evaluator = Evaluator(model, processor, args.ask, eos, args.max_new_tokens)
    variants = list(curve(artifact, budget) if args.part == "curve" else ablations(artifact, budget, pca, other))
    with enable(model, artifact, backend=args.backend) as active:
        methods = Methods(active)
        own = [entry_of(active, variant, budget) for variant in variants]
        entries = [methods.dense(), *own, *(rivals(methods, budget, known, args.ask) if args.part == "curve" else [])]
        same = {"seed": args.seed, "max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "backend": active.backend.name}
        measured = in_time(evaluator, distinct(entries), items, args)
        places = dict(list(places.items())[: measured[0].row.samples])
        facts = facts_of(artifact, base_source(artifact, args.model), evaluator, data, list(places.values()), same)
    notes = {entry.setting: variant for entry, variant in zip(own, variants, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        rows = read_results(write_results(Path(folder), measured, facts))
    for row in rows:
        note = notes.get(row["setting"]) if row["method"] == OURS else None
        row |= {
            "part": args.part,
            "budget": f"{budget:.6g}",
            "group": note.group if note else "",
            "does_not_show": note.does_not_show if note else "",
        }
    args.output.mkdir(parents=True, exist_ok=True)
    file: Path = args.output / f"codec-{args.part}-{budget:.4g}.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return file


def main() -> int:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder for the CSV of each budget")
    parser.add_argument("--part", choices=PARTS, default="curve")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(OWN_BUDGETS))
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument(
        "--seconds", type=float, help="stop after about so long, with the documents that are done (per budget, loading aside)"
    )
    parser.add_argument("--data", default="mixed")
    parser.add_argument("--ask", choices=ASK, default="after")
    parser.add_argument("--suite", type=Path, help="results.csv of --suite rivals of this model: only its best rivals are measured")
    parser.add_argument("--pca", type=Path, help="ablations: an artifact with --basis pca")
    parser.add_argument("--other-domain", type=Path, help="ablations: an artifact calibrated on other documents")
    parser.add_argument("--model", help="base weights other than the recorded ones")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "torch", "reconstruct"))
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args()
    try:
        for budget in args.budgets:
            print(measure(args, budget), flush=True)
    except (RotateKError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
