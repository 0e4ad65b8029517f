"""Markdown tables of an evaluation, from the results.csv that `rotatek-eval --output` wrote.

    python benchmarks/print_suite.py results.csv              # one line per method and setting, both modes beside each other
    python benchmarks/print_suite.py results.csv --skills     # exact match per skill, question asked after compression
    python benchmarks/print_suite.py results.csv --skills with
    python benchmarks/print_suite.py a.csv b.csv              # several models beside each other, question asked after compression
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rotatek_compile.errors import RotateKError
from rotatek_compile.suite import ALL, read_results

Rows = list[dict[str, str]]


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


def heading(rows: Rows) -> str:
    """What was measured, on what."""
    first = rows[0]
    versions = f"torch {first['torch']}, transformers {first['transformers']}"
    return f"{first['model']}, {first['samples']} documents of {first['data']}, {first['device']}, {first['dtype']}, {versions}"


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


def main() -> int:
    """Parse and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+")
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
        print("\n".join(models_table(tables)))
        return 0
    rows = tables[0]
    print("\n".join(skills_table(rows, args.skills) if args.skills else methods_table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
