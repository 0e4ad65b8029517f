"""Fewer pairs in the weights and codes in the cache: RAP alone, RotateK alone and both, at equal bytes of the whole KV cache.

    python benchmarks/bench_stack.py --work WORK --output benchmarks/results/stack-tiny-llava-next.csv
    python benchmarks/bench_stack.py --print benchmarks/results/stack-tiny-llava-next.csv

Artifacts are compiled once each, into WORK, and taken from there the next time: RAP at every share that it can keep (from `--rap-from`
on), RotateK, and both for every `--keep`. A coded one is compiled for `--compiled-for` and cut to other budgets from what it has measured,
which no documents check; RotateK alone and both are treated alike. The budget of its codes is such that the whole cache takes the share
asked for: everything that is allocated, text at the bytes of whole heads, too. What text alone exceeds is left out. With `--equal images`
the images' part is made equal instead, codes and all that they need; RAP's is its keep ratio.

Figures on documents of the evaluation split, question after compression: KL to the base model per answer token and exact match with their
bootstrap intervals over documents, bytes of the whole cache over the base's, and parameters of the model. Models with q/k-norm
(tiny-qwen3-vl) are refused by RAP.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from measuring import Rows, add_run_options, add_table_options, ended, opened, record_of, show_table, versions

from rotatek_compile.api import load_base, load_smaller
from rotatek_compile.artifact import Artifact, read_artifact
from rotatek_compile.batches import Encoded, end_ids, rope_index
from rotatek_compile.compile_options import CompileOptions
from rotatek_compile.compiler import compile_artifact
from rotatek_compile.documents import Documents, usable
from rotatek_compile.errors import UsageError
from rotatek_compile.evaluate import Evaluator, Prefilled
from rotatek_compile.methods import Entry, Methods
from rotatek_compile.models import resolve
from rotatek_compile.names import OURS, RAP, STACKED
from rotatek_compile.rap_evaluate import PrunedRun, StackedRun
from rotatek_compile.runtime.enable import enable
from rotatek_compile.suite import run_entries

TRIED = 12  # documents whose bytes say what budget of codes a share of the whole cache leaves
STEPS = 2  # of that search: bytes are nearly straight in the budget
FIELDS = (
    "share", "equal", "way", "keep_ratio", "kv_budget", "kv_share", "span_share", "documents", "kl", "kl_low", "kl_high", "exact_match",
    "exact_low", "exact_high", "kv_bytes", "kv_bytes_dense", "parameters", "num_samples", "model", "data", "device", "dtype", "torch",
    "transformers",
)  # fmt: skip


def artifacts(args: argparse.Namespace) -> Iterator[tuple[float | None, Artifact]]:
    """What is compared, compiled where WORK does not have it: the share that it has by itself (RAP alone), and the artifact."""
    same = {"model": args.model, "calib": args.calib, "num_samples": args.num_samples, "seed": args.seed, "quiet": args.quiet}
    same |= {"dtype": args.dtype, "device": args.device, "batch_size": 4, "resume": True}
    wanted: list[tuple[float | None, str, dict[str, Any]]] = []
    for share in args.shares:
        if share >= args.rap_from:
            wanted.append((share, f"rap-{share:g}", {"method": RAP, "keep_ratio": share}))
    coded = {"kv_budget": args.compiled_for}
    wanted.append((None, "rotatek", {"method": OURS, **coded}))
    wanted += [(None, f"stacked-{keep:g}", {"method": STACKED, "keep_ratio": keep, **coded}) for keep in args.keep]
    for share, name, own in wanted:
        folder = args.work / name
        if not folder.exists():
            try:
                compile_artifact(CompileOptions(output=folder, **same, **own))
            except UsageError as error:
                if share is None:
                    raise
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
        yield share, read_artifact(folder)


def spent(evaluator: Evaluator, prefilled: Sequence[Prefilled], entry: Entry, equal: str) -> tuple[float, float]:
    """What the documents' caches take of the dense bytes that are compared, and how much of it one unit of a budget is."""
    total = span = dense = span_dense = 0.0
    for document in prefilled:
        found = evaluator.finish(document, entry.make()).bytes
        total, span = total + found.total, span + found.span
        dense, span_dense = dense + found.dense, span_dense + found.span_dense
    return (span / span_dense, 1.0) if equal == "images" else (total / dense, span_dense / dense)


def budget_for(share: float, methods: Methods, evaluator: Evaluator, prefilled: Sequence[Prefilled], equal: str) -> float | None:
    """The KV budget of the codes with which the caches take this share; None where there is none."""
    budget = share
    for _ in range(STEPS):
        try:
            seen, unit = spent(evaluator, prefilled, methods.own_budget(budget), equal)
        except UsageError:  # less than means take
            return None
        budget = min(budget + (share - seen) / unit, 1.0)
        if budget <= 0:
            return None
    return budget


def entries_of(
    run: Any, methods: Methods | None, own: float | None, evaluator: Evaluator, items: Sequence[Encoded], args: argparse.Namespace
) -> dict[str, tuple[float, Entry]]:
    """Rows of one artifact by label: the share that each stands for."""
    if methods is None:
        assert own is not None
        entry = run.compiled()
        return {entry.label: (own, entry)}
    found, prefilled = {}, [evaluator.prefill([item]) for item in items[:TRIED]]
    for share in args.shares:
        if (budget := budget_for(share, methods, evaluator, prefilled, args.equal)) is None:
            continue
        try:
            entry = methods.own_budget(budget)
        except UsageError:
            continue
        found[entry.label] = share, entry
    return found


