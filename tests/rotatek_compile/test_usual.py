"""What is usual among calibration documents: ratios and angles of single segments, against numbers worked out one by one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rotatek_compile.bases import two_sided
from rotatek_compile.batches import Chunk
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.kernels.codes import clipped_scales, rounded
from rotatek_compile.plan import SIDES
from rotatek_compile.usual import (
    FACTOR,
    FEWEST,
    LEAST_SPREAD,
    MARGIN,
    SAMPLED,
    TOKENS,
    UNKNOWN_FACTOR,
    UsualSegments,
    deviations,
    largest_deviation,
    leading_angles,
    legible,
    spread,
    tail_ratios,
)

HEADS, DIM, LAYERS = 2, 16, 2


def test_tail_ratios():
    energy, spectrum = torch.tensor([[6.0, 1.0, 4.0, 0.0]]), torch.tensor([[4.0, 2.0, 1.0, 0.0]])
    assert tail_ratios(energy, spectrum)[0].tolist() == pytest.approx([11 / 7, 5 / 3, 4, 1])
    assert tail_ratios(torch.zeros(1, 4), torch.zeros(1, 4))[0].tolist() == [1, 1, 1, 1]


def test_leading_angles():
    energy = np.array([[3.0, 0, 1, 0], [0, 0, 2, 2], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]])
    assert leading_angles(energy).tolist() == pytest.approx([30, 90, 0, 0, 45])


def test_a_document_is_compared_with_the_others_only():
    """One document of ten lies 8 deviations off: alone with the rest it is that far, in a mean that it is part of it would not be."""
    generator = np.random.default_rng(0)
    documents = [20 + generator.normal(0, 2, (n % 2 + 1, 30)) for n in range(10)]
    before = largest_deviation(documents)
    assert 1.0 < before < 2.0
    documents[3] = documents[3] + 16
    assert 6.0 < largest_deviation(documents) < 10.0
    everything = np.concatenate(documents)
    assert deviations(everything, everything.mean(0), spread(everything)).max() < 4.0


def test_angles_that_hardly_vary_have_a_least_spread():
    same = np.tile([1.0, 50.0, 0.0], (9, 1))
    assert spread(same).tolist() == pytest.approx([LEAST_SPREAD, 50 * LEAST_SPREAD, 1e-6])
    assert largest_deviation(list(same[:, None])) == 0.0


def test_angles_that_rounding_makes_are_not_looked_at():
    angles = np.array([[0.1, 0.1], [0.2, 0.2]])
    assert legible(angles, torch.finfo(torch.float32).eps).tolist() == angles.tolist()
    assert legible(angles, torch.finfo(torch.bfloat16).eps).tolist() == [[0.1, np.inf], [0.2, 0.2]]
    assert angles[0, 1] == 0.1


@pytest.fixture
def measured():
    """`UsualSegments` with random bases of Keys and Values, images and text; and a maker of prefilled batches."""
    generator = torch.Generator().manual_seed(0)
    shape = LayerGeometry(layer_type="full_attention", query_heads=4, kv_heads=HEADS, head_dim=DIM)
    geometry = Geometry(model_type="tiny", layers=(shape,) * LAYERS, visual_token_ids=(5,))
    bases, means = {}, {}
    for kind in ("visual", "text"):
        for n, side in enumerate(SIDES):
            for i in range(LAYERS):
                a, b = torch.randn(2, HEADS, DIM, DIM, generator=generator)
                bases.setdefault(kind, {}).setdefault(side, {})[i] = two_sided(a @ a.mT / DIM + 0.1 * torch.eye(DIM), b @ b.mT / DIM)
                means[i, kind, side] = torch.randn(HEADS, DIM, generator=generator).double() + n
    moments = SimpleNamespace(mean=lambda i, kind, side: means[i, kind, side])

    def batch(names, images, length=300, scale=1.0, seed=0):
        """`images`: by row, columns of each image; everything else is text, but for the first two columns of padding."""
        own = torch.Generator().manual_seed(seed)
        x = [[scale * torch.randn(len(names), HEADS, length, DIM, generator=own) for _ in SIDES] for _ in range(LAYERS)]
        one_hot = torch.zeros(len(names), length, max(map(len, images)))
        for row, runs in enumerate(images):
            for n, (start, end) in enumerate(runs):
                one_hot[row, start:end, n] = 1
        mask = torch.ones(len(names), length, dtype=torch.int64)
        mask[:, :2] = 0
        return SimpleNamespace(
            items=[SimpleNamespace(sample=SimpleNamespace(id=name)) for name in names],
            prefix=Chunk(torch.zeros_like(mask), mask),
            images=one_hot,
            cache=SimpleNamespace(layers=[SimpleNamespace(keys=k, values=v) for k, v in x]),
        )

    return SimpleNamespace(usual=UsualSegments(geometry, moments, bases), bases=bases, means=means, batch=batch)


def figures(x, basis, head, mean):
    """Energy of each direction of one head, and its tail and code ratios, in numpy, one direction at a time."""
    z = (x.double() - mean).numpy() @ basis.encode[head].numpy()
    errors = np.zeros(DIM)
    for d in range(DIM):
        column = torch.from_numpy(z[:: -(-len(z) // SAMPLED), d : d + 1]).float()
        errors[d] = (rounded(column, clipped_scales(column, 4).float(), 4) - column).square().mean()
    spectrum = basis.spectrum[head].numpy()
    ratios = [np.cumsum(a[::-1])[::-1] / np.cumsum(b[::-1])[::-1] for a, b in (((z**2).mean(0), spectrum), (errors, 0.016 * spectrum))]
    return (z**2).mean(0), np.stack(ratios)


def test_largest_ratios_and_angles_of_all_segments(measured):
    docs = [measured.batch([f"{n}", f"{n}b"], [[(3, 80), (90, 290)], [(2, 100)]], scale=0.5 + n % 3, seed=n) for n in range(5)]
    for doc in docs:
        measured.usual.see(doc)
    tensors, usual = measured.usual.tensors()
    angles = {}
    for i in range(LAYERS):
        for side in SIDES:
            for h in range(HEADS):
                largest = {kind: np.ones((2, DIM)) for kind in ("visual", "text")}
                for doc in docs:
                    stored = getattr(doc.cache.layers[i], f"{side}s")[:, h]
                    for row, runs in enumerate([[(3, 80), (90, 290)], [(2, 100)]]):
                        for start, end in runs:
                            x, basis = stored[row, start:end], measured.bases["visual"][side][i]
                            energy, ratios = figures(x, basis, h, x.double().mean(0))
                            largest["visual"] = np.maximum(largest["visual"], ratios)
                            share = energy[: DIM // 2].sum() / energy.sum()
                            if side == "value":
                                angles.setdefault((i, h), []).append(np.degrees(np.arccos(np.sqrt(share))))
                    # text of the second row: 200 columns behind the image, three whole blocks; the first has gaps shorter than a block
                    for start in (100, 164, 228):
                        x, basis = stored[1, start : start + TOKENS], measured.bases["text"][side][i]
                        largest["text"] = np.maximum(largest["text"], figures(x, basis, h, measured.means[i, "text", side][h])[1])
                for kind, ratios in largest.items():
                    for name, ratio in zip(("tail_ratio", "code_ratio"), ratios, strict=True):
                        assert tensors[f"layers.{i}.{kind}.{side}_{name}"][h].numpy() == pytest.approx(ratio, rel=1e-2), (kind, name)
    for (i, h), seen in angles.items():
        mean, deviation = tensors[f"layers.{i}.visual.value_angle"][h].tolist()
        assert mean == pytest.approx(np.mean(seen), abs=0.01)
        assert deviation == pytest.approx(max(np.std(seen), LEAST_SPREAD * np.mean(seen)), rel=1e-2)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    images = np.array(list(angles.values())).T  # 15 images, three of each batch: two of its first document, one of its second
    own = [[n, n + 1] for n in range(0, 15, 3)] + [[n + 2] for n in range(0, 15, 3)]
    off = []
    for document in own:
        others = np.delete(images, document, axis=0)
        scale = np.maximum(others.std(0), LEAST_SPREAD * others.mean(0))
        off += [np.sqrt((((images[n] - others.mean(0)) / scale) ** 2).mean()) for n in document]
    assert usual == pytest.approx(MARGIN * max(*off, 1.0), rel=1e-3)


def test_a_document_counts_once(measured):
    for n in range(FEWEST):
        measured.usual.see(measured.batch([f"{n}"], [[(10, 290)]], seed=n))
    before, deviation = measured.usual.tensors()
    measured.usual.see(measured.batch(["0"], [[(10, 290)]], scale=9.0, seed=0))  # would change everything
    after, same = measured.usual.tensors()
    assert deviation == same
    assert all(torch.equal(before[name], after[name]) for name in before)
    measured.usual.see(measured.batch(["new"], [[(10, 290)]], scale=9.0, seed=0))
    assert measured.usual.tensors()[0]["layers.1.visual.value_tail_ratio"].min() > 20


def test_few_documents_say_nothing(measured):
    for n in range(FEWEST - 1):
        measured.usual.see(measured.batch([f"{n}"], [[(10, 290)]], seed=n))
    assert measured.usual.tensors() == ({}, None)


def test_short_images_have_ratios_and_no_angles(measured):
    for n in range(FEWEST):
        measured.usual.see(measured.batch([f"{n}"], [[(10, 10 + TOKENS - 1)]], length=80, seed=n))
    tensors, deviation = measured.usual.tensors()
    assert deviation is None and not any(name.endswith("_angle") for name in tensors)
    assert (tensors["layers.0.visual.key_tail_ratio"] > 1).any()
    # no block of text was seen: the fallback does as without these tensors
    assert torch.allclose(FACTOR * tensors["layers.0.text.key_tail_ratio"], torch.tensor(UNKNOWN_FACTOR))


def test_tokens_of_short_images(measured):
    """Nine in ten have as many; documents that are seen again do not count, nor does text; processes put theirs together."""
    assert measured.usual.image_tokens() is None
    for n in range(2):
        measured.usual.see(measured.batch(["a", "b"], [[(5, 25), (30, 70)], [(5, 65), (70, 150), (160, 260)]], seed=n))
    assert sorted(measured.usual.lengths) == [20, 40, 60, 80, 100]
    assert measured.usual.image_tokens() == 28  # two fifths of the way from 20 to 40
    others = SimpleNamespace(gather=lambda mine: [mine, [200] * 5])
    assert measured.usual.image_tokens(others) == 38


def test_processes_together(measured):
    """What two processes saw, put together, is what one would have seen."""
    docs = [measured.batch([f"{n}"], [[(10, 290)]], scale=1 + n % 3, seed=n) for n in range(FEWEST + 1)]
    for doc in docs:
        measured.usual.see(doc)
    alone, deviation = measured.usual.tensors()
    halves = [UsualSegments(measured.usual.geometry, measured.usual.moments, measured.bases) for _ in range(2)]
    for n, doc in enumerate(docs):
        halves[n % 2].see(doc)
    gathered = [({name: x.cpu() for name, x in half.largest.items()}, half.angles, half._seen) for half in halves]
    together, same = halves[0].tensors(SimpleNamespace(gather=lambda mine: gathered))
    assert same == pytest.approx(deviation)
    assert all(torch.allclose(alone[name], together[name], rtol=1e-5) for name in alone) and set(alone) == set(together)
