"""Checking a plan as a whole on documents kept aside, and improving it by swaps while that helps.

Single cuts hide redundancy: heads that each can go may not all go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from .allocate import Choice, Menu, bargain, cost_of
from .cost_curves import Pair, lower_hull
from .plan import Plan
from .planning import Search

SWAP_ROUNDS = 6
DONORS, TAKERS = 2, 4
RELIEF = 0.05  # share of KL that a head must save when raw, to be given more weight
WEIGHTS = (8, 64)
GOOD_ENOUGH = 1e-5  # nats per token below which a plan needs no repair
GOOD_START = 1e-6  # and no other start
NARROW = 1.05  # ratio of two budgets that are taken as one


class Measure(Protocol):
    """KL per answer token of a plan. `most`: what is of interest; a plan that costs more may get any figure above it."""

    def __call__(self, plan: Plan, most: float = math.inf) -> float: ...


def repaired(
    searches: Sequence[Search],
    measure: Measure,
    enough: float = GOOD_ENOUGH,
    good_start: float = GOOD_START,
    relief: Callable[[Plan], Mapping[Pair, float]] | None = None,
) -> tuple[Plan, float, int]:
    """The best plan found, its measured KL, and the number of changes made; if the uniform plan is better, it is taken.

    A change gives a head more weight and spends the budget again; or, where expected costs alone say who needs more, it is a swap: the
    budget of one head's step down its convex hull goes to the head that is expected to gain most by it.

    Args:
        searches: of one budget; the best start among them is repaired.
        enough: plans of less KL are not repaired. good_start: nor is another start looked at after one of less.
        relief: by head, the share of KL that keeping all of it would save, as measured on the plan that `measure` read to the end last;
            who would save little gets no more weight.
    """
    search = searches[0]
    choice = search.best()
    best, swaps = measure(search.plan(choice)), 0
    seen = [search.plan(choice)]
    for other in searches[1:]:
        trial = other.best()
        if best > good_start and (plan := other.plan(trial)) not in seen:
            seen.append(plan)
            if (kl := measure(plan, best)) < best:
                search, choice, best = other, trial, kl
    while best > enough and swaps < SWAP_ROUNDS:
        found = None
        changes = _swaps(search, choice) if relief is None else _heavier(search, relief(search.plan(choice)))
        for changed, trial in changes:
            if (plan := changed.plan(trial)) not in seen:
                seen.append(plan)
                if (kl := measure(plan, best)) < best:
                    best, found = kl, (changed, trial)
        if found is None:
            break
        (search, choice), swaps = found, swaps + 1
    plan = search.plan(choice)
    if best > enough and plan != search.uniform and (reference := measure(search.uniform, best)) < best:
        return search.uniform, reference, swaps
    return plan, best, swaps


def smallest_within(
    searches_at: Callable[[float], Sequence[Search]],
    measure: Measure,
    most: float,
    least: float,
    alike: bool = False,
    repair: bool = True,
) -> tuple[Plan, float, int]:
    """The smallest plan found whose measured KL is at most `most`, as `repaired` returns it: by bisection, and then with repair.

    Args:
        searches_at: the searches of a budget, a share of the dense bytes.
        least: the smallest share there is; at 1 everything can be raw, and the KL 0.
        alike: look at the uniform plan of each budget only.
        repair: improve plans by what is measured.
    """

    def tried(share: float) -> tuple[float, Plan]:
        search = searches_at(share)[0]
        plan = search.uniform if alike else search.plan(search.best())
        return measure(plan, most if share < 1 else math.inf), plan

    low, high, swaps = least, 1.0, 0
    kl, plan = tried(high)
    while high / low > NARROW:
        share = (low * high) ** 0.5
        cost, trial = tried(share)
        if cost <= most:
            high, kl, plan = share, cost, trial
        else:
            low = share
    while repair and not alike and high / NARROW > least:  # a plan just too small may pass once it is repaired
        trial, cost, made = repaired(searches_at(high / NARROW), measure, most, most)
        if cost > most:
            break
        high, plan, kl, swaps = high / NARROW, trial, cost, swaps + made
    return plan, kl, swaps


def _heavier(search: Search, relief: Mapping[Pair, float]) -> list[tuple[Search, Choice]]:
    """The budget spent with more weight on a head: few heads, those that relieve most, times few weights."""
    found = []
    for pair in sorted((pair for pair, share in relief.items() if share > RELIEF), key=lambda pair: -relief[pair])[:DONORS]:
        for weight in WEIGHTS:
            menus = search.menus | {pair: replace(search.menus[pair], kl=weight * search.menus[pair].kl)}
            changed = replace(search, menus=menus)
            found.append((changed, changed.best()))
    return found


def _swaps(search: Search, choice: Choice) -> list[tuple[Search, Choice]]:
    """Promising swaps of equal cost: few donors, the cheapest first, times few takers, the neediest first."""
    menus, left = search.menus, search.budget - cost_of(choice, search.menus)
    donors = []
    for pair, menu in menus.items():
        if (lower := _step_down(menu, choice[pair])) is not None:
            freed = int(menu.cost[choice[pair]] - menu.cost[lower])
            donors.append(((menu.kl[lower] - menu.kl[choice[pair]]) / freed, pair, lower, freed))
    found = []
    for _, giver, lower, freed in sorted(donors, key=lambda donor: donor[0])[:DONORS]:
        takers = [(bargain(menu, choice[pair], left + freed), pair) for pair, menu in menus.items() if pair != giver]
        wanted = sorted(((fall, pair, option) for (fall, option), pair in takers if fall > 0), key=lambda taker: -taker[0])
        found += [(search, {**choice, giver: lower, pair: option}) for _, pair, option in wanted[:TAKERS]]
    return found


def _step_down(menu: Menu, now: int) -> int | None:
    """The dearest option of the hull that is cheaper than `now`."""
    cheaper = [n for n in lower_hull(menu.cost, menu.kl) if menu.cost[n] < menu.cost[now]]
    return max(cheaper, key=lambda n: menu.cost[n], default=None)
