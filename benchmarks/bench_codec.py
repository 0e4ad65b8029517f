"""The codec over many documents: ours and the best rivals at each KV budget, and what each of its parts is worth.

    python benchmarks/bench_codec.py ARTIFACT --output DIR --part curve --samples 500                        # ours and rivals
    python benchmarks/bench_codec.py ARTIFACT --output DIR --part ablations --budgets 0.0625 0.03125 \\
        --pca ARTIFACT2 --other-domain ARTIFACT3                                                           # one part changed at a time
    python benchmarks/bench_codec.py ARTIFACT --output DIR --part escapes --data sparse                    # where single tokens matter
    python benchmarks/print_codec.py DIR/*.csv                                                             # the tables

    python benchmarks/bench_codec.py ARTIFACT --output DIR --part curve --shard 2/8                        # one process of eight
    python benchmarks/bench_codec.py --merge DIR/*.jsonl --output DIR                                      # all eight together

ARTIFACT is compiled for any KV budget; every other is planned from its sensitivities. All budgets share one prefill of each batch, and
processes share the documents. Each writes the values of every document to a .jsonl file; from all of them come one CSV for each part
(rotatek-eval's results.csv with columns more). `--suite` names the results of `rotatek-eval --suite rivals` for this model, of which the
rivals that did best at each budget are measured again; without it every rival is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from codec_variants import BASE, GROUPS, Variant, ablations, curve, escapes, some_groups
from measuring import add_run_options, ended, opened, write_csv
from shards import Shard, Values, by_run, read_values

from rotatek_compile.api import base_source, load_base
from rotatek_compile.artifact import read_artifact
from rotatek_compile.batches import end_ids, rope_index
from rotatek_compile.comparison import SLACK, against_rivals
from rotatek_compile.documents import Documents, usable
from rotatek_compile.errors import RotateKError
from rotatek_compile.evaluate import Evaluator, evaluate
from rotatek_compile.methods import DENSE, OWN_BUDGETS, Entry, Methods, distinct
from rotatek_compile.names import ASK, OURS, RIVAL_NAMES
from rotatek_compile.outcomes import Row, kl_ratio
from rotatek_compile.runtime.cache import RotateKCache
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.prepared import PreparedArtifact
from rotatek_compile.runtime.rivals.registry import PROMISED_FROM, smallest_budget
from rotatek_compile.suite import ALL, Measured, facts_of, read_results, write_results

BUDGETS = {"curve": OWN_BUDGETS, "ablations": (1 / 16, 1 / 32), "escapes": (1 / 16, 1 / 32, 1 / 64)}
BEST = 1  # rivals of each kind that are measured again


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table to be: an entry at a budget, and for ours what it is about. Entries at several budgets are measured once."""

    entry: Entry
    budget: float
    group: str = ""
    does_not_show: str = ""

    def to_json(self) -> dict[str, Any]:
        """For the header of a shard: everything but how to make caches."""
        entry = {f: getattr(self.entry, f) for f in ("method", "setting", "requested_budget", "kv_budget", "keep_ratio", "ours")}
        return {"label": self.entry.label, "budget": self.budget, "group": self.group, "does_not_show": self.does_not_show, "entry": entry}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Line:
        return cls(Entry(make=_not_measured_again, **data["entry"]), data["budget"], data["group"], data["does_not_show"])


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


def rivals(methods: Methods, budget: float, known: Sequence[dict[str, str]] | None, ask: str, count: int) -> list[Entry]:
    """Those that a suite found best, or every one at the budget or the smallest it can do with."""
    geometry = methods.artifact.geometry
    if known is not None:
        rows = best_rivals(known, budget, ask, count)
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
    setting = f"KV budget {budget:g}" + (f", {variant.words}" if variant.words else "")
    return Entry(OURS, lambda: RotateKCache(config, prepared, backend), setting, budget, budget, ours=True)


def lines_of(args: argparse.Namespace, active: enable) -> Iterator[Line]:
    """Everything that a part measures, the dense model first at each budget."""
    artifact, methods = active.artifact, Methods(active)
    pca, other = (read_artifact(path) if path else None for path in (args.pca, args.other_domain))
    known = read_results(args.suite) if args.suite else None
    for budget in args.budgets:
        yield Line(methods.dense(), budget)
        if args.part == "curve":
            variants = curve(artifact, budget)
        elif args.part == "escapes":
            variants = escapes(artifact, budget)
        else:
            variants = ablations(artifact, budget, pca, other, own_bases=budget == args.budgets[0])
        for variant in some_groups(variants, args.groups):
            yield Line(entry_of(active, variant, budget), budget, variant.group, variant.does_not_show)
        if args.part == "curve":
            yield from (Line(entry, budget) for entry in rivals(methods, budget, known, args.ask, args.rivals))


