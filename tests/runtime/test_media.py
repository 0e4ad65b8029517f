"""Where images end: side by side, cut by prefill chunks, and clips with text between their frames."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rotatek_compile.errors import RotateKError
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.kernels.table import KIND, LENGTH, Kind
from rotatek_compile.plan import HeadPlan
from rotatek_compile.runtime.accounting import cache_bytes
from rotatek_compile.runtime.cache import RotateKCache
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.media import CallState, encoded_lengths, lengths_of
from rotatek_compile.runtime.rivals.registry import make_coder
from rotatek_compile.runtime.segments import IMAGE, VIDEO

PLAN = [[8, 24], [0, 16], [16, 16]]


def segments(layer, row=0, kind=Kind.CODED):
    """Lengths of a row's segments of one kind."""
    entries = layer.store.table[row, 0]
    return sorted(entries[entries[:, KIND] == kind, LENGTH].tolist())


def forward(model, inputs, cache, parts):
    """Read a prompt in pieces, as a chunked prefill does: embeddings with token types, so no encoder speaks for the pieces."""
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    if "pixel_values" in inputs:
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
        embeds[ids == 5] = torch.cat(list(features))
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    out, start = [], 0
    for size in parts:
        part = slice(start, start + size)
        out.append(
            model(
                inputs_embeds=embeds[:, part], mm_token_type_ids=(ids[:, part] == 5).long(), position_ids=positions[:, part],
                attention_mask=inputs["attention_mask"][:, : start + size], past_key_values=cache, use_cache=True,
            ).logits
        )  # fmt: skip
        start += size
        yield torch.cat(out, 1)


@pytest.fixture
def side_by_side(prompts):
    p = prompts
    return p.batch([[4, p.wide, p.tall, 9], [3, p.square, 50], [30]])


def test_images_side_by_side_are_two_segments(model, side_by_side, make_artifact):
    with torch.no_grad(), enable(model, make_artifact(PLAN), backend="torch") as enabled:
        cache = enabled.new_cache()
        model(**side_by_side, past_key_values=cache)
    for layer in cache.layers:
        assert [segments(layer, row) for row in range(3)] == [[52, 56], [88], []]


def test_generate_tells_them_apart_too(model, side_by_side, make_artifact, generate):
    """From transformers 5.23 on `generate` encodes images before it calls the model."""
    with enable(model, make_artifact(PLAN), backend="torch"):
        cache = generate(model, side_by_side, 2).cache
    assert [segments(cache.layers[0], row) for row in range(3)] == [[52, 56], [88], []]


