"""Markdown tables of the codec from what bench_codec.py wrote: the curve over budgets, the ablations, and escape tokens.

python benchmarks/print_codec.py DIR/codec-*.csv                          # every table that the files hold
python benchmarks/print_codec.py DIR/codec-*.csv --merge all.csv          # put them into one CSV, which this prints too
python benchmarks/print_codec.py --plans DIR/plans-*.json                 # what bench_plans.py found: predicted and measured KL
python benchmarks/print_codec.py --chosen DIR/plans-t2.csv                # plans chosen anew, among random plans measured before
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from measuring import ended, write_csv

from rotatek_compile.errors import RotateKError
from rotatek_compile.suite import ALL, read_results

Rows = list[dict[str, str]]
NEGLIGIBLE_KL = 0.003  # nats per answer token: a best rival that loses no more leaves nothing to win
LOSSES = {1 / 8: 0.005, 1 / 16: 0.02}  # exact match that may be lost at a budget (issue 5)


def merged(files: Sequence[Path]) -> Rows:
    """Rows of several files, each once.

    Raises:
        RotateKError: a file that is missing, or no table of bench_codec.py.
    """
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for file in files:
        for row in read_results(file):
            if "part" not in row:
                raise RotateKError(f"{file} is a table of rotatek-eval; pass those of bench_codec.py (print_suite.py prints this one)")
            rows[tuple(row[name] for name in ("model", "part", "budget", "ask", "method", "setting", "skill"))] = row
    return list(rows.values())


def spread(row: dict[str, str], name: str, form: str) -> str:
    """A figure and its interval."""
    value, low, high = (format(float(row[key]), form) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value} [{low}, {high}]"


def span(row: dict[str, str]) -> str:
    """Coded span over its dense bytes."""
    dense = float(row["span_bytes_dense"])
    return f"{float(row['span_bytes']) / dense:.4f}" if dense else "-"


def fraction(budget: float) -> str:
    """1/8 for 0.125, decimals for what is no such fraction."""
    whole = round(1 / budget)
    return f"1/{whole}" if whole > 1 and abs(1 / budget - whole) < 1e-3 * whole else f"{budget:.3g}"


def heading(rows: Rows) -> str:
    """What was measured, on what."""
    first = rows[0]
    about = f"{first['device']}, {first['dtype']}, torch {first['torch']}, transformers {first['transformers']}"
    counts = sorted({int(row["samples"]) for row in rows})
    samples = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"{first['model']}, {samples} documents of {first['data']}, question asked {first['ask']} compression, {about}"


def curve_table(rows: Rows) -> list[str]:
    """Ours at each budget, what it loses of dense exact match, and the best rivals beside it."""
    dense = next(row for row in rows if row["method"] == "dense")
    lines = [f"Dense exact match {spread(dense, 'exact_match', '.3f')}.", ""]
    columns = ("budget", "ours", "documents", "coded span", "exact match", "dense less ours", "KL per token", "fallback heads",
               "best rival within it: span, KL", "ours / rival", "best that needs more: span, KL", "ours / rival")  # fmt: skip
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in _by_budget(r for r in rows if r["method"] == "rotatek"):
        words = row["setting"].partition(", ")[2] or "planned from the artifact"
        cells = [
            fraction(float(row["budget"])),
            words,
            row["samples"],
            span(row),
            spread(row, "exact_match", ".3f"),
            spread(row, "exact_match_loss", ".3f"),
        ]
        cells += [spread(row, "kl", ".1e"), row["fallback_heads"], *_rival(row, "rival"), *_rival(row, "above")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def rivals_table(rows: Rows) -> list[str]:
    """What was measured of the rivals."""
    lines = ["| budget | rival | coded span | exact match | KL per token |", "|---|---|---|---|---|"]
    for row in _by_budget(r for r in rows if r["method"] not in ("rotatek", "dense")):
        name = f"{row['method']}, {row['setting']}" if row["setting"] else row["method"]
        cells = [fraction(float(row["budget"])), name, span(row), spread(row, "exact_match", ".3f"), spread(row, "kl", ".1e")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def verdicts(rows: Rows) -> list[str]:
    """Which of the promises of issue 5 these rows keep."""
    found = []
    plain = [r for r in _by_budget(r for r in rows if r["method"] == "rotatek") if "no fallback" not in r["setting"]]
    for row in plain:
        budget, loss = float(row["budget"]), float(row["exact_match_loss"])
        name = ", ".join(filter(None, (fraction(budget), row["setting"].partition(", ")[2])))
        allowed = next((most for at, most in LOSSES.items() if abs(at - budget) < 1e-6), None)
        if allowed is not None:
            found.append(f"- {name}: loses {loss:.3f} of dense exact match, {'within' if loss <= allowed else 'NOT within'} {allowed:g}")
        prefix = "rival" if row["rival"] else "above"
        if row[prefix] and float(row[f"{prefix}_kl"]) > NEGLIGIBLE_KL:
            ratio, high = row[f"{prefix}_ratio"], row[f"{prefix}_high"]
            kept = bool(ratio) and float(ratio) <= 0.5 and bool(high) and float(high) < 1
            found.append(f"- {name}: {'at most half' if kept else 'NOT at most half'} of the KL of {row[prefix]}")
    return found


def skill_table(rows: Rows) -> list[str]:
    """What gives way: exact match of ours at each budget on the documents of each skill. Empty where it was not measured by skill."""
    skills = sorted({row["skill"] for row in rows} - {ALL})
    if not skills:
        return []
    lines = ["Exact match by skill:", "", f"| budget | {' | '.join(skills)} |", "|" + "---|" * (len(skills) + 1)]
    settings = {(row["method"], row["setting"]): row for row in _by_budget(rows) if row["skill"] != ALL}
    for method, setting in sorted(settings, key=lambda pair: pair[0] != "dense"):
        words = setting.partition(", ")[2]
        if words not in ("", "as compiled"):
            continue
        own = {row["skill"]: row["exact_match"] for row in rows if (row["method"], row["setting"]) == (method, setting)}
        budget = fraction(float(settings[method, setting]["budget"]))
        name = "dense" if method == "dense" else ", ".join(filter(None, (budget, words)))
        lines.append(f"| {name} | {' | '.join(format(float(own[skill]), '.3f') if skill in own else '-' for skill in skills)} |")
    return [*lines, ""]


def ablation_table(rows: Rows) -> list[str]:
    """One part changed at a time, and what each row does not show."""
    columns = ("changed", "row", "coded span", "exact match", "KL per token", "KL over the first row's", "fallback heads", "does not show")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        if row["method"] != "rotatek":
            continue
        words = row["setting"].partition(", ")[2] or "two-sided, allocated, mixed precision; no fallback, own basis or escape token"
        numbers = [f"{float(row[key]):.3g}" if row[key] else "-" for key in ("base_ratio", "base_low", "base_high")]
        beside = f"{numbers[0]} [{numbers[1]}, {numbers[2]}]" if row["base_ratio"] else "1"
        cells = [row["group"], words, span(row), spread(row, "exact_match", ".3f"), spread(row, "kl", ".1e"), beside, row["fallback_heads"]]
        lines.append(f"| {' | '.join([*cells, row['does_not_show']])} |")
    return lines


def tables(rows: Rows) -> list[str]:
    """All tables, model by model."""
    lines: list[str] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        whole = [row for row in own if row["skill"] == ALL]
        if chosen := [row for row in whole if row["part"] == "curve"]:
            lines += [heading(chosen), "", *curve_table(chosen), "", *verdicts(chosen), ""]
            lines += skill_table([row for row in own if row["part"] == "curve"])
            lines += ["Rivals:", "", *rivals_table(chosen), ""]
        for part in ("ablations", "escapes"):
            for budget in dict.fromkeys(row["budget"] for row in whole if row["part"] == part):
                chosen = [row for row in whole if row["part"] == part and row["budget"] == budget]
                dense = next(row for row in chosen if row["method"] == "dense")
                lines += [
                    f"{heading(chosen)}, KV budget {fraction(float(budget))}, dense exact match {float(dense['exact_match']):.3f}",
                    "",
                ]
                lines += [*ablation_table(chosen), ""]
    return lines[:-1]


def plans_table(files: Sequence[Path]) -> list[str]:
    """What bench_plans.py found, one row for each model and budget.

    Raises:
        RotateKError: a file that is missing or no such result.
    """
    columns = ("model", "budget", "random plans", "documents", "rank correlation", "place of the chosen plan", "its KL",
               "least KL of a random plan", "their median", "the same plan in every head", "its KL / least")  # fmt: skip
    lines, about = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)], []
    for file in files:
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            for model, budgets in result["models"].items():
                lines += [_plan_row(model, float(budget), found) for budget, found in budgets.items() if budget != "seconds"]
            calibrated = f"{result['num_samples']} calibration documents of {result['data']}, {result['sensitivity_samples']} of them cut"
            calibrated += f"; evaluation documents from the {result['skipped'] + 1}th on" if result.get("skipped") else ""
            where = f"{result['device']}, {result['dtype']}, torch {result['torch']}, transformers {result['transformers']}"
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise RotateKError(f"{file} cannot be read ({error}); pass a plans.json that bench_plans.py wrote") from error
        about.append(f"{calibrated}; {where}")
    return [*dict.fromkeys(about), "", *lines]


def _plan_row(model: str, budget: float, found: dict[str, Any]) -> str:
    low, high = found["rank_correlation_interval"]
    kl, random = found["kl"], found["random_kl"]
    cells = [model, fraction(budget), str(found["plans"]), str(found["documents"])]
    cells += [f"{found['rank_correlation']:.2f} [{low:.2f}, {high:.2f}]", f"{found['chosen_rank']} of {found['plans'] + 1}"]
    cells += [f"{x:.1e}" for x in (kl["chosen"], random["least"], random["median"], kl["uniform"])]
    low, high = found["chosen_over_best_random"]
    return f"| {' | '.join([*cells, f'[{low:.2g}, {high:.2g}]'])} |"


def chosen_table(file: Path) -> list[str]:
    """Plans that were chosen anew, measured on the documents of random plans of bench_plans.py, among which they are given a place.

    Args:
        file: rows of a model and a budget; `random_plans` names the table of the random ones, which lies beside it. Places are exact,
            but there is no paired interval: of a random plan only the mean over documents is kept.

    Raises:
        RotateKError: a file that is missing or has no such columns, or no random plan of a model at a budget.
    """
    columns = ("model", "budget", "documents", "place of the chosen plan", "its KL", "least KL of a random plan", "share of one document")
    lines, about = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)], []
    try:
        for row in _read(file):
            others = [
                float(one["measured_kl"])
                for one in _read(file.with_name(row["random_plans"]))
                if (one["model"], one["plan"], float(one["budget"])) == (row["model"], "random", float(row["budget"]))
            ]
            if not others:
                raise RotateKError(f"{row['random_plans']} has no random plan of {row['model']} at {row['budget']}; name one that has")
            kl = float(row["kl"])
            cells = [row["model"], fraction(float(row["budget"])), row["documents"]]
            cells += [f"{1 + sum(other < kl for other in others)} of {len(others) + 1}", spread(row, "kl", ".1e"), f"{min(others):.1e}"]
            lines.append(f"| {' | '.join([*cells, format(float(row['most_of_one']), '.2f')])} |")
            about.append(f"{row['device']}, {row['dtype']}, torch {row['torch']}, transformers {row['transformers']}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RotateKError(f"{file} cannot be read ({error}); pass a table as benchmarks/results/plans-t2.csv is") from error
    return [*dict.fromkeys(about), "", *lines]


def _read(file: Path) -> Rows:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _rival(row: dict[str, str], prefix: str) -> list[str]:
    if not row[prefix]:
        return ["-", "-"]
    value, low, high = (f"{float(row[key]):.2g}" if row[key] else "-" for key in (f"{prefix}_{end}" for end in ("ratio", "low", "high")))
    beside = f"{row[prefix]}: {float(row[f'{prefix}_span']):.4f}, {float(row[f'{prefix}_kl']):.1e}"
    return [beside, f"{value} [{low}, {high}]"]


def _by_budget(rows: Iterable[dict[str, str]]) -> Rows:
    return sorted(rows, key=lambda row: -float(row["budget"]))


def run(args: argparse.Namespace) -> int:
    """Print what was asked for."""
    if args.plans or args.chosen:
        print("\n".join(plans_table(args.plans) if args.plans else chosen_table(args.chosen)))
        return 0
    rows = merged(args.csv)
    if args.merge:
        write_csv(args.merge, rows, list(dict.fromkeys(name for row in rows for name in row)))
    print("\n".join(tables(rows)))
    return 0


def main() -> int:
    """Parse and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="*")
    parser.add_argument("--merge", type=Path, help="write the rows to this CSV too")
    parser.add_argument("--plans", type=Path, nargs="+", metavar="JSON", help="print the table of these instead")
    parser.add_argument("--chosen", type=Path, metavar="CSV", help="print the table of these plans, chosen anew, instead")
    args = parser.parse_args()
    if sum(map(bool, (args.csv, args.plans, args.chosen))) != 1:
        parser.error("pass CSV files of bench_codec.py, --plans with those of bench_plans.py, or --chosen with a table of plans")
    return ended(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
