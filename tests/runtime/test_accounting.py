"""Bytes: what is counted is what a walk over the cache's objects finds, and raw Keys and Values die with their layer."""

import gc
import types
import weakref

import pytest
import torch
from transformers import PretrainedConfig

from rotatek_compile.kernels.codes import padded
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.kernels.table import KEY, LENGTH, NATIVE, VALUE, Kind
from rotatek_compile.plan import HeadPlan
from rotatek_compile.runtime import merging
from rotatek_compile.runtime.accounting import cache_bytes
from rotatek_compile.runtime.cache import RotateKLayer
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.prepared import PreparedArtifact, PreparedLayer
from rotatek_compile.runtime.rivals.registry import make_coder

MIXED = [[8, 24], [0, 16], [0, 0]]
RAW = Slabs(32)
SLABS = [  # all precisions, coded Values beside raw ones, an empty head
    [HeadPlan(Slabs(8, 8, 16), Slabs(0, 16)), HeadPlan(RAW, Slabs(8))],
    [HeadPlan(Slabs(), RAW), HeadPlan(Slabs(0, 8), Slabs(0, 0, 32))],
    [HeadPlan(Slabs(0, 0, 16), Slabs()), HeadPlan(RAW, RAW)],
]


def reachable(root, stop):
    """Bytes of all tensors that `root` keeps alive, whatever holds them; objects in `stop` are not entered."""
    seen, stack, storages = set(), [root], {}
    borders = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, PretrainedConfig, torch.nn.Module, *stop)
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, borders):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        else:
            stack.extend(gc.get_referents(thing))
    return storages


def own_bytes(cache):
    artifact = reachable(cache.artifact, ())
    return sum(size for place, size in reachable(cache, (PreparedArtifact, PreparedLayer)).items() if place not in artifact)


@pytest.mark.parametrize("plan", [32, 0, MIXED, SLABS], ids=["raw", "nothing", "ranks", "slabs"])
@pytest.mark.parametrize("basis", ["two-sided", "paper"])
@pytest.mark.parametrize("span", ["visual", "all"])
def test_stored_is_what_is_reachable(model, ragged, make_artifact, generate, span, basis, plan):
    what = {"plan": plan} if plan is SLABS else {"ranks": plan}
    with enable(model, make_artifact(**what, span=span, basis=basis, fallback=1.0), backend="torch"):
        cache = generate(model, ragged, 70).cache
    count = cache_bytes(cache)
    assert count.stored == own_bytes(cache) > 0
    # in float32, total is the same with 2 bytes a native number; codes, scales, own means and tables keep their size
    native = 0
    for layer in cache.layers:
        store = layer.store
        native += 2 * store.own_bases.numel() + 2 * store.window.buffer.numel()
        for entry in (entry for heads in store.segments() for entry in heads):
            native += 2 * padded(int(entry[LENGTH])) * (int(entry[KEY + NATIVE]) + int(entry[VALUE + NATIVE]))
    assert count.stored - count.total == native > 0
    parts = sum(2 * layer.store.scales.numel() + 2 * layer.store.own_means.numel() for layer in cache.layers)
    assert count.span - count.basis - parts == sum(layer.store.code_bytes(Kind.CODED)[0] for layer in cache.layers)
    if plan == 32:
        assert parts == count.basis == 0  # raw numbers need nothing beside them
        assert count.span - sum(layer.store.code_bytes(Kind.CODED)[1] for layer in cache.layers) == count.span_dense
    assert count.total == count.span + count.window + count.tables
    tokens = int(ragged["attention_mask"].sum()) + 4 * 69  # padding left out
    assert count.dense == 3 * tokens * 2 * 32 * 2 * 2
    texts = {"visual": 0, "all": None}[span]
    images = [88, 88 + 56 + 52, 0, 52 + 56]
    if texts == 0:
        assert count.span_dense == 3 * sum(images) * 2 * 32 * 2 * 2
    assert 0 <= count.slack <= count.span + count.window
    assert 0 <= count.basis <= count.span


@pytest.mark.parametrize("name", ["int4", "think", "head-drop-native"])
def test_stored_by_a_rival_is_what_is_reachable(model, ragged, geometry, make_artifact, generate, name):
    ratio = 0.5 if name != "int4" else None
    state = {"knockout": {i: torch.tensor([0.1, 0.2]) * (i + 1) for i in range(3)}}
    with enable(model, make_artifact(), backend="torch") as enabled:
        coder = make_coder(name, geometry, keep_ratio=ratio, state=state)
        cache = generate(model, ragged, 20, past_key_values=enabled.new_cache(coder)).cache
    count = cache_bytes(cache)
    with_work = own_bytes(cache)
    for layer in cache.layers:
        layer.spans.drop_work()
        layer.coder = None  # settings, shared by all caches
    assert count == cache_bytes(cache)
    assert count.stored == own_bytes(cache) < with_work


def test_fewer_directions_take_fewer_bytes(model, ragged, make_artifact, generate):
    spans = []
    for rank in (0, 8, 16, 24, 32):
        with enable(model, make_artifact(rank, prior_tokens=10**9), backend="torch"):
            spans.append(cache_bytes(generate(model, ragged, 2).cache))
    assert [c.basis for c in spans] == [0] * 5  # a calibrated covariance this sure of itself is never corrected
    steps = [b.span - a.span for a, b in zip(spans[:-1], spans[1:], strict=True)]
    tokens = 88 + (88 + 56 + 52) + 0 + (52 + 56)  # of the images of each row, all of them even
    heads, means = 3 * 2, 6 * 32 * 2  # fp16, of six segments; raw Keys have none
    assert steps == [heads * tokens * 8 * 2] * 3 + [heads * (tokens * 8 * 2 - means)]


