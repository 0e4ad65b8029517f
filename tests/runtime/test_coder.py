"""A rival's cache: what its layers answer is attention over the rebuilt Keys and Values, and segments are shared and counted."""

import copy
from dataclasses import replace

import pytest
import torch

from rotatek_compile.errors import UsageError
from rotatek_compile.kernels.table import Kind
from rotatek_compile.runtime.accounting import cache_bytes, cache_tensors
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.recording import fill, record, stock_cache
from rotatek_compile.runtime.rivals.registry import make_coder


@pytest.fixture
def prefilled(model, ragged, make_artifact):
    """Makes a cache with a coder after the ragged prompt."""

    def make(coder, inputs=ragged, **options):
        with torch.no_grad(), enable(model, make_artifact(**options), backend="torch") as enabled:
            cache = enabled.new_cache(coder)
            model(**inputs, past_key_values=cache)
        return cache

    return make


def next_logits(model, make_artifact, inputs, cache, ids):
    """Logits of more text tokens [B, T] behind left-padded inputs, whatever the cache."""
    with torch.no_grad(), enable(model, make_artifact(), backend="torch"):
        return next_logits_inside(model, inputs, cache, ids)


def next_logits_inside(model, inputs, cache, ids):
    """As `next_logits`, inside `enable()`."""
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits.float()


@pytest.mark.parametrize("new", [1, 5, 60])  # one and a few tokens are decoded from the window, many are extended
def test_layers_attend_over_what_is_rebuilt(model, ragged, geometry, make_artifact, new):
    more = torch.randint(6, 97, (4, new), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), enable(model, make_artifact(), backend="torch") as enabled:
        cache = enabled.new_cache(make_coder("kivi2", geometry))
        model(**ragged, past_key_values=cache)
        recording = record(model, **ragged)
    stock = stock_cache(model.config, recording)
    dense = next_logits(model, make_artifact, ragged, copy.deepcopy(stock), more)
    for layer, ours in zip(stock.layers, cache.layers, strict=True):
        for row, segments in enumerate(ours.spans.rows):
            images = [run for run in recording.step.rows[row] if run.kind > 0]
            for run, segment in zip(images, segments, strict=True):
                layer.keys[row, :, run.start : run.end], layer.values[row, :, run.start : run.end] = segment.rebuild()
    expected = next_logits(model, make_artifact, ragged, stock, more)
    got = next_logits(model, make_artifact, ragged, cache, more)
    assert (got - expected).abs().max() < 1e-4
    assert (got - dense)[[0, 1, 3]].abs().amax((1, 2)).min() > 0.05
    assert (got - dense)[2].abs().max() < 1e-4  # the row without an image


def test_a_coder_gets_the_segment_and_the_real_queries(model, ragged, make_artifact, prefilled, exact_coder):
    seen = []

    class Watching(type(exact_coder)):
        def code(self, layer, keys, values, queries):
            seen.append((layer, keys, queries))
            return super().code(layer, keys, values, queries)

    prefilled(Watching())
    with torch.no_grad(), enable(model, make_artifact(), backend="torch"):
        recording = record(model, **ragged)
    lengths = ragged["attention_mask"].sum(1).tolist()
    images = [(row, run) for row in range(4) for run in recording.step.rows[row] if run.kind > 0]
    assert len(seen) == 3 * len(images) == 18
    for (layer, keys, queries), (row, run) in zip(seen, images * 3, strict=True):
        whole = recording.layers[layer]
        assert torch.equal(keys, whole.keys[row, :, run.start : run.end])
        # left padding: the row's own queries are its last columns; query heads 2h and 2h + 1 read KV head h
        assert torch.equal(queries, whole.query[row, :, -lengths[row] :].reshape(2, 2, lengths[row], 32))


@pytest.mark.parametrize("name", ["int8", "fp8", "kivi2"])
def test_generate(model, ragged, geometry, make_artifact, generate, name):
    stock = generate(model, ragged, 6)
    with enable(model, make_artifact(), backend="torch") as enabled:
        got = generate(model, ragged, 6, past_key_values=enabled.new_cache(make_coder(name, geometry)))
    error = (got.logits[:, 1] - stock.logits[:, 1]).abs().amax(-1)
    assert torch.equal(got.logits[:, 0], stock.logits[:, 0])  # prefill is exact
    assert torch.equal(got.tokens[2], stock.tokens[2])
    assert (error[[0, 1, 3]] > 1e-4).all()
    if name == "int8":
        assert torch.equal(got.tokens, stock.tokens)


