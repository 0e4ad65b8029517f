"""Budgets and bits that go together, refusals of those that do not, and artifacts compiled for each kind of budget."""

import re
from pathlib import Path

import pytest

from rotatek_compile import CompileOptions, compile_artifact
from rotatek_compile.artifact import read_artifact
from rotatek_compile.compiler import shared_out
from rotatek_compile.cost_curves import dense_bytes, needed_share, plan_bytes
from rotatek_compile.errors import UsageError
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.models import checked_geometry, load_config, resolve
from rotatek_compile.planning import tokens_to_pay
from rotatek_compile.replan import replanned
from rotatek_compile.token_budget import index_share


def options(**given):
    return CompileOptions(model="m", calib="c", output=Path("out"), **given)


def test_bits_follow_the_budget():
    found = {
        name: options(**given)
        for name, given in (("none", {}), ("ratio", {"keep_ratio": 0.5}), ("bytes", {"kv_budget": 0.125}), ("kl", {"max_kl": 0.01}))
    }
    assert [(o.keep_ratio, o.key_bits, o.value_bits) for o in found.values()] == [
        (0.25, "native", "native"), (0.5, "native", "native"), (None, "auto", "auto"), (None, "auto", "auto")
    ]  # fmt: skip
    assert options(keep_ratio=0.5, key_bits="auto", value_bits="8").own_method().value_bits == "8"
    assert options(kv_budget=0.5, key_bits="native", value_bits="native").own_method().kv_budget == 0.5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kv_budget": 0.5, "keep_ratio": 0.5}, "--keep-ratio and --kv-budget are budgets of different kinds; give one of them"),
        ({"max_kl": 0.5, "kv_budget": 0.5}, "--kv-budget and --max-kl are budgets"),
        ({"max_kl": 0.0}, "--max-kl 0.0 is out of range"),
        ({"max_kl": float("nan")}, "--max-kl nan is out of range"),
        ({"kv_budget": 0.0}, "--kv-budget 0.0 is out of range"),
        ({"key_bits": "2"}, "unknown --key-bits '2'; choose one of native, 8, 4, auto"),
        ({"value_bits": "auto"}, "--value-bits auto comes with --kv-budget or --max-kl"),
        ({"method": "int4", "value_bits": "8"}, "--value-bits comes with --method rotatek"),
        ({"escape_ratio": 0.5}, "--escape-ratio 0.5 is out of range; it is a fraction of an image's tokens, from 0 to 0.25"),
        ({"escape_ratio": float("nan")}, "--escape-ratio nan is out of range"),
        ({"prior_tokens": -1}, "--prior-tokens -1 is out of range; it must be at least 0"),
        ({"method": "int4", "escape_ratio": 0.0}, "--escape-ratio comes with --method rotatek"),
        ({"allocation": "greedy"}, "choose one of allocated, uniform, energy"),
        ({"sensitivity_samples": 0}, "--sensitivity-samples 0 is out of range; it must be at least 1"),
        ({"sensitivity_samples": 65}, "--sensitivity-samples 65 are more documents than --num-samples 64; raise that"),
    ],
)
def test_refusals(given, words):
    with pytest.raises(UsageError, match=words):
        options(**given)


def test_sensitivity_samples():
    found = [options(**given).sensitivity_samples for given in ({}, {"num_samples": 9}, {"sensitivity_samples": 64})]
    assert found == [36, 9, 64]


@pytest.mark.parametrize(
    ("count", "asked", "moments", "cut", "check"),
    [
        (64, 36, 56, 36, (36, 64)),  # the check is every document that was not read with cuts
        (144, 36, 126, 36, (36, 144)),  # three times as many as are read, the kept aside ones among them
        (400, 36, 350, 36, (292, 400)),
        (24, 24, 21, 18, (18, 24)),  # a quarter is left for the check
        (24, 4, 21, 4, (12, 24)),
        (8, 8, 7, 6, (6, 8)),
        (7, 7, 7, 7, (7, 7)),
        (4, 1, 4, 1, (4, 4)),
    ],
)
def test_documents_are_shared_out(count, asked, moments, cut, check):
    items = list(range(count))
    assert shared_out(items, asked) == (items[:moments], items[:cut], items[slice(*check)])


@pytest.fixture(scope="module")
def compile_with(checkpoint, data_file, moments_cache, tmp_path_factory):
    def compiled(**given):
        target = tmp_path_factory.mktemp("compiled") / "artifact"
        small = {"num_samples": 4, "batch_size": 2, "device": "cpu", "quiet": True}
        said = compile_artifact(CompileOptions(model=str(checkpoint), calib=str(data_file), output=target, **small, **given))
        return said, read_artifact(target)

    return compiled


