"""Checking a plan as a whole on documents kept aside, and improving it by swaps while that helps.

Single cuts hide redundancy: heads that each can go may not all go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .allocate import Choice, Menu, bargain, cost_of
from .cost_curves import lower_hull
from .plan import Plan
from .planning import Search

SWAP_ROUNDS = 6
DONORS, TAKERS = 2, 4
GOOD_ENOUGH = 1e-4  # nats per token below which a plan needs no repair
NARROW = 1.05  # ratio of two budgets that are taken as one


def repaired(searches: Sequence[Search], measure: Callable[[Plan], float], enough: float = GOOD_ENOUGH) -> tuple[Plan, float, int]:
    """The best plan found, its measured KL, and the number of swaps made; if the uniform plan is better, it is taken.

    A swap moves the budget of one head's step down its convex hull to the head that is expected to gain most by it.

    Args:
        searches: of one budget; the best start among them is repaired, and further ones are looked at only where the first is not good.
        measure: KL per answer token of a plan.
    """
    search = searches[0]
    choice = search.best()
    best, swaps = measure(search.plan(choice)), 0
    for other in searches[1:]:
        trial = other.best()
        if best > enough and (plan := other.plan(trial)) != search.plan(choice) and (kl := measure(plan)) < best:
            search, choice, best = other, trial, kl
    while best > enough and swaps < SWAP_ROUNDS:
        trials = [(measure(search.plan(trial)), number, trial) for number, trial in enumerate(_swaps(search, choice))]
        if not trials or min(trials)[0] >= best:
            break
        best, _, choice = min(trials, key=lambda trial: trial[:2])
        swaps += 1
    plan = search.plan(choice)
    if best > enough and plan != search.uniform and (reference := measure(search.uniform)) < best:
        return search.uniform, reference, swaps
    return plan, best, swaps


def smallest_within(
    searches_at: Callable[[float], Sequence[Search]],
    measure: Callable[[Plan], float],
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
        return measure(plan), plan

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
        trial, cost, made = repaired(searches_at(high / NARROW), measure, most)
        if cost > most:
            break
        high, plan, kl, swaps = high / NARROW, trial, cost, swaps + made
    return plan, kl, swaps


def _swaps(search: Search, choice: Choice) -> list[Choice]:
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
        found += [{**choice, giver: lower, pair: option} for _, pair, option in wanted[:TAKERS]]
    return found


def _step_down(menu: Menu, now: int) -> int | None:
    """The dearest option of the hull that is cheaper than `now`."""
    cheaper = [n for n in lower_hull(menu.cost, menu.kl) if menu.cost[n] < menu.cost[now]]
    return max(cheaper, key=lambda n: menu.cost[n], default=None)
