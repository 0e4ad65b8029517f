"""How wide each layer's Keys and Values stay: as published, or by what narrowing costs.

A group is a layer's Keys or its Values. Widths are in steps of 8 pairs and of 8 directions, at least one step each; a step of pairs takes
16 numbers of every token and KV head, a step of Values 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import RotateKError, UsageError
from .geometry import Geometry
from .rap_plan import PAIR_STEP, VALUE_STEP

BUDGETS = ("sensitivity", "published")
Group = tuple[int, str]  # layer, side
Widths = dict[Group, int]  # pairs of the Keys, directions of the Values
MEASURED = (1 / 8, 1 / 4, 1 / 2, 3 / 4)  # shares of a group's width at which it is measured
LEAST = 1e-9  # nats per token: below it a figure is rounding
TRIALS = 24  # whole plans that may be measured to better one
HARMLESS = 1e-6  # nats per token: a plan of less is not bettered, sums of float32 probabilities tell no more
PATIENCE = 10  # of them in a row that bring nothing; they come by what they should gain, so the next ones hardly will


@dataclass(frozen=True, slots=True)
class Menu:
    """The widths of one group, ascending; `unit` is how many numbers per token one pair or direction takes over the KV heads."""

    widths: tuple[int, ...]
    unit: int

    @property
    def full(self) -> int:
        return self.widths[-1]

    def beside(self, width: int, step: int) -> int:
        """The next wider (1) or narrower (-1) width; the same at an end."""
        place = self.widths.index(width) + step
        return self.widths[min(max(place, 0), len(self.widths) - 1)]


def menus(geometry: Geometry) -> dict[Group, Menu]:
    """What may be kept, by group. Heads too small for steps of 8 have steps of a fourth of their width."""
    found = {}
    for i, shape in enumerate(geometry.layers):
        for side, full, wanted, numbers in (("key", shape.head_dim // 2, PAIR_STEP, 2), ("value", shape.head_dim, VALUE_STEP, 1)):
            step = wanted if full >= 2 * wanted else max(1, full // 4)
            widths = tuple(sorted({*range(step, full, step), full}))
            found[i, side] = Menu(widths, numbers * shape.kv_heads)
    return found


def room(geometry: Geometry, keep_ratio: float) -> int:
    """Numbers per token that may be kept over all layers.

    Raises:
        UsageError: less than every group's least width.
    """
    dense = sum(2 * shape.kv_heads * shape.head_dim for shape in geometry.layers)
    least = sum(menu.widths[0] * menu.unit for menu in menus(geometry).values())
    wanted = math.floor(keep_ratio * dense + 1e-9)
    if wanted < least:
        smallest = math.ceil(1000 * least / dense) / 1000
        raise UsageError(f"--keep-ratio {keep_ratio:g} is below the least that this model can keep; use at least {smallest:g}")
    return wanted


def published(scores: Mapping[Group, float], geometry: Geometry, keep_ratio: float) -> Widths:
    """Widths by the published rule (RAP, arXiv 2602.02599): with rho = 1 - keep ratio, group g gives up rho (1 - s_g / S) / (1 - 1/N) of
    itself, clipped to [0, 1] and shifted until the mean is rho; then rounded to steps within the room.
    """
    options, wanted = menus(geometry), room(geometry, keep_ratio)
    groups, rho, total = list(options), 1 - keep_ratio, sum(scores.values()) or 1.0
    count = len(groups)
    raw = np.array([rho * (1 - scores[g] / total) / max(1 - 1 / count, 1e-9) for g in groups])
    size = np.array([options[g].full * options[g].unit for g in groups], dtype=float)
    low, high = -2.0, 2.0
    for _ in range(60):  # the shift at which the clipped shares remove rho of all numbers
        shift = (low + high) / 2
        low, high = (shift, high) if (np.clip(raw + shift, 0, 1) * size).sum() < rho * size.sum() else (low, shift)
    kept = 1 - np.clip(raw + high, 0, 1)
    return rounded({g: float(share * options[g].full) for g, share in zip(groups, kept, strict=True)}, options, wanted)


def rounded(wanted: Mapping[Group, float], options: Mapping[Group, Menu], most: int) -> Widths:
    """Real widths rounded down to steps; what is left goes to those that lost the largest part of a step, while there is room."""
    widths = {g: max([w for w in menu.widths if w <= wanted[g] + 1e-9], default=menu.widths[0]) for g, menu in options.items()}
    while (over := spent(widths, options) - most) > 0:  # least widths may have lifted it
        g = max((g for g in widths if widths[g] > options[g].widths[0]), key=lambda g: widths[g] - wanted[g])
        widths[g] = options[g].beside(widths[g], -1)
        assert over > 0
    open_ = set(widths)
    while open_:
        g = max(sorted(open_), key=lambda g: (wanted[g] - widths[g]) / options[g].widths[0])
        wider = options[g].beside(widths[g], 1)
        if wider == widths[g] or spent(widths, options) + (wider - widths[g]) * options[g].unit > most:
            open_.discard(g)
        else:
            widths[g] = wider
    return widths


def spent(widths: Widths, options: Mapping[Group, Menu]) -> int:
    """Numbers per token that are kept."""
    return sum(width * options[g].unit for g, width in widths.items())


def sensitivities(options: Mapping[Group, Menu], cost: Callable[[Widths], float]) -> dict[Group, dict[int, float]]:
    """KL of narrowing one group alone to a few widths, by width.

    Args:
        cost: KL per token of widths, where groups that are not named stay whole.
    """
    found = {}
    for g, menu in options.items():
        chosen = sorted({min(menu.widths, key=lambda w: abs(w - share * menu.full)) for share in MEASURED} - {menu.full})
        found[g] = {width: cost({g: width}) for width in chosen}
    return found


def curve(menu: Menu, measured: Mapping[int, float]) -> dict[int, float]:
    """Cost of every width of a menu: linear between measured ones in the logarithm of KL, which falls with the width; 0 at the full one."""
    if not measured:
        return dict.fromkeys(menu.widths, 0.0)
    at = sorted(measured)
    logs = np.minimum.accumulate([math.log(max(measured[w], LEAST)) for w in at])
    slope = (logs[-1] - logs[-2]) / (at[-1] - at[-2]) if len(at) > 1 else -1.0 / menu.widths[0]
    found = {}
    for width in menu.widths:
        value = float(np.interp(width, at, logs))
        if width > at[-1]:
            value = logs[-1] + slope * (width - at[-1])
        if width < at[0]:
            first = (logs[1] - logs[0]) / (at[1] - at[0]) if len(at) > 1 else slope
            value = logs[0] + first * (width - at[0])
        found[width] = 0.0 if width == menu.full else math.exp(value)
    return found


def cheapest(options: Mapping[Group, Menu], costs: Mapping[Group, Mapping[int, float]], most: int) -> Widths:
    """The widths of least summed cost whose numbers fit: dynamic programming over numbers kept, exact."""
    sizes = {g: [w * menu.unit for w in menu.widths] for g, menu in options.items()}
    grain = math.gcd(*(size for found in sizes.values() for size in found))
    cells = most // grain + 1
    best, choices = np.zeros(cells), []
    for g, menu in options.items():
        tried = np.full((len(menu.widths), cells), np.inf)
        for n, (width, size) in enumerate(zip(menu.widths, sizes[g], strict=True)):
            step = size // grain
            if step < cells:
                tried[n, step:] = best[: cells - step] + costs[g][width]
        choices.append(tried.argmin(0))
        best = tried.min(0)
    widths: Widths = {}
    cell = cells - 1
    for g, chosen in reversed(list(zip(options, choices, strict=True))):
        number = int(chosen[cell])
        widths[g] = options[g].widths[number]
        cell -= sizes[g][number] // grain
    return {g: widths[g] for g in options}


def by_sensitivity(
    geometry: Geometry,
    keep_ratio: float,
    cost: Callable[[Widths], float],
    trials: int = TRIALS,
    few: Callable[[Widths], float] | None = None,
) -> tuple[Widths, float]:
    """Widths of least measured KL, and that KL.

    Single cuts say what a group costs alone; together, errors may cancel or add up, so that plans for the costs and for their square roots
    (as if errors, not their squares, added up) are compared as wholes, and the better one is improved by moving single steps between
    groups, always measured as a whole.

    Args:
        few: the same cost on a part of the documents, where there are many: single cuts are measured by it, and a move that brings nothing
            there is not measured any further. What is taken is better by both.
    """
    options, most = menus(geometry), room(geometry, keep_ratio)
    curves = {g: curve(options[g], found) for g, found in sensitivities(options, few or cost).items()}
    plans = [cheapest(options, {g: {w: kl**power for w, kl in c.items()} for g, c in curves.items()}, most) for power in (1.0, 0.5)]
    known: list[tuple[float, Widths]] = []
    for plan in plans:
        if plan not in (widths for _, widths in known):
            known.append((cost(plan), plan))
    kl, widths = min(known, key=lambda pair: pair[0])
    least = few(widths) if few is not None and trials else kl
    tried, vain = [plan for _, plan in known], 0
    for _ in range(trials):
        if kl < HARMLESS or vain == PATIENCE:
            break
        moved = next((plan for plan in moves(widths, options, curves, most) if plan not in tried), None)
        if moved is None:
            break
        tried.append(moved)
        vain += 1
        if few is not None and (first := few(moved)) >= least:
            continue
        if (found := cost(moved)) < kl:
            kl, widths, vain = found, moved, 0
            least = first if few is not None else found
    return widths, kl


def moves(widths: Widths, options: Mapping[Group, Menu], curves: Mapping[Group, Mapping[int, float]], most: int) -> Sequence[Widths]:
    """Neighbours of a plan: one group a step wider, one or two others narrower as far as that needs, by what that should gain."""
    found: list[tuple[float, int, Widths]] = []
    for to in widths:
        wider = options[to].beside(widths[to], 1)
        if wider == widths[to]:
            continue
        for source in widths:
            moved = {**widths, to: wider}
            if source == to:
                continue
            while spent(moved, options) > most and moved[source] > options[source].widths[0]:
                moved[source] = options[source].beside(moved[source], -1)
            if spent(moved, options) > most:
                continue
            gain = sum(math.sqrt(curves[g][widths[g]]) - math.sqrt(curves[g][moved[g]]) for g in (to, source))
            found.append((-gain, len(found), moved))
    return [plan for _, _, plan in sorted(found, key=lambda entry: entry[:2])]


def widths_for(
    budget: str,
    geometry: Geometry,
    keep_ratio: float,
    scores: Mapping[Group, float] | None,
    cost: Callable[[Widths], float] | None,
    few: Callable[[Widths], float] | None = None,
) -> tuple[Widths, float | None]:
    """Widths by the budget's name, and their measured KL where it was measured.

    Raises:
        UsageError: no such budget, or a keep ratio below the least.
        RotateKError: what the budget needs is not there.
    """
    if budget not in BUDGETS:
        raise UsageError(f"unknown budget {budget!r}; choose one of {', '.join(BUDGETS)}")
    if budget == "published":
        if scores is None:
            raise RotateKError("the published budget needs squared gradients; collect the statistics with gradients")
        return published(scores, geometry, keep_ratio), None
    if cost is None:
        raise RotateKError("a budget by sensitivity needs documents to measure on; pass some")
    return by_sensitivity(geometry, keep_ratio, cost, few=few)