def test_own_bases_count(model, ragged, make_artifact, generate):
    with enable(model, make_artifact(16, prior_tokens=0, basis="paper"), backend="torch"):
        cache = generate(model, ragged, 2).cache
    count = cache_bytes(cache)
    assert count.basis == 3 * 6 * 2 * 32 * 16 * 2  # two images side by side are two segments; calibrated bases are nobody's


def test_beams_share_segments(model, prompts, make_artifact, generate):
    inputs = prompts.batch([[3, prompts.square, 10]])
    with enable(model, make_artifact(16, prior_tokens=10**9), backend="torch") as enabled:
        cache = enabled.new_cache()
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        one = cache_bytes(cache)
        cache.batch_repeat_interleave(4)
        four = cache_bytes(cache)
    assert four.span == one.span
    assert four.span_dense == one.span_dense
    assert four.window == 4 * one.window
    assert four.stored == own_bytes(cache)


def test_what_no_row_has_any_more_is_freed(model, prompts, make_artifact, generate):
    """`generate` prefills every beam by itself; once they share one's image, those of the others are gone, and are not counted."""
    inputs = prompts.batch([[3, prompts.square, 10]])
    with torch.no_grad(), enable(model, make_artifact(16, prior_tokens=10**9), backend="torch") as enabled:
        alone = cache_bytes(generate(model, inputs, 12).cache)
        beams = cache_bytes(generate(model, inputs, 12, num_beams=4).cache)
        assert beams.span_dense == alone.span_dense
        assert alone.span <= beams.span < 1.05 * alone.span  # means are kept
        two = prompts.batch([[3, prompts.square, 10], [3, prompts.tall, 10]])
        cache = enabled.new_cache()
        model(**two, past_key_values=cache)
        both = cache_bytes(cache)
        cache.batch_select_indices(torch.tensor([0]))
        more = torch.full((1, 1), 17)
        got = model(input_ids=more, past_key_values=cache, attention_mask=None, position_ids=torch.tensor([[101]])).logits
        one = enabled.new_cache()
        model(**prompts.batch([[3, prompts.square, 10]], [0], [0]), past_key_values=one)
        expected = model(input_ids=more, past_key_values=one).logits
    assert (got - expected).abs().max() < 1e-4
    assert cache_bytes(cache).span < 0.7 * both.span
    assert cache_bytes(cache).span_dense == 3 * 2 * 88 * 2 * 32 * 2


def test_merged_blocks_stay_shared(model, make_artifact, prompts, monkeypatch):
    """Rows that share blocks go on sharing them when others are joined, and when they are joined themselves."""
    monkeypatch.setattr(merging, "MERGE_AT", 3)
    pieces = torch.randint(6, 97, (1, 16 * 40), generator=torch.Generator().manual_seed(0)).split(16, 1)
    block = 3 * 2 * 64 * (8 + 32) * 2  # the means are the artifact's
    with torch.no_grad(), enable(model, make_artifact(8, span="all"), backend="torch") as enabled:
        cache = enabled.new_cache()

        def read(pieces, rows):
            for piece in pieces:
                out = model(input_ids=piece.expand(rows, -1), past_key_values=cache).logits
            lengths = [sorted(row[0, row[0, :, LENGTH] > 0, LENGTH].tolist()) for row in cache.layers[0].store.table]
            return lengths, cache_bytes(cache).span / block, out[-1]

        assert read(pieces[:12], 1)[:2] == ([[64, 64]], 2)
        cache.batch_repeat_interleave(2)
        assert read(pieces[12:20], 2)[:2] == ([[64] * 4] * 2, 2 + 2 * 2)
        cache.reorder_cache(torch.tensor([0, 0]))  # now all four blocks belong to both rows
        lengths, blocks, out = read(pieces[20:24], 2)
        assert lengths == [[64, 256]] * 2
        assert blocks == 4 + 2 * 1
        lengths, blocks, out = read(pieces[24:33], 2)
        assert lengths == [[192, 256]] * 2
        assert blocks == 4 + 2 * 3
        one = enabled.new_cache()
        cache = one
        assert (read(pieces[:33], 1)[2] - out).abs().max() < 1e-4


@pytest.mark.parametrize("span", ["visual", "all"])
def test_two_layers_at_full_width(model, ragged, make_artifact, generate, monkeypatch, span):
    alive, handles, update = [], [], RotateKLayer.update

    def watched(layer, keys, values, *args):
        gc.collect()
        # those of the layer before: they are coded once this one has its own (segment_coder.py)
        assert all(ref() is None for ref in alive[:-2]), f"raw Keys of an earlier layer are alive in layer {layer.index}"
        alive.extend([weakref.ref(keys), weakref.ref(values)])
        out = update(layer, keys, values, *args)
        handles.append(out[0])  # even a handle that somebody keeps must not keep them
        return out

    monkeypatch.setattr(RotateKLayer, "update", watched)
    with enable(model, make_artifact(16, span=span), backend="torch"):
        out = generate(model, ragged, 3)
    gc.collect()
    assert len(alive) == 2 * len(handles) == 2 * 3 * 3
    assert all(ref() is None for ref in alive)
    assert out.cache.get_seq_length() == ragged["input_ids"].shape[1] + 2


def test_stock_cache(model, ragged, generate):
    cache = generate(model, ragged, 3).cache
    count = cache_bytes(cache)
    length = ragged["input_ids"].shape[1] + 2
    assert count.stored == 2 * count.total == 3 * 2 * 4 * 2 * length * 32 * 4
    assert count.dense == count.total
    assert cache_bytes(cache, tokens=10).dense == 10 * 3 * 2 * 2 * 32 * 2
