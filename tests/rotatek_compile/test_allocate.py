"""Spending a budget: exact, in steps of 8, where it lowers expected KL most; and the joint check's swaps."""

import numpy as np
import pytest
import torch

from rotatek_compile.allocate import TIE_WEIGHT, allocate, cost_curve, plan_tensor, repair, uniform_plan
from rotatek_compile.geometry import Geometry, LayerGeometry


def geometry(layers=1, heads=2, dim=32):
    layer = LayerGeometry(layer_type="full_attention", query_heads=2 * heads, kv_heads=heads, head_dim=dim)
    return Geometry(model_type="m", layers=(layer,) * layers, visual_token_ids=(5,))


def curves(*heads):
    return {0: [np.array(head, dtype=float) for head in heads]}


def test_uniform_plan_rounds_to_steps():
    assert uniform_plan(geometry(), 0.25) == {0: [8, 8]}
    assert uniform_plan(geometry(2), 0.3) == {0: [8, 8], 1: [8, 8]}
    assert uniform_plan(geometry(), 0.38) == {0: [16, 16]}
    assert uniform_plan(geometry(), 0.01) == {0: [0, 0]}
    assert uniform_plan(geometry(), 1.0) == {0: [32, 32]}


def test_the_known_optimum():
    """A head that is worthless until its third step, and one that pays at once: the hull sees the third step."""
    late, early = [10, 10, 10, 1, 0], [5, 3.5, 3.4, 3.3, 3.2]
    # 4 steps: three for `late` (9 in three steps, 3 each), one for `early` (1.5); greedy single steps would give early all
    assert allocate(geometry(), curves(late, early), 0.5) == {0: [24, 8]}
    assert allocate(geometry(), curves(early, late), 0.5) == {0: [8, 24]}
    best = min((late[a] + early[4 - a], a) for a in range(5))
    assert best[1] == 3


@pytest.mark.parametrize("keep", [0.0625, 0.25, 0.4, 0.5, 0.9, 1.0])
def test_the_budget_is_spent_exactly(keep):
    shape = geometry(3, 4, 128)
    generator = np.random.default_rng(0)
    random = {i: [np.sort(generator.random(17))[::-1] * 10.0**-h for h in range(4)] for i in range(3)}
    plan = allocate(shape, random, keep)
    ranks = [rank for heads in plan.values() for rank in heads]
    assert sum(ranks) == sum(map(sum, uniform_plan(shape, keep).values()))
    assert all(rank % 8 == 0 and 0 <= rank <= 128 for rank in ranks)
    if keep == 0.25:
        totals = [sum(plan[i][h] for i in range(3)) for h in range(4)]
        assert totals == sorted(totals, reverse=True)
        assert totals[0] > totals[2]
        assert min(ranks) == 0  # dropping a head altogether is legal


def test_cost_curve_meets_its_measures_and_never_rises():
    spectrum = torch.tensor([2.0**-i for i in range(32)])
    curve = cost_curve((0, 8, 16), torch.tensor([1.0, 0.1, 0.2]), spectrum)
    assert len(curve) == 5
    # a larger rank that measured worse (0.2) is noise that lifts the smaller one's
    assert curve[:3] == pytest.approx([1.0, 0.2, 0.2], abs=2 * TIE_WEIGHT)
    assert (np.diff(curve) <= 0).all()
    tail = spectrum.flip(0).cumsum(0).flip(0)
    assert curve[3] == pytest.approx(0.2 * float(tail[24] / tail[16]), rel=0.01)
    assert curve[-1] == 0
    between = cost_curve((0, 16), torch.tensor([1.0, 0.01]), spectrum)[1]
    # log KL over log energy: 8 of 16 octaves make half of the logarithm
    assert between == pytest.approx(0.1, rel=0.02)


def test_heads_that_measured_nothing_are_ordered_by_energy():
    strong, weak = torch.full((32,), 1.0), torch.tensor([1.0] * 8 + [0.0] * 24)
    zero = torch.zeros(2)
    heads = {0: [cost_curve((0, 8), zero, weak), cost_curve((0, 8), zero, strong)]}
    assert allocate(geometry(), heads, 0.75) == {0: [16, 32]} or allocate(geometry(), heads, 0.75)[0][0] <= 16
    assert allocate(geometry(), heads, 0.25)[0][0] == 8


def flat(plan):
    return tuple(plan[0])


def test_repair_swaps_towards_what_is_measured():
    shape_curves = curves([1, 0.9, 0.8, 0.7, 0], [1, 0.9, 0.8, 0.7, 0])
    truth = {(16, 16): 1.0, (8, 24): 0.5, (24, 8): 2.0, (0, 32): 0.4}
    plan, kl, swaps = repair({0: [16, 16]}, shape_curves, lambda p: truth[flat(p)], {0: [16, 16]})
    assert (plan, kl, swaps) == ({0: [0, 32]}, 0.4, 2)


def test_repair_leaves_a_good_plan_alone():
    calls = []
    plan, kl, swaps = repair({0: [8, 24]}, curves([1, 0, 0, 0, 0], [1, 0, 0, 0, 0]), lambda p: calls.append(p) or 5e-5, {0: [16, 16]})
    assert (plan, kl, swaps) == ({0: [8, 24]}, 5e-5, 0)


def test_repair_falls_back_to_uniform():
    plan, kl, swaps = repair({0: [0, 32]}, curves([0] * 5, [0] * 5), lambda p: 0.1 if flat(p) == (16, 16) else 9.0, {0: [16, 16]})
    assert (plan, kl, swaps) == ({0: [16, 16]}, 0.1, 0)


def test_repair_keeps_the_budget_and_does_not_change_its_argument():
    start = {0: [8, 8]}
    seen = []

    def measured(plan):
        seen.append(flat(plan))
        return 1.0 / (1 + len(seen))

    repair(start, curves([4, 3, 2, 1, 0], [8, 4, 2, 1, 0]), measured, {0: [8, 8]})
    assert start == {0: [8, 8]}
    assert {sum(plan) for plan in seen} == {16}
    assert all(min(plan) >= 0 for plan in seen)


def test_plan_tensor():
    assert plan_tensor([8, 0]).dtype == torch.int32
    assert plan_tensor([8, 0]).tolist() == [8, 0]
