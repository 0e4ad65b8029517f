"""Token selection against second, plain formulations: scores, what caches keep of it, bytes, and every way an image can arrive."""

import math
import threading
import time

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from rotatek_compile.errors import RotateKError
from rotatek_compile.names import TOKEN_METHODS
from rotatek_compile.runtime.accounting import cache_bytes
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.recording import fill, record
from rotatek_compile.runtime.segments import IMAGE, Run
from rotatek_compile.runtime.token_selection import (
    TokenSelector,
    attention_received,
    divprune,
    fastv_scores,
    highest,
    snapkv_scores,
)
from rotatek_compile.runtime.vision_attention import received

HEADS, DIM, RAW = 2, 32, 32
ENCODED = "rotatek_compile.runtime.enable.encoded_lengths"
BYTES = 4 * DIM * HEADS  # of one token in one layer, dense


# -- scores against loops ---------------------------------------------------------------------------------------------------------


def test_attention_received_is_a_loop_over_queries():
    torch.manual_seed(0)
    queries, keys, scaling = torch.randn(2, 3, 4, 8), torch.randn(2, 11, 8), 0.7
    expected = np.zeros((2, 3, 11))
    for h in range(2):
        for g in range(3):
            for w in range(4):
                sees = 11 - 4 + w + 1
                weights = [math.exp(scaling * float(queries[h, g, w] @ keys[h, n])) for n in range(sees)]
                expected[h, g, :sees] += np.array(weights) / sum(weights) / 4
    assert np.allclose(attention_received(queries, keys, scaling).numpy(), expected, atol=1e-6)


def test_fastv_is_the_mean_over_heads_and_snapkv_pools_neighbours_of_each_head():
    given = torch.rand(2, 3, 9)
    assert torch.allclose(fastv_scores(given), given.reshape(6, 9).mean(0))
    group = given.mean(1).numpy()
    wide = np.pad(group, ((0, 0), (2, 2)))
    assert np.allclose(snapkv_scores(given).numpy(), np.stack([wide[:, n : n + 5].mean(1) for n in range(9)], 1), atol=1e-6)


def test_divprune_takes_the_farthest_token_each_time():
    torch.manual_seed(1)
    points = torch.randn(14, 5)
    far = [[1 - float(cosine_similarity(a, b, dim=0)) for b in points] for a in points]
    chosen = [max(range(14), key=lambda i: min(far[i][j] for j in range(14) if j != i))]
    while len(chosen) < 8:
        left = [i for i in range(14) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(far[i][j] for j in chosen)))
    assert divprune(points, 8).tolist() == chosen
    assert divprune(torch.ones(6, 3), 6).sort().values.tolist() == list(range(6))  # equal tokens are not taken twice


def test_vision_scores_with_and_without_a_class_token():
    torch.manual_seed(2)
    query, key = torch.randn(2, 3, 300, 4), torch.randn(2, 3, 300, 4)
    weights = (0.5 * query @ key.mT).softmax(-1)
    assert torch.allclose(received(query, key, 0.5, class_token=True), weights[:, :, 0, 1:].mean(1), atol=1e-6)
    assert torch.allclose(received(query, key, 0.5, class_token=False), weights.mean((1, 2)), atol=1e-6)


def test_highest_takes_the_first_of_equals_in_order():
    assert highest(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]


# -- what a cache keeps -----------------------------------------------------------------------------------------------------------


def kept_of(model, artifact, inputs, method, ratio=0.25, **options):
    """The cache after a prefill, and what layers were given."""
    with torch.no_grad(), enable(model, artifact, backend="torch", token_method=method, token_keep_ratio=ratio, **options) as enabled:
        recording = record(model, **inputs)
        cache = enabled.new_cache()
        model(**inputs, past_key_values=cache)
    return cache, recording


