"""Sums over documents: covariances of pairs' contributions, outputs of heads, squared gradients."""

import pytest
import torch
from rap_small import documents, small_llama

from rotatek_compile import rap_statistics
from rotatek_compile.rap_reading import attentions, read
from rotatek_compile.rap_statistics import collect, covariances, loss_of

OPTIONS = {"batch_size": 1, "pad_id": 0, "quiet": True, "gradients": False}


@pytest.mark.parametrize("attended", [128, 4])
def test_covariances_of_contributions(monkeypatch, attended):
    monkeypatch.setattr(rap_statistics, "ATTENDED", attended)
    torch.manual_seed(0)
    query, key = torch.randn(4, 3, 8), torch.randn(2, 9, 8)
    seen = torch.arange(9) <= torch.tensor([4, 6, 8])[:, None]
    counts = torch.tensor([1.0, 0.5, 2.0])
    sharp, even = covariances(query, key, seen, torch.arange(9), 0.4, counts)
    for h in range(4):
        wanted, flat = torch.zeros(8, 8), torch.zeros(8, 8)
        for n in range(3):
            q, k = (torch.complex(x[..., :4], x[..., 4:]) for x in (0.4 * query[h, n], key[h // 2]))
            product = q * k.conj()  # [T, P]
            features = torch.cat([product.real, product.imag], -1)
            logits = product.real.sum(-1).masked_fill(~seen[n], float("-inf"))
            weights = logits.softmax(-1)
            weights[weights.argsort(descending=True)[attended:]] = 0
            weights = weights / weights.sum()
            centred = features - weights @ features
            wanted += counts[n] * centred.T @ (weights[:, None] * centred)
            flat += counts[n] * (features - features.mean(0)).T @ (features - features.mean(0)) / 9
        assert torch.allclose(sharp[h], wanted, atol=1e-5) and torch.allclose(even[h], flat, atol=1e-5)


def test_sums_do_not_depend_on_batches_and_add_up(monkeypatch):
    monkeypatch.setattr(rap_statistics, "QUERIES", 100)  # all of them, so that nothing is drawn
    model, geometry = small_llama()
    items = documents(5)
    one, whole = (collect(model, items, geometry, **OPTIONS | {"batch_size": size}) for size in (1, 3))
    parts = collect(model, items[:2], geometry, **OPTIONS).merged(collect(model, items[2:], geometry, **OPTIONS))
    assert one.sums.keys() == whole.sums.keys() == parts.sums.keys()
    for name, value in one.sums.items():
        assert value.dtype == torch.float64
        for other in (whole, parts):  # padding changes nothing but rounding
            assert (value - other.sums[name]).abs().max() <= 1e-4 * value.abs().max(), name
    assert float(one.sums["0.tokens"]) == sum(len(item.prompt) + len(item.answer) for item in items)


def test_sampled_queries_count_for_all():
    model, geometry = small_llama()
    found = collect(model, documents(3), geometry, **OPTIONS)
    assert float(found.sums["1.queries"]) == pytest.approx(3 * rap_statistics.QUERIES)


def test_outputs_of_heads():
    model, geometry = small_llama()
    items = documents(3)
    found = collect(model, items, geometry, **OPTIONS)
    caught = []
    hook = attentions(model, geometry)[1].o_proj.register_forward_pre_hook(lambda module, args: caught.append(args[0][0]))
    with torch.no_grad():
        for item in items:
            model(**read(model, [item], geometry, 0).inputs)
    hook.remove()
    outputs = torch.cat(caught).unflatten(-1, (4, 16)).transpose(0, 1).double()
    mean, covariance = found.outputs(1)
    assert torch.allclose(mean, outputs.mean(1), atol=1e-5)
    centred = outputs - outputs.mean(1, keepdim=True)
    assert torch.allclose(covariance, centred.mT @ centred / outputs.shape[1], atol=1e-4)
    weight = attentions(model, geometry)[1].o_proj.weight.double().unflatten(1, (4, 16))
    gram = torch.einsum("ohd,ohe->hde", weight, weight)
    assert torch.allclose(found.sums["1.gram"], gram[0::2] + gram[1::2], atol=1e-5)


def test_squared_gradients_and_nothing_left_behind():
    model, geometry = small_llama()
    items = documents(2)
    found = collect(model, items, geometry, **OPTIONS | {"gradients": True})
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    wanted, second, columns = torch.zeros(2, 16), torch.zeros(4, 16), torch.zeros(4, 16)
    for item in items:
        batch = read(model, [item], geometry, 0, None)
        loss_of(model(**batch.inputs, logits_to_keep=batch.last).logits, batch).backward()
        own = attentions(model, geometry)[0]
        wanted += own.k_proj.weight.grad.square().unflatten(0, (2, 16)).sum(-1)
        second += (own.q_proj.weight.grad * own.q_proj.weight.detach()).square().unflatten(0, (4, 16)).sum(-1)
        columns += own.o_proj.weight.grad.square().unflatten(1, (4, 16)).sum(0)
        model.zero_grad()
    for name, value in (("0.k_fisher", wanted), ("0.q_fisher_weight", second), ("0.o_fisher", columns)):
        assert torch.allclose(found.sums[name].float(), value, rtol=1e-4), name


def test_the_attention_function_is_put_back():
    model, geometry = small_llama()
    collect(model, documents(1), geometry, **OPTIONS)
    assert model.config._attn_implementation == "sdpa"
