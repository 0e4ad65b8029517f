"""LeanK's training: what lowers a scale and what holds it, the mask of the second stage, and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch

from rotatek_compile import learn_leank
from rotatek_compile.errors import RotateKError, UsageError
from rotatek_compile.learn_leank import LeanOptions, binary, first_stage, learn, mask_error, prefilled, second_stage
from rotatek_compile.runtime.rivals.leank import lean_masks
from rotatek_compile.scaled_reading import ScaledReader, frozen

LAYERS, HEADS, DIM = 3, 2, 32
QUICK = LeanOptions(steps=5, binary_steps=5, rate=0.1, binary_rate=0.1, batch_size=2, quiet=True)
USELESS = (1, 0, 7)  # layer, head, channel; RoPE turns it together with channel 7 + 16


@pytest.fixture(scope="module")
def planted(tiny):
    """The tiny model, in which Keys of one pair of channels are always zero."""
    model = copy.deepcopy(tiny)
    layer, head, channel = USELESS
    with torch.no_grad():
        weight = model.model.language_model.layers[layer].self_attn.k_proj.weight
        weight[[head * DIM + channel, head * DIM + channel + DIM // 2]] = 0
    return model


def flat(scales):
    return torch.cat([scale.flatten() for scale in scales.values()])


def test_without_a_price_nothing_moves(tiny, tiny_geometry, documents):
    scales, losses = learn(tiny, documents, tiny_geometry, replace(QUICK, weight=0.0))
    assert all(torch.equal(scale, torch.ones(HEADS, DIM)) for scale in scales.first.values())
    assert losses.first == [0.0] * 5 and all(p.requires_grad for p in tiny.parameters())


def test_the_price_lowers_scales(tiny, tiny_geometry, documents):
    """Where it is all that counts, Adam takes the rate from every scale in each step, and what is at 0 stays there."""
    high = learn(tiny, documents, tiny_geometry, replace(QUICK, weight=1e9))[0].first
    assert torch.allclose(flat(high), torch.full((LAYERS * HEADS * DIM,), 0.5), atol=1e-3)
    gone = learn(tiny, documents, tiny_geometry, replace(QUICK, weight=1e9, steps=15))[0].first
    assert torch.equal(flat(gone), torch.zeros(LAYERS * HEADS * DIM))
    means = [float(flat(learn(tiny, documents, tiny_geometry, replace(QUICK, weight=w, steps=30))[0].first).mean()) for w in (0.06, 6.0)]
    assert 0 < means[1] < means[0] < 1


def test_a_useless_channel_has_the_lowest_scale(planted, tiny_geometry, documents):
    scales, losses = learn(planted, documents, tiny_geometry, replace(QUICK, steps=60, rate=0.02, weight=0.06))
    layer, head, channel = USELESS
    pair = scales.first[layer][head, [channel, channel + DIM // 2]]
    assert torch.equal(pair, torch.zeros(2))
    assert int((flat(scales.first) <= 0).sum()) < 0.1 * LAYERS * HEADS * DIM  # others are held
    assert losses.first[-1] > 0


def test_the_mask_has_the_exact_count():
    numbers = torch.tensor([0.5, 0.25, 1.0, 0.0, 0.75, 1.0, 0.125], requires_grad=True)
    mask = binary(numbers, 3 / 7)
    assert mask.tolist() == [0, 0, 1, 0, 1, 1, 0]
    (mask * torch.arange(7.0)).sum().backward()
    assert numbers.grad.tolist() == [0, 1, 2, 3, 4, 5, 6]  # straight through, also where the mask is 0
    equal = torch.ones(192)
    for ratio in (0.1, 0.25, 0.5, 1 / 3, 1.0):
        assert int(binary(equal, ratio).sum()) == int(ratio * 192 + 1e-6)


def test_the_second_stage_changes_the_mask(tiny, tiny_geometry, documents):
    """Of a model that reads with one head alone, its channels take the places of others that stood higher; they gain nothing by it."""
    model, useful = copy.deepcopy(tiny), (2, 1)
    with torch.no_grad():
        for number, layer in enumerate(model.model.language_model.layers):
            for head in range(HEADS):
                if (number, head) != useful:
                    layer.self_attn.v_proj.weight[head * DIM : (head + 1) * DIM] = 0
    start = {i: torch.full((HEADS, DIM), 0.5) for i in range(LAYERS)}
    start[useful[0]][useful[1]] = 0.45
    ratio = 1 / (LAYERS * HEADS)
    with frozen(model):
        reader = ScaledReader(model, tiny_geometry)
        pages = prefilled(reader, documents, replace(QUICK, batch_size=5))
        found, errors = second_stage(reader, pages, replace(QUICK, binary_steps=20, binary_rate=0.03), start, ratio)
    assert binary(flat(start), ratio).view(LAYERS, HEADS, DIM)[useful].sum() == 0
    kept = binary(flat(found), ratio).view(LAYERS, HEADS, DIM)
    assert int(kept.sum()) == DIM and int(kept[useful].sum()) > 0.7 * DIM
    assert errors[-1] < 0.1 * errors[0]
    others = torch.cat([found[i][h] for i in range(LAYERS) for h in range(HEADS) if (i, h) != useful])
    assert torch.equal(others, torch.full_like(others, 0.5))
    masks = lean_masks(tiny_geometry, ratio, found)
    assert [[len(mask) for mask in masks[i]] for i in range(LAYERS)] == [[0, 0], [0, 0], [0, 32]]


def test_the_second_stage_keeps_the_best_mask(tiny, tiny_geometry, documents, monkeypatch):
    """Of the first and ten on the way, by the error of the mask that a coder would use."""
    options = replace(QUICK, batch_size=5, binary_steps=25)
    start = {i: torch.full((HEADS, DIM), 0.2) for i in range(LAYERS)}
    for scale in start.values():
        scale[0] = 0.5
    with frozen(tiny):
        reader = ScaledReader(tiny, tiny_geometry)
        pages = prefilled(reader, documents, options)
        masks = {i: torch.tensor([[1.0] * DIM, [0.0] * DIM]) for i in range(LAYERS)}
        with torch.no_grad():
            expected = float(reader.error(pages[0], masks))
        assert mask_error(reader, pages, start, 0.5) == pytest.approx(expected) and expected > 0.01
        seen = []

        def told(errors):
            left = iter(errors)
            monkeypatch.setattr(learn_leank, "mask_error", lambda reader, pages, scales, ratio: seen.append(scales) or next(left))

        told(range(11))
        assert torch.equal(flat(second_stage(reader, pages, options, start, 0.5)[0]), flat(start))
        assert len(seen) == 10  # after 3, 6, ... 24 steps and all 25
        seen.clear()
        told([5, 4, 3, 2, 1, 0, 7, 8, 9, 10, 11])
        found, _ = second_stage(reader, pages, options, start, 0.5)
        assert torch.equal(flat(found), flat(seen[5])) and not torch.equal(flat(seen[5]), flat(seen[4]))


def test_stages_go_on_from_each_other(tiny, tiny_geometry, documents):
    scales, losses = learn(tiny, documents, tiny_geometry, replace(QUICK, ratios=(0.5, 0.25), binary_steps=0))
    assert list(scales.second) == [0.5, 0.25] and losses.second == {0.5: [], 0.25: []}
    assert all(torch.equal(flat(own), flat(scales.first)) for own in scales.second.values())
    moved, _ = learn(tiny, documents, tiny_geometry, replace(QUICK, ratios=(0.5, 0.25)))
    assert torch.equal(flat(moved.first), flat(scales.first))
    assert not torch.equal(flat(moved.second[0.5]), flat(moved.second[0.25]))
    assert float(flat(moved.second[0.5]).min()) >= 0 and float(flat(moved.second[0.5]).max()) <= 1


def test_the_same_seed_gives_the_same_scales(tiny, tiny_geometry, documents):
    one, again, other = (learn(tiny, documents, tiny_geometry, replace(QUICK, ratios=(0.5,), seed=seed))[0] for seed in (0, 0, 1))
    assert torch.equal(flat(one.second[0.5]), flat(again.second[0.5])) and torch.equal(flat(one.first), flat(again.first))
    assert not torch.equal(flat(one.first), flat(other.first))


def test_the_pieces_are_what_learn_does(tiny, tiny_geometry, documents):
    with frozen(tiny):
        reader = ScaledReader(tiny, tiny_geometry)
        pages = prefilled(reader, documents, QUICK)
        first, errors = first_stage(reader, pages, QUICK)
    assert [len(page.doc.items) for page in pages] == [2, 2, 1] and len(errors) == 5
    assert {item.sample.id for page in pages for item in page.doc.items} == {item.sample.id for item in documents}
    assert torch.equal(flat(learn(tiny, documents, tiny_geometry, QUICK)[0].first), flat(first))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": -1}, "--steps -1 is out of range; it must be at least 0"),
        ({"binary_steps": -1}, "--steps-binary -1 is out of range"),
        ({"binary_rate": -0.1}, "--lr-binary -0.1 is out of range"),
        ({"batch_size": 0}, "--batch-size 0 is out of range"),
        ({"rate": float("nan")}, "--lr nan is out of range"),
        ({"ratios": (0.5, 0.0)}, "--ratios 0.5 0.0 must be different shares"),
        ({"ratios": (0.5, 0.5)}, "must be different shares"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(UsageError, match=words):
        LeanOptions(**options)


def test_models_with_nothing_to_scale(tiny, tiny_geometry, documents):
    with pytest.raises(UsageError, match="leank-learned scales Keys of images, and llava_next reads text alone"):
        learn(tiny, documents, replace(tiny_geometry, visual_token_ids=()), QUICK)
    narrow = replace(tiny_geometry, layers=tuple(replace(layer, head_dim=48) for layer in tiny_geometry.layers))
    with pytest.raises(UsageError, match="leank-learned needs a head_dim that is a multiple of 32, this model has 48"):
        learn(tiny, documents, narrow, QUICK)


def test_what_cannot_be_trained_on(tiny, tiny_geometry, documents):
    with pytest.raises(RotateKError, match="there are no documents to train on"):
        learn(tiny, [], tiny_geometry, QUICK)
    ended = [replace(documents[0], prompt=documents[0].prompt[: documents[0].visual_end], answer=documents[0].answer[:1])]
    with pytest.raises(RotateKError, match="no document has an answer token that is predicted after its images"):
        learn(tiny, ended, tiny_geometry, QUICK)
    broken = copy.deepcopy(tiny)
    with torch.no_grad():
        broken.model.language_model.norm.weight.fill_(float("inf"))
    with pytest.raises(RotateKError, match="scales: the loss is no number any more after 1 steps"):
        learn(broken, documents, tiny_geometry, QUICK)
    assert all(p.requires_grad for p in broken.parameters())
