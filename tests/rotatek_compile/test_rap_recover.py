"""Recovery by adapters: it learns, it leaves plain smaller weights behind, and it says what is missing."""

import sys

import pytest
import torch
from rap_small import documents, small_llama
from test_rap_reading import random_layer

from rotatek_compile.compile_rap import pruned_copy
from rotatek_compile.errors import RotateKError
from rotatek_compile.rap_plan import RapPlan
from rotatek_compile.rap_recover import _distance, _loss, recover, schedule

OPTIONS = {"batch_size": 4, "pad_id": 0, "quiet": True}


def pruned_pair(sharp=1.0):
    """A model, what pruning at random makes of it, and their geometry; `sharp` multiplies the logits, so that there is more to lose."""
    model, geometry = small_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(sharp)
    plan = RapPlan({i: random_layer(shape, 4, 8, 40, i) for i, shape in enumerate(geometry.layers)})
    return model, pruned_copy(model, plan, geometry), geometry


def loss(model, pruned, items, geometry):
    with torch.no_grad():
        return float(_loss(pruned, model, items, geometry, 0))


def distance(model, pruned, items, geometry):
    return _distance(pruned, model, items, 4, geometry, 0)


@pytest.mark.parametrize("taught", [True, False])
def test_training_brings_the_pruned_model_nearer(taught):
    pytest.importorskip("peft")
    model, pruned, geometry = pruned_pair(sharp=20.0 if taught else 1.0)
    items = [*documents(7), documents(3)[2]]  # the held-out one is of what the others are of
    teacher = model if taught else None
    before, shapes = loss(teacher, pruned, items, geometry), {name: p.shape for name, p in pruned.named_parameters()}
    old = {name: p.clone() for name, p in pruned.named_parameters()}
    first, last = recover(pruned, teacher, items, 25, geometry=geometry, rate=1e-2, **OPTIONS)
    assert loss(teacher, pruned, items, geometry) < before - 0.1
    assert last < first and last == pytest.approx(distance(teacher, pruned, items[7:], geometry), rel=1e-3)  # the last is held out
    assert {name: p.shape for name, p in pruned.named_parameters()} == shapes  # merged: no adapter is left
    changed = {name.split(".")[-2] for name, p in pruned.named_parameters() if not torch.equal(p, old[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not pruned.training and all(p.requires_grad for p in pruned.parameters())


def test_no_step_changes_nothing():
    pytest.importorskip("peft")
    model, pruned, geometry = pruned_pair()
    before = {name: p.clone() for name, p in pruned.named_parameters()}
    recover(pruned, model, documents(2), 0, geometry=geometry, **OPTIONS)
    assert all(torch.equal(p, before[name]) for name, p in pruned.named_parameters())


def test_what_brings_it_no_nearer_is_left_out():
    """At a rate that destroys the model, and where there is nothing to recover."""
    pytest.importorskip("peft")
    model, pruned, geometry = pruned_pair()
    before = {name: p.clone() for name, p in pruned.named_parameters()}
    first, last = recover(pruned, model, documents(8), 6, geometry=geometry, rate=50.0, **OPTIONS)
    assert first == last > 0
    assert all(torch.equal(p, before[name]) for name, p in pruned.named_parameters())


def test_how_far_a_model_is(monkeypatch):
    model, pruned, geometry = pruned_pair()
    items = documents(5)
    alone = [distance(model, pruned, [item], geometry) for item in items]
    tokens = [len(item.prompt) + len(item.answer) - 1 for item in items]
    mean = sum(a * n for a, n in zip(alone, tokens, strict=True)) / sum(tokens)
    assert distance(model, pruned, items, geometry) == pytest.approx(mean, rel=1e-4) and min(alone) > 0
    assert distance(model, model, items, geometry) == pytest.approx(0, abs=1e-6)


def test_what_is_refused(monkeypatch):
    model, pruned, geometry = pruned_pair()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RotateKError, match="--recover trains adapters with the package peft: pip install peft"):
        recover(pruned, model, documents(2), 1, geometry=geometry, **OPTIONS)


def test_nothing_to_train_on_and_a_loss_that_is_no_number():
    pytest.importorskip("peft")
    model, pruned, geometry = pruned_pair()
    with pytest.raises(RotateKError, match="--recover has no calibration documents"):
        recover(pruned, model, [], 1, geometry=geometry, **OPTIONS)
    with torch.no_grad():
        pruned.model.norm.weight[0] = float("nan")
    with pytest.raises(RotateKError, match="the loss is no number any more after 0 steps"):
        recover(pruned, model, documents(2), 1, geometry=geometry, **OPTIONS)


def test_the_rate_rises_and_falls():
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == 0.2 and max(rates) == 1.0 and rates.index(1.0) == 4 and rates[-1] < 1e-3
    assert schedule(0, 1) == 1.0
