"""What the rows of bench_rap.py are, their table, and runs over single ratios put together to one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import read_csv, versions

from rotatek_compile.errors import RotateKError
from rotatek_compile.rap_maps import REPAIRS

SETTINGS = ("calib", "seed", "measured_on", "recover_batch")  # columns that older results do not have
ABOUT = ("model", "data", "device", "dtype", "torch", "transformers", "num_samples", "recover", "rates", "documents", "perplexity")
FIGURES = ("pairs", "values", "documents", "kl", "kl_low", "kl_high", "perplexity", "exact_match")
LEAST = 1e-2  # of what pruning costs: a way on which training goes less is none


@dataclass(frozen=True, slots=True)
class Way:
    """One row: how a plan is made, and whether it is trained afterwards."""

    score: str
    budget: str
    repairs: tuple[str, ...] = ()
    trained: bool = False

    @property
    def name(self) -> str:
        return f"{self.score} / {self.budget}"


PUBLISHED = Way("fisher", "published")
OURS = Way("logit", "sensitivity", REPAIRS)
TRAINED = {Way("fisher", "published", (), True): "published", Way("logit", "sensitivity", REPAIRS, True): "ours"}
WAYS = (
    PUBLISHED,
    Way("fisher-weight", "published"),
    Way("logit", "published"),
    *(Way("logit", "published", (repair,)) for repair in REPAIRS),
    Way("fisher", "published", REPAIRS),
    Way("logit", "published", REPAIRS),
    Way("fisher", "sensitivity"),
    Way("fisher", "sensitivity", REPAIRS),
    Way("logit", "sensitivity"),
    OURS,
    *TRAINED,
)


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One model's table as markdown, from rows as a CSV has them."""
    first, dense = rows[0], next((row for row in rows if row["way"] == "dense"), None)
    trained = any(int(row["trained"]) for row in rows)
    steps = f", recovery of {first['recover']} steps at the best of {first['rates']}" if trained else ""
    head = f"{first['model']}, {first['documents']} documents of {first['data']}, {versions(dict(first))}{steps}"
    out = [
        head,
        "",
        "| keep ratio | score / budget | repair | trained | KL per token | perplexity | exact match | closed: KL, log perplexity |",
    ]
    out.append("|---|---|---|---|---|---|---|---|")
    for ratio, group in itertools.groupby(rows, key=lambda row: float(row["keep_ratio"])):
        own = list(group)
        published = [row for row in own if (row["way"], row["repairs"]) == (PUBLISHED.name, "")]
        ends = {int(row["trained"]): row for row in published}
        for row in own:
            repaired = "all" if row["repairs"] == "+".join(REPAIRS) else row["repairs"] or "-"
            kl = f"{float(row['kl']):.2g} [{float(row['kl_low']):.2g}, {float(row['kl_high']):.2g}]"
            cells = [f"{ratio:g}", row["way"], repaired, "yes" if int(row["trained"]) else "-", kl]
            cells += [f"{float(row['perplexity']):.4g}", f"{float(row['exact_match']):.3f}", closed(row, ends, dense)]
            out.append(f"| {' | '.join(cells)} |")
    return out


def closed(row: Mapping[str, Any], ends: Mapping[int, Mapping[str, Any]], dense: Mapping[str, Any] | None = None) -> str:
    """How far a row goes from the published method without training to that with training, in KL and in log perplexity.

    "-" where there is no such way: training made it worse, or brought it less than a hundredth (`LEAST`) nearer to the dense model.
    """
    if len(ends) < 2:
        return "-"
    found = []
    for name, scale in (("kl", float), ("perplexity", lambda x: math.log(float(x)))):
        begin, end, here = (scale(r[name]) for r in (ends[0], ends[1], row))
        least = LEAST * (begin - (scale(dense[name]) if dense else 0.0))
        found.append(f"{(begin - here) / (begin - end):.2f}" if begin - end > max(least, 0.0) else "-")
    return ", ".join(found)


def merged(files: Sequence[Path]) -> list[dict[str, str]]:
    """Rows of several runs, the largest ratio first, in the order of `WAYS`; the dense row is that of the first.

    A file may have a ratio that another has if it repeats a row of it with the same figures and adds others; what is repeated is kept as
    the first file has it. The same proves that a file without the columns `SETTINGS`, which older ones lack, had these settings.

    Raises:
        RotateKError: runs of other documents, devices or settings, or a ratio that two of them have although neither holds.
    """
    rows: list[dict[str, str]] = []
    known: dict[tuple[str, ...], dict[str, str]] = {}
    settings: dict[str, str] = {}
    for file in files:
        own = read_csv(file)
        pruned = [row for row in own if row["way"] != "dense"]
        again = [row for row in pruned if _key(row) in known]
        told = {name: own[0][name] for name in SETTINGS if own[0].get(name)}
        other = bool(rows) and any(own[0].get(name) != rows[0].get(name) for name in ABOUT)
        other |= any(row.get(name) != known[_key(row)].get(name) for row in again for name in FIGURES)
        other |= any(settings.get(name, value) != value for name, value in told.items())
        if other or (rows and not again and told.keys() != settings.keys()):
            raise RotateKError(f"{file} is not of the same run as {files[0]}")
        adds = {row["keep_ratio"] for row in pruned if _key(row) not in known}
        shared = {row["keep_ratio"] for row in again}
        if twice := {key[0] for key in known} & {row["keep_ratio"] for row in pruned} - (adds & shared):
            raise RotateKError(f"{file} has ratio {', '.join(sorted(twice))} again; merge every ratio once, or rows that are new")
        settings |= told
        rows += [row for row in (pruned if rows else own) if _key(row) not in known]
        known |= {_key(row): row for row in rows if row["way"] != "dense"}
    order = [_key_of(way) for way in WAYS]
    return sorted(rows, key=lambda row: (-float(row["keep_ratio"]), order.index(_key(row)[1:]) if _key(row)[1:] in order else -1))


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of all rows, in the order of one that has most."""
    return list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return row["keep_ratio"], row["way"], row["repairs"], row["trained"]


def _key_of(way: Way) -> tuple[str, ...]:
    return way.name, "+".join(way.repairs), str(int(way.trained))
