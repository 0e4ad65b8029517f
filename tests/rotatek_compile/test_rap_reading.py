"""Batches as RAP reads them, and plans tried out on the dense model."""

import pytest
import torch
from rap_small import document, documents, small_llama
from transformers import Qwen3Config, Qwen3ForCausalLM

from rotatek_compile.compile_rap import pruned_copy
from rotatek_compile.errors import RotateKError
from rotatek_compile.geometry import geometry_of
from rotatek_compile.rap_measure import Measure
from rotatek_compile.rap_plan import RapLayer, RapPlan, selection, unpruned
from rotatek_compile.rap_reading import SHARES, attentions, patched, read


def random_layer(shape, pairs, width, hidden, seed=0):
    """A plan's layer whose maps are no selections."""
    torch.manual_seed(seed)
    chosen = torch.stack([torch.randperm(shape.head_dim // 2)[:pairs].sort().values for _ in range(shape.kv_heads)])
    maps = [torch.randn(h, n, shape.head_dim) / 4 for h, n in ((shape.kv_heads, 2 * pairs), (shape.query_heads, 2 * pairs))]
    value, output = torch.randn(shape.kv_heads, width, shape.head_dim) / 4, torch.randn(shape.query_heads, shape.head_dim, width) / 4
    return RapLayer(chosen, *maps, value, output, torch.randn(hidden))


def test_text_is_scored_up_to_its_last_tokens_and_padding_never():
    model, geometry = small_llama()
    batch = read(model, [document(10), document(20, 1)], geometry, 0, 12)
    assert batch.inputs["input_ids"].shape == (2, 20)
    assert batch.scored.sum(1).tolist() == [9, 12] and batch.real.sum(1).tolist() == [10, 20]
    assert not batch.scored[:, -1].any() and batch.scored[1, 7:19].all() and batch.last == 13
    row = batch.inputs["input_ids"][1]
    assert torch.equal(batch.targets[1, 7:19], row[8:20])
    assert torch.equal(batch.weights(), batch.real.float())


def test_groups_of_tokens_count_as_wholes():
    from dataclasses import replace

    model, text = small_llama()
    geometry = replace(text, visual_token_ids=(47,))
    item = replace(document(20, answer=2), visual_end=12)
    batch = read(model, [item], geometry, 0)
    answer, question, page = batch.groups
    assert [int(group.sum()) for group in batch.groups] == [2, 6, 12]  # the last token predicts nothing and counts with the question
    weights = batch.weights()
    assert weights.sum() == pytest.approx(20)
    assert [float(weights[group].sum()) / 20 for group in (answer, question, page)] == pytest.approx(SHARES)


@pytest.mark.parametrize("biased", [False, True])
def test_a_patched_model_computes_what_the_pruned_one_does(biased):
    model, geometry = small_llama(attention_bias=biased)
    layers = {0: random_layer(geometry.layers[0], 3, 5, 40), 1: random_layer(geometry.layers[1], 8, 16, 40, 1)}
    ids = torch.randint(3, 48, (2, 17))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        wanted = pruned_copy(model, RapPlan(layers), geometry)(input_ids=ids).logits
        with patched(model, layers, geometry):
            got = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, before)
    assert (wanted - before).abs().max() > 0.1
    assert torch.allclose(got, wanted, atol=1e-4)


def test_a_patched_model_is_restored_after_an_error():
    model, geometry = small_llama()
    weights = [module.k_proj.weight for module in attentions(model, geometry)]
    with pytest.raises(ZeroDivisionError), patched(model, {1: random_layer(geometry.layers[1], 2, 8, 40)}, geometry):
        raise ZeroDivisionError
    assert all(module.k_proj.weight is weight for module, weight in zip(attentions(model, geometry), weights, strict=True))
    assert all(module.o_proj.bias is None for module in attentions(model, geometry))


def test_measure_is_the_kl_of_whole_passes():
    model, geometry = small_llama()
    items = documents(5)
    measure = Measure(model, items, geometry, 2, 0)
    layer = random_layer(geometry.layers[1], 4, 8, 40)
    for layers in ({1: layer}, {0: random_layer(geometry.layers[0], 6, 8, 40), 1: layer}):
        total = tokens = 0.0
        for item in items:
            batch = read(model, [item], geometry, 0)
            with torch.no_grad():
                dense = model(**batch.inputs).logits[0, :-1].log_softmax(-1)
                with patched(model, layers, geometry):
                    got = model(**batch.inputs).logits[0, :-1].log_softmax(-1)
            total, tokens = total + float((dense.exp() * (dense - got)).sum()), tokens + len(dense)
        assert measure(layers) == pytest.approx(total / tokens, rel=1e-3) and total > 0.1
    assert measure({}) == 0.0
    assert measure({0: unpruned(geometry.layers[0])}) == pytest.approx(0, abs=1e-5)
    assert measure({1: layer}, most=0.0) > 0.0


def test_norms_of_queries_and_keys_are_refused():
    config = Qwen3Config(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=8)  # fmt: skip
    with pytest.raises(RotateKError, match=r"q/k-norm divides by the length of the whole head, dropped pairs included"):
        attentions(Qwen3ForCausalLM(config), geometry_of(config))


def test_selection_maps_keep_logits_of_kept_pairs_only():
    model, geometry = small_llama()
    shape = geometry.layers[0]
    pairs = torch.tensor([[0, 5, 6], [1, 2, 7]])
    key, query = selection(pairs, 16), selection(pairs.repeat_interleave(2, 0), 16)
    whole = unpruned(shape)
    layer = RapLayer(pairs, key, query, whole.value, whole.output)
    with torch.no_grad(), patched(model, {0: layer}, geometry):
        rows = attentions(model, geometry)[0].k_proj.weight.unflatten(0, (2, 16))
    kept = [[h for h in range(16) if rows[head, h].abs().sum() > 0] for head in range(2)]
    assert kept == [[0, 5, 6, 8, 13, 14], [1, 2, 7, 9, 10, 15]]