def plain_keep(method, recording, layer, row, runs, features, ratio):
    """Kept tokens of one image [Hkv, n], from the definition alone."""
    record_of = recording.layers[1 if method == "fastv" else layer]
    places = [n for run in runs for n in range(run.start, run.end)]
    count = max(2, int(len(places) * ratio) // 2 * 2)
    if method == "divprune":
        return [sorted(divprune(features, count).tolist())] * HEADS
    real = [n for run in recording.step.rows[row] for n in range(run.start, run.end)]
    newest = real[-1:] if method == "fastv" else real[-32:]
    query, keys = record_of.query[row], record_of.keys[row]
    heads = []
    for q in range(query.shape[0]):
        attention = torch.zeros(len(real))
        for place in newest:
            seen = [n for n in real if n <= place]
            weights = (DIM**-0.5 * keys[q // 2, seen] @ query[q, place]).softmax(0)
            attention[: len(seen)] += weights / len(newest)
        heads.append(attention[[real.index(n) for n in places]])
    scores = torch.stack(heads)
    if method == "fastv":
        return [sorted(scores.mean(0).topk(count).indices.tolist())] * HEADS
    wide = torch.nn.functional.pad(scores.view(HEADS, 2, -1).mean(1), (2, 2))
    pooled = torch.stack([wide[:, n : n + 5].mean(1) for n in range(scores.shape[1])], 1)
    return [sorted(pooled[h].topk(count).indices.tolist()) for h in range(HEADS)]


@pytest.mark.parametrize("method", ["fastv", "snapkv", "divprune"])
def test_every_layer_keeps_what_the_definition_says(model, ragged, make_artifact, method):
    cache, recording = kept_of(model, make_artifact(RAW), ragged, method)
    kept = cache.kept_tokens()
    assert set(kept) == {0, 1, 2}
    with torch.no_grad():
        images = model.model.get_image_features(ragged["pixel_values"], ragged["image_sizes"], return_dict=True).pooler_output
    for layer, rows in kept.items():
        number = 0
        assert [len(row) for row in rows] == [1, 3, 0, 2]
        for row, segments in enumerate(rows):
            for runs, indices in zip(recording.step.media(row), segments, strict=True):
                expected = plain_keep(method, recording, layer, row, runs, images[number], 0.25)
                assert indices.expand(HEADS, -1).tolist() == expected, (layer, row)
                number += 1
    different = kept[0][1][0].tolist() != kept[2][1][0].tolist()
    assert different == (method == "snapkv")  # it alone chooses in every layer


def test_visionzip_follows_class_attention_through_the_tiles(model, prompts, make_artifact):
    inputs = prompts.batch([[3, prompts.tall, 9]])
    cache, _ = kept_of(model, make_artifact(RAW), inputs, "visionzip")
    tower, found = model.model.vision_tower, []
    layers = [m for m in tower.modules() if type(m).__name__ == "CLIPAttention"]
    layers[-2].register_forward_hook(lambda module, args, kwargs, out: found.append(kwargs.get("hidden_states", args[0] if args else None)),
                                     with_kwargs=True)  # fmt: skip
    try:
        with torch.no_grad():
            model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
    finally:
        layers[-2]._forward_hooks.clear()
    states, one = found[0], layers[-2]
    query, key = (proj(states).unflatten(-1, (2, -1)).transpose(1, 2) for proj in (one.q_proj, one.k_proj))
    scores = (query[:, :, :1] @ key.mT * one.scale).softmax(-1).mean(1)[:, 0, 1:]  # [5 tiles, 16 patches]
    # 128 × 64 of a 2 × 2 grid of tiles of 4 × 4 patches: columns 2 to 5 of 8, and an end of line that scores nothing
    grid = scores[1:].view(2, 2, 4, 4).transpose(1, 2).reshape(8, 8)[:, 2:6]
    packed_scores = torch.cat([scores[0], torch.cat([grid, torch.zeros(8, 1)], 1).flatten()])
    assert len(packed_scores) == 56
    assert cache.kept_tokens()[0][0][0].tolist() == [sorted(packed_scores.topk(14).indices.tolist())]


def test_threads_that_watch_one_tower_take_turns(model, prompts, make_artifact):
    """The second begins while the first encodes; each finds its own image's scores, and the tower is as it was."""
    inputs = [prompts.batch([[3, size, 9]]) for size in (prompts.square, prompts.wide)]
    expected = [as_lists(kept_of(model, make_artifact(RAW), one, "visionzip")[0]) for one in inputs]
    tower, began, ended = model.model.vision_tower, threading.Barrier(2), []
    implementation = tower.config._attn_implementation_internal
    slow = tower.register_forward_hook(lambda *given: time.sleep(0.2))
    try:
        with enable(model, make_artifact(RAW), backend="torch", token_method="visionzip", token_keep_ratio=0.25) as enabled:

            def read(number):
                cache = enabled.new_cache()
                began.wait()
                with torch.no_grad():
                    model(**inputs[number], past_key_values=cache)
                ended.append((number, as_lists(cache)))

            threads = [threading.Thread(target=read, args=(number,)) for number in range(2)]
            for one in threads:
                one.start()
            for one in threads:
                one.join()
    finally:
        slow.remove()
    assert [found for _, found in sorted(ended)] == expected
    assert tower.config._attn_implementation_internal == implementation and "pack_image_features" not in vars(model.model)


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_decoding_sees_the_kept_tokens_and_all_text(model, ragged, make_artifact, method):
    """The next token's logits are those of a stock cache whose dropped columns are masked, in every layer and head."""
    with torch.no_grad(), enable(model, make_artifact(RAW), backend="torch", token_method=method, token_keep_ratio=0.5) as enabled:
        cache = enabled.new_cache()
        model(**ragged, past_key_values=cache)
        recording = record(model, **ragged)
        batch, length = ragged["input_ids"].shape
        for layer in range(3):
            seen = torch.zeros(batch, HEADS, length, dtype=torch.bool)
            for row in range(batch):
                for run in recording.step.text(row):
                    seen[row, :, run.start : run.end] = True
                for runs, indices in zip(recording.step.media(row), cache.kept_tokens()[layer][row], strict=True):
                    places = torch.tensor([n for run in runs for n in range(run.start, run.end)])
                    for h in range(HEADS):
                        seen[row, h, places[indices.expand(HEADS, -1)[h]]] = True
            given = recording.layers[layer]
            query = torch.randn(batch, 4, 1, DIM)
            new = torch.randn(2, batch, HEADS, 1, DIM)
            logits = torch.einsum("bhgqd,bhnd->bhgqn", query.view(batch, HEADS, 2, 1, DIM), torch.cat([given.keys, new[0]], 2)) * 0.3
            allowed = torch.cat([seen, torch.ones(batch, HEADS, 1, dtype=torch.bool)], 2)
            weights = logits.masked_fill(~allowed[:, :, None, None], -torch.inf).softmax(-1)
            expected = torch.einsum("bhgqn,bhnd->bhgqd", weights, torch.cat([given.values, new[1]], 2)).reshape(batch, 4, 1, DIM)
            store = cache.layers[layer].store
            store.window.grow(1)
            got = enabled.backend.decode(query, store.view(splits=False), 0.3, new[0], new[1])
            assert torch.allclose(got, expected, atol=1e-5)


def test_all_tokens_is_no_selection(model, ragged, make_artifact, generate, check_equal):
    with enable(model, make_artifact(RAW), backend="torch"):
        expected = generate(model, ragged)
    with enable(model, make_artifact(RAW), backend="torch", token_method="snapkv", token_keep_ratio=1.0):
        got = generate(model, ragged)
    check_equal(got, expected)
    assert got.cache.kept_tokens() == {}


# -- every way an image arrives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_generate_beams_and_filled_caches_keep_the_same(model, prompts, make_artifact, generate, method):
    inputs = prompts.batch([[3, prompts.square, 40], [4, prompts.wide, 9]])  # beams of several images are wrong in transformers 5.17
    with torch.no_grad(), enable(model, make_artifact(RAW), backend="torch", token_method=method, token_keep_ratio=0.25) as enabled:
        cache = enabled.new_cache()
        model(**inputs, past_key_values=cache)
        filled = fill(enabled.new_cache(), record(model, **inputs))
        plain = generate(model, inputs, new=3).cache
        beams = generate(model, inputs, new=3, num_beams=2).cache
    kept = as_lists(cache)
    assert as_lists(filled) == as_lists(plain) == kept
    assert cache_bytes(filled) == cache_bytes(cache)
    assert {layer: [rows[0], rows[2]] for layer, rows in as_lists(beams).items()} == kept
    assert [[len(s[0]) for s in row] for row in kept[0]] == [[22], [12]]


@pytest.mark.parametrize("method", ["fastv", "snapkv"])
def test_an_image_that_ends_with_a_call_is_selected_when_the_next_one_begins(model, prompts, make_artifact, method, monkeypatch):
    inputs = prompts.batch([[3, prompts.square]])
    more = {"input_ids": torch.tensor([[7, 8]]), "attention_mask": torch.ones(1, 93, dtype=torch.int64)}
    with torch.no_grad(), enable(model, make_artifact(RAW), backend="torch", token_method=method, token_keep_ratio=0.25) as enabled:
        whole = enabled.new_cache()
        model(**inputs, past_key_values=whole)
        held = enabled.new_cache()
        monkeypatch.setattr(ENCODED, lambda *given: None)  # nobody says that the image is complete
        model(**inputs, past_key_values=held)
        assert held.kept_tokens() == {0: [[]], 1: [[]], 2: [[]]}
        copied = held.fork()
        copied.finish()
        model(**more, past_key_values=held)
        assert held.state.selector.held == {}
    kept = as_lists(held)
    assert as_lists(copied) == kept
    assert [len(heads[0]) for heads in (kept[layer][0][0] for layer in range(3))] == [22, 22, 22]
    if method == "fastv":  # one query's order is the same with or without the three tokens of text before the image
        assert kept[0] == kept[2] == as_lists(whole)[1]


@pytest.mark.parametrize("method", ["visionzip", "divprune"])
def test_scores_of_the_encoder_are_refused_where_images_are_not_known(model, prompts, make_artifact, method, monkeypatch):
    inputs = prompts.batch([[3, prompts.square]])
    more = {"input_ids": torch.tensor([[7, 8]]), "attention_mask": torch.ones(1, 93, dtype=torch.int64)}
    with torch.no_grad(), enable(model, make_artifact(RAW), backend="torch", token_method=method, token_keep_ratio=0.25) as enabled:
        cache = enabled.new_cache()
        monkeypatch.setattr(ENCODED, lambda *given: None)
        model(**inputs, past_key_values=cache)
        with pytest.raises(RotateKError, match="use --token-method snapkv or fastv"):
            model(**more, past_key_values=cache)


def test_features_of_another_size_are_refused():
    selector = TokenSelector("divprune", 0.5, (0, 1))
    with pytest.raises(RotateKError, match="these 9 tokens"):
        selector.keep(0, 0, Run(0, 9, IMAGE, 0), 9, None, 1.0, {IMAGE: [torch.randn(8, 4)]})


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_a_cache_with_dropped_tokens_is_forked_and_reset_but_not_saved(model, prompts, make_artifact, tmp_path, method):
    inputs = prompts.batch([[3, prompts.square, 4]])
    cache, _ = kept_of(model, make_artifact(RAW), inputs, method)
    with pytest.raises(RotateKError, match="dropped image tokens"):
        cache.save(tmp_path / "cache")
    copied, kept = cache.fork(), as_lists(cache)
    cache.reset()
    assert cache.kept_tokens() == {} and as_lists(copied) == kept
    assert not cache.layers[0].is_initialized and cache.state.selector.method == method
    with torch.no_grad(), enable(model, make_artifact(RAW), backend="torch", token_method=method, token_keep_ratio=0.25):
        model(**inputs, past_key_values=cache)
    assert as_lists(cache) == kept


def as_lists(cache):
    return {layer: [[segment.tolist() for segment in row] for row in rows] for layer, rows in cache.kept_tokens().items()}
