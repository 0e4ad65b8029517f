"""Spending a budget: never more than it, where it lowers expected KL most; plans that treat heads alike, and random ones."""

import numpy as np
import pytest
import torch

from rotatek_compile.allocate import (
    Menu,
    all_at_bits,
    at_bits,
    cost_of,
    menus_of_bytes,
    menus_of_directions,
    plan_from_choice,
    random_plan,
    same_everywhere,
    spend,
    uniform_plan,
)
from rotatek_compile.cost_curves import curves_of, dense_bytes, energy_curves, every_slabs, plan_bytes, predicted_kl
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan
from rotatek_compile.sensitivity import levels_for


def geometry(layers=1, heads=2, dim=32):
    layer = LayerGeometry(layer_type="full_attention", query_heads=2 * heads, kv_heads=heads, head_dim=dim)
    return Geometry(model_type="m", layers=(layer,) * layers, visual_token_ids=(5,))


def menus(*heads):
    """Native ranks in steps of 8 at a price of one each."""
    return {
        (0, h): Menu(tuple(HeadPlan(Slabs(8 * n), Slabs(32)) for n in range(len(kl))), np.arange(len(kl)), np.array(kl, dtype=float))
        for h, kl in enumerate(heads)
    }


def model(layers=3, heads=4, dim=128, seed=0):
    """Geometry, curves and spectra of heads whose importance spans powers of ten."""
    shape, generator = geometry(layers, heads, dim), torch.Generator().manual_seed(seed)
    levels = levels_for(dim)
    falls = torch.logspace(0, -2 * (len(levels) - 1), len(levels))

    def spectrum():
        return torch.logspace(0, -3, dim) * torch.rand(heads, 1, generator=generator)

    def table():
        return 10.0 ** -torch.randint(0, 5, (heads, 1), generator=generator) * falls

    kl, spectra = ({side: {i: made() for i in range(layers)} for side in ("key", "value")} for made in (table, spectrum))
    return shape, curves_of(shape, levels, kl, spectra), spectra


def test_uniform_plans_round_to_steps():
    raw = Slabs(32)
    for ratio, rank in ((0.25, 8), (0.3, 8), (0.38, 16), (0.01, 0), (1.0, 32)):
        assert uniform_plan(geometry(2), ratio) == {i: [HeadPlan(Slabs(rank), raw)] * 2 for i in range(2)}
    assert uniform_plan(geometry(), 0.25, "8") == {0: [HeadPlan(Slabs(byte=8), raw)] * 2}
    assert uniform_plan(geometry(), 0.25, "4") == {0: [HeadPlan(Slabs(nibble=16), raw)] * 2}
    assert uniform_plan(geometry(dim=24), 1.0, "4")[0][0].key == Slabs(nibble=16)


def test_all_directions_at_a_precision():
    assert [all_at_bits(64, bits) for bits in ("native", "8", "4")] == [at_bits(64, "native"), Slabs(byte=64), Slabs(nibble=64)]
    assert all_at_bits(24, "4") == Slabs(byte=8, nibble=16)


def test_the_known_optimum():
    """A head that is worthless until its third step, and one that pays at once: the hull sees the third step."""
    late, early = [10, 10, 10, 1, 0], [5, 3.5, 3.4, 3.3, 3.2]
    # 4 steps: three for `late` (9 in three steps, 3 each), one for `early` (1.5); greedy single steps would give early all
    assert spend(menus(late, early), 4) == {(0, 0): 3, (0, 1): 1}
    assert spend(menus(early, late), 4) == {(0, 0): 1, (0, 1): 3}
    best = min((late[a] + early[4 - a], a) for a in range(5))
    assert best[1] == 3


def test_what_a_hull_step_cannot_pay_for_is_still_spent():
    assert spend(menus([10, 10, 9, 1, 0], [1, 0.9, 0.8, 0.7, 0.6]), 2) == {(0, 0): 2, (0, 1): 0}
    assert spend(menus([10, 10, 10, 1, 0], [1, 0.9, 0.8, 0.7, 0.6]), 2) == {(0, 0): 0, (0, 1): 2}


def test_too_small_a_budget():
    menu = Menu((HeadPlan(Slabs(), Slabs(32)),), np.array([5]), np.array([1.0]))
    with pytest.raises(ValueError, match="budget 9 is below the smallest cost 10"):
        spend({(0, 0): menu, (0, 1): menu}, 9)


