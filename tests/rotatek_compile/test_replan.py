"""Another budget for an artifact: ranks from what it holds, and refusals in one sentence."""

from dataclasses import replace

import pytest
import torch

from rotatek_compile.artifact import Artifact, Method
from rotatek_compile.errors import UsageError
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.replan import replanned

DIM = 32
SHAPE = Geometry(
    model_type="tiny",
    layers=(LayerGeometry(layer_type="full_attention", query_heads=4, kv_heads=2, head_dim=DIM),) * 2,
    visual_token_ids=(5,),
)


def artifact(**options):
    """Head 1 of layer 0 matters most, head 0 of layer 1 not at all."""
    cost = {0: [1.0, 5.0], 1: [0.0, 0.5]}
    tensors = {}
    for i, heads in cost.items():
        tensors[f"layers.{i}.sensitivity"] = torch.tensor([[c, c / 4, c / 100] for c in heads])
        tensors[f"layers.{i}.visual.key_spectrum"] = torch.linspace(1, 0.01, DIM).repeat(2, 1)
        tensors[f"layers.{i}.key_rank"] = torch.tensor([8, 8], dtype=torch.int32)
    return Artifact(SHAPE, Method(levels=(0, 8, 16), **options), tensors, {}, {})


def test_ranks_follow_sensitivities_and_nest():
    before = artifact()
    plans = {ratio: replanned(before, keep_ratio=ratio).ranks() for ratio in (0.25, 0.5, 0.75, 1.0)}
    assert {ratio: sum(map(sum, plan.values())) for ratio, plan in plans.items()} == {0.25: 32, 0.5: 64, 0.75: 96, 1.0: 128}
    assert plans[0.25][0][1] > plans[0.25][0][0] > plans[0.25][1][0] == 0
    for small, large in ((0.25, 0.5), (0.5, 0.75), (0.75, 1.0)):
        assert all(a <= b for i in plans[small] for a, b in zip(plans[small][i], plans[large][i], strict=True))
    assert before.ranks() == {0: [8, 8], 1: [8, 8]}
    assert replanned(before, keep_ratio=0.5).method.keep_ratio == 0.5


def test_uniform_artifacts_stay_uniform():
    assert replanned(artifact(allocation="uniform"), keep_ratio=0.5).ranks() == {0: [16, 16], 1: [16, 16]}


def test_a_budget_counts_values():
    """At b of the dense bytes Values take one half, Keys the rest."""
    made = replanned(artifact(), kv_budget=0.625)
    assert made.ranks() == replanned(artifact(), keep_ratio=0.25).ranks()
    assert made.bytes_per_token() == 0.625 * SHAPE.dense_bytes_per_token()


def test_without_sensitivities():
    bare = replace(artifact(), method=Method(levels=()))
    with pytest.warns(UserWarning, match="no sensitivities"):
        assert replanned(bare, keep_ratio=0.5).ranks() == {0: [16, 16], 1: [16, 16]}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "give one of them"),
        ({"keep_ratio": 0.5, "kv_budget": 0.75}, "give one of them"),
        ({"keep_ratio": 0.0}, "--keep-ratio 0 is out of range"),
        ({"kv_budget": 1.5}, "--kv-budget 1.5 is out of range"),
        ({"kv_budget": 0.5}, "--kv-budget 0.5 is too small: .* takes 0.5"),
    ],
)
def test_refusals(asked, words):
    with pytest.raises(UsageError, match=words):
        replanned(artifact(), **asked)


def test_rivals_take_what_they_can():
    knockout = {f"layers.{i}.knockout": torch.tensor([0.5, 1.0]) for i in range(2)}
    rival = replace(artifact(), method=Method(rival="head-drop", kv_budget=0.25), tensors=knockout)
    assert replanned(rival, kv_budget=0.1).method.kv_budget == 0.1
    assert replanned(rival, keep_ratio=0.5).method.kv_budget is None  # of (layer, head) pairs
    with pytest.raises(UsageError, match="int4 has no keep ratio; use --kv-budget"):
        replanned(replace(rival, method=Method(rival="int4")), keep_ratio=0.5)
    think = replace(rival, method=Method(rival="think", keep_ratio=0.5))
    assert replanned(think, keep_ratio=0.25).method.keep_ratio == 0.25
    with pytest.raises(UsageError):
        replanned(think, kv_budget=0.1)  # stores Values as they are
