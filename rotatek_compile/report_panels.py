"""Panels of the page of `rotatek-inspect --html` about what is kept, as plots, a sentence and tables; report_costs.py has what it costs.

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
from .markup import short
from .plan import SIDES
from .plan_words import NATIVE_BITS, slab_words
from .report_data import Numbers
from .report_plots import WIDTH, Scale, Series, bars, chart, columns, heat_map, spectra
from .report_predictions import Map

PARTS = {"Keys": "a", "everything kept": "d", "Values": "b", "scales": "e", "means": "c"}
NAMES = {"key": "Keys", "value": "Values"}
COLORS = {"visual.key": "a", "text.key": "b", "visual.value": "c", "text.value": "d"}  # of spectra
KINDS = {"visual": "image", "text": "text"}
ENERGY = {
    "two-sided": "expected squared logit error",
    "pca": "Key energy",
    "paper": "Key energy weighted by query norms",
}  # what a basis's spectrum is of (bases.py)
VALUE_ENERGY = "expected squared error of the layer's output"
PRECISIONS = (("hi", "native"), ("hi8", "8 bit"), ("hi4", "4 bit"), ("off", "cut"))


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
    widest, plots, said = Scale(0, max(max(a.dims.values()) for a in every)), [], []
    for side, name in NAMES.items():
        ranks, bits, slabs = one.ranks(side), one.bits(side), one.slabs(side)
        channels = sum(one.dims[i] * len(row) for i, row in bits.items())
        mean = sum(one.dims[i] * float(row.sum()) for i, row in bits.items()) / channels
        if one.raw(side) and side != SIDES[0]:
            said.append(f"{name}: stored as they are.")
            continue
        none = sum(int((r == 0).sum()) for r in ranks.values())
        count = f"{sum(int(r.sum()) for r in ranks.values())} directions over {sum(len(r) for r in ranks.values())} heads"
        said.append(f"{name}: {count}, {short(mean)} bits per channel; {f'{none} of them keep none' if none else 'each keeps some'}.")
        plots.append((f"{name}: directions", ranks, widest))
        if any(slab.scaled for heads in slabs.values() for slab in heads):
            plots.append((f"{name}: bits per channel", bits, Scale(0, NATIVE_BITS)))
    words, width = " ".join(said), WIDTH / 2 if len(plots) > 1 else WIDTH
    maps = [
        (title if len(plots) > 1 else "", heat_map(t, scale, f"{title} per layer and head. {words}", width)) for title, t, scale in plots
    ]
    full = f"{widest.high:.0f} directions" + (f" or {NATIVE_BITS} bits" if any("bits" in title for title, _, _ in plots) else "")
    rows = [
        [f"{i}.{h}", *(slab_words(getattr(head, side), one.dims[i]) for side in SIDES)]
        + [*(float(one.bits(side)[i][h]) for side in SIDES), head.bytes_per_token]
        for i, heads in one.plan.items()
        for h, head in enumerate(heads)
    ]
    head_ = ["layer.head", "Keys", "Values", "Key bits", "Value bits", "bytes per token"]
    return Panel(maps, words, [("none", "0"), ("full", full)], [("directions × bits", head_, rows)])


def spectra_panel(one: Numbers, every: Sequence[Numbers]) -> Panel:
    coded = [side for side in SIDES if side == SIDES[0] or not one.raw(side)]
    plots, tables, used = [], [], {"cut"}
    for side in coded:
        over = one.spectra.get(f"text.{side}", {}) if one.main != "text" else {}
        label = f"Spectra of {KINDS[one.main]} {NAMES[side]} per layer and head, with the kept part."
        plot = spectra(one.spectra[f"{one.main}.{side}"], one.slabs(side), label, over)
        plots.append((f"{KINDS[one.main]} {NAMES[side]}" if len(coded) > 1 else "", plot))
        slabs = [slab for heads in one.slabs(side).values() for slab in heads]
        used |= {words for n, (_, words) in enumerate(PRECISIONS[:3]) if any(slab[n] for slab in slabs)}
    for name in (f"{kind}.{side}" for side in coded for kind in KINDS if f"{kind}.{side}" in one.spectra):
        table, kept, ranks = one.spectra[name], one.kept(name), one.ranks(name.rpartition(".")[2])
        needed = [one.needed(name, share) for share in (0.9, 0.99, 0.999)]
        rows = [
            [f"{i}.{h}", int(rank), float(kept[i][h]), *(int(n[i][h]) for n in needed), float(table[i][h, rank:].sum())]
            for i, row in ranks.items()
            for h, rank in enumerate(row)
        ]
        tables.append((_words(name), ["layer.head", "kept", "share of energy", "for 90 %", "for 99 %", "for 99.9 %", "energy cut"], rows))
    keys = [(color, words) for color, words in PRECISIONS if words in used]
    if one.main != "text" and any(name.startswith("text.") for name in one.spectra):
        keys.append(("f-b", "text"))
    energy = f"Energy of Keys: {ENERGY[one.basis or '']}" + (f"; of Values: {VALUE_ENERGY}." if len(coded) > 1 else ".")
    return Panel(plots, energy, keys, tables)


def variance_panel(one: Numbers, every: Sequence[Numbers]) -> Panel:
    kept = {name: one.kept(name) for name in one.spectra if not (name.endswith(".value") and one.raw("value"))}
    shown = [v for a in every for name in a.spectra if name.endswith(".key") or not a.raw("value") for v in flat(a.kept(name))]
    least = min(shown, default=0.0)
    x, y = _layers(every), Scale(math.floor(10 * least) / 10 if least < 1 else 0.0, 1.0)
    series = []
    for name, table in kept.items():
        words = [f"layer {i}, head {h}: {short(100 * v)} %" for i, row in table.items() for h, v in enumerate(row.tolist())]
        dots = [(float(i), v) for i, row in table.items() for v in row.tolist()]
        series += [Series(dots, "dots", COLORS[name], words), Series(_means(table), "line", COLORS[name])]
    shares = chart(
        series, x, y, "layer", "energy in the kept directions: each head, and the mean", "Share of energy kept, by layer.", percent="y"
    )
    needed = {name: one.needed(name, 0.99) for name in one.spectra}
    lines = [Series(_means(table), "line", COLORS[name]) for name, table in needed.items()]
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
    head = ["layer", *(f"{_words(n)}: kept" for n in kept), *(f"{_words(n)}: for 99 %" for n in needed)]
    rows = [[i, *(float(t[i].mean()) for t in columns_)] for i in one.plan]
    keys = [(f"f-{COLORS[name]}", _words(name)) for name in one.spectra]
    plots = [("", shares), ("", directions)]
    return Panel(plots, "", keys, [("means over heads", head, rows)])


def angles_panel(one: Numbers, every: Sequence[Numbers]) -> Panel:
    overlap = {i: (np.cos(np.deg2rad(a)) ** 2).mean(1) for i, a in one.angles.items()}
    chance = float(np.mean([a.shape[1] / one.dims[i] for i, a in one.angles.items()]))
    said = f"Mean squared cosine {short(float(np.mean(flat(overlap))))}; unrelated subspaces of this size have {chance:.2f}."
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


def differences(first: Numbers, second: Numbers) -> list[tuple[str, Element]]:
    """Maps of what the second artifact keeps more of than the first; none for different shapes or if one keeps no directions."""
    if not first.plan or {i: len(r) for i, r in first.plan.items()} != {i: len(r) for i, r in second.plan.items()}:
        return []
    found = {}
    for side, name in NAMES.items():
        for what, one, two in (
            ("directions", first.ranks(side), second.ranks(side)),
            ("bits per channel", first.bits(side), second.bits(side)),
        ):
            found[f"{name}: {what}"] = {i: (two[i] - row).tolist() for i, row in one.items()}
    if first.raw("value") and second.raw("value"):
        found = {"Keys: directions": found["Keys: directions"]}
    label = "that the second artifact keeps more (+) or less (-)."
    width = WIDTH / 2 if len(found) > 1 else WIDTH
    return [
        (title, heat_map(table, Scale(0, max(1, *(abs(v) for v in flat(table)))), f"{title} {label}", width, diverging=True))
        for title, table in found.items()
    ]


def _words(name: str) -> str:
    """`visual.key` as people say it."""
    kind, _, side = name.rpartition(".")
    return f"{KINDS[kind]} {NAMES[side]}"


def flat(table: Any) -> list[float]:
    """All numbers of a map."""
    return [float(v) for row in table.values() for v in row]


def _means(table: Map) -> list[tuple[float, float]]:
    return [(float(i), float(row.mean())) for i, row in table.items()]


def _layers(every: Sequence[Numbers]) -> Scale:
    return Scale(0, max(1, *(i for a in every for i in a.dims)))
