"""Widths: the published rule on numbers worked out by hand, the cheapest plan against all plans, and what is refused."""

import itertools
import math

import pytest

from rotatek_compile.errors import RotateKError, UsageError
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.rap_budget import (
    PATIENCE,
    Menu,
    by_sensitivity,
    cheapest,
    curve,
    menus,
    moves,
    published,
    room,
    rounded,
    sensitivities,
    spent,
    widths_for,
)


def geometry(layers=2, dim=64, kv_heads=2):
    shape = LayerGeometry(layer_type="full_attention", query_heads=4, kv_heads=kv_heads, head_dim=dim)
    return Geometry(model_type="llama", layers=(shape,) * layers, visual_token_ids=())


def test_menus_are_in_steps_of_eight():
    found = menus(geometry())
    assert found[0, "key"] == Menu((8, 16, 24, 32), 4) and found[1, "value"] == Menu(tuple(range(8, 65, 8)), 2)
    assert [menu.widths for menu in menus(geometry(1, 16)).values()] == [(2, 4, 6, 8), (8, 16)]  # no whole steps of pairs in a half of 8


def test_the_published_rule_by_hand():
    """Four groups, rho 0.5: 0.5 (1 - s/S) 4/3 of each goes: 0.4667, 0.6, 0.6, 0.3333, whose mean is rho already."""
    scores = {(0, "key"): 3.0, (0, "value"): 1.0, (1, "key"): 1.0, (1, "value"): 5.0}
    exact = {g: 1 - 0.5 * (1 - s / 10) * 4 / 3 for g, s in scores.items()}
    assert sum(exact.values()) == pytest.approx(2.0)
    found = published(scores, geometry(), 0.5)
    # kept of 32 pairs: 17.07, 12.8; of 64 directions: 25.6, 42.67; down to steps 16, 24, 8, 40 (224 of 256 numbers), then up
    assert found == {(0, "key"): 16, (0, "value"): 24, (1, "key"): 16, (1, "value"): 40}
    assert spent(found, menus(geometry())) == 256


def test_equal_scores_share_alike_and_a_clipped_group_keeps_everything():
    even = published(dict.fromkeys(menus(geometry()), 1.0), geometry(), 0.5)
    assert set(even.values()) == {16, 32}
    found = published({(0, "key"): 1e9, (0, "value"): 1.0, (1, "key"): 1.0, (1, "value"): 1.0}, geometry(), 0.7)
    assert found[0, "key"] == 32


def test_rounding_stays_within_the_room():
    options = menus(geometry())
    for total in (100, 130, 200, 333, 511):
        found = rounded({(0, "key"): 9.0, (0, "value"): 60.0, (1, "key"): 31.0, (1, "value"): 1.0}, options, total)
        left = total - spent(found, options)
        assert 0 <= left < 32
        assert all(found[g] in options[g].widths for g in options)


def test_the_cheapest_plan_is_that_of_all_plans():
    options = menus(geometry(2, 32))
    costs = {g: {w: (n + 2) * math.exp(-w / (4 + 3 * n)) for w in menu.widths} for n, (g, menu) in enumerate(options.items())}
    every = [dict(zip(options, chosen, strict=True)) for chosen in itertools.product(*(menu.widths for menu in options.values()))]
    for most in (100, 112, 160, 240, 256):
        fitting = [plan for plan in every if spent(plan, options) <= most]
        best = min(sum(costs[g][w] for g, w in plan.items()) for plan in fitting)
        found = cheapest(options, costs, most)
        assert spent(found, options) <= most
        assert sum(costs[g][w] for g, w in found.items()) == pytest.approx(best)


def test_curves_fall_in_the_logarithm():
    found = curve(Menu((8, 16, 24, 32, 40), 1), {16: 1e-2, 32: 1e-4})
    assert found[24] == pytest.approx(1e-3) and found[16] == pytest.approx(1e-2) and found[8] == pytest.approx(1e-1) and found[40] == 0.0
    bumpy = curve(Menu((8, 16, 24), 1), {8: 1e-3, 16: 1e-2})
    assert bumpy[16] <= bumpy[8]


