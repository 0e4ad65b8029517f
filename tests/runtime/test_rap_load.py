"""Pruned checkpoints as they are loaded: token-identical where all is kept, else what the maps say, in every way of generating."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rotatek_compile.compile_rap import pruned_copy
from rotatek_compile.errors import ArtifactError, RotateKError
from rotatek_compile.rap_checkpoint import MODEL_TYPE, write_checkpoint
from rotatek_compile.rap_reading import patched
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.rap_attention import whole_heads
from rotatek_compile.runtime.rap_load import bytes_of, load_pruned, pruned_artifact
from rotatek_compile.text_attention import set_text_attention

sys.path.append(str(Path(__file__).parent))
from rap_cases import CPU, artifact_of, builders, dense_of, drawn_plan, prompts, pruned_of, said, whole_plan  # noqa: E402

FAMILIES = ("llama", "mistral", "ministral", "mistral-sliding", "qwen2.5-vl", "internvl3", "llava-next-mistral")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Folder, config, geometry and dense model of a family, made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = builders.build(name, tmp_path_factory.mktemp("rap") / name)
            made[name] = (folder, *dense_of(folder))
        return made[name]

    return get


@pytest.fixture(scope="module")
def pruned(family, tmp_path_factory):
    """The Llama with layers of other widths each, and what it was made from."""
    folder, config, geometry, dense = family("llama")
    plan = drawn_plan(geometry, hidden=config.hidden_size)
    return pruned_of(folder, tmp_path_factory.mktemp("pruned") / "llama", geometry, plan), dense, geometry, plan


@pytest.mark.parametrize("name", FAMILIES)
def test_all_kept_is_the_base_model_token_by_token(family, tmp_path, name):
    folder, _, geometry, dense = family(name)
    model = pruned_of(folder, tmp_path / "whole", geometry, whole_plan(geometry))
    for inputs in (prompts(), prompts() | {"num_beams": 2}):
        (tokens, logits, _), (own, found, _) = said(dense, **inputs), said(model, **inputs)
        assert torch.equal(tokens, own) and torch.equal(logits, found)


@pytest.mark.parametrize("name", ["llama", "qwen2.5-vl", "ministral"])
def test_pruned_models_compute_their_maps(family, tmp_path, name):
    """The dense model with the maps multiplied out to full heads says the same, biases of Queries to Values and of the mean included.

    A copy in memory does, without rounding; what is written are its weights in the checkpoint's bf16.
    """
    folder, config, geometry, dense = family(name)
    plan = drawn_plan(geometry, hidden=config.get_text_config(decoder=True).hidden_size)
    before = {name: p.clone() for name, p in dense.named_parameters()}
    copied = pruned_copy(dense, plan, geometry)
    stock = said(dense, **prompts())[1]
    with patched(dense, plan.layers, geometry):
        tokens, logits, _ = said(dense, **prompts())
    own, found, cache = said(copied, **prompts())
    assert torch.equal(tokens, own) and torch.allclose(logits, found, atol=1e-3)
    assert (stock - logits).abs().max() > 0.5  # and the maps change something
    widths = [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers]
    assert widths == [(2 * layer.kept_pairs, layer.value_width) for layer in plan.layers.values()]
    written = dict(pruned_of(folder, tmp_path / "pruned", geometry, plan).named_parameters())
    rounded = {name: p.bfloat16().float() for name, p in copied.named_parameters()}
    assert written.keys() == rounded.keys() and all(torch.equal(p, rounded[name]) for name, p in written.items())
    assert copied.lm_head.weight is dense.lm_head.weight
    assert all(torch.equal(p, before[name]) for name, p in dense.named_parameters())


def test_rows_of_a_batch_are_what_they_are_alone(pruned):
    model, inputs = pruned[0], prompts()
    _, both, _ = said(model, **inputs)
    alone = {name: x[:1, 7:] for name, x in inputs.items()}
    assert torch.allclose(said(model, **alone)[1], both[:1], atol=1e-4)
    second = {name: x[1:] for name, x in inputs.items()}
    assert torch.allclose(said(model, **second)[1], both[1:], atol=1e-4)


def test_static_cache_chunks_and_turns(pruned):
    model, inputs = pruned[0], prompts(rows=1, padding=0)
    tokens, logits, _ = said(model, **inputs)
    held, static, _ = said(model, cache_implementation="static", disable_compile=True, **inputs)
    assert torch.equal(tokens, held) and torch.allclose(logits, static, atol=1e-4)
    cache = DynamicCache(config=model.config)
    first = {name: x[:, :12] for name, x in inputs.items()}
    model(**first, past_key_values=cache)
    cache.crop(-3)
    assert torch.allclose(said(model, past_key_values=cache, **inputs)[1], logits, atol=1e-4)


def test_other_attention_implementations(pruned):
    """Eager gives its weights, as the stock module's; one that wants equal widths gets them."""
    model, inputs = pruned[0], prompts()
    _, logits, _ = said(model, **inputs)
    seen = []

    def needs_equal(module, query, key, value, *args, **kwargs):
        seen.append(query.shape[-1] == key.shape[-1] == value.shape[-1])
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("narrow_minded", needs_equal)
    AttentionMaskInterface.register("narrow_minded", sdpa_mask)
    for name in ("eager", "narrow_minded"):
        try:
            set_text_attention(model, name)
            assert torch.allclose(said(model, **inputs)[1], logits, atol=1e-4)
            if name == "eager":
                weights = model(**inputs, output_attentions=True).attentions
                assert len(weights) == 3 and all(w.shape == (2, 4, 20, 20) for w in weights)
                assert torch.allclose(weights[1][1].sum(-1), torch.ones(4, 20), atol=1e-5)
        finally:
            set_text_attention(model, "sdpa")
    assert seen and all(seen)