def measured(args: argparse.Namespace) -> Rows:
    """Compile what is missing, answer the documents with each, and return the rows by share."""
    rows: Rows = []
    base = None
    source = opened(args.data, args.seed)
    for own, artifact in artifacts(args):
        base = base or load_base(artifact, dtype=args.dtype, device=args.device)
        model, processor = base
        eos, geometry = end_ids(model), artifact.geometry
        items = Documents(source, usable(source, args.documents, geometry.text_only), processor, geometry, eos[0], rope_index(model))
        evaluators = [Evaluator(model, processor, "after", eos, args.max_new_tokens)]
        answering = model if artifact.rap is None else load_smaller(artifact, dtype=args.dtype, device=args.device)[0]
        coding = args.backend, True
        run: Any = None
        if artifact.rap is None:
            run = enable(model, artifact, backend=args.backend)
        elif artifact.coded:
            run = StackedRun(artifact, evaluators, answering, *coding)
        else:
            run = PrunedRun(artifact, evaluators, answering)
        with ExitStack() as stack:
            active = stack.enter_context(run)
            methods = None if not artifact.coded else Methods(active if artifact.rap is None else run.enabled)
            dense = methods.dense() if methods is not None else run.dense()
            chosen = entries_of(run, methods, own, evaluators[0], items, args)
            if not chosen:
                continue
            done = run_entries(evaluators, [dense, *(entry for _, entry in chosen.values())], items, args.batch_size, args.quiet)
        facts = record_of(resolve(args.model), Path(args.data).name, evaluators[0].device, evaluators[0].dtype)
        parameters = sum(p.numel() for p in answering.parameters())
        facts |= {"num_samples": artifact.calibration["num_samples"], "parameters": parameters, "equal": args.equal}
        for one, (share, entry) in zip(done[1:], chosen.values(), strict=True):
            rows.append(facts | {"share": share} | row_of(one.to_json(), artifact, entry))
    return sorted(rows, key=lambda row: -row["share"])


def row_of(found: Mapping[str, Any], artifact: Artifact, entry: Entry) -> dict[str, Any]:
    """Columns of one way at one share."""
    way = f"{RAP} alone" if not artifact.coded else f"{OURS} alone" if artifact.rap is None else STACKED
    span = found["span_bytes"] / found["span_bytes_dense"] if found["span_bytes_dense"] else ""
    return {
        "way": way,
        "keep_ratio": artifact.rap.keep_ratio if artifact.rap is not None else "",
        "kv_budget": entry.kv_budget if entry.kv_budget is not None else "",
        "kv_share": found["kv_bytes"] / found["kv_bytes_dense"],
        "span_share": span,
        "documents": found["samples"],
        "kl": found["kl"],
        "kl_low": found["kl_interval"][0],
        "kl_high": found["kl_interval"][1],
        "exact_match": found["exact_match"],
        "exact_low": found["exact_match_interval"][0],
        "exact_high": found["exact_match_interval"][1],
        "kv_bytes": round(found["kv_bytes"]),
        "kv_bytes_dense": round(found["kv_bytes_dense"]),
    }


def markdown(rows: Rows) -> str:
    """The table, one group of lines for each share."""
    first = rows[0]
    what = "the whole KV cache" if first["equal"] == "total" else "the images' part of the KV cache"
    out = [f"{first['model']}, {first['documents']} documents of {first['data']}, shares of {what}, {versions(first)}", ""]
    out.append("| share | way | codes' budget | whole cache | images' part | KL per token | exact match | parameters |")
    out.append("|---|---|---|---|---|---|---|---|")
    for share, group in itertools.groupby(rows, key=lambda row: float(row["share"])):
        for row in group:
            way = f"rap {float(row['keep_ratio']):g} + rotatek" if row["way"] == STACKED else row["way"]
            budget, span = (f"{float(row[name]):.4f}" if row[name] != "" else "-" for name in ("kv_budget", "span_share"))
            kl = f"{float(row['kl']):.2g} [{float(row['kl_low']):.2g}, {float(row['kl_high']):.2g}]"
            exact = f"{float(row['exact_match']):.3f} [{float(row['exact_low']):.3f}, {float(row['exact_high']):.3f}]"
            cells = [f"{share:g}", way, budget, f"{float(row['kv_share']):.4f}", span, kl, exact, f"{int(row['parameters']):,}"]
            out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def main() -> None:
    """Measure and save, or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calib", default="mixed")
    parser.add_argument("--work", type=Path, default=Path("stack-work"), help="where artifacts are kept")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.5, 1 / 4, 1 / 8, 1 / 16])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.7], help="keep ratios of both together")
    parser.add_argument("--rap-from", type=float, default=0.5, metavar="F", help="the least share that RAP alone is pruned to")
    parser.add_argument("--compiled-for", type=float, default=1 / 8, metavar="F", help="KV budget that coded artifacts are compiled for")
    parser.add_argument("--equal", default="total", choices=("total", "images"), help="which bytes are made equal")
    parser.add_argument("--num-samples", type=int, default=72, help="calibration documents")
    parser.add_argument("--documents", type=int, default=120, help="evaluation documents")
    parser.add_argument("--quiet", action="store_true")
    add_run_options(parser)
    add_table_options(parser)
    parser.set_defaults(model="tiny-llava-next")  # the base, which is pruned and coded
    args = parser.parse_args()

    def shown() -> int:
        show_table(args, measured, markdown, FIELDS)
        return 0

    sys.exit(ended(shown))


if __name__ == "__main__":
    main()
