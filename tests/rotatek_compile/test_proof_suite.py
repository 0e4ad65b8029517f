"""The suite `proof`: Keys at equal bytes beside equal Values, and several calibrations of one model as one row."""

import math
import warnings
from dataclasses import fields, replace

import pytest
import torch

from rotatek_compile import proof_suite
from rotatek_compile.comparison import against_rivals
from rotatek_compile.cost_curves import dense_bytes, plan_bytes
from rotatek_compile.errors import UsageError
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.key_plans import with_key_budget
from rotatek_compile.methods import SUITE_BUDGETS, Entry, Methods, channel_energies
from rotatek_compile.outcomes import Outcome, Row, kl_ratio, pooled
from rotatek_compile.proof_suite import KEYS, KEYS_VALUES4, VALUES
from rotatek_compile.runtime.accounting import CacheBytes
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.rivals.coded_values import CodedValues
from rotatek_compile.runtime.rivals.registry import RIVALS, worst_share
from rotatek_compile.suite import Measured, over_calibrations
from rotatek_compile.token_budget import selecting


@pytest.fixture
def measured_artifact(make_artifact):
    """Of three layers whose Keys matter more and more; it has knock-outs."""

    def make(weight=1.0):
        artifact = make_artifact(8, keep_ratio=0.25, kv_budget=0.625, levels=(Slabs(), Slabs(0, 0, 16)), key_bits="auto", value_bits="auto")
        artifact.tensors |= {f"layers.{i}.knockout": torch.tensor([0.1 * i, 0.05]) for i in range(3)}
        for i in range(3):
            artifact.tensors[f"layers.{i}.key_sensitivity"] = torch.tensor([[weight * i, 0.1 * i]] * 2)
            artifact.tensors[f"layers.{i}.value_sensitivity"] = torch.tensor([[0.1 * i, 0.01 * i]] * 2)
        return artifact

    return make


@pytest.fixture
def entries(tiny, measured_artifact):
    with enable(tiny, measured_artifact(), backend="torch") as active, warnings.catch_warnings():
        warnings.simplefilter("error")
        yield Methods(active).suite("proof")


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.125])
def test_a_budget_of_the_keys(measured_artifact, budget):
    artifact = with_key_budget(measured_artifact(), budget)
    plan, geometry = artifact.plan(), artifact.geometry
    assert {head.value for heads in plan.values() for head in heads} == {Slabs(32)}
    keys = plan_bytes(geometry, plan) / dense_bytes(geometry) - 0.5
    assert 0.8 * budget / 2 < keys <= budget / 2 and artifact.method.kv_budget == (budget + 1) / 2
    kept = [sum(head.key.bytes_per_token() for head in heads) for heads in plan.values()]
    assert kept[2] >= kept[1] >= kept[0] and (kept[2] > kept[0] or budget == 1)


def test_keys_alone_are_compared_on_all_tokens(tiny, measured_artifact):
    selected = selecting(measured_artifact(), "snapkv", 0.5, kv_budget=0.25)
    cut, plain = with_key_budget(selected, 0.5), with_key_budget(measured_artifact(), 0.5)
    assert (cut.method.token_method, cut.method.token_keep_ratio, cut.method.token_budget) == (None, 1.0, None)
    assert cut.plan() == plain.plan() and cut.method.kv_budget == plain.method.kv_budget
    with enable(tiny, selected, backend="torch") as active:
        suite = Methods(active).suite("proof")
        dropping = {entry.name for entry in suite if entry.method != "dense" and entry.make().state.selector is not None}
    own = {entry.name for entry in suite if entry.axis == "kv" and entry.method in ("rotatek", "artifact")}
    assert dropping == own and len(own) == 7 and all("snapkv, 0.5 of the tokens, of these: " in name for name in own)


def test_what_a_budget_of_the_keys_refuses(measured_artifact):
    with pytest.raises(UsageError, match="0.001 of the Keys' bytes is too small: means alone take"):
        with_key_budget(measured_artifact(), 0.001)
    with pytest.raises(UsageError, match="--key-budget 1.5 is out of range"):
        with_key_budget(measured_artifact(), 1.5)
    artifact = measured_artifact()
    with pytest.raises(UsageError, match="needs an artifact of rotatek with sensitivities"):
        with_key_budget(replace(artifact, method=replace(artifact.method, levels=())), 0.5)