def test_whole_heads_say_the_same(pruned):
    """Zeros behind the kept channels change no logit; caches get them for these layers alone, and only for so long."""
    model, _, _, plan = pruned
    inputs = prompts()
    _, logits, narrow = said(model, **inputs)
    with whole_heads(model, (0, 2)):
        _, found, cache = said(model, **inputs)
    assert torch.allclose(found, logits, atol=1e-4)
    kept = [(2 * layer.kept_pairs, layer.value_width) for layer in plan.layers.values()]
    widths = [[(layer.keys.shape[-1], layer.values.shape[-1]) for layer in one.layers] for one in (narrow, cache, said(model, **inputs)[2])]
    assert widths == [kept, [(32, 32), kept[1], (32, 32)], kept]
    for layer, (key, value) in zip(cache.layers, kept, strict=True):
        assert not layer.keys[..., key:].any() and not layer.values[..., value:].any() and layer.keys[..., :key].any()
    assert all(
        torch.equal(layer.keys[..., :n], own.keys) for layer, own, (n, _) in zip(cache.layers[:1], narrow.layers, kept, strict=False)
    )


def test_bytes_beside_those_of_the_base(pruned):
    model, dense, _, plan = pruned
    inputs = prompts(rows=1, padding=0)
    kept, whole = (bytes_of(one, said(one, **inputs)[2], 25) for one in (model, dense))
    assert whole.total == whole.dense == kept.dense == 25 * 3 * 2 * 2 * 32 * 2
    assert kept.total == 25 * 2 * sum(2 * (2 * layer.kept_pairs + layer.value_width) for layer in plan.layers.values())


def test_stock_classes_fail_with_a_sentence(family, tmp_path):
    folder, _, geometry, _ = family("llama")
    pruned_of(folder, tmp_path / "pruned", geometry, drawn_plan(geometry))
    with pytest.raises(
        ValueError, match="model type `rotatek_rap, which rotatek_compile.load\\(\\) reads` but Transformers does not"
    ) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert MODEL_TYPE in str(error.value)


def test_what_a_pruned_model_refuses(pruned, tmp_path):
    model, dense, geometry, plan = pruned
    assert pruned_artifact(model) is not None and pruned_artifact(dense) is None
    with pytest.raises(RotateKError, match="is not saved by save_pretrained"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(RotateKError, match="is a smaller checkpoint \\(RAP\\), nothing to enable"):
        enable(dense, artifact_of(geometry, plan))
    with pytest.raises(RotateKError, match="the model is a pruned one"):
        enable(model, replace(artifact_of(geometry, plan), rap=None))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("widths", "does not fit section rap of the artifact: .* expected 4 heads of 24 channels"),
        ("truncated", "is damaged or truncated"),
        ("missing", "layer 1 has no v_proj.weight"),
        ("config", "is not that of a RAP checkpoint"),
        ("type", "'mamba_of_tomorrow', which this version of transformers does not know"),
        ("geometry", "does not fit the artifact: layer 0 has KV heads 2 against 4"),
        ("gone", "holds no config.json|has no config.json"),
    ],
)
def test_damaged_checkpoints(family, tmp_path, damage, words):
    folder, _, geometry, _ = family("llama")
    plan, target = drawn_plan(geometry), tmp_path / "pruned"
    target.mkdir()
    write_checkpoint(folder, "the checkpoint", target, geometry, plan)
    weights, config = target / "model.safetensors", target / "config.json"
    artifact = artifact_of(geometry, plan if damage != "widths" else drawn_plan(geometry, [(12, 16)]))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    if damage == "missing":
        tensors = load_file(weights)
        del tensors["model.layers.1.self_attn.v_proj.weight"]
        save_file(tensors, weights)
    if damage in ("config", "type", "geometry"):
        found = json.loads(config.read_text())
        changes = {"config": {"model_type": "llama"}, "type": {"rotatek_base_model_type": "mamba_of_tomorrow"}}
        config.write_text(json.dumps(found | changes.get(damage, {"num_key_value_heads": 4})))
    if damage == "gone":
        config.unlink()
    with pytest.raises(ArtifactError, match=words) as error:
        load_pruned(artifact, target, torch.float32, CPU)
    assert len(str(error.value).splitlines()) == 1
