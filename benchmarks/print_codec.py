"""Markdown tables of the codec from what bench_codec.py wrote: the curve over budgets, and the ablations.

python benchmarks/print_codec.py DIR/codec-*.csv                    # every table that the files hold
python benchmarks/print_codec.py DIR/codec-*.csv --merge all.csv    # put them into one CSV, which this prints too
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rotatek_compile.errors import RotateKError
from rotatek_compile.suite import ALL, read_results

Rows = list[dict[str, str]]
NEGLIGIBLE_KL = 0.003  # nats per answer token: a best rival that loses no more leaves nothing to win
LOSSES = {1 / 8: 0.005, 1 / 16: 0.02}  # exact match that may be lost at a budget (issue 5)


def merged(files: Sequence[Path]) -> Rows:
    """Rows of several files, those over all skills, each once.

    Raises:
        RotateKError: a file that is missing, or no table of bench_codec.py.
    """
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for file in files:
        for row in read_results(file):
            if "part" not in row:
                raise RotateKError(f"{file} is a table of rotatek-eval; pass those of bench_codec.py (print_suite.py prints this one)")
            if row["skill"] == ALL:
                rows[tuple(row[name] for name in ("model", "part", "budget", "ask", "method", "setting"))] = row
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


def ablation_table(rows: Rows) -> list[str]:
    """One part changed at a time, and what each row does not show."""
    columns = ("changed", "row", "coded span", "exact match", "KL per token", "times as compiled", "fallback heads", "does not show")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    own = [row for row in rows if row["method"] == "rotatek"]
    base = next((float(row["kl"]) for row in own if row["group"] == "as compiled"), 0.0)
    for row in own:
        words = row["setting"].partition(", ")[2] or "two-sided, allocated, mixed precision, no fallback"
        times = f"{float(row['kl']) / base:.3g}" if base else "-"
        cells = [row["group"], words, span(row), spread(row, "exact_match", ".3f"), spread(row, "kl", ".1e"), times, row["fallback_heads"]]
        lines.append(f"| {' | '.join([*cells, row['does_not_show']])} |")
    return lines


def tables(rows: Rows) -> list[str]:
    """All tables, model by model."""
    lines: list[str] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        if chosen := [row for row in own if row["part"] == "curve"]:
            lines += [heading(chosen), "", *curve_table(chosen), "", *verdicts(chosen), "", "Rivals:", "", *rivals_table(chosen), ""]
        for budget in dict.fromkeys(row["budget"] for row in own if row["part"] == "ablations"):
            chosen = [row for row in own if row["part"] == "ablations" and row["budget"] == budget]
            lines += [f"{heading(chosen)}, KV budget {fraction(float(budget))}", "", *ablation_table(chosen), ""]
    return lines[:-1]


def _rival(row: dict[str, str], prefix: str) -> list[str]:
    if not row[prefix]:
        return ["-", "-"]
    value, low, high = (f"{float(row[key]):.2g}" if row[key] else "-" for key in (f"{prefix}_{end}" for end in ("ratio", "low", "high")))
    beside = f"{row[prefix]}: {float(row[f'{prefix}_span']):.4f}, {float(row[f'{prefix}_kl']):.1e}"
    return [beside, f"{value} [{low}, {high}]"]


def _by_budget(rows: Iterable[dict[str, str]]) -> Rows:
    return sorted(rows, key=lambda row: -float(row["budget"]))


def main() -> int:
    """Parse and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--merge", type=Path, help="write the rows to this CSV too")
    args = parser.parse_args()
    try:
        rows = merged(args.csv)
        if args.merge:
            with args.merge.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    except (RotateKError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    print("\n".join(tables(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