def test_bfloat16(make_model, ragged, geometry, make_artifact):
    """What lies in memory is what is counted, and the compute dtype reaches native parts."""
    model = make_model().to(torch.bfloat16)
    inputs = dict(ragged, pixel_values=ragged["pixel_values"].bfloat16())
    ids = torch.full((4, 1), 17)
    with torch.no_grad(), enable(model, make_artifact(), backend="torch") as enabled:
        recording = record(model, **inputs)
        dense = next_logits_inside(model, ragged, stock_cache(model.config, recording), ids)
        cache = fill(enabled.new_cache(make_coder("think", geometry, keep_ratio=1.0)), recording)
        got = next_logits_inside(model, ragged, cache, ids)
    parts = cache.layers[0].spans.rows[0][0].parts
    assert parts["keys"].dtype == parts["values"].dtype == torch.bfloat16
    assert (got - dense).abs().max() < 0.15 < 0.1 * (dense.max() - dense.min())
    count = cache_bytes(cache)
    assert count.stored == count.total  # no float32 anywhere


def test_old_text_stays_raw(model, prompts, make_artifact, generate, check_equal, exact_coder):
    """150 tokens of text and a window of 32: whole blocks become dense segments beside the rival's."""
    inputs = prompts.batch([[150, prompts.square, 9], [40]])
    stock = generate(model, inputs, 90)
    with enable(model, make_artifact(), backend="torch") as enabled:
        got = generate(model, inputs, 90, past_key_values=enabled.new_cache(exact_coder))
    check_equal(got, stock)
    assert all(layer.store.code_bytes(Kind.DENSE)[0] > 0 for layer in got.cache.layers)


def test_bytes(geometry, prefilled, exact_coder):
    cache = prefilled(coder := make_coder("int4", geometry))
    count = cache_bytes(cache)
    images = [88, 88, 56, 52, 52, 56]  # two images side by side are two segments
    assert count.span == 3 * sum(coder.bytes_of(n, 0) for n in images)
    assert count.span_dense == 3 * sum(images) * 2 * 32 * 2 * 2
    assert count.total == count.span + count.window + count.tables
    assert (count.basis, count.fallback_heads) == (0, 0)
    exact = cache_bytes(prefilled(exact_coder))
    assert exact.span == exact.span_dense == count.span_dense  # native numbers count 2 bytes also in float32
    assert (exact.window, exact.slack) == (count.window, count.slack)
    assert exact.stored - count.stored == 2 * exact.span - count.span


def test_beams_share_segments(model, ragged, geometry, prefilled, make_artifact):
    cache = prefilled(make_coder("int4", geometry))
    before = cache_bytes(cache)
    cache.batch_repeat_interleave(3)
    after = cache_bytes(cache)
    assert (after.span, after.span_dense) == (before.span, before.span_dense)
    assert after.window == 3 * before.window
    ids = torch.full((12, 1), 17)
    one = {name: ragged[name].repeat_interleave(3, 0) for name in ("input_ids", "attention_mask")}
    next_logits(model, make_artifact, one, cache, ids)
    two = {name: torch.cat([t, ids.clamp_max(1) if "mask" in name else ids], 1) for name, t in one.items()}
    whole = next_logits(model, make_artifact, two, copy.deepcopy(cache), ids)
    order = torch.tensor([9, 0, 0, 5])
    cache.reorder_cache(order)
    rows = {name: t[order] for name, t in two.items()}
    assert torch.allclose(next_logits(model, make_artifact, rows, cache, ids[:4]), whole[order], atol=1e-5)
    assert [len(row) for row in cache.layers[0].spans.rows] == [2, 1, 1, 3]


def test_deepcopied_cache_is_independent_and_shares_segments(model, prompts, ragged, geometry, prefilled, make_artifact):
    cache = prefilled(coder := make_coder("int4", geometry))
    ids = torch.full((4, 1), 17)
    twin = copy.deepcopy(cache)
    first = next_logits(model, make_artifact, ragged, twin, ids)
    assert twin.layers[0].coder is coder
    assert twin.layers[0].backend.spans is twin.layers[0].spans is not cache.layers[0].spans
    assert twin.layers[0].spans.rows[0][0] is cache.layers[0].spans.rows[0][0]
    assert torch.equal(next_logits(model, make_artifact, ragged, cache, ids), first)
    twin.batch_select_indices(torch.tensor([0]))
    assert (len(twin.layers[0].spans.rows), len(cache.layers[0].spans.rows)) == (1, 4)


