"""Panels of the page of `rotatek-inspect --html`: what one artifact answers to one question, as plots, a sentence and tables.

Each function draws one artifact. It is given all that are shown, so that equal colours and heights mean equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from .artifact import IMAGE_TOKENS
from .knockout import MATTERS
from .markup import short
from .report_data import Map, Numbers
from .report_plots import LEAST_KL, WIDTH, Scale, Series, bars, chart, columns, heat_map, logarithmic, spectra

PARTS = {"Keys": "a", "Key codes": "a", "everything kept": "d", "Values": "b", "Key means": "c"}
LEVEL_COLORS = "abcde"
KINDS = {"visual": "image Keys", "text": "text Keys"}
ENERGY = {
    "two-sided": "expected squared logit error",
    "pca": "Key energy",
    "paper": "Key energy weighted by query norms",
}  # what a basis's spectrum is of (bases.py)


@dataclass(frozen=True, slots=True)
class Panel:
    """One artifact's plots and the numbers behind them; `without` says why there are none.

    plots: pictures and their captions. keys: class of the style sheet and words, for colours. tables: title, head, rows.
    """

    plots: Sequence[tuple[str, Element]] = ()
    said: str = ""
    keys: Sequence[tuple[str, str]] = ()
    tables: Sequence[tuple[str, Sequence[Any], Sequence[Sequence[Any]]]] = ()
    without: str = ""


def ranks_panel(one: Numbers, every: Sequence[Numbers]) -> Panel:
    scale = Scale(0, max(max(a.dims.values()) for a in every))
    said = f"{sum(int(r.sum()) for r in one.ranks.values())} directions over {sum(len(r) for r in one.ranks.values())} heads; "
    none = sum(int((r == 0).sum()) for r in one.ranks.values())
    said += f"{none} of them keep none." if none else "each keeps some."
    keys = [("none", "0"), ("full", f"{scale.high:.0f} directions")]
    return Panel([("", heat_map(one.ranks, scale, f"Directions kept per layer and head. {said}"))], said, keys, [_heads(one.ranks)])


def knockouts_panel(one: Numbers, every: Sequence[Numbers]) -> Panel:
    scale, found = logarithmic([v for a in every for v in _flat(a.knockouts)]), one.diagnosis
    said = f"{found['share_above']:.0%} of {found['pairs']} pairs cost at least {MATTERS} nats alone (framed); "
    said += f"{found['pairs_for_90_percent']} of them carry 90 % of the sum."
    plot = heat_map(one.knockouts, scale, f"KL of single knock-outs per layer and head. {said}", marked_from=MATTERS)
    return Panel([("", plot)], said, _ends(scale), [_heads(one.knockouts)])


def cuts_panel(one: Numbers, every: Sequence[Numbers]) -> Panel:
    scale = logarithmic([v for a in every for table in a.cuts.values() for v in _flat(table)])
    half = WIDTH / 2 if len(one.cuts) > 1 else WIDTH
    plots = [
        (f"cut to {level} directions", heat_map(table, scale, f"KL per layer and head when cut to {level} directions.", half))
        for level, table in one.cuts.items()
    ]
    rows = [[f"{i}.{h}", *(float(t[i][h]) for t in one.cuts.values())] for i in one.ranks for h in range(len(one.ranks[i]))]
    return Panel(plots, "", _ends(scale), [("", ["layer.head", *(f"cut to {level}" for level in one.cuts)], rows)])


def spectra_panel(one: Numbers, every: Sequence[Numbers]) -> Panel:
    kinds = {kind: words for kind, words in KINDS.items() if f"{kind}.key" in one.spectra}
    over = one.spectra.get("text.key", {}) if one.main != "text" else {}
    label = f"Spectra of {KINDS[one.main]} per layer and head, with the kept part."
    plot, tables = spectra(one.spectra[f"{one.main}.key"], one.ranks, label, over), []
    for kind, words in kinds.items():
        table, kept = one.spectra[f"{kind}.key"], one.kept(kind)
        needed = [one.needed(f"{kind}.key", share) for share in (0.9, 0.99, 0.999)]
        rows = [
            [f"{i}.{h}", int(rank), float(kept[i][h]), *(int(n[i][h]) for n in needed), float(table[i][h, rank:].sum())]
            for i, ranks in one.ranks.items()
            for h, rank in enumerate(ranks)
        ]
        tables.append((words, ["layer.head", "kept", "share of energy", "for 90 %", "for 99 %", "for 99.9 %", "energy cut"], rows))
    keys = [("hi", f"{KINDS[one.main]}, kept"), ("off", f"{KINDS[one.main]}, cut"), *([("f-b", KINDS["text"])] if over else [])]
    return Panel([("", plot)], f"Energy: {ENERGY[one.basis or '']}.", keys, tables)


def variance_panel(one: Numbers, every: Sequence[Numbers]) -> Panel:
    kept = {kind: one.kept(kind) for kind in ("visual", "text") if f"{kind}.key" in one.spectra}
    least = min((v for a in every for kind in ("visual", "text") for v in _flat(a.kept(kind))), default=0.0)
    x, y = _layers(every), Scale(math.floor(10 * least) / 10 if least < 1 else 0.0, 1.0)
    colors, series = {"visual": "a", "text": "b"}, []
    for kind, table in kept.items():
        words = [f"layer {i}, head {h}: {short(100 * v)} %" for i, row in table.items() for h, v in enumerate(row.tolist())]
        dots = [(float(i), v) for i, row in table.items() for v in row.tolist()]
        series += [Series(dots, "dots", colors[kind], words), Series(_means(table), "line", colors[kind])]
    shares = chart(
        series, x, y, "layer", "energy in the kept directions: each head, and the mean", "Share of Key energy kept, by layer.", percent="y"
    )
    names = {
        "visual.key": ("image Keys", "a"),
        "text.key": ("text Keys", "b"),
        "visual.value": ("image Values", "c"),
        "text.value": ("text Values", "c"),
    }
    needed = {name: one.needed(name, 0.99) for name in names if name in one.spectra}
    lines = [Series(_means(table), "line", names[name][1]) for name, table in needed.items()]
    widest = Scale(0, max(max(a.dims.values()) for a in every))
    directions = chart(
        lines,
        x,
        widest,
        "layer",
        "directions that hold 99 % of the energy, mean over heads",
        "Directions that hold 99 % of the energy, mean over heads, by layer.",
    )
    columns_ = [*kept.values(), *needed.values()]
    head = ["layer", *(f"{names[f'{k}.key'][0]}: kept" for k in kept), *(f"{names[n][0]}: for 99 %" for n in needed)]
    rows = [[i, *(float(t[i].mean()) for t in columns_)] for i in one.ranks]
    keys = [(f"f-{color}", words) for name, (words, color) in names.items() if name in one.spectra]
    plots = [("", shares), ("", directions)]
    return Panel(plots, "", keys, [("means over heads", head, rows)])


def angles_panel(one: Numbers, every: Sequence[Numbers]) -> Panel:
    overlap = {i: (np.cos(np.deg2rad(a)) ** 2).mean(1) for i, a in one.angles.items()}
    chance = float(np.mean([a.shape[1] / one.dims[i] for i, a in one.angles.items()]))
    said = f"Mean squared cosine {short(float(np.mean(_flat(overlap))))}; unrelated subspaces of this size have {chance:.2f}."
    longest = max(a.shape[1] for b in every for a in b.angles.values())
    lines = [Series([(n + 1.0, v) for n, v in enumerate(a.mean(0).tolist())], "thin", "a") for a in one.angles.values()]
    if len({a.shape[1] for a in one.angles.values()}) == 1:
        middle = np.median(np.concatenate(list(one.angles.values())), 0)
        lines.append(Series([(n + 1.0, v) for n, v in enumerate(middle.tolist())], "line", "b"))
    curve = chart(lines, Scale(1, max(longest, 2)), Scale(0, 90), "angle, smallest first", "degrees", "Principal angles by layer.")
    grid = heat_map(overlap, Scale(0, 1), f"Overlap of image and text subspaces per layer and head. {said}")
    rows = [
        [f"{i}.{h}", *(float(v) for v in (a[h, 0], np.median(a[h]), a[h, -1], overlap[i][h]))]
        for i, a in one.angles.items()
        for h in range(len(a))
    ]
    head = ["layer.head", "smallest, degrees", "median", "largest", "mean cos²"]
    plots = [("overlap: mean cos², 0 to 1", grid), ("", curve)]
    return Panel(plots, said, [("f-a", "mean of a layer's heads"), ("f-b", "median of all heads")], [("", head, rows)])


def errors_panel(one: Numbers, every: Sequence[Numbers]) -> Panel:
    floor = LEAST_KL  # dots on the axis lie below it
    x = logarithmic([v for a in every for r in a.cuts for v in _flat(a.discarded(r))], 1e-12)
    y = logarithmic([v for a in every for t in a.cuts.values() for v in _flat(t)], floor)
    series, keys, rows, said = [], [], [], []
    for n, (level, table) in enumerate(one.cuts.items()):
        error, color = one.discarded(level), LEVEL_COLORS[n % len(LEVEL_COLORS)]
        places = [(i, h) for i, heads in table.items() for h in range(len(heads))]
        points = [(float(error[i][h]), float(table[i][h])) for i, h in places]
        words = [
            f"layer {i}, head {h}, cut to {level}: error {short(a)}, KL {short(b)}" for (i, h), (a, b) in zip(places, points, strict=True)
        ]
        series.append(Series(points, "dots", color, words))
        keys.append((f"f-{color}", f"cut to {level}"))
        said.append(f"{rank_correlation([a for a, _ in points], [b for _, b in points]):.2f} at {level}")
        rows += [[f"{i}.{h}", level, a, b] for (i, h), (a, b) in zip(places, points, strict=True)]
    energy = ENERGY[one.basis or ""]
    plot = chart(series, x, y, f"predicted: {energy}", "measured: KL, nats", f"Measured KL of single cuts over the predicted {energy}.")
    words_ = f"Rank correlation over heads: {', '.join(said)}."
    return Panel([("", plot)], words_, keys, [("", ["layer.head", "cut to", "predicted", "measured KL"], rows)])


def budgets_panel(one: Numbers, every: Sequence[Numbers]) -> Panel:
    floor = 1e-8
    seen = [v for a in every for b in a.budgets for v in (b.allocated, b.uniform)]
    y = logarithmic(seen + [v for a in every for v in (a.predicted, a.measured) if v is not None], floor)
    series = [
        Series([(b.share, v) for b in one.budgets if (v := getattr(b, name)) > floor], "line", color)
        for name, color in (("allocated", "a"), ("uniform", "b"))
    ]
    keys = [("f-a", "predicted, allocated ranks"), ("f-b", "predicted, uniform ranks")]
    share = sum(float(r.sum()) for r in one.ranks.values()) / sum(one.dims[i] * len(r) for i, r in one.ranks.items())
    said = f"This plan keeps {share:.1%} of the Key directions. Predicted KL {short(one.predicted or 0.0)}"
    if one.measured is not None:
        series.append(Series([(share, one.measured)], "ring", "c", [f"measured, whole plan: KL {short(one.measured)}"]))
        keys.append(("f-c", "measured, this plan as a whole"))
        said += f", measured {short(one.measured)} nats per answer token, on documents kept aside where there were any."
    else:
        said += "; the whole plan was not measured."
    plot = chart(
        series, Scale(0, 1), y, "Key directions kept", "KL, nats per answer token", f"Predicted KL over budget. {said}", percent="x"
    )
    rows = [[f"{b.share:.1%}", f"{b.bytes:.1%}", b.allocated, b.uniform] for b in one.budgets]
    return Panel([("", plot)], said, keys, [("", ["Key directions", "bytes of a coded token", "allocated", "uniform"], rows)])


def bytes_panel(one: Numbers, every: Sequence[Numbers]) -> Panel:
    rows = {
        "stock cache": {p: sum(t.values()) for p, t in one.dense.items()},
        "this artifact": {p: sum(t.values()) for p, t in one.parts.items()},
    }
    dense, kept = (sum(row.values()) for row in rows.values())
    said = f"{IMAGE_TOKENS} coded tokens take {kept / 1024:,.0f} KiB of {dense / 1024:,.0f} KiB ({kept / dense:.1%})."
    by_layer = {i: sum(t[i] for t in one.dense.values()) for i in one.dense["Keys"]}
    plots = [
        ("all layers", bars(rows, PARTS, f"Bytes by part. {said}", 1024.0, "KiB")),
        ("by layer, of its stock bytes", columns(one.parts, PARTS, by_layer, "Bytes by part and layer, over the dense bytes.")),
    ]
    names: dict[str, list[str]] = {}
    for part in dict.fromkeys([*one.dense, *one.parts]):
        names.setdefault(f"f-{PARTS[part]}", []).append(part)
    keys = [(color, " or ".join(words)) for color, words in names.items()]
    lines = [[i, *(int(t[i]) for t in one.dense.values()), *(int(t[i]) for t in one.parts.values())] for i in by_layer]
    head = ["layer", *(f"stock {p}" for p in one.dense), *one.parts]
    return Panel(plots, said, keys, [("bytes", head, lines)])


def difference(first: Numbers, second: Numbers) -> Element | None:
    """Map of ranks of the second artifact minus the first; None for different shapes or if one keeps no directions."""
    if not first.ranks or {i: len(r) for i, r in first.ranks.items()} != {i: len(r) for i, r in second.ranks.items()}:
        return None
    table = {i: (second.ranks[i] - r).tolist() for i, r in first.ranks.items()}
    return heat_map(
        table,
        Scale(0, max(1, *(abs(v) for v in _flat(table)))),
        "Directions that the second artifact keeps more (+) or less (-).",
        diverging=True,
    )


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: Pearson's of the ranks, ties sharing their mean rank; 0 where one side is constant."""

    def ranked(values: Sequence[float]) -> np.ndarray:
        _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[inverse]

    x, y = ranked(a), ranked(b)
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0 else 0.0


def _flat(table: Any) -> list[float]:
    return [float(v) for row in table.values() for v in row]


def _means(table: Map) -> list[tuple[float, float]]:
    return [(float(i), float(row.mean())) for i, row in table.items()]


def _layers(every: Sequence[Numbers]) -> Scale:
    return Scale(0, max(1, *(i for a in every for i in a.dims)))


def _heads(table: Map) -> tuple[str, list[str], list[list[Any]]]:
    most = max(len(row) for row in table.values())
    return "", ["layer", *(f"head {h}" for h in range(most))], [[i, *row.tolist()] for i, row in table.items()]


def _ends(scale: Scale) -> list[tuple[str, str]]:
    return [("none", f"{'≤ ' if scale.low <= LEAST_KL else ''}{short(scale.low)}"), ("full", f"{short(scale.high)} nats per answer token")]
