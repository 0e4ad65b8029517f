"""enable() and disable(): what changes is undone, and wrong uses fail aloud."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from rotatek_compile.errors import RotateKError
from rotatek_compile.geometry import geometry_of
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.runtime.attention import NAME
from rotatek_compile.runtime.cache import RotateKCache
from rotatek_compile.runtime.enable import enable


def state(model):
    return (
        model.config.text_config._attn_implementation,
        model.config.vision_config._attn_implementation,
        sorted(model.__dict__),
        model.forward.__func__,
        model._prepare_cache_for_generation.__func__,
    )


def test_everything_is_undone(model, ragged, make_artifact, generate):
    before, stock = state(model), generate(model, ragged, 4)
    with enable(model, make_artifact(0), backend="torch"):
        assert model.config.text_config._attn_implementation == "rotatek"
        assert model.config.vision_config._attn_implementation == before[1] == "sdpa"
        inside = generate(model, ragged, 4)
        assert isinstance(inside.cache, RotateKCache)
    assert state(model) == before
    again = generate(model, ragged, 4)
    assert torch.equal(again.logits, stock.logits)
    assert not torch.equal(again.logits, inside.logits)
    assert isinstance(again.cache, DynamicCache)


def test_undone_after_an_exception(model, make_artifact):
    before = state(model)
    with pytest.raises(ZeroDivisionError), enable(model, make_artifact(), backend="torch"):
        raise ZeroDivisionError
    assert state(model) == before


def test_an_exception_inside_forward_leaves_no_token_kinds(model, ragged, make_artifact):
    with enable(model, make_artifact(), backend="torch") as enabled:
        cache = enabled.new_cache()
        with pytest.raises(ValueError):
            model(**dict(ragged, pixel_values=ragged["pixel_values"][:2], image_sizes=ragged["image_sizes"][:2]), past_key_values=cache)
        assert cache.state.step is None


def test_disable_twice_and_enable_again(model, make_artifact):
    before = state(model)
    enabled = enable(model, make_artifact(), backend="torch")
    with pytest.raises(RotateKError, match="already enabled"):
        enable(model, make_artifact(), backend="torch")
    assert model.config.text_config._attn_implementation == "rotatek"
    enabled.disable()
    enabled.disable()
    assert state(model) == before
    with enable(model, make_artifact(), backend="torch"):
        enabled.disable()  # the old one must not undo the new one
        assert model.config.text_config._attn_implementation == "rotatek"


def test_own_forward_of_the_caller_comes_back(model, make_artifact):
    original = model.forward
    wrapped = lambda *args, **kwargs: original(*args, **kwargs)  # noqa: E731
    model.forward = wrapped
    try:
        with enable(model, make_artifact(), backend="torch"):
            assert model.forward is not wrapped
        assert model.forward is wrapped
    finally:
        del model.forward


def test_cache_outside_of_enable(model, ragged, make_artifact):
    with enable(model, make_artifact(), backend="torch") as enabled:
        cache, late = enabled.new_cache(), enabled.new_cache()
        with torch.no_grad():
            model(**ragged, past_key_values=late)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="outside of rotatek_compile.enable"):
            model(**ragged, past_key_values=cache)
        # one more text token needs no kinds, but the stock kernel must not read the handle
        with pytest.raises(AttributeError):
            model(input_ids=torch.full((4, 1), 17), past_key_values=late)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_unaware_attention_function_fails(model, ragged, make_artifact, generate, implementation):
    with enable(model, make_artifact(), backend="torch"):
        model.set_attn_implementation({"text_config": implementation})
        with pytest.raises(AttributeError):
            generate(model, ragged, 2)


def test_the_mask_is_registered(model, make_artifact):
    with enable(model, make_artifact(), backend="torch"):
        assert ALL_MASK_ATTENTION_FUNCTIONS["rotatek"] is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def test_wrong_geometry(make_model, model, make_artifact):
    for change, words in (
        ({"num_hidden_layers": 2}, "3 text layers against 2"),
        ({"num_key_value_heads": 4}, "layer 0 has KV heads 2 against 4"),
        ({"head_dim": 16}, "layer 0 has head_dim 32 against 16"),
    ):
        other = make_model(**change)
        before = state(other)
        with pytest.raises(RotateKError, match=words):
            enable(other, make_artifact(), backend="torch")
        assert state(other) == before


def test_without_a_cache_and_with_a_stock_one(model, ragged, make_artifact, generate):
    stock = generate(model, ragged, 5)
    with enable(model, make_artifact(0), backend="torch"):
        none = generate(model, ragged, 5, use_cache=False)
        own = generate(model, ragged, 5, past_key_values=DynamicCache(config=model.config.text_config))
        plain = model(**ragged).logits
    assert type(own.cache) is DynamicCache
    for got in (none, own):
        assert torch.equal(got.tokens, stock.tokens)
        assert (got.logits - stock.logits).abs().max() < 1e-4
    assert torch.equal(plain, model(**ragged).logits)


def test_two_models_in_one_process(make_model, model, ragged, make_artifact, generate, check_equal):
    other = make_model(seed=1)
    stock, other_stock = generate(model, ragged, 5), generate(other, ragged, 5)
    assert not torch.equal(stock.tokens, other_stock.tokens)
    with enable(model, make_artifact(), backend="torch"):
        check_equal(generate(other, ragged, 5), other_stock)
        with enable(other, make_artifact(8), backend="torch"):
            check_equal(generate(model, ragged, 5), stock)
            compressed = generate(other, ragged, 5)
        assert (compressed.logits - other_stock.logits).abs().max() > 0.01
        check_equal(generate(model, ragged, 5), stock)
        assert torch.equal(generate(other, ragged, 5).logits, other_stock.logits)


def test_bfloat16(make_model, ragged, make_artifact, generate):
    model = make_model().to(torch.bfloat16)
    inputs = dict(ragged, pixel_values=ragged["pixel_values"].bfloat16())
    stock = generate(model, inputs, 1)
    with enable(model, make_artifact(span="all"), backend="torch"), torch.no_grad():
        cache = generate(model, inputs, 1).cache
        mask = torch.cat([ragged["attention_mask"], torch.ones(4, 1, dtype=torch.int64)], 1)
        positions = mask.sum(1, keepdim=True) - 1
        step = {"input_ids": torch.full((4, 1), 17), "attention_mask": mask, "position_ids": positions}
        got = model(**step, past_key_values=cache).logits.float()
        assert cache.layers[0].store.dtype == cache.layers[0].store.window.keys.dtype == torch.bfloat16
        dense = model(**step, past_key_values=stock.cache).logits.float()
    assert (got - dense).abs().max() < 0.15 < 0.1 * (dense.max() - dense.min())


def test_an_enabled_model_is_not_copied(model, make_artifact):
    """The copy's forward would be the original's."""
    with enable(model, make_artifact(), backend="torch"), pytest.raises(RotateKError, match="cannot be copied while"):
        copy.deepcopy(model)
    assert copy.deepcopy(model).forward.__self__ is not model


def test_an_undone_enable_cannot_be_entered(model, make_artifact):
    """It would generate with the stock cache without a word."""
    enabled = enable(model, make_artifact(), backend="torch")
    with enabled:
        pass
    with pytest.raises(RotateKError, match="undone already"), enabled:
        pass


def test_another_type_of_the_same_geometry_warns(model, make_artifact, geometry):
    from dataclasses import replace

    with pytest.warns(UserWarning, match="compiled for model type other"):
        enable(model, make_artifact(shape=replace(geometry, model_type="other")), backend="torch").disable()


def test_fallback_can_be_switched_off(model, ragged, make_artifact, generate):
    artifact = make_artifact(8, fallback=1e-6)
    with enable(model, artifact, backend="torch"):
        on = generate(model, ragged, 2).cache
    with enable(model, artifact, backend="torch", fallback=False):
        off = generate(model, ragged, 2).cache
    assert [int(layer.store.monitor.fallback.sum()) for layer in on.layers] == [6 * 2] * 3
    assert [int(layer.store.monitor.fallback.sum()) for layer in off.layers] == [0] * 3
    assert artifact.method.fallback_factor == 1e-6
    assert geometry_of(model.config) == artifact.geometry


def everything(model):
    """What enable() could have changed: attributes of every part, every config, weights, and what is registered with transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    parts = {
        name: {key: id(value) for key, value in part.__dict__.items() if key not in ("_parameters", "_buffers", "_modules")}
        for name, part in model.named_modules()
    }
    configs = [model.config, model.config.text_config, model.config.vision_config, model.generation_config]
    registered = [dict(interface._global_mapping) for interface in (AttentionInterface, AttentionMaskInterface)]
    weights = {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    return parts, [copy.deepcopy(config.__dict__) for config in configs], registered, weights


def test_nothing_is_left_behind(make_model, ragged, make_artifact, generate):
    model = make_model()
    model.config.vision_config._attn_implementation_internal = None  # transformers settles this in passing
    generate(model, ragged, 2)
    before = everything(model)
    with enable(model, make_artifact(8), backend="torch"):
        generate(model, ragged, 4)
        assert all(NAME in registered for registered in everything(model)[2])
        other = make_model()
        with enable(other, make_artifact(), backend="torch"):
            pass
        generate(model, ragged, 2)  # the other model's end must not take the shared functions away
    assert everything(model) == before


def in_threads(*calls):
    """Results of calls that ran at the same time."""
    import threading

    results, start = [None] * len(calls), threading.Barrier(len(calls))

    def run(number, call):
        start.wait()
        results[number] = call()

    threads = [threading.Thread(target=run, args=one) for one in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("models", [1, 2])
def test_threads(make_model, model, prompts, make_artifact, generate, check_equal, models):
    """Two threads with different prompts on one enabled model, or on two: each gets what it gets alone."""
    owners = [model, make_model(seed=1)] if models == 2 else [model, model]
    asked = [prompts.batch([[3, prompts.square, 20]]), prompts.batch([[9, prompts.wide, prompts.tall, 30], [12]], seeds=[7, 8])]
    artifact = make_artifact([[8, 24], [0, 16], [16, 16]])
    enabled = [enable(owner, artifact, backend="torch") for owner in owners[:models]]
    try:
        alone = [generate(owner, inputs, 12) for owner, inputs in zip(owners, asked, strict=True)]
        for _ in range(3):
            calls = [lambda owner=owner, inputs=inputs: generate(owner, inputs, 12) for owner, inputs in zip(owners, asked, strict=True)]
            for got, expected in zip(in_threads(*calls), alone, strict=True):
                check_equal(got, expected)
                assert cache_sizes(got.cache) == cache_sizes(expected.cache)
    finally:
        for one in enabled:
            one.disable()


def cache_sizes(cache):
    return [(layer.store.coded_tokens(), layer.logical_length, layer.real.tolist()) for layer in cache.layers]


def test_another_budget_for_one_call(model, ragged, make_artifact, generate, check_equal):
    """Ranks are allocated anew; the artifact itself stays as it is."""
    stock, artifact = generate(model, ragged, 4), make_artifact(8, allocation="uniform")
    with enable(model, artifact, backend="torch", keep_ratio=1.0):
        check_equal(generate(model, ragged, 4), stock)
    with enable(model, artifact, backend="torch", kv_budget=0.75) as enabled:
        assert enabled.artifact.plan() == {i: [(Slabs(16), Slabs(32))] * 2 for i in range(3)}
        half = generate(model, ragged, 4)
    with enable(model, make_artifact(16), backend="torch"):
        check_equal(generate(model, ragged, 4), half)
    assert artifact.plan() == {i: [(Slabs(8), Slabs(32))] * 2 for i in range(3)}


def test_a_stock_cache_by_name_is_refused(make_model, ragged, make_artifact, generate):
    model = make_model()
    with enable(model, make_artifact(8), backend="torch"):
        for asked in ("static", "dynamic"):
            with pytest.raises(RotateKError, match=f"cache_implementation='{asked}' asks for a stock cache"):
                model.generate(**ragged, max_new_tokens=2, cache_implementation=asked)
        expected = generate(model, ragged, 2)
        model.generation_config.cache_implementation = "hybrid"  # as the checkpoints of Gemma have it
        got = generate(model, ragged, 2)
        assert isinstance(got.cache, RotateKCache) and torch.equal(got.tokens, expected.tokens)
    assert model.generation_config.cache_implementation == "hybrid"


def test_what_is_enabled_can_be_asked_for_and_undone(make_model, make_artifact):
    import rotatek_compile

    model = make_model()
    before = everything(model)
    assert rotatek_compile.enabled(model) is None
    rotatek_compile.disable(model)
    handle = enable(model, make_artifact(8), backend="torch")
    assert rotatek_compile.enabled(model) is handle
    with pytest.raises(RotateKError, match=r"already enabled on this model; rotatek_compile.disable\(model\) first"):
        enable(model, make_artifact(8), backend="torch")
    rotatek_compile.disable(model)
    assert rotatek_compile.enabled(model) is None and everything(model) == before
    assert {"enable", "enabled", "disable", "load"} <= set(dir(rotatek_compile))