def measure(args: argparse.Namespace) -> Values:
    """This process's batches of one part, as many as the time allows, in the order of the data, in which skills take turns."""
    began, shard = time.monotonic(), Shard.parse(args.shard)
    artifact = read_artifact(args.artifact)
    data = opened(args.data, args.seed)
    places = usable(data, args.samples, artifact.geometry.text_only)
    model, processor = load_base(artifact, model=args.model, dtype=args.dtype, device=args.device)
    eos = end_ids(model)
    items = Documents(data, places, processor, artifact.geometry, eos[0], rope_index(model))
    evaluator = Evaluator(model, processor, args.ask, eos, args.max_new_tokens)
    with enable(model, artifact, backend=args.backend) as active:
        lines = list(lines_of(args, active))
        same = {"seed": args.seed, "max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "backend": active.backend.name}
        facts = facts_of(artifact, base_source(artifact, args.model), evaluator, data, list(places.values()), same)
        header = {"part": args.part, "ask": args.ask, "facts": facts, "lines": [line.to_json() for line in lines]}
        values = Values.begin(header, shard.file(args.output, f"codec-{args.part}"))
        makers = {entry.label: entry.make for entry in distinct(line.entry for line in lines)}
        loaded = time.monotonic()
        for done, (number, some) in enumerate(shard.batches(len(items), args.batch_size), 1):
            rows = evaluate(evaluator, items[some], makers, args.batch_size)
            values.add(number, {row.method: row.outcomes for row in rows})
            spent, spent_here = time.monotonic() - began, time.monotonic() - loaded
            said = f"{values.documents} documents by {len(makers)} methods, {spent_here:.0f} s after {loaded - began:.0f} s of loading"
            print(f"{args.part} {args.shard}: {said}", file=sys.stderr, flush=True)
            if args.seconds and spent + spent_here / done > args.seconds:
                break
    return values


def table(values: Values) -> list[dict[str, Any]]:
    """Rows of the CSV: every line over all documents, ours and the dense model on the curve also by skill."""
    header = values.header
    lines, part = [Line.from_json(line) for line in header["lines"]], header["part"]
    rows = {entry.label: values.row(entry.label, entry.method) for entry in distinct(line.entry for line in lines)}
    dense = rows[DENSE]
    measured = {one.entry.label: Measured(header["ask"], one.entry, rows[one.entry.label], dense) for one in lines}
    whole = {label: replace(one, row=_without_skills(one.row), dense=_without_skills(dense)) for label, one in measured.items()}
    bases = {line.budget: line.entry.label for line in lines if line.group == BASE}
    made = []
    for number, line in enumerate(lines):
        label, base = line.entry.label, bases.get(line.budget)
        by_skill = part == "curve" and (line.entry.ours or number == 0)
        one = replace((measured if by_skill else whole)[label], entry=line.entry)
        one = replace(one, against=against_rivals(one, list(measured.values())))
        about = {"part": part, "budget": f"{line.budget:.6g}", "group": line.group, "does_not_show": line.does_not_show}
        about |= _beside(one.row, rows[base] if base and line.entry.ours and label != base else None)
        made += [row | about for row in _cells(one, header["facts"])]
    return made


def _cells(one: Measured, facts: dict[str, Any]) -> list[dict[str, str]]:
    """Its rows as rotatek-eval writes them."""
    with tempfile.TemporaryDirectory() as folder:
        return read_results(write_results(Path(folder), [one], facts))


def _without_skills(row: Row) -> Row:
    return Row(row.method, [replace(outcome, skill="") for outcome in row.outcomes])


def _beside(row: Row, base: Row | None) -> dict[str, str]:
    """KL over that of the row which parts are changed of, paired over documents."""
    names = ("base_ratio", "base_low", "base_high")
    if base is None:
        return dict.fromkeys(names, "")
    ratio, interval = kl_ratio(row, base)
    return {name: f"{value:.6g}" for name, value in zip(names, (ratio, *interval), strict=True)}


def _not_measured_again() -> Any:
    raise RuntimeError("an entry that was read from a file makes no caches")


def save(found: Iterable[Values], folder: Path) -> Iterator[Path]:
    """One CSV for each part."""
    for values in found:
        file = folder / f"codec-{values.header['part']}.csv"
        write_csv(file, table(values))
        yield file


def run(args: argparse.Namespace) -> int:
    """Merge, or measure and, alone, write the table too."""
    if args.merge:
        for file in save((read_values(own) for own in by_run(args.merge)), args.output):
            print(file)
        return 0
    values = measure(args)
    if Shard.parse(args.shard).count > 1:
        print(values.file)
    elif not values.batches:
        raise RotateKError("no document was measured")
    else:
        print(*save([values], args.output))
    return 0


def main() -> int:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="only put these .jsonl files together")
    parser.add_argument("--output", type=Path, required=True, help="folder for the values of documents and the CSV of each part")
    parser.add_argument("--part", choices=tuple(BUDGETS), default="curve")
    parser.add_argument("--budgets", type=float, nargs="+", help="by default those of the part")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="measure each N-th batch of the documents, from the I-th")
    parser.add_argument("--seconds", type=float, help="begin no batch that would end later than so long after the start")
    parser.add_argument("--ask", choices=ASK, default="after")
    parser.add_argument("--suite", type=Path, help="results.csv of --suite rivals of this model: only its best rivals are measured")
    parser.add_argument("--rivals", type=int, default=BEST, help="of each kind, with --suite")
    parser.add_argument("--pca", type=Path, help="ablations: an artifact with --basis pca")
    parser.add_argument("--other-domain", type=Path, help="ablations: an artifact calibrated on other documents")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, help="ablations: only these groups of rows, and what they are compared with")
    add_run_options(parser)
    args = parser.parse_args()
    if (args.artifact is None) == (args.merge is None):
        parser.error("pass an ARTIFACT to measure, or --merge FILES")
    args.budgets = args.budgets or list(BUDGETS[args.part])
    return ended(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
