"""Plans checked as a whole: swaps towards what is measured, never beyond the budget; the smallest budget for a KL."""

import numpy as np
import pytest

from rotatek_compile.allocate import Menu
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan
from rotatek_compile.planning import DOUBTED, Search, doubted
from rotatek_compile.repair import repaired, smallest_within


def ranks(plan):
    return tuple(head.key.native for head in plan[0])


def plan_of(*counts):
    return {0: [HeadPlan(Slabs(count), Slabs(32)) for count in counts]}


def search(*heads, budget, uniform):
    found = {}
    for h, kl in enumerate(heads):
        options = tuple(HeadPlan(Slabs(8 * n), Slabs(32)) for n in range(len(kl)))
        found[0, h] = Menu(options, np.arange(len(kl)), np.array(kl, dtype=float))
    return Search(found, budget, plan_of(*uniform))


EVEN = [4, 3, 2, 1, 0]


def test_swaps_towards_what_is_measured():
    truth = {(16, 16): 1.0, (8, 24): 0.5, (24, 8): 2.0, (0, 32): 0.4}
    start = search([4, 2.9, 1.9, 1, 0.5], [4, 2.95, 1.95, 1.1, 0.6], budget=4, uniform=(16, 16))
    assert ranks(start.plan(start.best())) == (16, 16)
    plan, kl, swaps = repaired([start], lambda p, most=9: truth[ranks(p)])
    assert (ranks(plan), kl, swaps) == ((0, 32), 0.4, 2)


def test_a_good_plan_is_left_alone():
    calls = []
    wanted = [search([1, 0, 0, 0, 0], EVEN, budget=4, uniform=(16, 16))]
    plan, kl, swaps = repaired(wanted * 2, lambda p, most=9: calls.append(p) or 5e-7)
    assert (ranks(plan), kl, swaps, len(calls)) == ((8, 24), 5e-7, 0, 1)


def test_uniform_is_taken_where_it_is_better():
    one = search([0.1] * 5, EVEN, budget=4, uniform=(16, 16))
    plan, kl, swaps = repaired([one], lambda p, most=9: 0.1 if ranks(p) == (16, 16) else 9.0)
    assert (ranks(plan), kl, swaps) == ((16, 16), 0.1, 0)


def test_the_better_start_is_repaired():
    truth = {(16, 0): 5.0, (8, 8): 3.0, (0, 16): 1.0}
    trusted = search([9, 1, 0], [0.1, 0.05, 0.04], budget=2, uniform=(8, 8))
    literal = search([0.1, 0.05, 0.04], [9, 1, 0], budget=2, uniform=(8, 8))
    plan, kl, _ = repaired([trusted, literal], lambda p, most=9: truth[ranks(p)])
    assert (ranks(plan), kl) == ((0, 16), 1.0)


def test_doubted_searches():
    """The same every time, each a reading at another doubt; options keep their order, and the budget is the same."""
    measured = [
        search([8, 4, 1, 0.1, 0], EVEN, budget=4, uniform=(16, 16)),
        search([0.8, 0.4, 0.2, 0.1, 0], EVEN, budget=4, uniform=(16, 16)),
    ]
    found = doubted(measured)
    assert len(found) == DOUBTED and {one.budget for one in found} == {4}
    factors = []
    for n, one in enumerate(found):
        for pair, menu in one.menus.items():
            before = measured[n % 2].menus[pair]
            assert menu.options == before.options and (menu.cost == before.cost).all()
            factor = menu.kl[:4] / before.kl[:4]
            assert np.allclose(factor, factor[0])
            factors.append(float(np.log(factor[0])))
    assert 0.5 < np.std(factors) < 2.0 and len(set(factors)) == 2 * DOUBTED
    plans = {ranks(one.plan(one.best())) for one in found}
    assert len(plans) > 2 and all(sum(plan) <= 32 for plan in plans)
    assert [ranks(one.plan(one.best())) for one in doubted(measured)] == [ranks(one.plan(one.best())) for one in found]


