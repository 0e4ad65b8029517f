"""Whole steps: caches hold what a row says, the dense baseline attends like transformers' cache, and ratios are those of the figures."""

import pytest
import torch
from bench_full_size import llava_next, random_model
from bench_steps import DENSE, Bench, FixedLayer, artifact_of, attended_by, fill_ours, random_kv, rows_at
from print_decode import steps_table
from transformers import DynamicCache
from transformers.cache_utils import Cache

from rotatek_compile.geometry import geometry_of
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.kernels.table import KIND, LENGTH, Kind
from rotatek_compile.runtime.enable import enable


@pytest.fixture(scope="module")
def model():
    return random_model(llava_next(small=True), torch.device("cpu"))


@torch.no_grad()
def test_the_dense_baseline_is_a_stock_step(model):
    """The newest token in the last place, no mask, and the model as it was afterwards."""
    bench = Bench(model, 2, 40, 2)
    kv = [random_kv(bench.geometry, i, 2, 40, bench.like) for i in range(3)]
    stock = DynamicCache(config=model.config.get_text_config())
    for i, (keys, values) in enumerate(kv):
        stock.update(keys[:, :, :-1], values[:, :, :-1], i)
    places = torch.full((2, 1), 39)
    expected = model(input_ids=bench.ids, position_ids=places, past_key_values=stock, use_cache=True).logits
    with attended_by(model):
        assert model.config.get_text_config()._attn_implementation == DENSE
        fixed = Cache(layers=[FixedLayer(keys.clone(), values.clone()) for keys, values in kv])
        got = model(input_ids=bench.ids, position_ids=places, past_key_values=fixed, use_cache=True).logits
    assert torch.allclose(got, expected, atol=1e-5) and expected.std() > 0.05
    assert model.config.get_text_config()._attn_implementation == "sdpa"


@torch.no_grad()
def test_what_ours_is_filled_with(model):
    """Pages of 2880 tokens, the rest of them, and a question in the window; different in every row."""
    geometry, like = geometry_of(model.config), next(model.parameters())
    with enable(model, artifact_of(geometry, Slabs(0, 16, 0), Slabs(0, 32, 0)), backend="torch") as enabled:
        cache = enabled.new_cache()
        fill_ours(cache, geometry, 2, 2880 + 100 + 24, like)
    store = cache.layers[1].store
    coded = store.table[:, 0][store.table[:, 0, :, KIND] == Kind.CODED][:, LENGTH]
    assert sorted(coded.tolist()) == [100, 100, 2880, 2880] and store.window.host.tolist() == [24, 24]
    assert cache.get_seq_length() == 3004 and cache.stats()["fallback_heads"] == 0
    assert not torch.equal(store.window.keys[0], store.window.keys[1])


def test_rows_and_their_ratios(model):
    rows = rows_at(model, 2, 100, {"K 16x8, V 32x8": ((0, 16, 0), (0, 32, 0))}, 2)
    assert [row["cache"] for row in rows] == ["stock", "ours K 16x8, V 32x8"]
    stock, ours = rows
    assert stock["cache_gb"] == pytest.approx(2 * 3 * 2 * 2 * 100 * 32 * 4 / 1e9)
    assert ours["over_best_dense"] == pytest.approx(stock["ms"] / ours["ms"])
    weights = sum(p.nbytes for p in model.model.language_model.parameters()) / 1e9
    assert ours["bytes_allow"] == pytest.approx((weights + stock["cache_gb"]) / (weights + ours["cache_gb"]))
    assert stock["tokens_per_second"] == pytest.approx(2e3 / stock["ms"])


def test_table():
    row = {"device": "a GPU", "torch": "2", "transformers": "5", "batch": 2, "tokens": 64, "cache": "stock", "ms": "4.04"}
    row |= {"tokens_per_second": "495.05", "cache_gb": "0.5"}
    ours = row | {"cache": "ours", "ms": 2, "over_best_dense": "2.02", "bytes_allow": "2.5", "reached": "0.808"}
    lines = steps_table([row, ours])
    assert lines[0] == "a GPU, torch 2, transformers 5"
    assert lines[-2:] == ["| 2 | 64 | stock | 4.0 | 495 | 0.50 |  |  |  |", "| 2 | 64 | ours | 2.0 | 495 | 0.50 | 2.02 | 2.50 | 0.81 |"]
