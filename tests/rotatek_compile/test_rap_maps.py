"""Maps of Keys and Values, and whole plans."""

import pytest
import torch
from rap_small import documents, small_llama

from rotatek_compile import rap_maps
from rotatek_compile.errors import RotateKError, UsageError
from rotatek_compile.rap_maps import REPAIRS, kept_pairs, key_maps, make_plan, value_maps
from rotatek_compile.rap_measure import Measure
from rotatek_compile.rap_plan import RapLayer, selection, unpruned
from rotatek_compile.rap_reading import attentions, output_heads
from rotatek_compile.rap_statistics import collect


@pytest.fixture(scope="module")
def case():
    model, geometry = small_llama(head_dim=32)
    statistics = collect(model, documents(12), geometry, batch_size=4, pad_id=0, quiet=True, gradients=True)
    return model, geometry, statistics, Measure(model, documents(12)[6:], geometry, 3, 0)


def test_kept_pairs_are_the_first_in_ascending_order():
    assert kept_pairs(torch.tensor([[3, 0, 2, 1], [1, 3, 0, 2]]), 2).tolist() == [[0, 3], [1, 3]]


def test_factors_turn_and_scale_queries_alone(case):
    _, geometry, statistics, _ = case
    shape, pairs = geometry.layers[0], torch.tensor([[0, 4, 9], [2, 3, 15]])
    key, query = key_maps(statistics, 0, pairs, shape, True)
    assert torch.equal(key, selection(pairs, 32))
    for head in range(4):
        real, imaginary = query[head, :3], query[head, 3:]
        for j, p in enumerate(pairs[head // 2].tolist()):
            a, b = float(real[j, p]), float(imaginary[j, p])
            assert float(real[j, p + 16]) == pytest.approx(-b) and float(imaginary[j, p + 16]) == pytest.approx(a)  # a complex number
            assert torch.count_nonzero(real[j]) <= 2
    assert not torch.allclose(query, selection(pairs.repeat_interleave(2, 0), 32))
    plain = key_maps(statistics, 0, pairs, shape, False)
    assert torch.equal(plain[1], selection(pairs.repeat_interleave(2, 0), 32))


@pytest.mark.parametrize("width", [8, 24])
def test_values_predict_outputs_best(case, width):
    """No other map of the same kept directions leaves less of W_o times what is lost."""
    model, geometry, statistics, _ = case
    outputs = output_heads(attentions(model, geometry)[1], geometry.layers[1])
    mean, covariance = statistics.outputs(1)

    def error(value, output, bias):
        lost = torch.eye(32, dtype=torch.float64) - output.double() @ value.repeat_interleave(2, 0).double()
        spread = sum(
            float(torch.trace(outputs[h].double() @ lost[h] @ covariance[h] @ lost[h].mT @ outputs[h].double().mT)) for h in range(4)
        )
        off = torch.einsum("hod,hde,he->o", outputs.double(), lost, mean) - (0 if bias is None else bias.double())
        return spread, float(off.norm())

    plain, repaired = (value_maps(statistics, 1, width, geometry.layers[1], outputs, repair) for repair in (False, True))
    assert plain[2] is None and plain[0].shape == (2, width, 32) and plain[1].shape == (4, 32, width)
    assert error(*repaired)[0] < error(*plain)[0]
    assert error(*repaired)[1] < 1e-4 < error(*plain)[1]
    nudged = repaired[1] + 0.05 * torch.randn(repaired[1].shape, generator=torch.Generator().manual_seed(0))
    assert error(repaired[0], nudged, repaired[2])[0] > error(*repaired)[0]


@pytest.mark.parametrize("score", ["logit", "fisher", "fisher-weight"])
@pytest.mark.parametrize("budget", ["published", "sensitivity"])
def test_plans_keep_what_they_may(case, score, budget):
    model, geometry, statistics, measure = case
    plan = make_plan(model, statistics, geometry, keep_ratio=0.7, score=score, budget=budget, measure=measure)
    plan.check(geometry)
    assert 0.6 < plan.keep_ratio(geometry) <= 0.7
    assert plan.options["score"] == score and plan.options["budget"] == budget and plan.options["repair"] is True


def test_a_factor_makes_up_for_a_pair_that_repeats_another():
    """The last two pairs hardly turn, and hold the same: one of them, twice as large, is both."""
    model, geometry = small_llama(rope_parameters={"rope_type": "default", "rope_theta": 1e14})
    with torch.no_grad():
        for module in attentions(model, geometry):
            for projection in (module.q_proj, module.k_proj):
                rows = projection.weight.unflatten(0, (-1, 16))
                rows[:, 7], rows[:, 15] = rows[:, 6].clone(), rows[:, 14].clone()
    items, pairs = documents(12), torch.arange(7).repeat(2, 1)
    statistics = collect(model, items, geometry, batch_size=4, pad_id=0, quiet=True, gradients=False)
    measure = Measure(model, items, geometry, 4, 0)

    def kl(repair):
        whole = unpruned(geometry.layers[0])
        maps = key_maps(statistics, 0, pairs, geometry.layers[0], repair)
        return measure({0: RapLayer(pairs, *maps, whole.value, whole.output)})

    assert kl(True) < 0.01 * kl(False)


def test_outputs_are_refit_only_where_it_pays(case):
    model, geometry, statistics, measure = case

    def kl(*repair):
        plan = make_plan(model, statistics, geometry, keep_ratio=0.6, score="logit", budget="published", repair=repair, measure=measure)
        assert plan.options.get("kl", measure(plan.layers)) == pytest.approx(measure(plan.layers), rel=1e-3)
        return measure(plan.layers)

    assert kl("outputs") <= kl() and kl(*REPAIRS) <= kl("factors", "values")


def test_sensitivity_is_at_most_what_published_widths_cost(case):
    model, geometry, statistics, measure = case
    shared = {"keep_ratio": 0.6, "score": "logit", "repair": ("factors", "values"), "measure": measure}
    one, other = (make_plan(model, statistics, geometry, budget=budget, **shared) for budget in ("sensitivity", "published"))
    assert measure(one.layers) <= measure(other.layers)
    assert one.options["kl"] == pytest.approx(measure(one.layers), rel=1e-3)


def test_measured_on_its_own_documents_when_nothing_is_passed(case):
    model, geometry, statistics, _ = case
    plan = make_plan(model, statistics, geometry, keep_ratio=0.8)
    assert plan.options["kl"] > 0 and plan.keep_ratio(geometry) <= 0.8


def test_the_first_documents_of_a_measure(case):
    """Read once: no model runs for them again, and the figure is that of these documents."""
    model, geometry, statistics, measure = case
    plan = make_plan(model, statistics, geometry, keep_ratio=0.6, score="fisher", budget="published", repair=("factors",))
    part = measure.first(2)  # whole batches of three
    assert (measure.documents, part.documents) == (6, 3)
    assert part(plan.layers) == pytest.approx(Measure(model, documents(12)[6:9], geometry, 1, 0)(plan.layers), rel=1e-3)
    assert part(plan.layers) != measure(plan.layers)


def test_many_documents_are_measured_on_a_few_first(monkeypatch):
    model, geometry = small_llama()
    monkeypatch.setattr(rap_maps, "FEW", 2)
    asked = []
    real = Measure.__call__
    monkeypatch.setattr(Measure, "__call__", lambda self, layers: asked.append((self.documents, len(layers))) or real(self, layers))
    statistics = collect(model, documents(6), geometry, batch_size=1, pad_id=0, quiet=True, gradients=False)
    plan = make_plan(model, statistics, geometry, keep_ratio=0.6, repair=())
    assert {count for count, _ in asked} == {2, 6} and plan.options["kl"] == pytest.approx(
        Measure(model, documents(6), geometry, 1, 0)(plan.layers), rel=1e-3
    )
    assert sum(count for count, _ in asked) < 0.7 * 6 * len(asked)


def test_everything_kept_is_left_as_it_is(case):
    model, geometry, statistics, _ = case
    plan = make_plan(model, statistics, geometry, keep_ratio=1.0)
    assert all(torch.equal(layer.key, torch.eye(32).repeat(2, 1, 1)) and layer.bias is None for layer in plan.layers.values())
    assert plan.keep_ratio(geometry) == 1.0


def test_what_is_refused(case):
    model, geometry, statistics, _ = case
    for ratio in (0.0, 1.2, float("nan")):
        with pytest.raises(UsageError, match="is no share; use a number above 0 and at most 1"):
            make_plan(model, statistics, geometry, keep_ratio=ratio)
    with pytest.raises(UsageError, match="unknown repair 'magic'"):
        make_plan(model, statistics, geometry, keep_ratio=0.5, repair=("magic",))
    bare = collect(model, documents(1), geometry, batch_size=1, pad_id=0, quiet=True, gradients=False)
    with pytest.raises(RotateKError, match="need squared gradients; collect the statistics with gradients"):
        make_plan(model, bare, geometry, keep_ratio=0.5, score="fisher")
