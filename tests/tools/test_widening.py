"""A widened model computes what the narrow one did."""

import pytest
import torch

from tiny_training import forward, forward_qwen3_vl, llava_next, qwen3_vl
from tiny_training.rendering import Renderer
from tiny_training.widening import load_weights, widen_heads, without_layer

TEXT = {"hidden": 32, "layers": 2, "head_dim": 16, "feed_forward": 48}
CASES = {
    "llava_next": (llava_next, forward.BatchedForward, forward.tile_pages,
                   TEXT | {"vision_hidden": 64, "vision_layers": 1, "vision_feed_forward": 64}),
    "qwen3_vl": (qwen3_vl, forward_qwen3_vl.BatchedForward, forward_qwen3_vl.patch_pages,
                 TEXT | {"vision_hidden": 32, "vision_layers": 2, "vision_heads": 2, "vision_feed_forward": 48, "deepstack": (0,)}),
}  # fmt: skip


@pytest.mark.parametrize("narrow", [(2, 1), (4, 2)])
@pytest.mark.parametrize("name", list(CASES))
def test_copied_heads_change_nothing(name, narrow, pack):
    family, batched, prepare, geometry = CASES[name]
    small = family.build_model(family.build_config(**geometry, heads=narrow[0], kv_heads=narrow[1]), seed=1)
    large = family.build_model(family.build_config(**geometry, heads=8, kv_heads=4), seed=2)
    assert widen_heads(small.state_dict(), large) == 8 // narrow[0]
    batch = pack(family.TOKENS, 2, 1, length=64)
    pixels = prepare(Renderer(torch.device("cpu")).draw(batch.cells.flatten(0, 1)))
    with torch.no_grad():
        before, after = (batched(model).text_logits(pixels, 1, batch.tokens)[0] for model in (small, large))
    assert torch.allclose(before, after, atol=1e-5) and before.std() > 0.01
    old, new = (model.model.language_model.layers[1].self_attn for model in (small, large))
    for copy in range(4 // narrow[1]):
        for head in range(narrow[1]):
            at = (copy * narrow[1] + head) * 16
            assert torch.equal(new.k_proj.weight[at : at + 16], old.k_proj.weight[head * 16 : head * 16 + 16])
    group = new.q_proj.weight.unflatten(0, (4, 2, 16))
    assert torch.equal(group[:1], group[narrow[1] : narrow[1] + 1])


def test_other_differences_are_refused(tmp_path):
    family, _, _, geometry = CASES["llava_next"]

    def build(**changes):
        return family.build_model(family.build_config(**(geometry | {"heads": 4, "kv_heads": 2} | changes)))

    narrow = build().state_dict()
    with pytest.raises(ValueError, match="only head counts may differ"):
        widen_heads(narrow, build(feed_forward=96))
    with pytest.raises(ValueError, match=r"grow by one factor, not by \[2, 4\]"):
        widen_heads(narrow, build(heads=16, kv_heads=4))
    torch.save({"model": narrow}, tmp_path / "state.pt")
    same = build()
    assert widen_heads(load_weights(tmp_path / "state.pt", torch.device("cpu")), same) == 1
    assert all(torch.equal(tensor, narrow[name]) for name, tensor in same.state_dict().items())


@pytest.mark.parametrize("gone", [0, 1, 2])
@pytest.mark.parametrize("name", list(CASES))
def test_without_a_layer_the_others_follow_each_other(name, gone, pack, tmp_path):
    family, batched, prepare, geometry = CASES[name]
    geometry = geometry | {"heads": 4, "kv_heads": 2}
    deep = geometry | {"layers": 3}
    family.save_checkpoint(family.build_model(family.build_config(**deep), seed=1), tmp_path)  # which rounds its weights to bf16
    large = family.build_model(family.build_config(**deep), seed=3)
    widen_heads(load_weights(tmp_path, torch.device("cpu")), large)
    small = family.build_model(family.build_config(**(geometry | {"layers": 2})), seed=2)
    assert widen_heads(without_layer(load_weights(tmp_path, torch.device("cpu")), gone), small) == 1
    batch = pack(family.TOKENS, 1, 1, length=32)
    pixels = prepare(Renderer(torch.device("cpu")).draw(batch.cells.flatten(0, 1)))
    large.model.language_model.layers = torch.nn.ModuleList(
        layer for number, layer in enumerate(large.model.language_model.layers) if number != gone
    )
    with torch.no_grad():
        expected, got = (batched(model).text_logits(pixels, 1, batch.tokens)[0] for model in (large, small))
    assert torch.allclose(got, expected, atol=1e-5) and got.std() > 0.01
