"""Panels of the page of `rotatek-inspect --html` about what heads matter: knock-outs, cuts, and what budgets should cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .knockout import MATTERS
from .markup import short
from .plan import SIDES
from .plan_words import level_words
from .report_data import Numbers
from .report_panels import ENERGY, NAMES, VALUE_ENERGY, Panel, flat
from .report_plots import LEAST_KL, WIDTH, Scale, Series, chart, heat_map, logarithmic
from .report_predictions import Map

LEVEL_COLORS = "abcde"
LEAST_PREDICTED = 1e-8  # nats; sums of what was measured and extrapolated may lie below what is measured


def knockouts_panel(one: Numbers, every: Sequence[Numbers]) -> Panel:
    scale, found = logarithmic([v for a in every for v in flat(a.knockouts)]), one.diagnosis
    said = f"{found['share_above']:.0%} of {found['pairs']} pairs cost at least {MATTERS} nats alone (framed); "
    said += f"{found['pairs_for_90_percent']} of them carry 90 % of the sum."
    plot = heat_map(one.knockouts, scale, f"KL of single knock-outs per layer and head. {said}", marked_from=MATTERS)
    return Panel([("", plot)], said, _ends(scale), [_heads(one.knockouts)])


def cuts_panel(one: Numbers, every: Sequence[Numbers]) -> Panel:
    scale = logarithmic([v for a in every for side in a.cuts.values() for table in side.values() for v in flat(table)])
    plots, tables = [], []
    for side, levels in one.cuts.items():
        half = WIDTH / 2 if len(levels) > 1 or len(one.cuts) > 1 else WIDTH
        for level, table in levels.items():
            words = f"{NAMES[side]} cut to {level_words(level)}"
            plots.append((words, heat_map(table, scale, f"KL per layer and head with {words}.", half)))
        rows = [[f"{i}.{h}", *(float(t[i][h]) for t in levels.values())] for i, heads in one.plan.items() for h in range(len(heads))]
        head = ["layer.head", *(f"cut to {level_words(level)}" for level in levels)]
        tables.append((NAMES[side] if len(one.cuts) > 1 else "", head, rows))
    return Panel(plots, "", _ends(scale), tables)


def errors_panel(one: Numbers, every: Sequence[Numbers]) -> Panel:
    keys: dict[tuple[str, str], None] = {}
    plots, tables, said = [], [], []
    y = logarithmic([v for a in every for side in a.cuts.values() for t in side.values() for v in flat(t)])  # dots on the axis lie below
    for side, levels in one.cuts.items():
        x = logarithmic([v for a in every for t in a.errors.get(side, {}).values() for v in flat(t)], 1e-12)
        series, rows, found = [], [], []
        for n, (level, table) in enumerate(levels.items()):
            error, color, label = one.errors[side][level], LEVEL_COLORS[n % len(LEVEL_COLORS)], level_words(level)
            places = [(i, h) for i, heads in table.items() for h in range(len(heads))]
            points = [(float(error[i][h]), float(table[i][h])) for i, h in places]
            dots = zip(places, points, strict=True)
            words = [f"layer {i}, head {h}, cut to {label}: error {short(a)}, KL {short(b)}" for (i, h), (a, b) in dots]
            series.append(Series(points, "dots", color, words))
            keys[f"f-{color}", f"cut to {label}"] = None
            found.append(f"{rank_correlation([a for a, _ in points], [b for _, b in points]):.2f} at {label}")
            rows += [[f"{i}.{h}", label, a, b] for (i, h), (a, b) in zip(places, points, strict=True)]
        energy, several = ENERGY[one.basis or ""] if side == SIDES[0] else VALUE_ENERGY, len(one.cuts) > 1
        label = f"Measured KL of single cuts of {NAMES[side]} over the predicted {energy}."
        plots.append((NAMES[side] if several else "", chart(series, x, y, f"predicted: {energy}", "measured: KL, nats", label)))
        tables.append((NAMES[side] if several else "", ["layer.head", "cut to", "predicted", "measured KL"], rows))
        said.append(f"Rank correlation over heads{f', {NAMES[side]}' if several else ''}: {', '.join(found)}.")
    return Panel(plots, " ".join(said), list(keys), tables)


def budgets_panel(one: Numbers, every: Sequence[Numbers]) -> Panel:
    floor = LEAST_PREDICTED
    plans = [a.exact for a in every if a.exact is not None]
    seen = (
        [b.kl for a in every for b in [*a.budgets, *a.uniform]]
        + [b.kl for b in plans]
        + [a.measured for a in every if a.measured is not None]
    )
    x = Scale(min(b.bytes for a in every for b in [*a.budgets, *plans]), 1.0, True)
    y = logarithmic(seen, floor)
    lines = (("a", "predicted, allocated", one.budgets), ("d", "predicted, the same in every head", one.uniform))
    series, keys, said = [], [], ""
    for color, words, budgets in lines:
        if budgets:
            series.append(Series([(b.bytes, b.kl) for b in budgets if b.kl > floor], "line", color))
            keys.append((f"f-{color}", words))
    if one.exact is not None:
        words = f"this plan, predicted: KL {short(one.exact.kl)}"
        series.append(Series([(one.exact.bytes, max(one.exact.kl, floor))], "ring", "b", [words]))
        keys.append(("f-b", "predicted, this plan"))
        said = f"This plan takes {one.exact.bytes:.1%} of the bytes. Predicted KL {short(one.exact.kl)}"
        if one.measured is not None:
            series.append(Series([(one.exact.bytes, one.measured)], "ring", "c", [f"measured, whole plan: KL {short(one.measured)}"]))
            keys.append(("f-c", "measured, this plan as a whole"))
            said += f", measured {short(one.measured)} nats per answer token, on documents kept aside where there were any."
        else:
            said += "; the whole plan was not measured."
    x_label = "bytes of Keys and Values, over dense"
    plot = chart(series, x, y, x_label, "KL, nats per answer token", f"Predicted KL over budget. {said}", percent="x")
    tables = [(words, ["bytes over dense", "predicted KL"], [[f"{b.bytes:.2%}", b.kl] for b in some]) for _, words, some in lines if some]
    return Panel([("", plot)], said, keys, tables)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: Pearson's of the ranks, ties sharing their mean rank; 0 where one side is constant."""

    def ranked(values: Sequence[float]) -> np.ndarray:
        _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[inverse]

    x, y = ranked(a), ranked(b)
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0 else 0.0


def _heads(table: Map) -> tuple[str, list[str], list[list[Any]]]:
    most = max(len(row) for row in table.values())
    return "", ["layer", *(f"head {h}" for h in range(most))], [[i, *row.tolist()] for i, row in table.items()]


def _ends(scale: Scale) -> list[tuple[str, str]]:
    return [("none", f"{'≤ ' if scale.low <= LEAST_KL else ''}{short(scale.low)}"), ("full", f"{short(scale.high)} nats per answer token")]
