"""Rotation apart from everything else: the formula of the logit error against drawn Keys and queries, and how subspaces are compared."""

import json
from types import SimpleNamespace

import pytest
import torch
from bench_rotation import RATIOS, WAYS, agreement, channels, lines, logit_error, overlap

from rotatek_compile.bases import calibrated_basis
from rotatek_compile.geometry import Geometry, LayerGeometry

HEADS, DIM = 2, 16


@pytest.fixture
def moments():
    """Covariance of the Keys and second moment of the queries, fp64 [H, D, D] each."""
    made = torch.randn(2, HEADS, DIM, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made *= torch.logspace(0, -1, DIM)
    return tuple(x @ x.mT / DIM for x in made)


def test_channels_are_those_of_most_energy(moments):
    covariance, moment = moments
    basis = channels(covariance, moment)
    energy = covariance.diagonal(dim1=1, dim2=2) * moment.diagonal(dim1=1, dim2=2)
    for h in range(HEADS):
        best = energy[h].argsort(descending=True)
        assert basis.encode[h].argmax(0).tolist() == best.tolist() and (basis.encode[h].sum(0) == 1).all()
        assert torch.equal(basis.spectrum[h], energy[h][best])


@pytest.mark.parametrize("way", WAYS)
def test_logit_error_is_that_of_drawn_keys(moments, way):
    covariance, moment = moments
    basis = channels(*moments) if way == "channels" else calibrated_basis(way, *moments)
    generator = torch.Generator().manual_seed(1)
    keys, queries = (
        torch.randn(HEADS, 200_000, DIM, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(x).mT for x in moments
    )
    for rank in (1, 5, DIM):
        rebuilt = keys @ basis.encode[..., :rank] @ basis.decode[..., :rank].mT
        drawn = (queries * (keys - rebuilt)).sum(-1).square().mean(1) / (queries * keys).sum(-1).square().mean(1)
        assert logit_error(basis, rank, covariance, moment).tolist() == pytest.approx(drawn.tolist(), rel=0.05, abs=1e-9)


def test_two_sided_is_best_where_it_was_made(moments):
    errors = {way: logit_error(channels(*moments) if way == WAYS[0] else calibrated_basis(way, *moments), 4, *moments) for way in WAYS}
    assert (errors["two-sided"] < 0.8 * errors["pca"]).all() and (errors["two-sided"] < 0.5 * errors["channels"]).all()


def test_overlap():
    eye = torch.eye(DIM, dtype=torch.float64)
    first, last = torch.diag(torch.arange(DIM, 0, -1.0)), torch.diag(torch.arange(1.0, DIM + 1))
    assert overlap(first[None], 3 * first[None], 4).tolist() == pytest.approx([1.0])
    assert overlap(first[None], last[None], 4).tolist() == pytest.approx([0.0])
    turn = eye.clone()
    turn[0, 0] = turn[9, 9] = 0.5**0.5
    turn[0, 9], turn[9, 0] = -(0.5**0.5), 0.5**0.5
    assert overlap(first[None], (turn @ first.double() @ turn.mT)[None], 4).tolist() == pytest.approx([(3 + 0.5) / 4], abs=0.02)


def test_agreement_over_layers_and_pairs():
    shape = LayerGeometry(layer_type="full_attention", query_heads=2, kv_heads=1, head_dim=DIM)
    geometry = Geometry(model_type="tiny", layers=(shape,) * 2, visual_token_ids=(5,))
    up, down = torch.diag(torch.arange(1.0, DIM + 1))[None], torch.diag(torch.arange(DIM, 0, -1.0))[None]

    def of(visual, text=up):
        return SimpleNamespace(covariance=lambda i, kind, side: visual if kind == "visual" else text)

    found = agreement(of(up, down), of(up), [of(up), of(up), of(down)], geometry)
    assert found == {"calibration and unseen pages": 1.0, "two single pages": pytest.approx(1 / 3), "image and text": 0.0}


def test_printing():
    rows = [
        {"ratio": ratio, "way": way, "logit_error": 0.1234, "kl": 2e-3, "kl_interval": [1e-3, 3e-3]}
        | {"over_channels": 0.5, "over_channels_interval": [0.25, 0.75]}
        for ratio in RATIOS
        for way in WAYS
    ]
    facts = {"model": "tiny", "num_samples": 8, "documents": 6, "data": "mixed", "device": "cpu", "torch": "2", "transformers": "5"}
    found = json.loads(json.dumps(facts | {"rows": rows, "overlap": {"image and text": 0.5}}))
    out = lines(found)
    assert out[0] == "tiny, 8 calibration and 6 other documents of mixed, float32, cpu, torch 2, transformers 5"
    assert out[4:6] == [
        "| 1/8 | channels | 0.123 | 2.0e-03 [1.0e-03, 3.0e-03] | 1 |",
        "| 1/8 | pca | 0.123 | 2.0e-03 [1.0e-03, 3.0e-03] | 0.5 [0.25, 0.75] |",
    ]
    assert out[-1] == "| image and text | 0.50 |"