@pytest.mark.parametrize("backend", ["torch", "reconstruct"])
@pytest.mark.parametrize("basis", ["two-sided", "paper"])
@pytest.mark.parametrize("size", [7, 40])
def test_an_image_cut_by_chunks_is_one_segment(model, prompts, make_artifact, size, basis, backend):
    inputs = prompts.batch([[3, prompts.square, 20], [20, prompts.tall, 15]])
    length = inputs["input_ids"].shape[1]
    parts = [size] * (length // size) + [length % size] * bool(length % size)
    with torch.no_grad():
        stock = model(**inputs).logits
        with enable(model, make_artifact(basis=basis), backend=backend) as enabled:
            cache = enabled.new_cache()
            *_, got = forward(model, inputs, cache, parts)
    real = inputs["attention_mask"].bool()
    assert (got - stock)[real].abs().max() < 1e-4
    for layer in cache.layers:
        assert [segments(layer, row) for row in range(2)] == [[88], [56]]
        assert [segments(layer, row, Kind.DENSE) for row in range(2)] == [[], []]
        assert layer.media.queries == {}


@pytest.mark.parametrize("kv_budget", [None, 0.5])
def test_chunks_change_nothing_of_what_is_coded(model, prompts, make_artifact, kv_budget):
    """All precisions: an image that arrives in pieces, against the same image at once."""
    slabs = [HeadPlan(Slabs(8, 8, 16), Slabs(0, 16)), HeadPlan(Slabs(32), Slabs(8, 0, 16))]
    inputs, question = prompts.batch([[3, prompts.square]]), torch.full((1, 3), 17)
    artifact = make_artifact(plan=[slabs] * 3, kv_budget=kv_budget)
    with torch.no_grad(), enable(model, artifact, backend="torch") as enabled:
        found = []
        for parts in ([3 + 88], [50, 41]):  # the image at once, and in two pieces
            cache = enabled.new_cache()
            list(forward(model, inputs, cache, parts))
            found.append((model(input_ids=question, past_key_values=cache).logits, cache_bytes(cache)))
    assert found[0][1].span == found[1][1].span > 0
    assert segments(cache.layers[0]) == [88]
    assert (found[0][0] - found[1][0]).abs().max() < 2e-3


def test_until_complete_it_is_raw(model, prompts, make_artifact):
    inputs = prompts.batch([[3, prompts.square, 20]])
    with torch.no_grad(), enable(model, make_artifact(0), backend="torch") as enabled:
        stock = model(**inputs).logits
        cache = enabled.new_cache()
        steps = forward(model, inputs, cache, [3 + 40, 40, 8, 20])
        for raw in ([40], [40, 40], [8, 40, 40]):
            got = next(steps)
            assert segments(cache.layers[0], kind=Kind.DENSE) == raw
            assert segments(cache.layers[0]) == []
            assert cache_bytes(cache).span == 0
        # rank 0 loses nothing as long as nothing is coded
        assert (got - stock[:, : got.shape[1]]).abs().max() < 1e-4
        got = next(steps)
        assert segments(cache.layers[0]) == [88]
        assert segments(cache.layers[0], kind=Kind.DENSE) == []
        assert (got - stock)[:, -1].abs().max() > 0.01
        assert cache_bytes(cache).span_dense == 3 * 88 * 2 * 2 * 32 * 2


@pytest.mark.parametrize("name", ["think", "int4", "paper"])
def test_a_rival_gets_the_whole_image(model, geometry, prompts, make_artifact, name):
    """Chunks or not, one segment is coded from the same Keys; the method sees the newest queries in both."""
    inputs = prompts.batch([[3, prompts.square, 1]])
    coder = make_coder(name, geometry, keep_ratio=None if name == "int4" else 0.5)
    parts = []
    with torch.no_grad(), enable(model, make_artifact(), backend="torch") as enabled:
        for sizes in ([3 + 88, 1], [50, 41, 1]):
            cache = enabled.new_cache(coder)
            list(forward(model, inputs, cache, sizes))
            assert [len(row) for row in cache.layers[0].spans.rows] == [1]
            parts.append(cache.layers[1].spans.rows[0][0].parts)
    assert all(torch.allclose(parts[0][key].float(), parts[1][key].float(), atol=1e-4) for key in parts[0])


def test_rows_that_share_an_incomplete_image_share_its_segment(model, prompts, make_artifact):
    inputs = prompts.batch([[3, prompts.square]])
    with torch.no_grad(), enable(model, make_artifact(16, prior_tokens=10**9), backend="torch") as enabled:
        cache, alone = enabled.new_cache(), enabled.new_cache()
        for one in (cache, alone):
            list(forward(model, inputs, one, [3 + 40, 48]))
        cache.batch_repeat_interleave(3)
        rows = model(input_ids=torch.full((3, 1), 17), past_key_values=cache).logits
        single = model(input_ids=torch.full((1, 1), 17), past_key_values=alone).logits
    assert (rows - single).abs().max() < 1e-5
    assert [segments(cache.layers[0], row) for row in range(3)] == [[88]] * 3
    assert cache_bytes(cache).span == cache_bytes(alone).span
    assert cache_bytes(cache).dense == 3 * cache_bytes(alone).dense


def test_chunked_generate_codes_whole_images(model, prompts, make_artifact, generate):
    """Chunks of 20 cut every image; with one row the encoder's lengths tell images side by side apart."""
    inputs = prompts.batch([[3, prompts.square, prompts.wide, 20]])
    if not hasattr(model, "_supports_mm_encoder_outputs"):  # before 5.23 the stock model leaves the pictures out without a word
        with enable(model, make_artifact(), backend="torch"), pytest.raises(RotateKError, match="reads no pictures in chunks"):
            generate(model, inputs, 4, prefill_chunk_size=20)
        return
    stock = generate(model, inputs, 4, prefill_chunk_size=20)
    with enable(model, make_artifact(), backend="torch"):
        got = generate(model, inputs, 4, prefill_chunk_size=20)
    assert torch.equal(got.tokens, stock.tokens)
    assert isinstance(got.cache, RotateKCache)
    assert segments(got.cache.layers[0]) == [52, 88]


# -- the bookkeeping alone ----------------------------------------------------------------------------------------------------


def media(step, row=0):
    return [[at for run in runs for at in range(run.start, run.end)] for runs in step.media(row)]


def call(state, kinds, lengths=None):
    kinds = np.array(kinds, np.int8)
    state.begin(kinds.shape, kinds, lengths or {})
    step = state.of(*kinds.shape)
    state.end()
    return step


def test_lengths_of_encoders():
    two = SimpleNamespace(pooler_output=[torch.zeros(3, 8), torch.zeros(5, 8)])
    assert encoded_lengths(two, IMAGE) == [3, 5]
    stacked = SimpleNamespace(pooler_output=torch.zeros(2, 7, 8))
    assert encoded_lengths(stacked, VIDEO) == [7, 7]
    assert encoded_lengths(stacked, IMAGE) is None  # may be tiles
    assert encoded_lengths((torch.zeros(1),), IMAGE) is None
    assert lengths_of({"image": two, "video": None}) == {IMAGE: [3, 5]}
    assert lengths_of({}) == lengths_of(None) == {}


def test_a_clip_with_text_between_its_frames_is_one_medium():
    step = call(CallState(), [[0, 2, 2, 0, 2, 2, 0, 1]], {VIDEO: [4], IMAGE: [1]})
    assert media(step) == [[1, 2, 4, 5], [7]]
    assert (step.going_on, step.unfinished) == (frozenset(), frozenset())  # an image at the end of the call, but complete


def test_lengths_that_do_not_fit_are_not_believed():
    kinds = [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0]]
    for lengths in ({IMAGE: [3]}, {IMAGE: [2, 2]}, {}):
        step = call(CallState(), kinds, lengths)
        assert [media(step, row) for row in range(2)] == [[[1, 2, 3]], [[1]]]
    assert media(call(CallState(), kinds, {IMAGE: [1, 2, 1]})) == [[1], [2, 3]]