def test_every_method_of_keys_alone_at_every_share(entries):
    geometry = next(e for e in entries if e.method == "int4").make().layers[0].artifact.artifact.geometry
    alone = {name for name, rival in RIVALS.items() if rival.keys_only} - {"leank-learned"}  # no file is given
    for axis in (KEYS, KEYS_VALUES4):
        own = [e for e in entries if e.axis == axis]
        assert {e.method for e in own} == {"rotatek", *alone}
        assert {e.key_budget for e in own if e.method == "rotatek" and e.key_budget} == set(SUITE_BUDGETS)
        ours = {e.key_budget: e.kv_budget for e in own if e.method == "rotatek" and e.key_budget}
        for entry in (e for e in own if e.method in alone or axis == KEYS_VALUES4):
            coder = entry.make().layers[0].coder
            assert isinstance(coder, CodedValues) == (axis == KEYS_VALUES4)
            share = worst_share(coder, geometry)
            assert share <= entry.kv_budget * (1 + 1e-6)
            assert entry.requested_budget == ours[entry.key_budget]
            assert entry.kv_budget == entry.requested_budget or share > entry.requested_budget
    assert {e.setting for e in entries if e.axis == VALUES} == {f"Values {w}" for w in ("int4", "kivi4", "hadamard4", "calibrated4")}
    assert {e.method for e in entries if e.axis == "kv"} == {"dense", "artifact", "rotatek", "leank", *RIVALS} - (alone - {"leank"}) - {
        "native", "leank-learned", "palu", "palu4"
    }  # fmt: skip
    assert len({e.label for e in entries}) == len(entries)


def test_values_that_cannot_be_coded_are_left_out_loudly(tiny, measured_artifact, monkeypatch):
    def refuse(*args):
        raise UsageError("head_dim 24")

    monkeypatch.setattr(proof_suite, "_coded_share", refuse)
    said = pytest.warns(UserWarning, match="left out of the suite: head_dim 24")
    with enable(tiny, measured_artifact(), backend="torch") as active, said:
        axes = {e.axis for e in Methods(active).suite("proof")}
    assert axes == {"kv", KEYS, VALUES}


def test_what_depends_on_calibration(entries):
    calibrated = {e.method for e in entries if e.calibrated}
    assert calibrated == {"artifact", "rotatek", "head-drop", "head-drop-native", "leank"}


def test_another_calibration(tiny, measured_artifact):
    """Its own plan and its own names, the same budgets."""
    first, second = measured_artifact(), measured_artifact(weight=0.01)
    with enable(tiny, first, backend="torch") as active:
        one, other = Methods(active).suite("proof"), Methods(active, second, 1).suite("proof")
    ours = [[e for e in found if e.method == "rotatek" and e.requested_budget == 0.5][0] for found in (one, other)]
    assert [e.label for e in ours] == ["rotatek (KV budget 0.5)", "rotatek (KV budget 0.5) #2"]
    plans = [e.make().layers[0].artifact.artifact.plan() for e in ours]
    assert plans[0] != plans[1]
    assert not {e.label for e in other if e.calibrated} & {e.label for e in one}


def test_energies_are_those_of_the_moments(make_artifact):
    """Against the matrices that the fixture's bases are of: encode encodeᵀ and decode diag(spectrum) decodeᵀ, and the mean."""
    artifact = make_artifact(8)
    found = channel_energies(artifact)
    encode, spectrum, mean = (artifact.tensors[f"layers.1.visual.key_{name}"].double() for name in ("encode", "spectrum", "mean"))
    for h in range(2):
        moment, decode = encode[h] @ encode[h].T, torch.linalg.inv(encode[h]).T
        second = decode @ torch.diag(spectrum[h]) @ decode.T + torch.outer(mean[h], mean[h])
        assert torch.allclose(found[1][h], moment.diagonal() * second.diagonal())
    assert channel_energies(make_artifact(8, basis="pca")) is None


def test_leank_without_energies(tiny, make_artifact):
    artifact = make_artifact(8, basis="pca")
    artifact.tensors |= {f"layers.{i}.knockout": torch.rand(2) for i in range(3)}
    with enable(tiny, artifact, backend="torch") as active:
        methods = Methods(active)
        with pytest.raises(UsageError, match="leank needs energies of the Key channels, which artifacts with --basis two-sided hold"):
            methods.chosen(["leank"], (), (0.5,))
        with pytest.warns(UserWarning) as caught:
            names = {e.method for e in methods.suite("proof")}
    said = [str(w.message) for w in caught]
    assert "leank" not in names and any(s.startswith("left out of the suite: leank needs energies") for s in said)
    assert any(s.startswith("Keys beside equal Values are left out") for s in said)


