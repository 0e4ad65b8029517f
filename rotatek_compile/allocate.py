"""Spending a budget over the Keys and Values of all heads by what each costs in answer KL (DESIGN.md §4.4)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .cost_curves import FLOOR, SEGMENT, Curves, Pair, every_slabs, lower_hull, places
from .geometry import Geometry, LayerGeometry
from .kernels.slabs import NIBBLE_UNIT, UNIT, Slabs
from .plan import HeadPlan, Plan
from .plan_words import promised_bytes


@dataclass(frozen=True, slots=True)
class Menu:
    """What one head may keep. cost int64 [N], in any unit of a budget; kl fp64 [N]."""

    options: tuple[HeadPlan, ...]
    cost: np.ndarray
    kl: np.ndarray


Menus = dict[Pair, Menu]
Choice = dict[Pair, int]  # number of the option taken


def same_slabs(geometry: Geometry, key: Slabs, value: Slabs) -> Plan:
    """One plan for every head."""
    return {i: [HeadPlan(key, value)] * layer.kv_heads for i, layer in _layers(geometry)}


def uniform_plan(geometry: Geometry, keep_ratio: float, bits: str = "native") -> Plan:
    """The same number of Key directions everywhere, keep_ratio · D rounded to whole steps, at one precision; Values raw."""
    plan = {}
    for i, layer in _layers(geometry):
        step = NIBBLE_UNIT if bits == "4" else UNIT
        count = min(int(keep_ratio * layer.head_dim / step + 0.5) * step, layer.head_dim // step * step)
        plan[i] = [HeadPlan(at_bits(count, bits), Slabs(layer.head_dim))] * layer.kv_heads
    return plan


def at_bits(count: int, bits: str) -> Slabs:
    """Directions at one precision: `native`, `8` or `4`."""
    return {"native": Slabs(count), "8": Slabs(byte=count), "4": Slabs(nibble=count)}[bits]


def all_at_bits(dim: int, bits: str) -> Slabs:
    """All directions at one precision; what 4 bits cannot take in whole steps is 8 bits wide."""
    return Slabs(byte=dim % NIBBLE_UNIT, nibble=dim - dim % NIBBLE_UNIT) if bits == "4" else at_bits(dim, bits)


def menus_of_bytes(
    geometry: Geometry,
    curves: Curves,
    key_bits: str = "auto",
    value_bits: str = "auto",
    escape_ratio: float = 0.0,
    tokens: int = SEGMENT,
) -> Menus:
    """Keys and Values together, priced by the bytes of a segment: of each side the options on its convex hull.

    Args:
        key_bits, value_bits: precisions that may be used.
        escape_ratio: share of the tokens that have no codes.
        tokens: of that segment.
    """
    menus = {}
    for (i, h), curve in curves.items():
        dim = geometry.layers[i].head_dim
        keys = curve.key.hull(every_slabs(dim, key_bits))
        if curve.value is None:
            values = [Slabs(dim)]
            kl = np.array([curve.key.of(key) for key in keys])
        else:
            values = curve.value.hull(every_slabs(dim, value_bits))
            known = (side.kl[places(side.options, some)] for side, some in ((curve.key, keys), (curve.value, values)))
            kl = curve.together(next(known)[:, None], next(known)).ravel()
        cost = np.add.outer(*([promised_bytes(slabs, dim, tokens, escape_ratio) for slabs in some] for some in (keys, values))).ravel()
        menus[i, h] = Menu(tuple(HeadPlan(key, value) for key in keys for value in values), cost, kl)
    return menus


def menus_of_directions(geometry: Geometry, curves: Curves, bits: str, values: str) -> Menus:
    """Keys alone at one precision, priced by directions, or at any (`auto`), priced by half bytes of their codes; Values all alike."""
    menus = {}
    for (i, h), curve in curves.items():
        dim = geometry.layers[i].head_dim
        keys = every_slabs(dim, bits)
        cost = [2 * key.bytes_per_token() if bits == "auto" else key.rank for key in keys]
        options = tuple(HeadPlan(key, all_at_bits(dim, values)) for key in keys)
        menus[i, h] = Menu(options, np.array(cost, dtype=np.int64), np.array([curve.key.of(key) for key in keys]))
    return menus


def spend(menus: Menus, budget: int) -> Choice:
    """Take the options that lower expected KL most for their cost, along each menu's lower convex hull, and fill what is left.

    Raises:
        ValueError: the budget is below the sum of the cheapest options.
    """
    hulls = {pair: lower_hull(menu.cost, menu.kl) for pair, menu in menus.items()}
    choice = {pair: hull[0] for pair, hull in hulls.items()}
    left = budget - cost_of(choice, menus)
    if left < 0:
        raise ValueError(f"budget {budget} is below the smallest cost {budget - left}")
    offers = []
    for pair, hull in hulls.items():
        menu = menus[pair]
        for old, new in pairwise(hull):
            price = int(menu.cost[new] - menu.cost[old])
            offers.append(((menu.kl[new] - menu.kl[old]) / price, price, pair, new))
    closed: set[Pair] = set()
    # sorting keeps each menu's own offers in order, because slopes along a convex hull only fall
    for _, price, pair, new in sorted(offers, key=lambda offer: offer[0]):
        if pair in closed:
            continue
        if price > left:
            closed.add(pair)
            continue
        choice[pair], left = new, left - price
    return filled(choice, menus, left)


def filled(choice: Choice, menus: Menus, left: int) -> Choice:
    """A choice with further single options that what is left pays for, the best bargain first."""
    choice = dict(choice)
    bargains = {pair: bargain(menu, choice[pair], left) for pair, menu in menus.items()}
    while bargains:
        pair = max(bargains, key=lambda p: bargains[p][0])
        if bargains[pair][0] <= 0:
            break
        new = bargains[pair][1]
        left -= int(menus[pair].cost[new] - menus[pair].cost[choice[pair]])
        choice[pair] = new
        for other, (_, option) in bargains.items():
            if other == pair or menus[other].cost[option] - menus[other].cost[choice[other]] > left:
                bargains[other] = bargain(menus[other], choice[other], left)
    return choice


def bargain(menu: Menu, now: int, left: int) -> tuple[float, int]:
    """The largest fall of KL per cost among the options at most `left` dearer than option `now`: (fall, option), (0, _) for none."""
    extra = menu.cost - menu.cost[now]
    fall = np.where((extra > 0) & (extra <= left), (menu.kl[now] - menu.kl) / np.maximum(extra, 1), 0.0)
    best = int(fall.argmax())
    return float(fall[best]), best


def cost_of(choice: Choice, menus: Menus) -> int:
    """What a choice costs."""
    return int(sum(menus[pair].cost[number] for pair, number in choice.items()))


def plan_from_choice(choice: Choice, menus: Menus) -> Plan:
    """The plan that a choice stands for."""
    plan: Plan = {}
    for pair in sorted(choice):
        plan.setdefault(pair[0], []).append(menus[pair].options[choice[pair]])
    return plan


def same_everywhere(
    geometry: Geometry,
    curves: Curves,
    share: float,
    key_bits: str = "auto",
    value_bits: str = "auto",
    escape_ratio: float = 0.0,
    tokens: int = SEGMENT,
) -> Plan:
    """One option of Keys and one of Values for all heads of a width: the best pair by summed curves within a share of dense bytes.

    Args:
        escape_ratio: share of the tokens that stay raw; they are paid for first.
        tokens: of the segments that have to fit.

    Raises:
        ValueError: not even the cheapest pair fits.
    """
    plan: Plan = {}
    for dim in {layer.head_dim for _, layer in _layers(geometry)}:
        some = [curve for (i, _), curve in curves.items() if geometry.layers[i].head_dim == dim]
        keys, values = every_slabs(dim, key_bits), every_slabs(dim, value_bits)
        key_kl = sum(curve.key.kl[places(curve.key.options, keys)] for curve in some)
        value_kl = sum(curve.value.kl[places(curve.value.options, values)] for curve in some if curve.value is not None)
        key_cost, value_cost = (np.array([promised_bytes(s, dim, tokens, escape_ratio) for s in options]) for options in (keys, values))
        pairs = key_cost[:, None] + value_cost[None, :]
        if pairs.min() > (most := (share - escape_ratio) * 4 * dim * tokens):
            raise ValueError(f"the smallest plan takes {pairs.min()} of {most} bytes")
        total = np.where(pairs <= most, np.asarray(key_kl)[:, None] + np.asarray(value_kl)[None, :], np.inf)
        key, value = np.unravel_index(int(total.argmin()), total.shape)
        plan |= {i: [HeadPlan(keys[key], values[value])] * layer.kv_heads for i, layer in _layers(geometry) if layer.head_dim == dim}
    return dict(sorted(plan.items()))


def random_plan(menus: Menus, budget: int, generator: np.random.Generator) -> Plan:
    """A plan of about the same cost, drawn at random: what `spend` makes of KLs that are wrong by random factors per head.

    Each plan draws how far it takes heads for equally important, t from 0 to 1, and how wrong it is besides, σ from 0 to 4; a head's KL
    is then multiplied by (its largest KL)^-t · exp(σ x), x normal. So plans reach from nearly right to blind.
    """
    return plan_from_choice(spend(doubted(menus, generator, even=1.0, noise=4.0), budget), menus)


def doubted(menus: Menus, generator: np.random.Generator, even: float, noise: float) -> Menus:
    """The menus with every head's KL multiplied by (its largest KL)^-t · exp(σ x), t drawn up to `even`, σ up to `noise`, x normal."""
    tempered, sigma = generator.uniform(0, even), generator.uniform(0, noise)
    found = {}
    for pair, menu in menus.items():
        factor = max(float(menu.kl.max()), FLOOR) ** -tempered * float(np.exp(sigma * generator.standard_normal()))
        found[pair] = Menu(menu.options, menu.cost, menu.kl * factor)
    return found


def _layers(geometry: Geometry) -> list[tuple[int, LayerGeometry]]:
    return [(i, geometry.layers[i]) for i in geometry.compressible]