def test_chunks_of_a_row_whose_lengths_are_known():
    state = CallState()
    state.expect({IMAGE: [3, 2], VIDEO: [4]}, chunked=True)
    first = call(state, [[0, 1, 1]], {IMAGE: [2]})  # the piece an encoder output was cut to must not count as an image
    assert (media(first), first.going_on, first.unfinished) == ([[1, 2]], frozenset(), {0})
    second = call(state, [[1, 1, 1, 0]])
    assert (media(second), second.going_on, second.unfinished) == ([[0], [1, 2]], {0}, frozenset())
    third = call(state, [[2, 2, 0]])
    assert (media(third), third.unfinished) == ([[0, 1]], {0})
    stamp = call(state, [[0, 0]])  # text between frames does not end the clip
    assert (media(stamp), stamp.going_on, stamp.unfinished) == ([], {0}, {0})
    last = call(state, [[2, 2, 0]])
    assert (media(last), last.going_on, last.unfinished) == ([[0, 1]], {0}, frozenset())


def test_chunks_without_lengths_end_with_the_next_token():
    state = CallState()
    first = call(state, [[0, 1], [0, 1], [1, 0], [-1, 0]])
    assert first.unfinished == {0, 1}
    second = call(state, [[1, 0], [2, 0], [1, 0], [0, 0]])
    assert (second.going_on, second.unfinished) == ({0}, frozenset())
    state.select_rows([1, 0])
    state.begin((2, 1), None, {})
    assert state.of(2, 1).plain_text


def test_rows_take_their_open_images_with_them():
    state = CallState()
    call(state, [[0, 0], [0, 1]])
    state.select_rows([1, 1, 0])
    assert call(state, [[1, 0], [1, 0], [1, 0]]).going_on == {0, 1}
