"""When segments are coded: one layer late, so that the host decides while the device computes, and before anybody reads them."""

import copy

import pytest
import torch

from rotatek_compile.runtime.cache import RotateKCache
from rotatek_compile.runtime.cache_layer import RotateKLayer
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.observed import Figures
from rotatek_compile.runtime.segment_coder import SegmentCoder


@pytest.fixture
def order(monkeypatch):
    """What layers do, in order: ("look", n) and ("settle", n)."""
    found, numbers = [], {}

    def watch(name):
        real = getattr(SegmentCoder, name)

        def watched(self, *args):
            number = numbers.setdefault(id(self.store), len(numbers))
            found.append((name, number))
            return real(self, *args)

        monkeypatch.setattr(SegmentCoder, name, watched)

    watch("look")
    watch("settle")
    return found


def test_decisions_are_made_while_the_next_layer_computes(model, ragged, make_artifact, order):
    with torch.no_grad(), enable(model, make_artifact(16), backend="torch") as enabled:
        cache = enabled.new_cache()
        model(**ragged, past_key_values=cache)
        first = [("look", 0), ("look", 1), ("settle", 0), ("look", 2), ("settle", 1), ("settle", 2)]
        assert order == first  # the last one when the call is over
        assert cache.state._unsettled == []
        assert all(layer.segments.store.coded_tokens() for layer in cache.layers)


def test_whoever_reads_the_store_finds_it_settled(model, ragged, make_artifact, order, monkeypatch):
    seen = []
    update = RotateKLayer.update

    def reading(layer, *args, **kwargs):
        if layer.index == 1:
            seen.append(cache.layers[0].store.coded_tokens())
        return update(layer, *args, **kwargs)

    monkeypatch.setattr(RotateKLayer, "update", reading)
    with torch.no_grad(), enable(model, make_artifact(16), backend="torch") as enabled:
        cache = enabled.new_cache()
        model(**ragged, past_key_values=cache)
        assert seen == [cache.layers[2].store.coded_tokens()]
        assert order == [("look", 0), ("settle", 0), ("look", 1), ("look", 2), ("settle", 1), ("settle", 2)]
        expected = cache.layers[0].store.codes
        monkeypatch.setattr(RotateKLayer, "update", update)
        later = enabled.new_cache()
        model(**ragged, past_key_values=later)
    assert torch.equal(later.layers[0].store.codes, expected)  # early or late, the codes are the same


def test_a_call_that_fails_leaves_nothing_unsettled(model, ragged, make_artifact, monkeypatch):
    def failing(layer, *args, **kwargs):
        if layer.index == 2:
            raise ValueError("out of memory, say")
        return update(layer, *args, **kwargs)

    update = RotateKLayer.update
    monkeypatch.setattr(RotateKLayer, "update", failing)
    with torch.no_grad(), enable(model, make_artifact(16), backend="torch") as enabled:
        cache = enabled.new_cache()
        with pytest.raises(ValueError, match="out of memory"):
            model(**ragged, past_key_values=cache)
        assert isinstance(cache, RotateKCache)
        assert cache.state._unsettled == []
        assert not any(layer.segments.begun for layer in cache.layers[:2])
        assert copy.deepcopy(cache).layers[1].store.coded_tokens() > 0


def test_figures_come_apart_as_they_were_put_together():
    tables = [torch.randn(3, n, dtype=torch.float32) for n in (4, 1, 7)]
    for got, table in zip(Figures(tables).arrive(), tables, strict=True):
        assert got.dtype == "float64"
        assert (got == table.double().numpy()).all()
