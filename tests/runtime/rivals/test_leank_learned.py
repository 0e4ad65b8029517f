"""Learned scales: which of them a keep ratio takes, and the masks they give."""

import pytest
import torch

from rotatek_compile.errors import UsageError
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.runtime.rivals.leank import largest, lean_masks
from rotatek_compile.runtime.rivals.leank_learned import LearnedScales, shapes_of, state_of, tensors_of
from rotatek_compile.runtime.rivals.registry import make_coder

HEADS, DIM = 2, 64


@pytest.fixture
def geometry():
    layers = [
        LayerGeometry(layer_type=kind, query_heads=4, kv_heads=HEADS, head_dim=DIM) for kind in ("full_attention", "sliding_attention")
    ]
    return Geometry(model_type="made", layers=(*layers, layers[0]), visual_token_ids=(5,))


@pytest.fixture
def scales():
    """Each set prefers another head: 0 of layer 0 at 1/2, 1 of layer 2 at 1/8, 1 of layer 0 in the first stage."""

    def preferring(layer, head):
        made = {i: torch.rand(HEADS, DIM, generator=torch.Generator().manual_seed(i)) * 0.5 for i in (0, 2)}
        made[layer][head] += 0.5
        return made

    return LearnedScales(preferring(0, 1), {0.5: preferring(0, 0), 0.125: preferring(2, 1)})


@pytest.mark.parametrize(
    ("ratio", "trained"),
    [(1.0, 0.5), (0.5, 0.5), (0.26, 0.5), (0.25, 0.125), (0.24, 0.125), (0.125, 0.125), (0.01, 0.125), (0.0, 0.125)],
)
def test_the_nearest_trained_ratio(scales, ratio, trained):
    """In the logarithm: 1/4 is as near to 1/2 as to 1/8, and takes the smaller."""
    assert scales.at(ratio) is scales.second[trained]
    assert LearnedScales(scales.first, {}).at(ratio) is scales.first


def test_masks_are_of_these_scales(geometry, scales):
    for ratio, (layer, head) in ((0.25, (2, 1)), (0.26, (0, 0))):
        coder = make_coder("leank-learned", geometry, keep_ratio=ratio, state={"leank-learned": scales})
        assert coder.masks == lean_masks(geometry, ratio, scales.at(ratio))
        assert {(i, h): len(mask) for i, masks in coder.masks.items() for h, mask in enumerate(masks) if mask} == {(layer, head): DIM}
        assert coder.setting == "64 of 256 channels" and coder.bytes_of(10, layer) == 2 * 10 * (DIM + DIM) + 8 * DIM


def test_a_file_holds_all_of_them(geometry, scales):
    tensors, training = tensors_of(scales), {"ratios": [0.5, 0.125]}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes_of(geometry, training)
    assert len(tensors) == 6 and "layers.1.scale" not in tensors  # sliding
    again = state_of(tensors, geometry, training)
    assert list(again.second) == [0.5, 0.125] and torch.equal(again.second[0.125][2], scales.second[0.125][2])
    with pytest.raises(UsageError, match="expected a list of shares above 0 and at most 1"):
        shapes_of(geometry, {"ratios": [True]})


def test_the_largest_of_all(geometry):
    masks = largest([torch.tensor([[1.0, 3.0]]), torch.tensor([2.0, 3.0, 0.0])], 2)
    assert [mask.tolist() for mask in masks] == [[[False, True]], [False, True, False]]
