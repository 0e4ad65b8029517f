"""Whether a rerun reproduces committed results of rotatek-eval: every row's exact match and KL within the committed interval.

    python benchmarks/check_results.py benchmarks/results/rivals-tiny-qwen3-vl.csv rerun/results.csv

Rows are the same if mode, method, setting, axis and skill are; rows of a rival that is trained, if they were asked for the same budget
instead of the setting, because a training on another machine may keep a few other channels. Exit status 1 names the rows outside, 2 says
that the tables cannot be compared. What "within" means:

- of as many documents: the rerun's figure lies in the committed interval, to a document for exact match, which has steps of one;
- of fewer or more documents, nine at least: the two intervals meet. KL is mostly of a few documents, and a bootstrap that has none of those
  is too narrow, so that rows may be outside by chance: compare runs of equal documents where you can;
- KLs that are both below --negligible nats per answer token agree: they are rounding of another machine;
- bytes agree to --bytes of themselves, where the documents are as many (they are counted, not estimated); those of a trained rival may
  be fewer, and more as long as they are within the budget that it was asked for.

A budget at which a trained rival keeps what it keeps at the next larger one has no row of its own (methods.distinct); the larger one's
stands for it, if its bytes fit the smaller budget. What trained rivals keep otherwise than committed is said, and is no error.
A row that one table lacks is named, and is an error unless --some allows a part of the committed rows to be missing. Skills have too few
documents each for intervals to mean much, and are compared with --skills alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rotatek_compile.errors import RotateKError
from rotatek_compile.names import LEARNED
from rotatek_compile.runtime.rivals.registry import RIVALS
from rotatek_compile.suite import ALL, read_results

Row = dict[str, str]
Key = tuple[str, ...]
NEGLIGIBLE_KL = 1e-5
BYTES = 0.002
FEWEST = 9
NAMES = ("ask", "method", "setting", "axis", "skill")
ASKED = ("requested_budget", "key_budget", "keep_ratio")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """negligible: KL in nats per answer token below which two figures agree; bytes: relative."""

    negligible: float = NEGLIGIBLE_KL
    bytes: float = BYTES


def is_trained(row: Row) -> bool:
    """Whether what the method keeps comes from training or gradients, which no two machines compute alike."""
    method = row.get("method", "")
    return method in RIVALS and RIVALS[method].learned in LEARNED


def key_of(row: Row, by_budget: bool = True) -> Key:
    """What makes a row the same one; older results know one axis, and some no budgets (`by_budget` off).

    Raises:
        RotateKError: a budget is no number.
    """
    key = [row.get(name) or ("kv" if name == "axis" else "") for name in NAMES]
    if by_budget and is_trained(row) and (asked := [f"{name} {number(row, name):g}" for name in ASKED if row.get(name)]):
        key[NAMES.index("setting")] = ", ".join(asked)
    return tuple(key)


def number(row: Row, name: str) -> float:
    """A cell that has to be one; 0 where it is empty or missing.

    Raises:
        RotateKError: it is none.
    """
    try:
        return float(row.get(name) or 0)
    except ValueError:
        raise RotateKError(f"{row['method']} has {name} {row[name]!r}, which is no number; write the table again") from None


def stand_in(key: Key, row: Row, table: Mapping[Key, Row], tolerance: Tolerance) -> Row | None:
    """The row of a trained rival at the next larger budget, in a table that has none at the budget of `row`, if it fits that budget."""
    if not is_trained(row) or not row.get("requested_budget"):
        return None
    wanted, at = number(row, "requested_budget"), NAMES.index("setting")
    same = [one for other, one in table.items() if (*other[:at], *other[at + 1 :]) == (*key[:at], *key[at + 1 :])]
    larger = [one for one in same if number(one, "requested_budget") > wanted]
    found = min(larger, key=lambda one: number(one, "requested_budget"), default=None)
    most = max(number(row, "kv_budget") * number(row, "span_bytes_dense"), number(row, "span_bytes"))
    return found if found is not None and number(found, "span_bytes") <= most * (1 + tolerance.bytes) else None


def tables_of(old: Sequence[Row], new: Sequence[Row], tolerance: Tolerance, skills: bool = False) -> list[dict[Key, Row]]:
    """Rows of both by what they are, those that stand in among them.

    Raises:
        RotateKError: two rows of a table are the same one, or a budget is no number.
    """
    by_budget = all("requested_budget" in rows[0] for rows in (old, new))
    tables: list[dict[Key, Row]] = []
    for rows in (old, new):
        own = [row for row in rows if skills or row["skill"] == ALL]
        keys = [key_of(row, by_budget) for row in own]
        if twice := next((key for n, key in enumerate(keys) if key in keys[:n]), None):
            raise RotateKError(f"a table has two rows {words_of(twice)}; write it again")
        tables.append(dict(zip(keys, own, strict=True)))
    first, second = (dict(table) for table in tables)  # rows stand in for others, not for those that stand in
    for table, own, other in ((tables[0], first, second), (tables[1], second, first)):
        table |= {key: row for key in other if key not in own and (row := stand_in(key, other[key], own, tolerance))}
    return tables


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
        found += other_bytes(old, new, tolerance)
    return found


def other_bytes(old: Row, new: Row, tolerance: Tolerance) -> list[str]:
    """In which bytes a rerun of the same documents is not what was committed."""
    (span, kv), (new_span, new_kv) = ([float(row[f"{part}_bytes"]) for part in ("span", "kv")] for row in (old, new))
    pairs = [("span", span, new_span), ("kv", kv, new_kv)]
    if is_trained(old):
        budget = float(old.get("kv_budget") or 0) * float(old.get("span_bytes_dense") or 0)
        fits = 0 < new_span <= max(span, budget) * (1 + tolerance.bytes)
        pairs = [("span", span, span if fits else new_span), ("kv without span", kv - span, new_kv - new_span)]
    return [
        f"{part} bytes {now:.0f}, committed {was:.0f}"
        for part, was, now in pairs
        if not abs(now - was) <= tolerance.bytes * max(was, 100.0)
    ]


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
    tables = tables_of(old, new, tolerance, skills)
    both = [key for key in tables[0] if key in tables[1]]
    found = [f"{words_of(key)}: {'; '.join(said)}" for key in both if (said := outside(tables[0][key], tables[1][key], tolerance))]
    missing = [
        f"{words_of(key)}: only in the {('committed table', 'rerun')[n]}" for n in (0, 1) for key in tables[n] if key not in tables[1 - n]
    ]
    return found, missing, len(both)


def kept_otherwise(old: Sequence[Row], new: Sequence[Row], tolerance: Tolerance) -> list[str]:
    """Trained rivals whose setting is another than the committed one's at the same budget, in words."""
    committed, rerun = tables_of(old, new, tolerance)
    pairs = [(key, committed[key]["setting"], row["setting"]) for key, row in rerun.items() if is_trained(row) and key in committed]
    return [f"{words_of(key)}: keeps {now}, committed {was}" for key, was, now in pairs if was != now]


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
        tables, tolerance = [read_results(file) for file in (args.committed, args.rerun)], Tolerance(args.negligible, args.bytes)
        found, missing, count = compare(*tables, tolerance, args.skills)
        otherwise = kept_otherwise(*tables, tolerance)
    except (RotateKError, ValueError) as error:  # a cell that is no number
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in (*found, *missing, *otherwise):
        print(line)
    print(f"{count - len(found)} of {count} rows as committed, {len(missing)} in one table only")
    return int(bool(found) or not count or (bool(missing) and not args.some))


if __name__ == "__main__":
    sys.exit(main())