def test_single_cuts_are_measured_alone_and_never_whole():
    asked = []
    found = sensitivities(menus(geometry(1)), lambda widths: asked.append(widths) or 0.5)
    assert all(len(widths) == 1 for widths in asked)
    assert sorted(found[0, "key"]) == [8, 16, 24] and sorted(found[0, "value"]) == [8, 16, 32, 48]


def test_sensitivity_spends_where_it_matters():
    """Only the Values of layer 1 cost anything, and only below 56."""
    widths, kl = by_sensitivity(geometry(), 0.4, lambda w: 1.0 * max(0, 56 - w.get((1, "value"), 64)) + 1e-6, 6)
    assert widths[1, "value"] >= 56 and kl == pytest.approx(1e-6)
    assert spent(widths, menus(geometry())) <= room(geometry(), 0.4)


def test_a_plan_is_improved_as_a_whole():
    """Alone every cut looks harmless; together the Keys of both layers cost unless one of them is whole."""

    def cost(widths):
        narrow = [32 - widths.get((i, "key"), 32) for i in (0, 1)]
        return 1e-3 * sum(narrow) + min(narrow) + 1e-3 * (64 - widths.get((0, "value"), 64)) + 1e-3 * (64 - widths.get((1, "value"), 64))

    first, _ = by_sensitivity(geometry(), 0.8, cost, 0)
    better, kl = by_sensitivity(geometry(), 0.8, cost, 60)
    assert kl == cost(better) < cost(first) or cost(first) == kl
    assert spent(better, menus(geometry())) <= room(geometry(), 0.8)
    assert min(32 - better[0, "key"], 32 - better[1, "key"]) == 0


def test_where_there_are_many_documents_most_is_measured_on_a_few():
    """Single cuts ask the few alone; whole plans ask all, and what is taken is better by both."""

    def kl(widths):
        return sum((1 + n) * (1 - widths.get(g, menu.full) / menu.full) ** 2 for n, (g, menu) in enumerate(menus(geometry()).items()))

    asked = {"few": [], "all": []}
    found = by_sensitivity(geometry(), 0.6, lambda w: asked["all"].append(w) or kl(w), few=lambda w: asked["few"].append(w) or 2 * kl(w))
    assert all(len(widths) == 4 for widths in asked["all"]) and min(len(widths) for widths in asked["few"]) == 1
    assert len(asked["all"]) < len(asked["few"]) and found[1] == kl(found[0]) == min(kl(w) for w in asked["all"])
    first = asked["all"][0]
    stubborn = by_sensitivity(geometry(), 0.6, kl, few=lambda w: kl(w) if len(w) == 1 else float(w != first))
    assert stubborn[0] == first  # whatever else the few find dearer is not taken


def test_moves_that_bring_nothing_come_to_an_end():
    asked = []
    by_sensitivity(geometry(6), 0.6, lambda w: asked.append(w) or 1.0, trials=10_000)
    assert 3 < sum(len(w) == 12 for w in asked) <= 2 + PATIENCE
    asked.clear()
    by_sensitivity(geometry(6), 0.6, lambda w: asked.append(w) or 1e-7, trials=10_000)
    assert sum(len(w) == 12 for w in asked) <= 2  # nothing to better


def test_moves_fit():
    options, most = menus(geometry()), room(geometry(), 0.5)
    curves = {g: curve(menu, {menu.widths[1]: 0.1}) for g, menu in options.items()}
    plan = {(0, "key"): 16, (0, "value"): 32, (1, "key"): 16, (1, "value"): 32}
    found = moves(plan, options, curves, most)
    assert found and all(spent(moved, options) <= most and moved != plan for moved in found)


def test_what_is_refused():
    with pytest.raises(UsageError, match=r"--keep-ratio 0.1 is below the least that this model can keep; use at least 0.188"):
        room(geometry(), 0.1)
    with pytest.raises(UsageError, match="unknown budget 'even'; choose one of sensitivity, published"):
        widths_for("even", geometry(), 0.5, None, None)
    with pytest.raises(RotateKError, match="the published budget needs squared gradients"):
        widths_for("published", geometry(), 0.5, None, None)
