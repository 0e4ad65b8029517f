"""LeanK's mask: one threshold over all heads, widths in steps of 32, heads of width 0 as their means."""

import pytest
import torch

from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.runtime.rivals.leank import lean_masks
from rotatek_compile.runtime.rivals.registry import make_coder

HEADS, TOKENS, DIM, LAYERS = 3, 21, 96, 2


@pytest.fixture
def geometry():
    layer = LayerGeometry(layer_type="full_attention", query_heads=2 * HEADS, kv_heads=HEADS, head_dim=DIM)
    return Geometry(model_type="made", layers=(layer,) * LAYERS, visual_token_ids=(5,))


@pytest.fixture
def energy():
    """Heads that differ by powers of ten, so that the threshold gives them very different widths."""
    generator = torch.Generator().manual_seed(0)
    level = torch.tensor([[0.0, -1.5, -6.0], [-0.5, -0.8, -1.2]])
    return {i: torch.rand(HEADS, DIM, generator=generator) * 10 ** level[i][:, None] for i in range(LAYERS)}


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.9, 1.0])
def test_widths_by_one_threshold(geometry, energy, ratio):
    """Against a loop over a sorted list of all channels."""
    every = sorted(((float(energy[i][h, d]), i, h, d) for i in range(LAYERS) for h in range(HEADS) for d in range(DIM)), reverse=True)
    kept = [(i, h) for _, i, h, _ in every[: int(ratio * len(every) + 1e-6)]]
    masks = lean_masks(geometry, ratio, energy)
    for i in range(LAYERS):
        for h in range(HEADS):
            count = kept.count((i, h))
            width = min(range(0, DIM + 1, 32), key=lambda w: (abs(w - count), -w))  # halves go up
            best = sorted(range(DIM), key=lambda d: -float(energy[i][h, d]))[:width]
            assert masks[i][h] == tuple(sorted(best))
    assert len({len(mask) for heads in masks.values() for mask in heads}) > 1 or ratio == 1.0


def test_what_is_rebuilt(geometry, energy):
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(HEADS, TOKENS, DIM, generator=generator) + 1 for _ in range(2))
    coder = make_coder("leank", geometry, keep_ratio=0.3, state={"energy": energy})
    for layer in range(LAYERS):
        masks = coder.masks[layer]
        rebuilt, got = coder.code(layer, keys, values, keys[:, None]).rebuild()
        for h, mask in enumerate(masks):
            if mask:
                expected = torch.zeros(TOKENS, DIM)
                expected[:, list(mask)] = keys[h][:, list(mask)]
                assert torch.equal(rebuilt[h], expected) and torch.equal(got[h], values[h])
            else:
                assert torch.allclose(rebuilt[h], keys[h].mean(0).expand(TOKENS, DIM), atol=1e-6)
                assert torch.allclose(got[h], values[h].mean(0).expand(TOKENS, DIM), atol=1e-6)
        assert coder.value_heads(layer) == tuple(h for h, mask in enumerate(masks) if mask)
    assert () in coder.masks[0] and coder.setting == f"{sum(len(m) for heads in coder.masks.values() for m in heads)} of 576 channels"


def test_the_mean_value_is_what_equal_keys_give(geometry, energy):
    """Attention over a head of width 0 and other tokens is the same with all its Values as with their mean."""
    generator = torch.Generator().manual_seed(2)
    keys, values, text = (torch.randn(HEADS, TOKENS, DIM, generator=generator) for _ in range(3))
    coder = make_coder("leank", geometry, keep_ratio=0.3, state={"energy": energy})
    head = coder.masks[0].index(())
    rebuilt, got = (x[head] for x in coder.code(0, keys, values, keys[:, None]).rebuild())
    query = torch.randn(DIM, generator=generator)

    def attend(some):
        weights = (torch.cat([rebuilt, text[0]]) @ query / DIM**0.5).softmax(0)
        return weights @ torch.cat([some, text[1]])

    assert torch.allclose(attend(values[head]), attend(got), atol=1e-5)
