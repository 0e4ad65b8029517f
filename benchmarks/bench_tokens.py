"""Token selection at equal bytes: fewer tokens, fewer numbers of each, or both.

    python benchmarks/bench_tokens.py artifact --output tokens          # the bundled model: hours on a CPU, minutes on a GPU
    python benchmarks/bench_tokens.py artifact --output tokens --resume # goes on with a killed one
    python benchmarks/bench_tokens.py --print tokens/tokens.csv other/tokens.csv          # with --brief only exact match

Every row holds to its budget, a share of the dense bytes of all image tokens that were read, the tables of kept tokens included:

- *tokens*: kept tokens as they are, as many as the budget has room for, by each of the four scores;
- *channels*: all tokens, coded by the artifact's plan for that budget;
- *joint*: a share t of the tokens, coded by the artifact's plan for what the budget leaves each of them.

Fallback is off, so that budgets hold. Plans are cut from the artifact's sensitivities as it is loaded; none knows of the selection.
Intervals are bootstraps over documents, paired where rows are compared. A token-only row whose exact match is 20 points below the dense
model's is where joint selection is said to be 5 points better or more: `claim` says whether it is.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import Rows, add_run_options, ended, opened, read_csv, versions, write_csv

from rotatek_compile.api import base_source, load_base
from rotatek_compile.artifact import Artifact
from rotatek_compile.batches import end_ids, rope_index
from rotatek_compile.documents import Documents, usable
from rotatek_compile.errors import RotateKError, UsageError
from rotatek_compile.evaluate import Evaluator
from rotatek_compile.hub import open_artifact
from rotatek_compile.journal import Journal, Shard
from rotatek_compile.methods import Entry, Methods, distinct
from rotatek_compile.names import ASK, OURS, TOKEN_METHODS
from rotatek_compile.outcomes import Row, exact_match_loss
from rotatek_compile.runtime.enable import enable
from rotatek_compile.suite import batch_sizes, facts_of, run_entries
from rotatek_compile.token_entries import alone, joint

BUDGETS = (3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)
TOKEN_RATIOS = (3 / 4, 1 / 2, 1 / 4)
LOST, BETTER = 0.2, 0.05  # of exact match: what token-only has lost, and what joint selection is said to be better by
TABLE = "tokens.csv"

FIELDS = (
    "model", "data", "ask", "kind", "token_method", "token_ratio", "budget", "share", "documents", "exact_match", "low", "high", "lost",
    "kl", "kl_low", "kl_high", "over_tokens", "over_low", "over_high", "claim", "device", "dtype", "torch", "transformers", "rotatek",
)  # fmt: skip
"""share: bytes of the span over its dense ones; lost: exact match below the dense model's; over_tokens: exact match above that of the
same score alone at the same budget, with its paired interval."""

Setting = tuple[str, str, float, float]  # kind, score, share of tokens, budget


def entries_of(
    methods: Methods, budgets: Sequence[float], ratios: Sequence[float], scores: Sequence[str], joint_budgets: Sequence[float]
) -> dict[str, tuple[Entry, Setting]]:
    """By label, every row that can be: what a budget cannot hold is said and left out."""
    found: dict[str, tuple[Entry, Setting]] = {}

    def add(setting: Setting, make: Any) -> None:
        try:
            entry = make()
        except UsageError as error:
            warnings.warn(f"left out: {setting[0]} {setting[1]} at {setting[3]:g}: {error}", stacklevel=2)
            return
        found.setdefault(entry.label, (entry, setting))

    for budget in budgets:
        for score in scores:
            add(("tokens", score, budget, budget), lambda score=score, budget=budget: alone(methods, score, kv_budget=budget))
    for budget in joint_budgets:
        add(("channels", "", 1.0, budget), lambda budget=budget: methods.own_budget(budget))
        for ratio in ratios:
            for score in scores if ratio > budget else ():
                add(
                    ("joint", score, ratio, budget),
                    lambda score=score, ratio=ratio, budget=budget: joint(methods, OURS, score, ratio, kv_budget=budget),
                )
    return found


def measure(artifact: Artifact, args: argparse.Namespace) -> Rows:
    """Measure what is not in the journal yet; the rows of the table, none if this is a part of it."""
    source = opened(args.data, args.seed)
    samples = usable(source, args.num_samples, False)
    model, processor = load_base(artifact, model=args.model, dtype=args.dtype, device=args.device)
    eos, size = end_ids(model), artifact.geometry.rows_at_once(args.batch_size)
    items = Documents(source, samples, processor, artifact.geometry, eos[0], rope_index(model))
    asks = tuple(args.ask or ASK)
    evaluators = [Evaluator(model, processor, ask, eos, args.max_new_tokens) for ask in asks]
    with enable(model, artifact, backend=args.backend, fallback=False) as active:
        methods = Methods(active)
        chosen = entries_of(methods, args.budget or BUDGETS, args.token_keep_ratio or TOKEN_RATIOS, args.token_method or TOKEN_METHODS,
                            args.joint_budget or args.budget or BUDGETS)  # fmt: skip
        entries = distinct([methods.dense(), *(entry for entry, _ in chosen.values())])
        same = {name: getattr(args, name) for name in ("seed", "max_new_tokens", "batch_size")}
        same |= {"backend": active.backend.name, "fallback": False}
        facts = facts_of(artifact, base_source(artifact, args.model), evaluators[0], source, list(samples.values()), same)
        sizes, labels, shard = batch_sizes(len(items), size), [entry.label for entry in entries], Shard.parse(args.shard)
        with Journal(args.output, facts, asks, labels, sizes, args.resume, shard) as journal:
            measured = run_entries(evaluators, entries, items, size, args.quiet, journal)
    if shard.count > 1:
        return []
    return [row for ask in asks for row in table([m for m in measured if m.ask == ask], chosen, facts)]


def table(measured: Sequence[Any], chosen: dict[str, tuple[Entry, Setting]], facts: dict[str, Any]) -> Rows:
    """Rows of one mode; the first that was measured is the dense model."""
    dense: Row = measured[0].row
    settings = {label: setting for label, (_, setting) in chosen.items()}
    by_setting = {settings[m.entry.label]: m.row for m in measured[1:]}
    about = {name: facts[name] for name in ("model", "data", "device", "dtype", "torch", "transformers", "rotatek")}
    rows = []
    for one in measured:
        setting = settings.get(one.entry.label, ("dense", "", 1.0, 1.0))
        kind, score, ratio, budget = setting
        figures, sizes = one.row.accuracy(), one.row.sizes()
        row = {"ask": one.ask, "kind": kind, "token_method": score, "token_ratio": ratio, "budget": budget, "documents": figures["samples"]}
        row |= {"share": sizes["span_bytes"] / sizes["span_bytes_dense"] if sizes["span_bytes_dense"] else 1.0}
        row |= dict(zip(("exact_match", "low", "high"), (figures["exact_match"], *figures["exact_match_interval"]), strict=True))
        row |= dict(zip(("kl", "kl_low", "kl_high"), (figures["kl"], *figures["kl_interval"]), strict=True))
        row["lost"] = exact_match_loss(dense, one.row)[0]
        if kind == "joint" and (tokens := by_setting.get(("tokens", score, budget, budget))) is not None:
            better, (low, high) = exact_match_loss(one.row, tokens)
            row |= {"over_tokens": better, "over_low": low, "over_high": high}
            if exact_match_loss(dense, tokens)[0] >= LOST:
                row["claim"] = "holds" if low > 0 and better >= BETTER else "within noise" if better >= BETTER else "fails"
        rows.append(about | {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    return rows


def markdown(rows: Rows) -> str:
    """One table per model and mode."""
    parts = []
    for model, ask in dict.fromkeys((row["model"], row["ask"]) for row in rows):
        own = [row for row in rows if (row["model"], row["ask"]) == (model, ask)]
        parts.append(
            f"{_heading(own)}\n\n"
            "| budget | kept | tokens | coded span | exact match | KL per token | over tokens alone | claim |\n"
            "|---|---|---|---|---|---|---|---|"
        )
        for row in sorted((r for r in own if r["kind"] != "dense"), key=lambda r: -float(r["budget"])):
            what = {"tokens": f"{row['token_method']} alone", "channels": "channels alone", "joint": f"{row['token_method']} and channels"}
            over = (
                f"{float(row['over_tokens']):+.3f} [{float(row['over_low']):+.3f}, {float(row['over_high']):+.3f}]"
                if row.get("over_tokens")
                else "-"
            )
            parts.append(
                f"| {float(row['budget']):.4g} | {what[row['kind']]} | {float(row['token_ratio']):.3g} | {float(row['share']):.4f} | "
                f"{float(row['exact_match']):.3f} [{float(row['low']):.3f}, {float(row['high']):.3f}] | "
                f"{float(row['kl']):.1e} [{float(row['kl_low']):.1e}, {float(row['kl_high']):.1e}] | {over} | {row.get('claim') or '-'} |"
            )
        parts.append("")
    return "\n".join([*parts, *claims(rows)])


def brief(rows: Rows) -> str:
    """One table per model and mode of exact match alone: a line for each budget, joint rows by their share of the tokens."""
    parts = []
    for model, ask in dict.fromkeys((row["model"], row["ask"]) for row in rows):
        own = [row for row in rows if (row["model"], row["ask"]) == (model, ask)]
        exact = {_setting(row): f"{float(row['exact_match']):.3f}" for row in own}
        joints = [row for row in own if row["kind"] == "joint"]
        scores, ratios = (list(dict.fromkeys(row[name] for row in joints)) for name in ("token_method", "token_ratio"))
        columns = [f"{score} alone / {' / '.join(ratios)}" for score in scores]
        lines = [_heading(own), "", f"| budget | channels alone | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
        for budget in sorted({row["budget"] for row in own if row["kind"] == "channels"}, key=float, reverse=True):
            cells = []
            for score in scores:
                kept = [("tokens", score, budget, budget), *(("joint", score, ratio, budget) for ratio in ratios)]
                cells.append(" / ".join(exact.get(one, "-") for one in kept))
            lines.append(f"| {float(budget):.4g} | {exact['channels', '', '1', budget]} | {' | '.join(cells)} |")
        parts += [*lines, "", *(f"{said}\n" for said in claims(own))]
    return "\n".join(parts)


def claims(rows: Rows) -> list[str]:
    """What the comparisons of joint rows with tokens alone come to, in a sentence; nothing where there are none."""
    found = [row["claim"] for row in rows if row.get("claim")]
    said = (
        f"Joint is {BETTER:.2g} better or more, interval above 0, in {found.count('holds')} of {len(found)} comparisons where tokens "
        f"alone have lost {LOST:.1g} or more; {found.count('within noise')} are better within noise."
    )
    return [said] if found else []


def _setting(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return row["kind"], row["token_method"], row["token_ratio"], row["budget"]


def _heading(rows: Rows) -> str:
    """Of the rows of one model and mode: what was measured on."""
    dense = next(row for row in rows if row["kind"] == "dense")
    when = f"question asked {dense['ask']} {'compression' if dense['ask'] == 'after' else 'it'}"
    exact = f"dense exact match {float(dense['exact_match']):.3f}"
    return f"{dense['model']}, {dense['documents']} documents of {dense['data']}, {when}, {versions(dense)}; {exact}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?")
    parser.add_argument("--output", type=Path, help=f"folder for the journal and {TABLE}")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument(
        "--shard", default="1/1", metavar="I/N", help="each N-th batch from the I-th; --resume without it puts all together"
    )
    parser.add_argument("--print", type=Path, dest="tables", metavar="FILE", nargs="+", help="only print these tables")
    parser.add_argument("--brief", action="store_true", help="with --print: exact match only, a line for each budget")
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--ask", action="append", choices=ASK)
    parser.add_argument("--budget", type=float, action="append", help="of tokens alone, and of the rest without --joint-budget; may repeat")
    parser.add_argument("--joint-budget", type=float, action="append", help="of channels and joint rows; may repeat")
    parser.add_argument("--token-keep-ratio", type=float, action="append", help="of joint rows; may repeat")
    parser.add_argument("--token-method", action="append", choices=TOKEN_METHODS)
    parser.add_argument("--quiet", action="store_true")
    add_run_options(parser)
    args = parser.parse_args()
    if args.tables:
        print((brief if args.brief else markdown)([row for file in args.tables for row in read_csv(file)]))
        return 0
    if args.artifact is None or args.output is None:
        raise UsageError("name an artifact and --output FOLDER, or tables with --print")
    artifact = open_artifact(args.artifact)
    if artifact.method.rival is not None or artifact.geometry.text_only:
        raise RotateKError(f"{args.artifact} has no bases for images; compile one with --method {OURS} for a model that reads them")
    if not (rows := measure(artifact, args)):
        return 0
    write_csv(args.output / TABLE, rows, FIELDS)
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