# -- several calibrations as one row


def row(kl, calibrations=1, exact=None, share=0.1):
    names = {f.name: 0.0 for f in fields(CacheBytes)} | {"span": 1000 * share, "span_dense": 1000.0}
    ids = [str(n % (len(kl) // calibrations)) for n in range(len(kl))]
    return Row(
        "m",
        [Outcome(i, "", "m", bool(e), 1.0, float(k), 2, "", names) for i, k, e in zip(ids, kl, exact or [1] * len(kl), strict=True)],
        calibrations,
    )


def measured(method, setting, kl, calibration=0, ours=False, calibrated=True, budget=0.125, **more):
    entry = Entry(method, lambda: None, setting, budget, budget, ours=ours, calibrated=calibrated, calibration=calibration, **more)
    return Measured("after", entry, row(kl), row([0.0] * len(kl)))


def test_calibrations_are_pooled():
    kls = [[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 4.0, 4.0], [1.0, 1.0, 1.0, 1.0]]
    ours = [measured("rotatek", "KV budget", kl, n, ours=True) for n, kl in enumerate(kls)]
    lean = [measured("leank", f"{n} channels", kl, n) for n, kl in enumerate(kls)]
    rival = measured("int4", "", [10.0, 10.0, 10.0, 10.0], calibrated=False)
    lonely = measured("head-drop", "3 heads", kls[0], 1, budget=0.25)
    found = over_calibrations([ours[0], lean[0], rival, ours[1], lonely, lean[1], ours[2], lean[2]])
    assert [(m.entry.method, m.entry.setting, m.row.calibrations, m.row.samples) for m in found] == [
        ("rotatek", "KV budget", 3, 4), ("leank", "0 channels / 1 channels / 2 channels", 3, 4), ("int4", "", 1, 4),
        ("head-drop", "3 heads", 1, 4),
    ]  # fmt: skip
    assert found[0].to_json()["kl"] == pytest.approx(sum(map(sum, kls)) / 24) and found[0].to_json()["calibrations"] == 3
    against = against_rivals(found[0], [found[0], found[2]]).within
    assert against.rival == "int4" and against.ratio == pytest.approx(sum(map(sum, kls)) / 120)
    assert against.low < against.ratio < against.high


def test_rows_of_one_calibration_are_never_pooled_nor_lost():
    same = [measured("rotatek", setting, [1.0, 2.0], ours=True) for setting in ("as it is", "without fallback")]
    assert over_calibrations(same) == same
    other = measured("rotatek", "as it is", [3.0, 4.0], 1, ours=True)
    assert over_calibrations([*same, other]) == [*same, other]


def test_the_interval_knows_of_calibrations():
    """All documents alike: what varies is calibration alone, and a pooled interval of documents would be a point."""
    one = pooled([row([1.0] * 20), row([2.0] * 20), row([6.0] * 20)])
    low, high = one.accuracy()["kl_interval"]
    assert (low, high) == (0.5, 3.0)  # every draw the least, every draw the largest, at 2 tokens each
    ratio, interval = kl_ratio(one, row([1.0] * 20))
    assert ratio == pytest.approx(3.0) and interval == (1.0, 6.0)
    same = pooled([row([1.0, 2.0, 9.0])] * 3)
    alone = row([1.0, 2.0, 9.0])
    assert same.accuracy()["kl_interval"] == alone.accuracy()["kl_interval"] and same.samples == 3
    with pytest.raises(ValueError, match="of different documents"):
        pooled([row([1.0, 2.0]), row([1.0])])
    with pytest.raises(ValueError, match="rows of 2 and of 3 calibrations"):
        kl_ratio(same, pooled([alone] * 2))


def test_axes_are_not_mixed():
    """A rival of the Keys alone is no rival of a plan for Keys and Values."""
    ours = measured("rotatek", "a", [1.0, 1.0], ours=True)
    keys = measured("rotatek", "b", [1.0, 1.0], ours=True, axis=KEYS, key_budget=0.25)
    think = measured("think", "c", [3.0, 3.0], calibrated=False, axis=KEYS, key_budget=0.25)
    every = [ours, keys, think]
    assert against_rivals(ours, every) is None
    assert against_rivals(keys, every).within.rival == "think (c)" and math.isclose(against_rivals(keys, every).within.ratio, 1 / 3)
