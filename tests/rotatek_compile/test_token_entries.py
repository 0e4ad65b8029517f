"""Methods on fewer tokens: who gets which budget, and that every cache holds to it."""

from dataclasses import replace

import pytest
import torch

from rotatek_compile.cost_curves import dense_bytes, plan_bytes
from rotatek_compile.errors import UsageError
from rotatek_compile.evaluate import Evaluator
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.methods import Methods
from rotatek_compile.names import SHARED_SELECTIONS, TOKEN_METHODS
from rotatek_compile.runtime.accounting import cache_bytes
from rotatek_compile.runtime.cache import RotateKCache
from rotatek_compile.runtime.enable import enable
from rotatek_compile.token_budget import index_share, kept_tokens, selecting, with_selection
from rotatek_compile.token_entries import alone, joint, token_entries


def made(make_artifact, **options):
    """An artifact with sensitivities: the Keys of layer 2 matter most."""
    artifact = make_artifact(8, keep_ratio=0.25, kv_budget=0.625, levels=(Slabs(), Slabs(0, 0, 16)), key_bits="auto", value_bits="auto")
    artifact.tensors |= {f"layers.{i}.knockout": torch.tensor([0.1 * i, 0.05]) for i in range(3)}
    for i in range(3):
        artifact.tensors[f"layers.{i}.key_sensitivity"] = torch.tensor([[1.0 * i, 0.1 * i]] * 2)
        artifact.tensors[f"layers.{i}.value_sensitivity"] = torch.tensor([[0.1 * i, 0.01 * i]] * 2)
    return replace(artifact, method=replace(artifact.method, **options))


@pytest.fixture
def methods(tiny, make_artifact):
    with enable(tiny, made(make_artifact), backend="torch") as active:
        yield Methods(active)


@pytest.mark.parametrize("token_method", ["snapkv", "fastv"])
@pytest.mark.parametrize(("budget", "ratio"), [(0.25, 0.5), (0.125, 0.25), (0.08, 0.1)])
def test_what_plans_promise_holds_for_the_kept_tokens(methods, token_method, budget, ratio):
    geometry = methods.artifact.geometry
    cut = selecting(methods.artifact, token_method, ratio, kv_budget=budget)
    assert (cut.method.token_budget, cut.method.token_method, cut.method.token_keep_ratio) == (budget, token_method, ratio)
    shares = []
    for tokens in (512, 640, 2048):
        count = kept_tokens(tokens, ratio)
        index = index_share(geometry, token_method) * dense_bytes(geometry, count)
        shares.append((plan_bytes(geometry, cut.plan(), count) + index) / dense_bytes(geometry, tokens))
    assert max(shares) <= budget
    assert shares[0] > 0.8 * budget or budget / ratio > 0.7  # and is used, unless codes need no more


def test_entries_say_what_they_are(methods):
    entries = token_entries(methods, ["native", "rotatek", "int4"], [0.25], [], ["fastv", "snapkv"], [0.5])
    assert [entry.label for entry in entries] == [
        "native (fastv, 0.2494 of the tokens, KV budget 0.25)",
        "rotatek (fastv, 0.5 of the tokens, KV budget 0.25)",
        "int4 (fastv, 0.5 of the tokens, KV budget 0.25)",
        "native (snapkv, 0.2462 of the tokens, KV budget 0.25)",
        "rotatek (snapkv, 0.5 of the tokens, KV budget 0.25)",
        "int4 (snapkv, 0.5 of the tokens, KV budget 0.25)",
    ]
    assert all((entry.requested_budget, entry.kv_budget) == (0.25, 0.25) for entry in entries)
    assert methods.enabled.token_methods == {"fastv", "snapkv"}
    plain = token_entries(methods, [], [], [], ["divprune"], [0.5, 0.25])
    assert [entry.setting for entry in plain] == ["divprune, 0.5 of the tokens", "divprune, 0.25 of the tokens"]
    with pytest.raises(UsageError, match="give one of the two"):
        token_entries(methods, [], [0.25], [], ["fastv"], [0.5])
    with pytest.raises(UsageError, match="native, int4 has no keep ratio"):
        token_entries(methods, ["native", "int4"], [0.25], [0.5], ["fastv"], [0.5])
    with pytest.raises(UsageError, match="needs --token-keep-ratio"):
        token_entries(methods, ["int4"], [0.25], [], ["fastv"], [])
    with pytest.raises(UsageError, match=r"int8 cannot meet .* \(of the kept tokens, to whose codes --kv-budget 0.25 leaves 0.497"):
        token_entries(methods, ["int8"], [0.25], [], ["fastv"], [0.5])


@pytest.mark.parametrize("token_method", TOKEN_METHODS)
def test_caches_hold_to_their_budgets(methods, documents, fake_processor, token_method):
    """In bytes counted by what lies in the caches, for all methods alike, after one shared prefill."""
    evaluator = Evaluator(methods.enabled.model, fake_processor, "after", (2,), 2)
    entries = [alone(methods, token_method, kv_budget=0.3), joint(methods, "int4", token_method, 0.6, kv_budget=0.3),
               joint(methods, "rotatek", token_method, 0.6, kv_budget=0.3)]  # fmt: skip
    prefilled = evaluator.prefill(documents[:2])
    for entry in entries:
        cache = entry.make()
        assert isinstance(cache, RotateKCache)
        counted = evaluator.finish(prefilled, cache).bytes
        assert 0.15 < counted.span / counted.span_dense <= 0.3 + 0.05  # images here are shorter than what a budget is promised for
        kept = cache.kept_tokens()
        assert all(
            len(segment) == (1 if token_method in SHARED_SELECTIONS else 2) for rows in kept.values() for row in rows for segment in row
        )


def test_an_artifact_with_a_selection_is_a_row_and_rivals_keep_all_tokens(tiny, make_artifact, documents, fake_processor):
    artifact = selecting(made(make_artifact), "snapkv", 0.5, kv_budget=0.25)
    with enable(tiny, artifact, backend="torch") as active:
        methods = Methods(active)
        row = methods.compiled()
        assert row.setting.startswith("snapkv, 0.5 of the tokens, of these: KV budget 0.4") and row.requested_budget == 0.25
        evaluator = Evaluator(tiny, fake_processor, "after", (2,), 2)
        prefilled = evaluator.prefill(documents[:1])
        rival = methods.rival("int4", kv_budget=0.5).make()
        assert evaluator.finish(prefilled, rival).bytes.span > 0 and rival.kept_tokens() == {}
        own = row.make()
        assert evaluator.finish(prefilled, own).bytes.span_dense == cache_bytes(rival).span_dense
        assert own.kept_tokens()[0][0][0].shape[0] == 2


def test_with_selection_and_back(make_artifact):
    method = made(make_artifact).method
    once = with_selection(method, "fastv", 0.25)
    assert once.image_tokens == 128 and with_selection(once, "fastv", 0.5).image_tokens == 256
    assert with_selection(once, "fastv", 1.0).token_method is None
