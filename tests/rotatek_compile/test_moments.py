"""Sums of second moments: additive, in any order, within and total covariance, queries summed over the group."""

import numpy as np
import torch

from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.moments import Moments

H, D = 2, 8


def tokens(seed, count, mean=0.0):
    return torch.randn(H, count, D, generator=torch.Generator().manual_seed(seed)) + mean


def test_within_and_total_covariance():
    segments = [tokens(1, 30, 5.0), tokens(2, 50, -3.0)]
    moments = Moments()
    for segment in segments:
        moments.add_segment(0, "visual", segment, -segment)
        moments.add_segment(0, "text", segment, -segment)
    for h in range(H):
        parts = [s[h].double().numpy() for s in segments]
        within = (30 * np.cov(parts[0].T, bias=True) + 50 * np.cov(parts[1].T, bias=True)) / 80
        assert np.allclose(moments.covariance(0, "visual", "key")[h], within, atol=1e-4)
        assert np.allclose(moments.covariance(0, "text", "key")[h], np.cov(np.concatenate(parts).T, bias=True), atol=1e-4)
        assert np.allclose(moments.mean(0, "text", "value")[h], -np.concatenate(parts).mean(0), atol=1e-5)


def test_order_does_not_matter():
    a, b = Moments(), Moments()
    for seed in range(4):
        a.add_segment(0, "visual", tokens(seed, 5 + seed), tokens(9, 5 + seed))
        b.add_segment(0, "visual", tokens(3 - seed, 8 - seed), tokens(9, 8 - seed))
    assert all(torch.allclose(value, b.sums[name], rtol=1e-12, atol=1e-12) for name, value in a.sums.items())


def test_queries_of_a_group_do_not_cancel():
    query = tokens(1, 40).unsqueeze(1)
    moments = Moments()
    moments.add_queries(0, torch.cat([query, -query], 1), 0.5)  # [Hkv, G = 2, T, D] of opposite signs
    expected = 2 * 0.25 * query[:, 0].mT @ query[:, 0] / 40
    assert torch.allclose(moments.query_moment(0), expected.double(), atol=1e-5)


def test_adding_never_changes_a_saved_sum():
    moments = Moments()
    moments.add("x", torch.ones(2))
    before = moments.sums["x"]
    moments.add("x", torch.ones(2))
    assert before.tolist() == [1, 1]
    assert moments.sums["x"].tolist() == [2, 2]
    assert before.dtype == torch.float64


def test_what_is_missing():
    layer = LayerGeometry(layer_type="full_attention", query_heads=2, kv_heads=H, head_dim=D)
    geometry = Geometry(model_type="m", layers=(layer,), visual_token_ids=(5,))
    moments = Moments()
    assert moments.missing(geometry, ("visual",)) == "layer 0 saw no visual tokens"
    moments.add_segment(0, "visual", tokens(1, 3), tokens(1, 3))
    assert moments.missing(geometry, ("visual",)) == "layer 0 saw no queries after the images"
    moments.add_queries(0, tokens(1, 3).unsqueeze(1), 1.0)
    assert moments.missing(geometry, ("visual",)) is None
    assert moments.missing(geometry, ("visual", "text")) == "layer 0 saw no text tokens"
    moments.add("0.query_outer", torch.full((H, D, D), torch.inf))
    assert "0.query_outer is not finite" in moments.missing(geometry, ("visual",))
