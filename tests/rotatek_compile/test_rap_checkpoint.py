"""The smaller checkpoint on disk: what is folded, what is copied bit for bit, how it is split, and what cannot be pruned."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rotatek_compile import rap_checkpoint
from rotatek_compile.errors import RotateKError
from rotatek_compile.geometry import LayerGeometry
from rotatek_compile.rap_checkpoint import fold, refuse_quantised, write_checkpoint
from rotatek_compile.rap_tensors import attention_tensors, stored_tensors

sys.path.append(str(Path(__file__).parents[1] / "runtime"))
from rap_cases import CPU, artifact_of, builders, dense_of, drawn_layer, drawn_plan, load_pruned, prompts, said, whole_plan  # noqa: E402

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A LLaVA-NeXT, whose vision tower has q, k and v projections of its own; its folder, config, geometry and model."""
    folder = builders.build("llava-next-llama", tmp_path_factory.mktemp("base") / "llava")
    return (folder, *dense_of(folder))


def whole(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_folding_by_hand():
    shape = LayerGeometry(layer_type="full_attention", query_heads=4, kv_heads=2, head_dim=8)
    layer, draw = drawn_layer(shape, 3, 5, bias=6), torch.Generator().manual_seed(3)
    weight, bias = torch.randn(16, 6, generator=draw), torch.randn(16, generator=draw)
    for name, maps in (("k_proj", layer.key), ("v_proj", layer.value)):
        found = fold(layer, name, "weight", weight)
        assert torch.allclose(found, torch.cat([maps[0] @ weight[:8], maps[1] @ weight[8:]]), atol=1e-5)
        assert torch.allclose(fold(layer, name, "bias", bias), torch.cat([maps[0] @ bias[:8], maps[1] @ bias[8:]]), atol=1e-5)
    out = torch.randn(6, 32, generator=draw)
    heads = [out[:, 8 * h : 8 * h + 8] @ layer.output[h] for h in range(4)]
    assert torch.allclose(fold(layer, "o_proj", "weight", out), torch.cat(heads, 1), atol=1e-5)
    assert torch.allclose(fold(layer, "o_proj", "bias", bias[:6]), bias[:6] + layer.bias)
    half = fold(layer, "k_proj", "weight", weight.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.equal(half, fold(layer, "k_proj", "weight", weight.bfloat16().float()).bfloat16())


def test_everything_kept_is_the_same_checkpoint_but_for_its_name(base, tmp_path):
    folder, _, geometry, _ = base
    write_checkpoint(folder, "x", tmp_path, geometry, whole_plan(geometry))
    before, after = whole(folder), whole(tmp_path)
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    was, found = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path))
    assert (found.pop("model_type"), found.pop("rotatek_base_model_type")) == (rap_checkpoint.MODEL_TYPE, was.pop("model_type"))
    assert found == was
    assert (tmp_path / "generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()


def test_only_text_attention_changes(base, tmp_path):
    folder, config, geometry, _ = base
    write_checkpoint(folder, "x", tmp_path, geometry, drawn_plan(geometry, hidden=config.text_config.hidden_size))
    before, after = whole(folder), whole(tmp_path)
    added = after.keys() - before.keys()
    assert before.keys() <= after.keys() and {name.split(".layers.")[1] for name in added} == {
        "0.self_attn.o_proj.bias",
        "2.self_attn.o_proj.bias",
    }
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == set(attention_tensors(stored_tensors(folder, "x"), geometry)) and len(changed) == 12
    assert any("vision" in name and "q_proj" in name for name in before) and not any("vision" in name for name in changed)
    assert {after[name].dtype for name in changed | added} == {torch.bfloat16}


def test_shards_of_a_size_with_an_index(base, tmp_path, monkeypatch):
    folder, _, geometry, _ = base
    plan = drawn_plan(geometry)
    (one := tmp_path / "one").mkdir()
    (many := tmp_path / "many").mkdir()
    write_checkpoint(folder, "x", one, geometry, plan)
    monkeypatch.setattr(rap_checkpoint, "MAX_SHARD", "60KB")
    write_checkpoint(folder, "x", many, geometry, plan)
    shards = sorted(many.glob("*.safetensors"))
    assert len(shards) > 3 and all(file.stat().st_size < 80_000 for file in shards)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole(one).values())
    assert all(name in load_file(many / file) for name, file in index["weight_map"].items())
    models = [load_pruned(artifact_of(geometry, plan), place, torch.float32, CPU) for place in (one, many)]
    assert torch.equal(*(said(model, **prompts())[1] for model in models))
    # and a sharded checkpoint is read as well
    (again := tmp_path / "again").mkdir()
    config = json.loads((many / "config.json").read_text())
    (many / "config.json").write_text(json.dumps(config | {"model_type": config["rotatek_base_model_type"]}))
    with pytest.raises(RotateKError, match="attention weights were not found: q_proj.weight of layer 0 has shape"):
        write_checkpoint(many, "x", again, geometry, plan)


def test_trained_weights_stand_for_folded_ones(base, tmp_path):
    folder, config, geometry, _ = base
    plan = drawn_plan(geometry, hidden=config.text_config.hidden_size)
    trained = {(0, "q_proj.weight"): torch.ones(64, 128), (0, "o_proj.bias"): torch.full((128,), 2.0)}
    write_checkpoint(folder, "x", tmp_path, geometry, plan, trained)
    after = {name.split(".layers.")[-1]: tensor for name, tensor in whole(tmp_path).items() if "vision" not in name}
    assert torch.equal(after["0.self_attn.q_proj.weight"], torch.ones(64, 128, dtype=torch.bfloat16))
    assert torch.equal(after["0.self_attn.o_proj.bias"], torch.full((128,), 2.0, dtype=torch.bfloat16))
    assert not torch.equal(after["1.self_attn.q_proj.weight"], torch.ones_like(after["1.self_attn.q_proj.weight"]))


def test_what_cannot_be_pruned(base, tmp_path):
    folder, config, geometry, _ = base
    config.quantization_config = {"quant_method": "bitsandbytes"}
    try:
        with pytest.raises(RotateKError, match="x is quantised"):
            refuse_quantised(config, "x")
    finally:
        del config.quantization_config
    tensors = {"a.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RotateKError, match="is F8_E4M3, a quantised checkpoint cannot be pruned"):
        stored_tensors(tmp_path, "x")
    save_file({"lm_head.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(RotateKError, match="not found: no tensor is named like self_attn.q_proj"):
        attention_tensors(stored_tensors(tmp_path, "x"), geometry)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RotateKError, match="x has no model.safetensors"):
        stored_tensors(tmp_path, "x")
