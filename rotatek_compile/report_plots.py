"""Plots of the page of `rotatek-inspect --html`, as SVG whose colours the page's style sheet gives.

Written here and not by matplotlib: a page then follows the reader's light or dark scheme, is as narrow as a phone without shrinking its
letters, tells the value of a cell under the pointer, and needs no extra package. Widths are in units of about a pixel on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from xml.etree.ElementTree import Element

import numpy as np

from .kernels.slabs import Slabs
from .markup import node, short, tenth
from .plan_words import slab_words

WIDTH = 360.0
LEAST_KL = 1e-6  # nats per answer token: below it a logarithmic colour or axis shows rounding
LEFT, RIGHT, TOP, BOTTOM = 42.0, 18.0, 22.0, 36.0
NUMBER_WIDTH = 24.0  # of a cell from which its number fits
MOST_WORDS = 100  # dots of one series from which nobody points at one: the table has them
DEEPEST_SPECTRUM = 1e-6  # of a head's largest energy, where a spectrum's picture ends


@dataclass(frozen=True, slots=True)
class Scale:
    """Values to shares of an axis or a colour: 0 at `low`, 1 at `high`, outside clipped."""

    low: float
    high: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, x = (math.log10(max(v, 1e-300)) if self.logarithmic else v for v in (self.low, self.high, value))
        return min(max((x - low) / (high - low), 0.0), 1.0) if high > low else 0.0

    def ticks(self, most: int = 6) -> list[float]:
        """Round values between the ends."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**n for n in range(first, last + 1, max(1, math.ceil((last - first + 1) / most)))]
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        step = next(s for n in range(-12, 13) for s in (1 * 10.0**n, 2 * 10.0**n, 5 * 10.0**n) if span / s < most)
        return [step * n for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def logarithmic(values: Sequence[float], least: float = LEAST_KL) -> Scale:
    """From the power of ten below the values to the one above, no deeper than `least`."""
    seen = [v for v in values if v > least]
    if not seen:
        return Scale(least, least * 10, True)
    low, high = math.floor(math.log10(min(seen))), math.ceil(math.log10(max(seen)))
    return Scale(10.0**low, 10.0 ** max(high, low + 1), True)


@dataclass(frozen=True, slots=True)
class Series:
    """Points of a chart. look: `line`, `thin` (one of many), `dots` or `ring` (one that stands out); color: a class of the style sheet.

    words: what the pointer reads, for each point.
    """

    points: Sequence[tuple[float, float]]
    look: str
    color: str
    words: Sequence[str] = ()


def heat_map(
    table: Mapping[int, np.ndarray | Sequence[float]],
    scale: Scale,
    label: str,
    width: float = WIDTH,
    marked_from: float = math.inf,
    diverging: bool = False,
) -> Element:
    """Layers down, KV heads across; depth of colour is the value, written into the cell where it fits and is a whole number.

    Args:
        marked_from: cells of at least this value are framed.
        diverging: colours say the sign, too.
    """
    heads = max((len(row) for row in table.values()), default=1)
    left, top, right = 26.0, 16.0, 2.0
    wide = (width - left - right) / heads
    high = min(max(400.0 / max(len(table), 1), 9.0), 18.0, wide)
    whole = all(float(v).is_integer() for row in table.values() for v in row)
    cells, parts = [], []
    every = max(1, math.ceil(11 / high))
    for n, (layer, row) in enumerate(table.items()):
        y = top + n * high
        if n % every == 0:
            parts.append(_text(left - 4, y + high / 2 + 3.5, str(layer), "end"))
        for h, value in enumerate(row):
            depth, x = scale(abs(value)), left + h * wide
            color = "less" if diverging and value < 0 else None
            words = node("title", f"layer {layer}, head {h}: {short(float(value))}")
            box = f"M{tenth(x)} {tenth(y)}h{tenth(max(wide - 1.5, 1))}v{tenth(max(high - 1.5, 1))}H{tenth(x)}z"
            marked = "marked" if value >= marked_from else color
            cells.append(node("path", words, d=box, fill_opacity=f"{depth:.2f}".removeprefix("0") if depth < 1 else None, class_=marked))
            if whole and wide >= NUMBER_WIDTH and high >= 11 and (value or not diverging):
                sign = "+" if diverging and value > 0 else ""
                tone = "on" if depth > 0.7 else "ink"
                parts.append(_text(x + wide / 2 - 0.7, y + high / 2 + 2.8, f"{sign}{int(value)}", "middle", tone))
    step = max(1, math.ceil(14 / wide))
    columns = [_text(left + (h + 0.5) * wide, top - 5, str(h), "middle") for h in range(0, heads, step)]
    grid = node("g", *cells, class_="cells")
    return _svg(width, top + len(table) * high + 2, label, [*columns, grid, *parts])


def spectra(table: Mapping[int, np.ndarray], slabs: Mapping[int, Sequence[Slabs]], label: str, over: Mapping[int, np.ndarray]) -> Element:
    """One small picture for each head: energies over directions on a logarithmic axis, filled by the precision that they are kept at.

    Args:
        table: energies [Hkv, D] by layer. over: others, drawn as a line; may be empty.
    """
    heads = max(len(row) for row in table.values())
    left, top = 26.0, 16.0
    wide = (WIDTH - left - 2) / heads
    high = min(max(wide * 0.5, 14.0), 34.0)
    parts = [_text(left + (h + 0.5) * wide, top - 5, str(h), "middle") for h in range(0, heads, max(1, math.ceil(14 / wide)))]
    for n, (layer, spectrum) in enumerate(table.items()):
        y = top + n * high
        parts.append(_text(left - 4, y + high / 2 + 3.5, str(layer), "end"))
        for h, energies in enumerate(spectrum):
            kept, dim = slabs[layer][h], len(energies)
            box = (left + h * wide, y, wide - 2.0, high - 3.0)
            floor = f"M{tenth(box[0])} {tenth(y)}h{tenth(box[2])}v{tenth(box[3])}H{tenth(box[0])}z"
            words = f"layer {layer}, head {h}: {slab_words(kept, dim)}, {kept.rank} of {dim} directions"
            group = node("g", node("title", words), node("path", d=floor, class_="floor"))
            ends = [0, *accumulate(kept), dim]
            for start, end, color in reversed([*zip(ends, ends[1:], ("hi", "hi8", "hi4", "off"), strict=False)]):
                if end > start:
                    group.append(node("path", d=_under(energies, start, end, box), class_=color))
            if layer in over:
                group.append(node("path", d=_curve(over[layer][h], 0, dim, box), class_="over"))
            parts.append(group)
    return _svg(WIDTH, top + len(table) * high + 2, label, parts)


Box = tuple[float, float, float, float]  # x, y, width, height


def _under(energies: np.ndarray, start: int, end: int, box: Box) -> str:
    """The area under energies[start:end]."""
    x, y, wide, high = box
    return f"{_curve(energies, start, end, box)}V{tenth(y + high)}H{tenth(x + wide * start / len(energies))}z"


def _curve(energies: np.ndarray, start: int, end: int, box: Box) -> str:
    """The logarithm of energies[start:end], in steps no finer than a unit and no more than 32 in all."""
    x, y, wide, high = box
    dim, scale = len(energies), Scale(DEEPEST_SPECTRUM, 1.0, True)
    stride = max(1, math.ceil(dim / min(max(wide, 8), 32)))
    top = float(energies[0]) or 1.0
    at = sorted({*range(start, end, stride), end})
    levels = (y + high * (1 - scale(float(energies[min(n, dim - 1)]) / top)) for n in at)
    points = [(round(10 * (x + wide * n / dim)), round(10 * level)) for n, level in zip(at, levels, strict=True)]
    steps = (f"{tenth((c - a) / 10)} {tenth((d - b) / 10)}" for (a, b), (c, d) in pairwise(points))  # relative: half as long
    return f"M{tenth(points[0][0] / 10)} {tenth(points[0][1] / 10)}l{' '.join(steps)}"


def chart(
    series: Sequence[Series],
    x: Scale,
    y: Scale,
    x_label: str,
    y_label: str,
    label: str,
    across: Sequence[tuple[float, str]] = (),
    percent: str = "",
) -> Element:
    """Lines and dots over two axes.

    Args:
        across: horizontal references, value and words. percent: axes among "xy" whose values are shares, written in per cent.
    """
    high = 230.0
    inner_w, inner_h = WIDTH - LEFT - RIGHT, high - TOP - BOTTOM

    def place(px: float, py: float) -> tuple[float, float]:
        return LEFT + inner_w * x(px), TOP + inner_h * (1 - y(py))

    def written(value: float, axis: str) -> str:
        if axis in percent:
            return f"{100 * value:.3g} %"
        return f"1e{round(math.log10(value))}" if 0 < value < 1e-2 else short(value)

    parts = []
    for tick in y.ticks():
        level = place(x.low, tick)[1]
        parts += [node("line", x1=LEFT, x2=WIDTH - RIGHT, y1=level, y2=level, class_="grid")]
        parts += [_text(LEFT - 5, level + 3.5, written(tick, "y"), "end")]
    for tick in x.ticks():
        at = place(tick, y.low)[0]
        parts += [node("line", x1=at, x2=at, y1=high - BOTTOM, y2=high - BOTTOM + 4, class_="axis")]
        parts += [_text(at, high - BOTTOM + 15, written(tick, "x"), "middle")]
    parts.append(node("line", x1=LEFT, x2=WIDTH - RIGHT, y1=high - BOTTOM, y2=high - BOTTOM, class_="axis"))
    parts += [_text(LEFT + inner_w / 2, high - 5, x_label, "middle"), _text(2, 10, y_label, "start")]
    for value, words in across:
        level = place(x.low, value)[1]
        parts += [node("line", x1=LEFT, x2=WIDTH - RIGHT, y1=level, y2=level, class_="reference")]
        parts += [_text(WIDTH - RIGHT - 2, level - 4, words, "end")]
    for one in series:
        parts += _marks(one, [place(*point) for point in one.points])
    return _svg(WIDTH, high, label, parts)


def _marks(series: Series, places: list[tuple[float, float]]) -> list[Element]:
    if series.look in ("line", "thin"):
        points = " ".join(f"{tenth(a)},{tenth(b)}" for a, b in places)
        return [node("polyline", points=points, class_=f"{series.look} s-{series.color}")]
    radius = 2.2 if series.look == "dots" else 5.0
    words = [*series.words] if len(places) <= MOST_WORDS else []
    words += [""] * (len(places) - len(words))
    return [
        node("circle", node("title", said) if said else None, cx=a, cy=b, r=radius, class_=f"{series.look} f-{series.color}")
        for (a, b), said in zip(places, words, strict=True)
    ]


def bars(rows: Mapping[str, Mapping[str, float]], colors: Mapping[str, str], label: str, unit: float, unit_name: str) -> Element:
    """One stacked bar for each row, with its sum; all on one scale from 0.

    Args:
        rows: value of each part by row. colors: a class of the style sheet by part. unit: what one `unit_name` is.
    """
    left, right, high = 74.0, 74.0, 30.0
    most = max(sum(parts.values()) for parts in rows.values()) or 1.0
    drawn = []
    for n, (name, parts) in enumerate(rows.items()):
        x, y = left, 4 + n * high
        drawn.append(_text(left - 6, y + 15, name, "end"))
        for part, value in parts.items():
            wide = (WIDTH - left - right) * value / most
            words = node("title", f"{name}, {part}: {value / unit:,.0f} {unit_name}")
            drawn.append(node("rect", words, x=x, y=y, width=max(wide - 1, 0.5), height=high - 8, class_=f"f-{colors[part]}"))
            x += wide
        drawn.append(_text(x + 5, y + 15, f"{sum(parts.values()) / unit:,.0f} {unit_name}", "start"))
    return _svg(WIDTH, 4 + len(rows) * high, label, drawn)


def columns(table: Mapping[str, Mapping[int, float]], colors: Mapping[str, str], dense: Mapping[int, float], label: str) -> Element:
    """Stacked columns by layer, as shares of each layer's dense bytes."""
    layers = list(dense)
    most = max(sum(row[i] for row in table.values()) / dense[i] for i in layers)
    high, y = 150.0, Scale(0.0, max(1.0, most))  # a method may take more than the stock cache
    inner_w, inner_h = WIDTH - LEFT - RIGHT, high - TOP - BOTTOM
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        level = TOP + inner_h * (1 - y(tick))
        parts += [node("line", x1=LEFT, x2=WIDTH - RIGHT, y1=level, y2=level, class_="grid")]
        parts += [_text(LEFT - 5, level + 3.5, f"{100 * tick:.0f} %", "end")]
    wide = inner_w / len(layers)
    every = max(1, math.ceil(18 / wide))
    for n, layer in enumerate(layers):
        x, base = LEFT + n * wide, high - BOTTOM
        words = node("title", f"layer {layer}: " + ", ".join(f"{part} {short(row[layer] / 1024)} KiB" for part, row in table.items()))
        group = node("g", words)
        for part, row in table.items():
            tall = inner_h * y(row[layer] / dense[layer])
            base -= tall
            width = max(wide - min(3.0, wide / 4), 1.0)
            group.append(node("rect", x=x, y=base, width=width, height=tall, class_=f"f-{colors[part]}"))
        parts.append(group)
        if n % every == 0:
            parts.append(_text(x + wide / 2, high - BOTTOM + 14, str(layer), "middle"))
    parts.append(_text(LEFT + inner_w / 2, high - 5, "layer", "middle"))
    return _svg(WIDTH, high, label, parts)


def _text(x: float, y: float, words: str, anchor: str, class_: str | None = None) -> Element:
    return node("text", words, x=x, y=y, text_anchor=anchor, class_=class_)


def _svg(width: float, high: float, label: str, parts: Sequence[Element]) -> Element:
    return node("svg", *parts, viewBox=f"0 0 {tenth(width)} {tenth(high)}", role="img", aria_label=label)
