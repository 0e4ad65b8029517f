"""The pair-pruned module by itself: RoPE on kept pairs, unequal widths, and what it refuses to stand in for."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rotatek_compile.errors import RotateKError
from rotatek_compile.rap_plan import Widths, selection
from rotatek_compile.runtime.rap_attention import (
    PairPrunedAttention,
    attention_modules,
    equal_widths,
    of_pairs,
    refuse_text,
    replace_attention,
    rotate,
)

sys.path.append(str(Path(__file__).parent))
from rap_cases import builders  # noqa: E402

B, HQ, HKV, S, D = 2, 4, 2, 5, 16


def angles(seed=0):
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=HQ * D, num_attention_heads=HQ, num_key_value_heads=HKV, head_dim=D)
    positions = torch.randint(0, 900, (B, S), generator=torch.Generator().manual_seed(seed))
    return LlamaRotaryEmbedding(config)(torch.zeros(1), positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_pairs_turn_as_they_did(dtype):
    """Rotating what is kept equals keeping what was rotated, bit for bit."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    draw = torch.Generator().manual_seed(2)
    cos, sin = (x.to(dtype) for x in angles())
    query, key = (torch.randn(B, h, S, D, generator=draw).to(dtype) for h in (HQ, HKV))
    turned = apply_rotary_pos_emb(query, key, cos, sin)
    pairs = torch.tensor([[0, 3, 7], [1, 2, 6]])
    places = torch.cat([pairs, pairs + D // 2], 1)
    for x, stock in zip((query, key), turned, strict=True):
        own = places.repeat_interleave(x.shape[1] // HKV, 0)[None, :, None].expand(B, -1, S, -1)
        found = rotate(x.gather(-1, own), of_pairs(cos, pairs), of_pairs(sin, pairs))
        assert found.shape == (B, x.shape[1], S, 6) and torch.equal(found, stock.gather(-1, own))


def test_selection_names_both_channels_of_a_pair():
    rows = selection(torch.tensor([[1, 3]]), 8)
    assert rows.shape == (1, 4, 8) and rows[0].argmax(-1).tolist() == [1, 3, 5, 7] and rows.sum() == 4


@pytest.mark.parametrize(("key", "value"), [(6, 10), (10, 6), (8, 8)])
def test_padding_changes_no_output(key, value):
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 4, key, generator=draw) for _ in range(2))
    v = torch.randn(1, 2, 4, value, generator=draw)
    wide = equal_widths(q, k, v)
    assert {x.shape[-1] for x in wide} == {max(key, value)}
    attend = torch.nn.functional.scaled_dot_product_attention
    assert torch.allclose(attend(*wide, scale=0.3)[..., :value], attend(q, k, v, scale=0.3), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("qwen3", {}, "'qwen3': q/k-norm divides by the length of the whole head"),
        ("qwen3_vl_text", {}, "q/k-norm"),
        ("gemma3_text", {}, "q/k-norm"),
        ("gpt_oss", {}, "attention sinks"),
        ("gemma2", {}, "soft-capping"),
        ("glm", {}, "interleaved"),
        ("phi3", {}, "partial rotary"),
        ("mamba", {}, "'mamba'; it is validated with llama, mistral"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ("llama", {"attn_logit_softcapping": 30.0}, "soft-capping"),
    ],
)
def test_refused_by_name(kind, more, words):
    with pytest.raises(RotateKError, match="--method rap does not support") as error:
        refuse_text(SimpleNamespace(model_type=kind, **more))
    assert words in str(error.value) and len(str(error.value).splitlines()) == 1


def test_refused_by_what_is_there():
    """A model whose name says nothing but whose attention normalises Keys."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**builders.text_config()))
    with pytest.raises(RotateKError, match=r"Qwen3Attention: it has k_norm, q_norm \(q/k-norm divides"):
        attention_modules(model)


def test_every_layer_is_replaced_by_narrow_projections():
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**builders.text_config()))
    made = replace_attention(model, {i: Widths(8, 24, i == 1) for i in range(3)})
    assert list(made) == [0, 1, 2] and all(model.model.layers[i].self_attn is module for i, module in made.items())
    for i, module in made.items():
        assert isinstance(module, PairPrunedAttention) and isinstance(module, Qwen2Attention)
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        expected = {"q_proj.weight": (64, 128), "k_proj.weight": (32, 128), "v_proj.weight": (48, 128), "o_proj.weight": (128, 96)}
        biases = {"q_proj.bias": (64,), "k_proj.bias": (32,), "v_proj.bias": (48,)} | ({"o_proj.bias": (128,)} if i == 1 else {})
        assert shapes == expected | biases
        assert module.scaling == 32**-0.5 and module.pairs.shape == (2, 8)