def heads_of(artifact):
    return [head for heads in artifact.plan().values() for head in heads]


@pytest.mark.parametrize("allocation", ["allocated", "energy", "uniform"])
def test_a_budget_of_bytes(compile_with, allocation):
    said, artifact = compile_with(kv_budget=0.125, allocation=allocation)
    share = plan_bytes(artifact.geometry, artifact.plan()) / dense_bytes(artifact.geometry)
    assert said["plan"]["share"] == share <= 0.125
    assert (artifact.method.kv_budget, artifact.method.allocation, artifact.report["plan_kind"]) == (0.125, allocation, allocation)
    assert (len(set(heads_of(artifact))) == 1) == (allocation == "uniform")
    segment = artifact.report["segment"]
    assert segment == {"tokens": 512, "dense_bytes": 512 * 768, "bytes": pytest.approx(share * 512 * 768)}
    entry = artifact.report["layers"][1]["heads"][0]
    assert entry["key"] == list(artifact.plan()[1][0].key) and entry["value"] == list(artifact.plan()[1][0].value)
    assert entry["key_kl_when_cut"] == artifact.sensitivity("key")[1][0].tolist()
    assert entry["value_kl_when_cut"] == artifact.sensitivity("value")[1][0].tolist()
    assert entry["kl_when_knocked_out"] == entry["key_kl_when_cut"][0]
    assert 0 <= entry["value_energy_kept"] <= 1 and entry["key_expected_squared_error"] > 0
    if allocation == "allocated" and artifact.report["plan_swaps"] == 0:  # replanning spends as compiling did
        assert replanned(artifact, kv_budget=0.125).plan() == artifact.plan() or artifact.report["plan_kl"] > 1e-6


def test_doubted_readings_are_tried(compile_with, monkeypatch):
    asked = []
    monkeypatch.setattr("rotatek_compile.deciding.doubted", lambda searches: asked.append(len(searches)) or searches[:1])
    compile_with(kv_budget=0.125)
    assert asked == [4]


def test_a_bound_on_kl(compile_with):
    loose = compile_with(max_kl=1.0)  # a model of random weights loses little
    bounds = 1.0, loose[0]["plan"]["predicted_kl"] / 10
    strict = compile_with(max_kl=bounds[1])
    assert loose[0]["plan"]["share"] == 1 / 512
    for (said, artifact), bound in zip((loose, strict), bounds, strict=True):
        assert said["plan"]["predicted_kl"] <= bound == artifact.method.max_kl
        paid = tokens_to_pay(artifact.method, said["plan"]["share"])
        assert artifact.method.kv_budget == pytest.approx(needed_share(artifact.geometry, artifact.plan(), tokens=paid))
        assert said["plan"]["share"] <= artifact.method.kv_budget < said["plan"]["share"] + 1 / 64  # these images are short
    assert loose[0]["plan"]["share"] < strict[0]["plan"]["share"] < 1


def test_fewer_documents_are_cut(compile_with):
    few, all_ = (compile_with(kv_budget=0.5, **given)[1] for given in ({"sensitivity_samples": 1}, {}))
    assert [a.calibration["sensitivity_documents"] for a in (few, all_)] == [1, 4]
    assert [a.calibration["documents"] for a in (few, all_)] == [4, 4]
    assert not few.sensitivity("key")[0].allclose(all_.sensitivity("key")[0], rtol=1e-2)


@pytest.mark.parametrize(("key", "value"), [("8", "native"), ("4", "8"), ("auto", "4")])
def test_simple_knobs(compile_with, key, value):
    _, artifact = compile_with(keep_ratio=0.5, key_bits=key, value_bits=value)
    heads = heads_of(artifact)
    assert {head.value for head in heads} == {{"native": Slabs(32), "8": Slabs(0, 32), "4": Slabs(0, 0, 32)}[value]}
    if key == "auto":
        native = 6 * 16 * 2
        assert 0.9 * native <= sum(head.key.bytes_per_token() for head in heads) <= native
    else:
        assert sum(head.key.rank for head in heads) == 6 * 16
        assert all(head.key == (Slabs(0, head.key.rank) if key == "8" else Slabs(0, 0, head.key.rank)) for head in heads)


