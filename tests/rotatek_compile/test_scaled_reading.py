"""Scaled Keys against a cache whose Keys were multiplied, and the gradient against differences."""

import copy

import pytest
import torch
from transformers.cache_utils import Cache

from rotatek_compile.batches import join, positions
from rotatek_compile.cutter import Cutter
from rotatek_compile.scaled_reading import ScaledReader, frozen

LAYERS, HEADS, DIM = 3, 2, 32


@pytest.fixture
def scales():
    generator = torch.Generator().manual_seed(1)
    return {i: torch.rand(HEADS, DIM, generator=generator) for i in range(LAYERS)}


def multiplied(model, geometry, items, scales):
    """Logits of the columns that predict answers, from a stock cache of multiplied Keys and the model's own attention."""
    cutter = Cutter(model, geometry, {}, span_all=False)
    doc = cutter.prefill(*items)
    rest, image = cutter.rest(doc), torch.zeros_like(doc.prefix.ids, dtype=torch.bool)
    for token in geometry.visual_token_ids:
        image |= doc.prefix.ids == token
    for layer, scale in scales.items():
        held = doc.cache.layers[layer]
        held.keys = torch.where(image[:, None, :, None], held.keys * scale[None, :, None], held.keys)
    with torch.no_grad():
        logits = model(
            input_ids=rest.ids,
            attention_mask=join(doc.prefix, rest).mask,
            position_ids=positions(doc.items, doc.prefix.mask.sum(1).tolist(), rest.mask),
            past_key_values=Cache(layers=doc.cache.layers),
            use_cache=True,
        ).logits
    return [row[-len(item.answer) :] for row, item in zip(logits, items, strict=True)]


@pytest.mark.parametrize("numbers", [[0], [1], [0, 1, 2, 3, 4]], ids=["one image", "two images", "batch"])
def test_keys_are_multiplied(tiny, tiny_geometry, documents, scales, numbers):
    items = [documents[n] for n in numbers]
    reader = ScaledReader(tiny, tiny_geometry)
    page = reader.prefill(items)
    with torch.no_grad():
        found, dense = (tiny.lm_head(x) for x in (reader.hidden(page, scales), page.dense))
    for row, item in enumerate(items):
        assert int(page.scored[row].sum()) == len(item.answer)
    for expected, got in ((multiplied(tiny, tiny_geometry, items, scales), found), (multiplied(tiny, tiny_geometry, items, {}), dense)):
        for row, item in enumerate(items):
            assert torch.allclose(got[row, -len(item.answer) :], expected[row], atol=2e-5)
    assert (found - dense).abs().max() > 0.1


def test_the_error_is_of_answer_tokens(tiny, tiny_geometry, documents, scales):
    """Of a batch it is the mean over all answer tokens of its documents."""
    reader = ScaledReader(tiny, tiny_geometry)
    items = documents[:2]
    alone, counts = [], [len(item.answer) for item in items]
    with torch.no_grad():
        for item in items:
            page = reader.prefill([item])
            alone.append(float(reader.error(page, scales)))
            expected = (reader.hidden(page, scales) - page.dense)[0, -len(item.answer) :].square().mean()
            assert alone[-1] == pytest.approx(float(expected), rel=1e-5)
        both = float(reader.error(reader.prefill(items), scales))
        assert float(reader.error(page, {i: torch.ones(HEADS, DIM) for i in range(LAYERS)})) == 0
    assert both == pytest.approx(sum(a * n for a, n in zip(alone, counts, strict=True)) / sum(counts), rel=1e-4)


def test_the_gradient_is_that_of_differences(tiny, tiny_geometry, documents, scales):
    model = copy.deepcopy(tiny).double()
    reader = ScaledReader(model, tiny_geometry)
    with frozen(model):
        page = reader.prefill(documents[:2])
        own = {i: s.double().requires_grad_(True) for i, s in scales.items()}
        reader.error(page, own).backward()
        assert all(p.grad is None for p in model.parameters())
        for layer, head, channel in ((0, 1, 3), (1, 0, 30), (2, 1, 17)):
            ends = []
            for step in (3e-3, -3e-3):  # RMSNorm rounds to fp32
                moved = {i: s.detach().clone() for i, s in own.items()}
                moved[layer][head, channel] += step
                with torch.no_grad():
                    difference = (reader.hidden(page, moved) - page.dense).square().mean(-1)
                ends.append(float((difference * page.scored).sum() / page.scored.sum()))
            assert float(own[layer].grad[head, channel]) == pytest.approx((ends[0] - ends[1]) / 6e-3, rel=1e-2)
    assert all(p.requires_grad for p in model.parameters())


def test_a_document_that_ends_on_its_image(tiny, tiny_geometry, documents, scales):
    """Its first answer token is predicted by the exact part: it is not scored."""
    from dataclasses import replace

    item = replace(documents[0], prompt=documents[0].prompt[: documents[0].visual_end])
    page = ScaledReader(tiny, tiny_geometry).prefill([item])
    assert page.scored.tolist() == [[True] * (len(item.answer) - 1)] and page.dense.shape[1] == len(item.answer) - 1