def test_a_reset_cache_can_be_used_again(model, ragged, geometry, make_artifact):
    ids = torch.full((4, 1), 17)
    with torch.no_grad(), enable(model, make_artifact(), backend="torch") as enabled:
        recording = record(model, **ragged)
        cache = fill(enabled.new_cache(make_coder("int4", geometry)), recording)
        first = next_logits_inside(model, ragged, cache, ids)
        cache.reset()
        assert cache_tensors(cache) == [] and cache_bytes(cache).total == 0
        assert not any(layer.backend.spans.rows for layer in cache.layers)
        assert torch.equal(next_logits_inside(model, ragged, fill(cache, recording), ids), first)


def test_the_work_copy_follows_changes(model, prompts, make_artifact, prefilled, exact_coder):
    """A second image after decoding has begun must be seen."""
    inputs = prompts.batch([[3, prompts.square, 40]])
    cache, late = prefilled(exact_coder, inputs), prompts.batch([[2, prompts.tall, 5]], pixels=[7])
    with torch.no_grad():
        with enable(model, make_artifact(), backend="torch"):
            model(input_ids=torch.tensor([[17]]), past_key_values=cache)
            assert cache.layers[0].spans._work is not None
            got = model(**dict(late, attention_mask=None), past_key_values=cache).logits
            last = model(input_ids=torch.tensor([[17]]), past_key_values=cache).logits
        whole = torch.cat([inputs["input_ids"], torch.tensor([[17]]), late["input_ids"], torch.tensor([[17]])], 1)
        pixels = torch.cat([inputs["pixel_values"], late["pixel_values"]])
        sizes = torch.cat([inputs["image_sizes"], late["image_sizes"]])
        stock = model(input_ids=whole, pixel_values=pixels, image_sizes=sizes).logits
    assert (torch.cat([got, last], 1) - stock[:, -got.shape[1] - 1 :]).abs().max() < 1e-4


def test_parts_own_their_storage(prefilled, exact_coder):
    """Slices of the prefill would keep all of it alive."""
    cache = prefilled(exact_coder)
    parts = [part for layer in cache.layers for part in layer.spans.tensors()]
    assert len(parts) == 2 * 18
    assert all(part.untyped_storage().nbytes() == part.numel() * 4 for part in parts)
    assert {id(part) for part in parts} < {id(part) for part in cache_tensors(cache)}


def test_rivals_code_images_only(model, make_artifact, exact_coder):
    with enable(model, make_artifact(span="all"), backend="torch") as enabled, pytest.raises(UsageError, match="--span visual"):
        enabled.new_cache(exact_coder)


def test_an_artifact_of_a_rival_makes_its_caches(model, ragged, geometry, make_artifact, generate):
    """Compiled for a rival: nothing but knock-outs in it, and `generate` uses the rival."""
    knockout = {f"layers.{i}.knockout": torch.tensor([0.2, 0.1]) * (i + 1) for i in range(3)}
    artifact = replace(make_artifact(rival="head-drop", kv_budget=0.2), tensors=knockout)
    with enable(model, artifact, backend="torch") as enabled:
        cache = generate(model, ragged, 4).cache
        coder = enabled.prepared.coder
        assert all(layer.coder is coder for layer in cache.layers)
        assert enabled.new_cache(other := make_coder("int4", geometry)).layers[0].coder is other
    assert coder.setting == "3 of 6 heads"  # (32 / 2 + 4) of 64 bytes each, 8 / 512 for the means of others
    assert coder.kept == {0: (False, False), 1: (True, False), 2: (True, True)}
    assert cache_bytes(cache).span == sum(coder.bytes_of(n, layer) for n in (88, 88, 56, 52, 52, 56) for layer in range(3))
    think = replace(artifact.method, rival="think", kv_budget=None, keep_ratio=0.5)
    with enable(model, replace(artifact, method=think), "torch") as enabled:
        assert enabled.prepared.coder.setting == "16 of 32 channels"
    with (
        enable(model, replace(artifact, method=replace(artifact.method, rival="kivi9")), "torch") as enabled,
        pytest.raises(UsageError, match="unknown method 'kivi9'"),
    ):
        enabled.new_cache()
