"""Whether a rerun reproduces committed results of rotatek-eval: every row's exact match and KL within the committed interval.

    python benchmarks/check_results.py benchmarks/results/rivals-tiny-qwen3-vl.csv rerun/results.csv

Rows are the same if mode, method, setting, axis and skill are. Exit status 1 names the rows outside, 2 says that the tables cannot be
compared. What "within" means:

- of as many documents: the rerun's figure lies in the committed interval, to a document for exact match, which has steps of one;
- of fewer or more documents, nine at least: the two intervals meet. KL is mostly of a few documents, and a bootstrap that has none of those
  is too narrow, so that rows may be outside by chance: compare runs of equal documents where you can;
- KLs that are both below --negligible nats per answer token agree: they are rounding of another machine;
- bytes agree to --bytes of themselves, where the documents are as many (they are counted, not estimated).

A row that one table lacks is named, and is an error unless --some allows a part of the committed rows to be missing. Skills have too few
documents each for intervals to mean much, and are compared with --skills alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rotatek_compile.errors import RotateKError
from rotatek_compile.suite import ALL, read_results

Row = dict[str, str]
Key = tuple[str, ...]
NEGLIGIBLE_KL = 1e-5
BYTES = 0.002
FEWEST = 9
NAMES = ("ask", "method", "setting", "axis", "skill")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """negligible: KL in nats per answer token below which two figures agree; bytes: relative."""

    negligible: float = NEGLIGIBLE_KL
    bytes: float = BYTES


def key_of(row: Row) -> Key:
    """What makes a row the same one; older results know one axis."""
    return tuple(row.get(name) or ("kv" if name == "axis" else "") for name in NAMES)


def words_of(key: Key) -> str:
    """A row for people."""
    ask, method, setting, axis, skill = key
    more = "".join(f", {word}" for word, plain in ((axis, "kv"), (skill, ALL)) if word != plain)
    return f"{ask}: {method}" + (f" ({setting})" if setting else "") + more


def outside(old: Row, new: Row, tolerance: Tolerance) -> list[str]:
    """In what a rerun's row is not what was committed: sentences, none if it is."""
    found = []
    same = old["samples"] == new["samples"]
    slack = {"exact_match": 1 / int(new["samples"]), "kl": tolerance.negligible}
    for name, words in (("exact_match", "exact match"), ("kl", "KL per token")):
        low, high, value = (float(old[f"{name}{end}"]) for end in ("_low", "_high", ""))
        low, high = min(low, value) - slack[name], max(high, value) + slack[name]
        least, most = (float(new[name if same else f"{name}{end}"]) for end in ("_low", "_high"))
        if not (most >= low - 1e-9 and least <= high + 1e-9):  # also what is no number
            seen = f"{float(new[name]):.3g}" if same else f"[{least:.3g}, {most:.3g}]"
            found.append(f"{words} {seen}, committed {value:.3g} [{float(old[f'{name}_low']):.3g}, {float(old[f'{name}_high']):.3g}]")
    if same:
        for part in ("span", "kv"):
            was, now = float(old[f"{part}_bytes"]), float(new[f"{part}_bytes"])
            if not abs(now - was) <= tolerance.bytes * max(was, 1.0):
                found.append(f"{part} bytes {now:.0f}, committed {was:.0f}")
    return found


def compare(old: Sequence[Row], new: Sequence[Row], tolerance: Tolerance, skills: bool = False) -> tuple[list[str], list[str], int]:
    """Rows outside and rows missing, in words, and how many were compared.

    Raises:
        RotateKError: the tables are of different models or data.
    """
    for name in ("model", "data"):
        if old[0][name] != new[0][name]:
            raise RotateKError(
                f"the tables are of different things: {name} {old[0][name]} and {new[0][name]}; compare one with its own rerun"
            )
    counts = [int(rows[0]["samples"]) for rows in (old, new)]
    if counts[0] != counts[1] and min(counts) < FEWEST:
        raise RotateKError(f"{min(counts)} documents are too few to compare with {max(counts)}; measure {FEWEST} or more, or as many")
    tables = [{key_of(row): row for row in rows if skills or row["skill"] == ALL} for rows in (old, new)]
    both = [key for key in tables[0] if key in tables[1]]
    found = [f"{words_of(key)}: {'; '.join(said)}" for key in both if (said := outside(tables[0][key], tables[1][key], tolerance))]
    missing = [
        f"{words_of(key)}: only in the {('committed table', 'rerun')[n]}" for n in (0, 1) for key in tables[n] if key not in tables[1 - n]
    ]
    return found, missing, len(both)


def main() -> int:
    """Parse, compare, and say which rows are outside."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("committed", type=Path)
    parser.add_argument("rerun", type=Path)
    parser.add_argument("--negligible", type=float, default=NEGLIGIBLE_KL, metavar="NATS")
    parser.add_argument("--bytes", type=float, default=BYTES, metavar="SHARE")
    parser.add_argument("--skills", action="store_true", help="rows of single skills too")
    parser.add_argument("--some", action="store_true", help="rows may be missing")
    args = parser.parse_args()
    try:
        tables = [read_results(file) for file in (args.committed, args.rerun)]
        found, missing, count = compare(*tables, Tolerance(args.negligible, args.bytes), args.skills)
    except RotateKError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*found, *missing, f"{count - len(found)} of {count} rows as committed, {len(missing)} in one table only"]))
    return int(bool(found) or not count or (bool(missing) and not args.some))


if __name__ == "__main__":
    sys.exit(main())