def test_heads_that_cost_nothing_can_be_doubted():
    still = search([0, 0, 0, 0, 0], EVEN, budget=4, uniform=(16, 16))
    for one in doubted([still]):
        assert all(np.isfinite(menu.kl).all() for menu in one.menus.values())
        assert sum(ranks(one.plan(one.best()))) <= 32


def test_doubt_makes_heads_more_alike():
    """On average: what weighs a thousand times as much weighs less than that."""
    uneven = search([1000, 500, 100, 10, 0], EVEN, budget=4, uniform=(16, 16))
    pairs = [(one.menus[0, 0].kl[0] / 1000, one.menus[0, 1].kl[0] / EVEN[0]) for one in doubted([uneven])]
    shift = float(np.mean([np.log(much / little) for much, little in pairs]))
    assert -3.0 < shift < -0.5  # t of ln 250 = 5.5, t from 0 to 0.5


def test_further_starts_are_looked_at_where_no_repair_is_needed():
    """Each start once; what is of interest is told, and a figure above it only says so."""
    asked, truth = [], {(16, 0): 5e-5, (8, 8): 3e-5, (0, 16): 1e-5}

    def measured(plan, most=9.0):
        asked.append((ranks(plan), most))
        return truth[ranks(plan)]

    first = search([9, 1, 0], [0.1, 0.05, 0.04], budget=2, uniform=(8, 8))
    other = search([0.1, 0.05, 0.04], [9, 1, 0], budget=2, uniform=(8, 8))
    plan, kl, swaps = repaired([first, first, other, other], measured)
    assert (ranks(plan), kl, swaps) == ((0, 16), 1e-5, 0) and asked == [((16, 0), 9.0), ((0, 16), 5e-5)]


def test_the_budget_is_kept():
    seen = []

    def measured(plan, most=9.0):
        seen.append(ranks(plan))
        return 1.0 / (1 + len(seen))

    repaired([search(EVEN, [8, 4, 2, 1, 0], EVEN, budget=6, uniform=(16, 16, 16))], measured)
    assert len(seen) > 5 and max(map(sum, seen)) <= 48 and min(map(min, seen)) >= 0


def test_the_smallest_budget_for_a_kl():
    """One head of 64 steps whose KL is 1 at nothing and falls linearly: 0.25 nats need 48 of 64 steps."""
    line = [1 - n / 64 for n in range(65)]

    def at(share):
        return [search(line, budget=int(64 * share), uniform=(8 * int(64 * share),))]

    measure = lambda plan, most=9: 1 - ranks(plan)[0] / 512  # noqa: E731
    plan, kl, _ = smallest_within(at, measure, 0.25, 1 / 64)
    assert 0.2 <= kl <= 0.25 and 48 <= ranks(plan)[0] / 8 <= 51
    assert ranks(smallest_within(at, measure, 1e-9, 1 / 64)[0]) == (512,)
    assert ranks(smallest_within(at, measure, 2.0, 1 / 64, alike=True)[0])[0] <= 16


def test_who_needs_more_is_measured():
    """Expected costs give head 6 nothing; that its being raw would relieve everything is measured, and it gets weight until it is."""
    flat, needy = [0.2, 0.15, 0.1, 0.05, 0.0], [4, 1, 0.5, 0.45, 0.4]
    one = search(*[needy] * 6, flat, budget=12, uniform=(16,) * 6 + (0,))
    start = ranks(one.plan(one.best()))
    assert start[6] == 0
    asked = []

    def relief(plan):
        asked.append(ranks(plan))
        return {(0, h): float(h == 6) for h in range(7)}

    measured = lambda plan, most=9: 1.0 - ranks(plan)[6] / 100  # noqa: E731
    plan, kl, swaps = repaired([one], measured, relief=relief)
    assert kl == pytest.approx(0.68) and asked[0] == start and swaps == len(asked) - 1
    assert ranks(plan)[6] == 32 and sum(ranks(plan)) == 8 * 12
    assert repaired([one], measured, relief=lambda plan: {(0, h): 0.04 for h in range(7)})[0] == one.plan(one.best())
