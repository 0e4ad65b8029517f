"""Output maps by least squares: planted ones are found, and the streams of pruned models come nearer the dense one's."""

from dataclasses import replace

import pytest
import torch
from rap_small import documents, small_llama
from test_rap_reading import random_layer

from rotatek_compile import rap_repair
from rotatek_compile.rap_maps import make_plan
from rotatek_compile.rap_measure import Layers
from rotatek_compile.rap_reading import attentions, output_heads, patched, read
from rotatek_compile.rap_repair import _added, _best, fitted, left_over, refit_outputs
from rotatek_compile.rap_statistics import collect

OPTIONS = {"batch_size": 4, "pad_id": 0, "quiet": True}


def test_planted_maps_and_bias_are_found(monkeypatch):
    """Heads whose inputs are correlated with each other: one sweep is not enough, many are."""
    monkeypatch.setattr(rap_repair, "SWEEPS", 300)
    model, geometry = small_llama(hidden_size=80)  # more hidden channels than heads need, so that maps are unique
    shape = geometry.layers[0]
    layer = random_layer(shape, 4, 8, 80)
    weights = output_heads(attentions(model, geometry)[0], shape).double()
    torch.manual_seed(1)
    planted = torch.randn(4, 16, 8, dtype=torch.float64)
    x = torch.randn(400, 32, dtype=torch.float64) + torch.randn(400, 1, dtype=torch.float64)
    y = torch.einsum("hod,hdr,nhr->no", weights, planted, x.unflatten(1, (4, 8))) + 3.0
    counts = torch.rand(400, dtype=torch.float64)
    found = fitted(layer, _added(None, x, y, counts), weights, shape, 1e-9)
    assert torch.allclose(found.output.double(), planted, atol=1e-2)
    assert torch.allclose(found.bias.double(), torch.full((80,), 3.0, dtype=torch.float64), atol=2e-2)
    assert torch.equal(found.value, layer.value) and torch.equal(found.query, layer.query)


def test_a_strong_ridge_leaves_maps_alone():
    model, geometry = small_llama()
    layer = random_layer(geometry.layers[0], 4, 8, 40)
    x, y = torch.randn(50, 32, dtype=torch.float64), torch.randn(50, 40, dtype=torch.float64)
    weights = output_heads(attentions(model, geometry)[0], geometry.layers[0]).double()
    found = fitted(layer, _added(None, x, y, torch.ones(50, dtype=torch.float64)), weights, geometry.layers[0], 1e9)
    assert torch.allclose(found.output, layer.output, atol=1e-5)


def test_what_is_left_over_is_counted_from_sums():
    model, geometry = small_llama()
    layer = random_layer(geometry.layers[0], 4, 8, 40)
    weights = output_heads(attentions(model, geometry)[0], geometry.layers[0]).double()
    x, y, counts = (torch.randn(*size, dtype=torch.float64) for size in ((30, 32), (30, 40), (30,)))
    counts = counts.abs()
    lost = y - layer.bias - torch.einsum("hod,hdr,nhr->no", weights, layer.output.double(), x.unflatten(1, (4, 8)))
    wanted = float(counts @ lost.square().sum(1) / counts.sum())
    assert left_over(layer, _added(_added(None, x[:9], y[:9], counts[:9]), x[9:], y[9:], counts[9:]), weights) == pytest.approx(wanted)


def test_maps_that_do_not_serve_other_documents_are_not_taken():
    """Targets that nothing predicts: whatever is fitted to them is noise."""
    model, geometry = small_llama()
    shape = geometry.layers[0]
    layer = replace(random_layer(shape, 4, 8, 40), bias=torch.zeros(40))
    weights = output_heads(attentions(model, geometry)[0], shape).double()
    x, noise = torch.randn(60, 32, dtype=torch.float64), 50 * torch.randn(60, 40, dtype=torch.float64)
    y = noise + torch.einsum("hod,hdr,nhr->no", weights, layer.output.double(), x.unflatten(1, (4, 8)))
    ones = torch.ones(30, dtype=torch.float64)
    parts = _added(None, x[:30], y[:30], ones), _added(None, x[30:], y[30:], ones)
    assert _best(layer, *parts, weights, shape) is layer
    assert _best(layer, parts[0], None, weights, shape) is layer
    better = y - noise + 3.0  # a constant, which a bias makes up for
    parts = _added(None, x[:30], better[:30], ones), _added(None, x[30:], better[30:], ones)
    found = _best(layer, *parts, weights, shape)
    assert torch.allclose(found.bias, torch.full((40,), 3.0), atol=0.1)


@pytest.mark.parametrize("biased", [False, True])
def test_hidden_states_come_nearer(biased):
    model, geometry = small_llama(attention_bias=biased)
    items = documents(16)
    statistics = collect(model, items, geometry, gradients=False, **OPTIONS)
    plan = make_plan(model, statistics, geometry, keep_ratio=0.5, score="logit", repair=())
    repaired = refit_outputs(model, plan.layers, items, geometry, **OPTIONS)
    assert repaired.keys() == plan.layers.keys()

    def distance(layers, items):
        run, total = Layers(model, geometry), 0.0
        for item in items:
            batch = read(model, [item], geometry, 0)
            with torch.inference_mode():
                entries, arguments, _ = run.trace(batch)
                dense = run.step(1, entries[1], arguments[1])
                with patched(model, layers, geometry):
                    hidden = run.step(1, run.step(0, entries[0], arguments[0]), arguments[1])
            total += float((hidden - dense).square().sum())
        return total

    assert distance(repaired, items) < 0.9 * distance(plan.layers, items)
    other = documents(24)[16:]
    assert distance(repaired, other) < distance(plan.layers, other)


@pytest.mark.parametrize("count", [3, 6])
def test_batches_of_any_size_fit_the_same_maps(count):
    """Also one batch that holds all documents: some of its rows are kept aside, and the others fitted."""
    model, geometry = small_llama()
    items = documents(count)
    statistics = collect(model, items, geometry, gradients=False, **OPTIONS)
    plan = make_plan(model, statistics, geometry, keep_ratio=0.5, score="logit", repair=())
    found = {size: refit_outputs(model, plan.layers, items, geometry, **OPTIONS | {"batch_size": size}) for size in (1, 2, 8)}
    assert any(not torch.equal(found[1][i].output, layer.output) for i, layer in plan.layers.items())
    for size in (2, 8):
        for i, layer in found[1].items():
            assert torch.allclose(found[size][i].output, layer.output, atol=2e-3), (size, i)
            assert (found[size][i].bias is None) == (layer.bias is None)