def test_too_small_a_budget_is_refused_before_weights_are_loaded(compile_with, monkeypatch):
    monkeypatch.setattr("rotatek_compile.compile_inputs.load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match="--kv-budget 0.001 is too small: .* take 0.001953 of its dense bytes"):
        compile_with(kv_budget=0.001)


def test_dry_runs(cli, checkpoint, data_file, tmp_path):
    ask = ("compile", "--model", checkpoint, "--calib", data_file, "-o", tmp_path / "a", "--device", "cpu", "--dry-run")
    assert "KV budget 0.125" in (said := cli(*ask, "--kv-budget", "0.125").out) and "768 dense, about 96 compressed" in said
    assert "the smallest that fits" in cli(*ask, "--max-kl", "0.01").out
    # half of the tokens may take twice as much each, less their index
    tokens = ("--token-keep-ratio", "0.5", "--token-method", "snapkv")
    index = index_share(checked_geometry(load_config(resolve(str(checkpoint)))), "snapkv")
    said = cli(*ask, *tokens, "--kv-budget", "0.25").out
    assert "(KV budget 0.25 of all tokens), of these: basis" in said and f"bits, KV budget {0.5 - index:.4g}, span" in said
    assert "768 dense, about 192 compressed" in said
    plain = float(re.search("about (\\d+) compressed", cli(*ask, "--keep-ratio", "0.5").out)[1])
    assert f"about {(plain + 768 * index) / 2:.0f} compressed" in cli(*ask, *tokens, "--keep-ratio", "0.5").out
    assert "to whose codes --kv-budget 0.1 leaves 0.1" in cli(*ask, *tokens, "--method", "int4", "--kv-budget", "0.1").sentence(2)
    assert (
        "Values at 8 bits" in (said := cli(*ask, "--value-bits", "8", "--key-bits", "4").out) and "768 dense, about 240 compressed" in said
    )


def test_escape_tokens_and_own_bases_are_chosen(compile_with, monkeypatch):
    """Four documents are too few to choose by, unless one says so; what is chosen is in the artifact, and within its budget."""
    _, artifact = compile_with(kv_budget=0.25)
    assert (artifact.method.escape_ratio, artifact.method.prior_tokens) == (0, 0)
    assert artifact.report["coding"] == {"documents": 4, "escape_ratio": 0, "prior_tokens": 0, "tried": []}
    monkeypatch.setattr("rotatek_compile.coding_choice.ENOUGH_DOCUMENTS", 1)
    monkeypatch.setattr("rotatek_compile.coding_choice.GOOD_ENOUGH", 0.0)
    monkeypatch.setattr("rotatek_compile.coding_choice.CodingChoice._ratio", lambda self, trial, simple: (0.0, 0.5))
    said, artifact = compile_with(kv_budget=0.25)
    coding = artifact.report["coding"]
    assert coding["tried"][0]["kl"] > 0 and coding["documents"] == 4
    best = min((t for t in coding["tried"] if t["kl"] is not None), key=lambda t: t["kl"])
    assert (coding["escape_ratio"], coding["prior_tokens"]) == (best["escape_ratio"], best["prior_tokens"])
    assert (artifact.method.escape_ratio, artifact.method.prior_tokens) == (best["escape_ratio"], best["prior_tokens"])
    assert artifact.report["plan_kl"] == pytest.approx(best["kl"], rel=0.05)
    assert said["plan"]["share"] <= 0.25 and "escapes_and_bases" in said["seconds"]


@pytest.mark.parametrize("budget", [{"kv_budget": 0.125}, {"max_kl": 0.01}, {"keep_ratio": 0.5}])
def test_forced_escape_tokens(compile_with, budget):
    said, artifact = compile_with(**budget, escape_ratio=1 / 64, prior_tokens=32)
    method, geometry = artifact.method, artifact.geometry
    assert (method.escape_ratio, method.prior_tokens) == (1 / 64, 32)
    if "keep_ratio" in budget:
        assert artifact.report["coding"] is None and sum(head.key.rank for head in heads_of(artifact)) == 6 * 16
        return
    assert needed_share(geometry, artifact.plan(), 1 / 64) <= method.kv_budget * (1 + 1e-9)
    assert said["plan"]["share"] == plan_bytes(geometry, artifact.plan(), escape_ratio=1 / 64) / dense_bytes(geometry) > 1 / 64
    assert "0.01562 of the tokens raw" in said["plan"]["setting"]
    codes = sum(head.bytes_per_token for head in heads_of(artifact))
    assert said["kv_bytes_per_token"]["compressed"] == pytest.approx(codes * 63 / 64 + 768 / 64)
