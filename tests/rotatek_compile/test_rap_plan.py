"""Plans: what they keep, how they are stored, and that a wrong one is refused in one sentence."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rotatek_compile.errors import ArtifactError
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.rap_plan import RapPlan

sys.path.append(str(Path(__file__).parents[1] / "runtime"))
from rap_cases import drawn_plan, whole_plan  # noqa: E402

SHAPE = LayerGeometry(layer_type="full_attention", query_heads=4, kv_heads=2, head_dim=32)
GEOMETRY = Geometry(model_type="llama", layers=(SHAPE, SHAPE), visual_token_ids=())


def test_what_is_kept():
    assert whole_plan(GEOMETRY).keep_ratio(GEOMETRY) == 1
    plan = drawn_plan(GEOMETRY, [(8, 16), (12, 8)])
    assert plan.keep_ratio(GEOMETRY) == (16 + 16 + 24 + 8) / (4 * 32)
    assert plan.layers[1].widths == (12, 8, False) and drawn_plan(GEOMETRY, hidden=8).layers[0].widths.output_bias


def test_stored_and_read_again():
    plan = drawn_plan(GEOMETRY, hidden=8)
    tensors = plan.tensors()
    assert sorted(tensors) == sorted(
        [f"layers.{i}.{name}" for i in range(2) for name in ("pairs", "key", "query", "value", "output")] + ["layers.0.bias"]
    )
    again = RapPlan.from_tensors(tensors, {"keep_ratio": 0.5})
    again.check(GEOMETRY)
    assert again.options == {"keep_ratio": 0.5} and list(again.layers) == [0, 1]
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in tensors.items())
    with pytest.raises(ArtifactError, match=r"'layers\.0\.colour' is none of a RAP plan"):
        RapPlan.from_tensors(tensors | {"layers.0.colour": torch.zeros(1)}, {})
    del tensors["layers.1.value"]
    with pytest.raises(ArtifactError, match=r"layers\.1\.value of the RAP plan is missing"):
        RapPlan.from_tensors(tensors, {})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("pairs", lambda x: x[:, :0], r"pairs has shape \[2, 0\], expected \[2, 1 to 16\]"),
        ("pairs", lambda x: x[:1], r"pairs has shape \[1, 8\]"),
        ("pairs", lambda x: x.float(), "pairs is float32, expected whole numbers"),
        ("pairs", lambda x: x + 16, "pair .* is out of range, expected 0 to 15"),
        ("pairs", lambda x: x - 16, "pair -.* is out of range"),
        ("pairs", lambda x: x.flip(1), "doubled or not ascending"),
        ("pairs", lambda x: torch.cat([x[:, :1], x[:, :-1]], 1), "doubled or not ascending"),
        ("key", lambda x: x[:, :-1], r"key has shape \[2, 15, 32\], expected \[2, 16, 32\]"),
        ("query", lambda x: x[:2], r"query has shape \[2, 16, 32\], expected \[4, 16, 32\]"),
        ("value", lambda x: x[..., :8], r"value has shape \[2, 16, 8\], expected \[2, 16, 32\]"),
        ("value", lambda x: x.repeat(1, 3, 1), "keeps Values of width 48, expected 1 to 32"),
        ("output", lambda x: x.mT, r"output has shape"),
        ("output", lambda x: x * float("nan"), "output has numbers that are not finite"),
        ("query", lambda x: x / 0, "query has numbers that are not finite"),
        ("bias", lambda x: torch.zeros(2, 2), r"bias has shape \[2, 2\]"),
    ],
)
def test_wrong_plans(name, change, words):
    plan = drawn_plan(GEOMETRY)
    layer = replace(plan.layers[0], **{name: change(getattr(plan.layers[0], name))})
    with pytest.raises(ArtifactError, match=f"layer 0 of the RAP plan.*{words}") as error:
        RapPlan({0: layer, 1: plan.layers[1]}).check(GEOMETRY)
    assert len(str(error.value).splitlines()) == 1


def test_a_plan_of_another_model():
    plan = drawn_plan(GEOMETRY)
    with pytest.raises(ArtifactError, match=r"the RAP plan has layers \[0, 1\], the model 1"):
        plan.check(replace(GEOMETRY, layers=GEOMETRY.layers[:1]))
