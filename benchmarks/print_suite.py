"""Markdown tables of an evaluation, from the results.csv that `rotatek-eval --output` wrote.

    python benchmarks/print_suite.py results.csv              # one line per method and setting, both modes beside each other
    python benchmarks/print_suite.py results.csv --skills     # exact match per skill, question asked after compression
    python benchmarks/print_suite.py results.csv --skills with
    python benchmarks/print_suite.py a.csv b.csv              # several models beside each other, question asked after compression
    python benchmarks/print_suite.py results.csv --versus     # only ours beside the best rivals

Without --skills a second table follows where something of ours was measured at KV budgets: ours beside the best rival of each. Results of
the suite `proof` have such a pair of tables for every axis (rotatek_compile/proof_suite.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rotatek_compile.errors import RotateKError
from rotatek_compile.suite import ALL, read_results

Rows = list[dict[str, str]]
KV = "kv"
AXES = {
    KV: "Keys and Values",
    "keys": "Keys at equal bytes, Values raw on both sides",
    "keys+values4": "Keys at equal bytes, Values at 4 bits on both sides",
    "values": "Keys raw, Values at 4 bits",
}
NEGLIGIBLE_KL = 0.003  # nats per answer token: a best rival that loses no more leaves nothing to win
WANTED_RATIO = 0.5


def name_of(row: dict[str, str]) -> str:
    """Method, its setting, and a mark where it could not do with the budget that was wanted."""
    words = f"{row['method']}, {row['setting']}" if row["setting"] else row["method"]
    wanted, given = row["requested_budget"], row["kv_budget"]
    return f"{words} (wanted {float(wanted):.3g})" if wanted and given and float(given) > float(wanted) else words


def spread(row: dict[str, str], name: str, form: str) -> str:
    """A score and its interval."""
    value, low, high = (format(float(row[key]), form) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value} [{low}, {high}]"


def share(row: dict[str, str], part: str) -> str:
    """Bytes over dense bytes."""
    dense = float(row[f"{part}_bytes_dense"])
    return f"{float(row[f'{part}_bytes']) / dense:.4f}" if dense else "-"


def axis_of(row: dict[str, str]) -> str:
    """What a row is compared in; older results know one axis."""
    return row.get("axis") or KV


def by_axis(rows: Rows) -> dict[str, Rows]:
    """Rows of every axis that there is; the dense model belongs to all."""
    found = {axis: [row for row in rows if axis_of(row) == axis] for axis in dict.fromkeys(map(axis_of, rows))}
    dense = [row for row in rows if row["method"] == "dense"]
    return {axis: own if axis == KV else dense + own for axis, own in found.items()}


def heading(rows: Rows) -> str:
    """What was measured, on what."""
    first = rows[0]
    versions = f"torch {first['torch']}, transformers {first['transformers']}"
    calibrations = max(int(row.get("calibrations") or 1) for row in rows)
    own = f", {calibrations} calibrations" if calibrations > 1 else ""
    return f"{first['model']}, {first['samples']} documents of {first['data']}{own}, {first['device']}, {first['dtype']}, {versions}"


def methods_table(rows: Rows) -> list[str]:
    """Bytes, exact match and KL of every method, over all skills."""
    whole = [row for row in rows if row["skill"] == ALL]
    asks = list(dict.fromkeys(row["ask"] for row in whole))
    columns = ["method", "coded span / dense", "KV / dense"]
    columns += [words for ask in asks for words in (f"`{ask}`: exact match", f"`{ask}`: KL per token")]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    by_name = {ask: {name_of(row): row for row in whole if row["ask"] == ask} for ask in asks}
    for name, row in by_name[asks[0]].items():
        cells = [name, share(row, "span"), share(row, "kv")]
        for ask in asks:
            cells += [spread(by_name[ask][name], "exact_match", ".3f"), spread(by_name[ask][name], "kl", ".1e")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def skills_table(rows: Rows, ask: str) -> list[str]:
    """Exact match of every method per skill."""
    chosen = [row for row in rows if row["ask"] == ask]
    skills = list(dict.fromkeys(row["skill"] for row in chosen))
    lines = [f"| method | coded span / dense | {' | '.join(skills)} |", "|" + "---|" * (len(skills) + 2)]
    for name in dict.fromkeys(name_of(row) for row in chosen):
        own = {row["skill"]: row for row in chosen if name_of(row) == name}
        cells = [name, share(own[ALL], "span"), *(f"{float(own[skill]['exact_match']):.3f}" for skill in skills)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def models_table(tables: list[Rows]) -> list[str]:
    """Bytes, exact match and KL of the methods that all models have, question asked after compression."""
    chosen = [{name_of(row): row for row in rows if row["skill"] == ALL and row["ask"] == "after"} for rows in tables]
    columns = ["method", *(f"{rows[0]['model']}: coded span | exact match | KL per token" for rows in tables)]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * (1 + 3 * len(tables))]
    for name in chosen[0]:
        if all(name in rows for rows in chosen):
            own = [rows[name] for rows in chosen]
            cells = [cell for row in own for cell in (share(row, "span"), spread(row, "exact_match", ".2f"), f"{float(row['kl']):.1e}")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def versus_table(rows: Rows, asks: Sequence[str]) -> list[str]:
    """Ours at each KV budget, beside the best rival within it and the best of those that need more; nothing where none was measured."""
    chosen = [row for row in rows if row["skill"] == ALL and row["ask"] in asks and (row.get("rival") or row.get("above"))]
    if not chosen:
        return []
    keys = axis_of(chosen[0]) != KV
    columns = ["Keys" if keys else "budget", "ours", "coded span", "KL per token"]
    columns += ["best rival within it, coded span", "KL per token", "ours / rival", "at most half"]
    columns += ["best that needs more, coded span", "KL per token", "ours / rival"]
    modes = list(dict.fromkeys(row["ask"] for row in chosen))
    columns = (["asked"] if len(modes) > 1 else []) + columns
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in sorted(chosen, key=lambda row: (modes.index(row["ask"]), -float(row["requested_budget"]))):
        cells = [f"`{row['ask']}`"] if len(modes) > 1 else []
        budget = float(row["key_budget" if keys else "requested_budget"])
        cells += [fraction(budget), name_of(row), share(row, "span"), f"{float(row['kl']):.1e}"]
        cells += [*rival_cells(row, "rival"), verdict(row), *rival_cells(row, "above")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def rival_cells(row: dict[str, str], prefix: str) -> list[str]:
    """A rival with its bytes, its KL, and the ratio of KLs with its interval; an empty end is infinite or no number."""
    if not row[prefix]:
        return ["-"] * 3
    value, low, high = (f"{float(row[key]):.2g}" if row[key] else "-" for key in (f"{prefix}_{end}" for end in ("ratio", "low", "high")))
    return [f"{row[prefix]}, {float(row[f'{prefix}_span']):.4f}", f"{float(row[f'{prefix}_kl']):.1e}", f"{value} [{low}, {high}]"]


def fraction(budget: float) -> str:
    """1/8 for 0.125, decimals for what is no such fraction."""
    whole = round(1 / budget)
    return f"1/{whole}" if abs(1 / budget - whole) < 1e-3 * whole and whole > 1 else f"{budget:.3g}"


def verdict(row: dict[str, str]) -> str:
    """Whether ours has at most half of the KL of the best rival within the budget, the interval excluding 1.

    Nothing is said where no rival is, or where it loses almost nothing.
    """
    if not row["rival"] or float(row["rival_kl"]) <= NEGLIGIBLE_KL:
        return "-"
    known = row["rival_ratio"] and row["rival_high"]
    return "yes" if known and float(row["rival_ratio"]) <= WANTED_RATIO and float(row["rival_high"]) < 1 else "no"


def main() -> int:
    """Parse and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--versus", action="store_true", help="only ours beside the best rivals")
    parser.add_argument("--skills", nargs="?", const="after", choices=("after", "with"), help="exact match per skill in this mode")
    args = parser.parse_args()
    try:
        tables = [read_results(file) for file in args.csv]
    except RotateKError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    wanted = args.skills or ("after" if len(tables) > 1 else tables[0][0]["ask"])
    for file, rows in zip(args.csv, tables, strict=True):
        if wanted not in {row["ask"] for row in rows}:
            print(f"error: {file} has no rows of mode {wanted}; evaluate with --ask {wanted}", file=sys.stderr)
            return 2
    print("; ".join(heading(rows) for rows in tables) + "\n")
    if len(tables) > 1:
        if not args.versus:
            print("\n".join(models_table([by_axis(rows)[KV] for rows in tables])))
        for rows in tables:
            for axis, own in by_axis(rows).items():
                if versus := versus_table(own, (wanted,)):
                    where = f" ({AXES.get(axis, axis)})" if axis != KV else ""
                    print("\n".join(["", f"{rows[0]['model']}, ours beside the best rivals of each budget{where}:", "", *versus]))
        return 0
    rows = tables[0]
    for number, (axis, own) in enumerate(by_axis(rows).items()):
        if lines := one_axis(own, args):
            title = [f"{AXES.get(axis, axis)}:", ""] if axis != KV else []
            print("\n".join([*([""] if number else []), *title, *lines]))
    return 0


def one_axis(rows: Rows, args: argparse.Namespace) -> list[str]:
    """The tables of one axis of one model."""
    if args.skills:
        return skills_table(rows, args.skills)
    lines = [] if args.versus else methods_table(rows)
    if versus := versus_table(rows, list(dict.fromkeys(row["ask"] for row in rows))):
        lines += [*([""] if lines else []), "Ours beside the best rivals of each budget:", "", *versus]
    return lines


if __name__ == "__main__":
    sys.exit(main())
