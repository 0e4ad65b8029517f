"""Tables of whole steps for README and docs, from the rows that bench_steps.py saved; print_decode.py prints them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]  # cells are text where they come from a file
TARGET = 0.85  # of the speed-up that the bytes allow
FULL = "full"  # the batch of a point: the largest that fits
COLUMNS = {
    "roofline": "roofline",
    "beyond_ms": "ms beyond the bytes",
    "over_best_dense": "over the best dense",
    "bytes_allow": "bytes allow",
    "reached": "reached",
}


def is_ours(row: Row) -> bool:
    return str(row["cache"]).startswith("ours")


def with_ratios(rows: list[Row]) -> list[Row]:
    """Rows with `roofline` (reading weights and cache at the rate of a device copy, over the time of the step), `beyond_ms` (the step
    less that reading) and, where a dense row of the same model and point is there, `over_best_dense` (tokens per second over those of the
    fastest), `bytes_allow` (what that would be if the reading were all there is to a step) and `reached` (the one over the other)."""
    out = []
    for row in rows:
        same = [other for other in rows if all(other[name] == row[name] for name in ("model", "point"))]
        dense = [other for other in same if not is_ours(other)]
        reading = step_gb(row) / float(row["copy_TBps"])  # GB over TB/s is ms
        found = {"roofline": reading / float(row["ms"]), "beyond_ms": float(row["ms"]) - reading}
        if dense and row not in dense:
            fastest = max(dense, key=lambda other: float(other["tokens_per_second"]))
            smallest = min(dense, key=lambda other: float(other["cache_gb"]))
            found["over_best_dense"] = float(row["tokens_per_second"]) / float(fastest["tokens_per_second"])
            found["bytes_allow"] = float(row["batch"]) / step_gb(row) / (float(smallest["batch"]) / step_gb(smallest))
            found["reached"] = found["over_best_dense"] / found["bytes_allow"]
        out.append(row | found)
    return out


def step_gb(row: Row) -> float:
    """GB that a step has to read: the weights and the cache."""
    return float(row["weights_gb"]) + float(row["cache_gb"])


def steps_table(rows: list[Row]) -> list[str]:
    """Whole steps of each model, dense and compressed, point by point; the largest batches; which rows reach the target."""
    first = rows[0]
    head = ["B", "T", "cache", "ms a step", "tokens/s", "cache GB", *COLUMNS.values()]
    lines = [f"{first['device']}, torch {first['torch']}, transformers {first['transformers']}, copy {float(first['copy_TBps']):.2f} TB/s"]
    for model, mine in by_model(rows):
        lines += ["", f"{model}, weights {float(mine[0]['weights_gb']):.1f} GB", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        points = list(dict.fromkeys(row["point"] for row in mine))
        for row in sorted(mine, key=lambda row: points.index(row["point"])):
            cells = [str(row["batch"]), str(row["tokens"]), str(row["cache"])]
            cells += [f"{float(row['ms']):.1f}", f"{float(row['tokens_per_second']):.0f}", f"{float(row['cache_gb']):.2f}"]
            cells += [f"{row[name]:.2f}" if name in row else "" for name in COLUMNS]
            lines.append("| " + " | ".join(cells) + " |")
        lines += largest_batches(mine) + targets(mine)
    return lines


def by_model(rows: list[Row]) -> Iterable[tuple[str, list[Row]]]:
    """Each model and its rows, with their ratios."""
    rows = with_ratios(rows)
    return [(model, [row for row in rows if row["model"] == model]) for model in dict.fromkeys(row["model"] for row in rows)]


def largest_batches(rows: list[Row]) -> list[str]:
    """For each length of text whose largest batches were tried, a sentence."""
    lines = []
    for point in dict.fromkeys(row["point"] for row in rows if str(row["point"]).startswith(FULL)):
        batches = {str(row["cache"]): int(row["batch"]) for row in rows if row["point"] == point}
        dense = max((n for name, n in batches.items() if not name.startswith("ours")), default=0)
        words = [f"{name}: {n}" + (f" ({n / dense:.1f} times)" if dense and name.startswith("ours") else "") for name, n in batches.items()]
        lines += ["", f"Largest batch at T {point.split('x')[-1]}: {'; '.join(words)}."]
    return lines


def targets(rows: list[Row]) -> list[str]:
    """Which rows reach 0.85 of what the bytes allow, and which do not."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for row in rows:
        if "reached" in row:
            found[row["reached"] >= TARGET].append(f"B {row['batch']}, T {row['tokens']}, {row['cache']} ({row['reached']:.2f})")
    if not any(found.values()):
        return []
    return [
        "",
        f"At least {TARGET} of what the bytes allow: {'; '.join(found[True]) or 'none'}. Less: {'; '.join(found[False]) or 'none'}.",
    ]


def reached(rows: list[Row]) -> list[str]:
    """What the README says of whole steps: captured rows of ours over the best dense one, at an equal batch and at the largest."""
    lines = [
        "| tokens per second over the best dense step (of what the bytes allow) | equal batches | largest batches that fit |",
        "|---|---|---|",
    ]
    for model, mine in by_model(rows):
        ours = [row for row in mine if "reached" in row and str(row["cache"]).endswith("captured")]
        full = [row for row in ours if str(row["point"]).startswith(FULL)]
        equal = [row for row in ours if row not in full]
        at = f", T {span((int(row['tokens']) for row in full), 0)}" if full else ""
        lines.append(f"| {model} | {ratios(equal)} | {ratios(full)}{at} |")
    return lines


def ratios(rows: list[Row]) -> str:
    """Tokens per second over those of the best dense row, and the share of what bytes allow."""
    return "{} ({})".format(*(span((row[name] for row in rows), 2) for name in ("over_best_dense", "reached"))) if rows else ""


def span(values: Iterable[float], digits: int) -> str:
    """`least to most`, or one number if they are written alike."""
    found = list(values)
    low, high = f"{min(found):.{digits}f}", f"{max(found):.{digits}f}"
    return low if low == high else f"{low} to {high}"
