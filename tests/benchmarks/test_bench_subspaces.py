"""Subspaces: what a basis holds of drawn Keys, how heads of two models are matched, and what is printed."""

from types import SimpleNamespace

import pytest
import torch
from bench_rotation import WAYS, channels
from bench_subspaces import Subject, between, drift, explained, spread, variance_kept
from print_subspaces import lines

from rotatek_compile.bases import calibrated_basis
from rotatek_compile.geometry import Geometry, LayerGeometry

HEADS, DIM = 2, 16


def matrices(seed, count=1):
    made = torch.randn(count, HEADS, DIM, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made *= torch.logspace(0, -1, DIM)
    return [x @ x.mT / DIM for x in made]


@pytest.mark.parametrize("way", WAYS)
def test_variance_kept_is_that_of_drawn_keys(way):
    covariance, moment = matrices(0, 2)
    basis = channels(covariance, moment) if way == "channels" else calibrated_basis(way, covariance, moment)
    keys = torch.randn(HEADS, 100_000, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    keys = keys @ torch.linalg.cholesky(covariance).mT
    for rank in (2, 9, DIM):
        lost = keys - keys @ basis.encode[..., :rank] @ basis.decode[..., :rank].mT
        drawn = 1 - lost.square().sum((1, 2)) / keys.square().sum((1, 2))
        assert variance_kept(basis, rank, covariance).tolist() == pytest.approx(drawn.tolist(), abs=0.02)


def test_heads_are_matched_with_the_most_like_one():
    first, last = torch.diag(torch.arange(DIM, 0, -1.0).double()), torch.diag(torch.arange(1.0, DIM + 1).double())
    assert between([torch.stack([first, last])], [torch.stack([last, first])]) == pytest.approx((1, 1, 1))
    assert between([torch.stack([first, first])], [torch.stack([last, last])]) == pytest.approx((0, 0, 0))


def moments(image, text, query):
    return SimpleNamespace(covariance=lambda i, kind, side: {"visual": image, "text": text}[kind], query_moment=lambda i: query)


def subject():
    layer = LayerGeometry(layer_type="full_attention", query_heads=HEADS, kv_heads=HEADS, head_dim=DIM)
    return SimpleNamespace(geometry=Geometry(model_type="made", layers=(layer,), visual_token_ids=(5,)))


def test_tables():
    image, text, other, query = matrices(2, 4)
    seen, unseen = moments(image, text, query), moments(image, other, query)
    bases = {way: {0: channels(image, query) if way == "channels" else calibrated_basis(way, image, query)} for way in WAYS}
    rows = explained(bases, unseen, subject())
    kept = {(row["ratio"], row["way"]): (row["keys"][0], row["logits"][0]) for row in rows}
    assert kept[0.25, "pca"][0] > kept[0.25, "channels"][0] and kept[0.25, "two-sided"][1] > kept[0.25, "pca"][1]
    found = drift(seen, unseen, [seen, moments(text, text, query)], subject())
    assert found["calibration and unseen pages"] == pytest.approx((1, 1, 1))
    assert found["two single pages"] == pytest.approx(found["image and text"]) and found["two single pages"][0] < 0.95
    assert found["calibration and a single page"][0] == pytest.approx((1 + found["image and text"][0]) / 2)
    kl = {"kl": [0.1, 0.05, 0.2], "over_first": None}
    own = {"explained": rows, "drift": found}
    own["calibration_mix"] = [{"text_share": 0.25, "images": [0.1, 0.1, 0.1], "text": [0.2, 0.1, 0.3], **kl}]
    own["prompt_mix"] = [{"words": 50, "text_share": 0.5, "surprise": 0.25, "over_channels": [0.5, 0.4, 0.6], **kl}]
    about = {"num_samples": 4, "documents": 3, "data": "d", "device": "cpu", "torch": "1", "transformers": "2"}
    out = lines(about | {"models": {"m": own}}, "m")
    assert out[0] == "m, 4 calibration and 3 other documents of d, float32, cpu, torch 1, transformers 2"
    assert "| 0.25 | 0.100 [0.100, 0.100] | 0.200 [0.100, 0.300] | 1.0e-01 [5.0e-02, 2.0e-01] | - |" in out
    assert "| 50 | 0.50 | 0.25 | 1.0e-01 [5.0e-02, 2.0e-01] | - | 0.5 [0.4, 0.6] |" in out


def test_other_text_goes_before_the_question(monkeypatch):
    import bench_subspaces

    from rotatek_compile.calibration_data.sample import Sample

    samples = [Sample(id=str(n), images=(), question=f"what is {n}", answers=(f"it {n}",)) for n in range(3)]
    items = SimpleNamespace(data=SimpleNamespace(sample=lambda place: samples[place]), places=[0, 1, 2])
    monkeypatch.setattr(bench_subspaces, "encode", lambda processor, sample, *rest: sample)
    model = SimpleNamespace(processor=None, geometry=None, eos=1, rope=None)
    longer = Subject.with_text(model, items, 7)
    assert [len(sample.question.split()) for sample in longer] == [10, 10, 10]
    assert all(sample.question.endswith(f"what is {n}") and sample.answers == samples[n].answers for n, sample in enumerate(longer))
    assert len({tuple(sample.question.split()[:7]) for sample in longer}) == 3
    assert [sample.question for sample in Subject.with_text(model, items, 0)] == [sample.question for sample in samples]


def test_spread():
    mean, low, high = spread([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0 and 1.0 <= low < 3.0 < high <= 6.0
