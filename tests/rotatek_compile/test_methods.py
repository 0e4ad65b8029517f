"""Entries of an evaluation: which methods at which settings, and what is refused."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rotatek_compile.cost_curves import dense_bytes, plan_bytes
from rotatek_compile.errors import UsageError
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.methods import OWN_BUDGETS, SUITE_BUDGETS, Methods
from rotatek_compile.plan import HeadPlan
from rotatek_compile.runtime.cache import RotateKCache
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.rivals.registry import RIVALS, smallest_budget

KNOCKOUT = {i: torch.tensor([0.1 * i, 0.05]) for i in range(3)}


@pytest.fixture
def methods(tiny, make_artifact):
    """Of an artifact with knock-outs and sensitivities, compiled for a budget: the Keys of layer 2 matter most, layer 0 not at all."""
    artifact = make_artifact(8, keep_ratio=0.25, kv_budget=0.625, levels=(Slabs(), Slabs(0, 0, 16)), key_bits="auto", value_bits="auto")
    artifact.tensors |= {f"layers.{i}.knockout": t for i, t in KNOCKOUT.items()}
    for i in range(3):
        artifact.tensors[f"layers.{i}.key_sensitivity"] = torch.tensor([[1.0 * i, 0.1 * i]] * 2)
        artifact.tensors[f"layers.{i}.value_sensitivity"] = torch.tensor([[0.1 * i, 0.01 * i]] * 2)
    with enable(tiny, artifact, backend="torch") as active:
        yield Methods(active)


@pytest.fixture
def unmeasured(tiny, make_artifact):
    with enable(tiny, make_artifact(8), backend="torch") as active:
        yield Methods(active)


def test_suite(methods):
    entries = methods.suite("rivals")
    own = [e for e in entries if e.method == "rotatek" and e.kv_budget]
    assert [(e.requested_budget, e.kv_budget, e.setting) for e in own] == [(b, b, f"KV budget {b:g}") for b in OWN_BUDGETS]
    assert all(e.ours == (e.method in ("rotatek", "artifact")) for e in entries)
    assert (entries[1].setting, entries[1].requested_budget) == ("KV budget 0.625, allocated", 0.625)
    entries = [e for e in entries if e not in own]
    # a quarter and an eighth of 32 directions are both 8 after rounding to whole steps, a sixteenth is none
    assert [e.label for e in entries[2:5]] == [f"rotatek (uniform, {n} directions)" for n in (16, 8, 0)]
    assert [e.method for e in entries[:6]] == ["dense", "artifact", "rotatek", "rotatek", "rotatek", "int8"]
    assert len({e.label for e in entries}) == len(entries)
    files = {"leank-learned", "palu", "palu4"}  # what needs a file that was learned
    assert {e.method for e in entries} == {"dense", "artifact", "rotatek", *RIVALS} - {"native"} - files
    geometry = methods.artifact.geometry
    for entry in entries:
        if entry.method in RIVALS and entry.requested_budget is not None:
            least = smallest_budget(entry.method, geometry)
            assert entry.kv_budget >= entry.requested_budget
            if entry.kv_budget > entry.requested_budget:
                assert entry.kv_budget == pytest.approx(least, abs=1e-6) and entry.requested_budget < least
    # without a knob there is one row; a method of several sizes has one per budget that differs
    counts = {name: sum(e.method == name for e in entries) for name in RIVALS}
    assert counts["int4"] == counts["int8"] == counts["kivi2"] == 1
    assert counts["head-drop"] > 3
    int8 = next(e for e in entries if e.method == "int8")
    assert int8.requested_budget == max(SUITE_BUDGETS) < int8.kv_budget
    # Values as they are: more than half of the bytes, so its keep ratios are compared
    assert {e.keep_ratio for e in entries if e.method == "think"} >= {1 / 2, 1 / 4}


def test_makers_give_fresh_caches_of_the_right_kind(methods):
    for entry in methods.suite("rivals"):
        first, second = entry.make(), entry.make()
        assert first is not second and isinstance(first, RotateKCache) == (entry.method != "dense")
        coders = {getattr(layer.coder, "name", None) for layer in first.layers} if entry.method != "dense" else {None}
        assert coders == {entry.method if entry.method in RIVALS else None}


def test_own_bases_at_another_keep_ratio(methods):
    entry = methods.own(0.5)
    plans = [layer.artifact.artifact.plan()[layer.index] for layer in entry.make().layers]
    assert plans == [[HeadPlan(Slabs(16), Slabs(32))] * 2] * 3
    assert methods.artifact.plan()[0] == [HeadPlan(Slabs(8), Slabs(32))] * 2  # the artifact itself is left alone
    assert (entry.method, entry.keep_ratio, entry.setting) == ("rotatek", 0.5, "uniform, 16 directions")


@pytest.mark.parametrize("budget", [1 / 2, 1 / 8, 1 / 32])
def test_own_bases_at_a_budget(methods, budget):
    """Within the bytes of a 512-token segment, more for what matters more."""
    entry = methods.own_budget(budget)
    artifact = entry.make().layers[0].artifact.artifact
    plan, geometry = artifact.plan(), artifact.geometry
    assert 0.7 * budget < plan_bytes(geometry, plan) / dense_bytes(geometry) <= budget
    bytes_of = [sum(head.bytes_per_token for head in heads) for heads in plan.values()]
    assert bytes_of[2] >= bytes_of[1] >= bytes_of[0] < bytes_of[2]
    assert (entry.requested_budget, entry.ours, artifact.method.kv_budget) == (budget, True, budget)


def test_an_artifact_of_a_uniform_plan_says_so(methods):
    methods.artifact = replace(methods.artifact, method=replace(methods.artifact.method, allocation="uniform"))
    entry = methods.own_budget(0.25)
    assert entry.setting == "KV budget 0.25, uniform"
    assert len({head for heads in entry.make().layers[0].artifact.artifact.plan().values() for head in heads}) == 1


def test_an_artifact_without_sensitivities_of_values_is_left_out_of_budgets(methods):
    tensors = {name: t for name, t in methods.artifact.tensors.items() if not name.endswith("value_sensitivity")}
    methods.artifact = replace(methods.artifact, tensors=tensors)
    with pytest.warns(UserWarning, match="rotatek at KV budgets is left out of the suite: .* compile it again"):
        entries = methods.suite("rivals")
    assert {e.requested_budget for e in entries if e.method == "rotatek"} == {None}


def test_chosen(methods):
    chosen = methods.chosen(["rotatek"], (0.25, 0.125), (0.5,))
    assert [(e.kv_budget, e.keep_ratio) for e in chosen] == [(0.25, None), (0.125, None), (None, 0.5)]
    chosen = methods.chosen(["rotatek", "int4", "think", "head-drop"], (), (0.5, 0.25))
    assert [(e.method, e.keep_ratio) for e in chosen] == [
        ("rotatek", 0.5), ("rotatek", 0.25), ("int4", None), ("think", 0.5), ("think", 0.25), ("head-drop", 0.5), ("head-drop", 0.25),
    ]  # fmt: skip
    assert [(e.requested_budget, e.kv_budget) for e in methods.chosen(["int4", "head-drop"], (0.5, 0.4), ())][:1] == [(0.5, 0.5)]


@pytest.mark.parametrize(
    ("names", "budgets", "ratios", "words"),
    [
        (["kivi3"], (), (), "unknown --method 'kivi3'; choose one of rotatek, int8"),
        (["rotatek"], (0.001,), (), "0.001"),
        (["rotatek"], (), (), "--method rotatek needs --kv-budget or --keep-ratio"),
        (["int4"], (0.01,), (), "int4 cannot meet a KV budget of 0.01; the smallest it can on this model is 0.3"),
        (["think"], (), (), "think takes a KV budget or a keep ratio"),
        (["int4", "fp8"], (), (0.5,), "int4, fp8 has no keep ratio; leave --keep-ratio out"),
    ],
)
def test_refusals(methods, names, budgets, ratios, words):
    with pytest.raises(UsageError, match=words):
        methods.chosen(names, budgets, ratios)


def test_rivals_beside_an_artifact_of_all_text_are_refused_before_anything_runs(methods):
    methods.artifact = replace(methods.artifact, method=replace(methods.artifact.method, span="all"))
    for ask in (lambda: methods.chosen(["int4"], (), ()), lambda: methods.suite("rivals")):
        with pytest.raises(UsageError, match="int[48] codes images only, but the artifact has span 'all'"):
            ask()


def test_unknown_suite(methods):
    with pytest.raises(UsageError, match="unknown --suite 'all'; choose one of rivals"):
        methods.suite("all")


def test_learned_methods_need_knockouts(unmeasured):
    for ask in (lambda: unmeasured.chosen(["head-drop"], (0.2,), ()), lambda: unmeasured.suite("rivals")):
        with pytest.raises(UsageError, match="head-drop needs measured knock-outs and the artifact has none; compile it again"):
            ask()
    assert unmeasured.chosen(["int4"], (), ())[0].method == "int4"


def test_rivals_that_cannot_code_the_model_are_left_out_loudly(methods):
    geometry = methods.artifact.geometry
    odd = replace(geometry, layers=tuple(replace(layer, head_dim=24) for layer in geometry.layers))
    fake = SimpleNamespace(**{name: getattr(methods.enabled, name) for name in ("model", "prepared", "backend", "new_cache")})
    fake.artifact = replace(methods.artifact, geometry=odd)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = {e.method for e in Methods(fake).suite("rivals")}
    said = [str(warning.message) for warning in caught]
    assert any(s.startswith("left out of the suite: hadamard4 needs a head_dim that is a power of two, this model has 24") for s in said)
    assert "int4" in names and not {"hadamard4", "hadamard2"} & names


def test_artifact_of_a_rival(tiny, make_artifact):
    artifact = make_artifact(8)
    artifact.method = replace(artifact.method, rival="head-drop", kv_budget=0.2, keep_ratio=1.0)
    artifact.tensors = {f"layers.{i}.knockout": t for i, t in KNOCKOUT.items()}
    with enable(tiny, artifact, backend="torch") as active:
        methods = Methods(active)
        entry = methods.compiled()
        assert (entry.method, entry.kv_budget, entry.keep_ratio) == ("artifact", 0.2, None)
        assert entry.setting.startswith("head-drop, ") and entry.make().layers[0].coder.name == "head-drop"
        assert "rotatek" not in {e.method for e in methods.suite("rivals")}
        for ask in (methods.own, methods.own_budget):
            with pytest.raises(UsageError, match="compiled for head-drop and has no bases"):
                ask(0.5)