@pytest.mark.parametrize("keep", [0.0625, 0.25, 0.4, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("bits", ["native", "8", "4"])
def test_directions_are_spent_exactly(keep, bits):
    shape, curves, _ = model()
    uniform = uniform_plan(shape, keep, bits)
    budget = sum(head.key.rank for heads in uniform.values() for head in heads)
    found = menus_of_directions(shape, curves, bits, "native")
    plan = plan_from_choice(spend(found, budget), found)
    heads = [head for heads in plan.values() for head in heads]
    assert sum(head.key.rank for head in heads) == budget
    assert {head.value for head in heads} == {Slabs(128)} and {head.key for head in heads} <= set(every_slabs(128, bits))
    if keep == 0.25:
        assert predicted_kl(plan, curves) < 0.5 * predicted_kl(uniform, curves)


def test_the_same_bytes_at_any_precision():
    shape, curves, _ = model()
    native, mixed = (menus_of_directions(shape, curves, bits, "8") for bits in ("native", "auto"))
    plans = [plan_from_choice(spend(native, 12 * 32), native), plan_from_choice(spend(mixed, 12 * 32 * 4), mixed)]
    sizes = [sum(head.key.bytes_per_token() for heads in plan.values() for head in heads) for plan in plans]
    assert 0.99 * sizes[0] <= sizes[1] <= sizes[0] == 12 * 64
    assert {head.value for heads in plans[1].values() for head in heads} == {Slabs(byte=128)}
    assert predicted_kl(plans[1], curves) < 0.1 * predicted_kl(plans[0], curves)


@pytest.mark.parametrize("share", [1 / 512, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 0.9, 1.0])
@pytest.mark.parametrize("dim", [32, 128])
def test_a_budget_of_bytes_is_a_promise(share, dim):
    shape, curves, spectra = model(dim=dim)
    found = menus_of_bytes(shape, curves)
    plan = plan_from_choice(spend(found, int(share * dense_bytes(shape))), found)
    alike = same_everywhere(shape, energy_curves(shape, spectra), share)
    for each in (plan, alike):
        assert plan_bytes(shape, each) <= share * dense_bytes(shape)
    if 1 / 512 < share <= 0.5:
        assert plan_bytes(shape, plan) > 0.95 * share * dense_bytes(shape) or dim == 32
        assert predicted_kl(plan, curves) <= predicted_kl(alike, curves)
    assert len({head for heads in alike.values() for head in heads}) == 1
    if share == 1:
        assert predicted_kl(plan, curves) < 1e-8


def test_heads_that_matter_keep_more():
    shape, curves, _ = model()
    found = menus_of_bytes(shape, curves)
    plan = plan_from_choice(spend(found, dense_bytes(shape) // 32), found)
    bytes_of = {pair: plan[pair[0]][pair[1]].bytes_per_token for pair in curves}
    order = sorted(curves, key=lambda pair: curves[pair].kl(HeadPlan(Slabs(), Slabs())))
    assert sum(bytes_of[pair] for pair in order[-3:]) > 3 * sum(bytes_of[pair] for pair in order[:3])


def test_chosen_bits_alone():
    shape, curves, _ = model()
    found = menus_of_bytes(shape, curves, "4", "native")
    plan = plan_from_choice(spend(found, dense_bytes(shape) // 4), found)
    heads = [head for heads in plan.values() for head in heads]
    assert all(head.key == Slabs(nibble=head.key.rank) and head.value == Slabs(head.value.rank) for head in heads)


def test_no_pair_fits():
    shape, _, spectra = model()
    with pytest.raises(ValueError, match="the smallest plan takes 512 of 102"):
        same_everywhere(shape, energy_curves(shape, spectra), 1 / 2560)


def test_random_plans_have_equal_bytes_and_are_worse():
    shape, curves, _ = model()
    found, budget = menus_of_bytes(shape, curves), dense_bytes(shape) // 16
    best = spend(found, budget)
    plans = [random_plan(found, budget, np.random.default_rng(seed)) for seed in range(8)]
    sizes = [plan_bytes(shape, plan) / budget for plan in plans]
    assert max(sizes) <= 1 and min(sizes) > 0.97
    assert cost_of(best, found) <= budget
    costs = [predicted_kl(plan, curves) for plan in plans]
    assert min(costs) >= 0.99 * predicted_kl(plan_from_choice(best, found), curves) and max(costs) > 10 * min(costs)
    again = random_plan(found, budget, np.random.default_rng(3))
    assert again == plans[3] != plans[4]
