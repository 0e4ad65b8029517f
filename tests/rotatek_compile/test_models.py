"""Finding and loading checkpoints: names, geometry, dtype and device, and a fingerprint that notices other weights."""

import json
import shutil

import pytest
import torch

from rotatek_compile import RotateKError, UsageError, models


def test_resolve(checkpoint, monkeypatch):
    for name in ("tiny-llava-next", "tiny-qwen3-vl"):
        bundled = models.resolve(name)
        assert (bundled.name, bundled.is_local, bundled.location) == (name, True, str(models.bundled_path(name)))
    alias = models.resolve("llava-next", "abc")
    assert (alias.location, alias.revision, alias.is_local) == ("llava-hf/llava-v1.6-mistral-7b-hf", "abc", False)
    for name in models.BUNDLED:
        with pytest.raises(UsageError, match=f"--revision abc is for Hub models, but {name} is bundled; leave it out"):
            models.resolve(name, "abc")
    hub = models.resolve("org/name", "main", trust_remote_code=True)
    assert hub.arguments == {"revision": "main", "trust_remote_code": True}
    local = models.resolve(str(checkpoint), trust_remote_code=True)
    assert local.is_local and local.arguments == {"trust_remote_code": False}  # a local directory never runs code of its own
    monkeypatch.chdir(checkpoint.parent)
    assert models.resolve(checkpoint.name).name == str(checkpoint)


@pytest.mark.parametrize(("name", "model_type"), [("tiny-llava-next", "llava_next"), ("tiny-qwen3-vl", "qwen3_vl")])
def test_bundled_checkpoint_is_where_resolve_says(name, model_type):
    geometry = models.checked_geometry(models.load_config(models.resolve(name)))
    assert geometry.model_type == model_type
    assert [(layer.query_heads, layer.kv_heads, layer.head_dim) for layer in geometry.layers] == [(8, 4, 128)] * len(geometry.layers)


@pytest.mark.parametrize("name", ["lava", "", "  "])
def test_unknown_alias_lists_the_known_ones(name):
    with pytest.raises(UsageError, match="use one of tiny-llava-next, tiny-qwen3-vl, llava-next, .*, a local directory, or a Hub id"):
        models.resolve(name)


@pytest.mark.parametrize("name", ["./no", "/no/such", "~/no-such-folder-here", "a/b/c"])
def test_path_that_does_not_exist(name):
    with pytest.raises(RotateKError, match=f"model path {name} does not exist"):
        models.resolve(name)


def test_geometry(checkpoint):
    geometry = models.checked_geometry(models.load_config(models.resolve(str(checkpoint))))
    assert [(layer.query_heads, layer.kv_heads, layer.head_dim, layer.layer_type) for layer in geometry.layers] == [
        (4, 2, 32, "full_attention")
    ] * 3
    assert geometry.visual_token_ids == (5,)
    assert geometry.dense_bytes_per_token() == 768


def test_head_dim_that_is_no_multiple_of_8(broken_checkpoint):
    file = broken_checkpoint / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["head_dim"] = 20
    file.write_text(json.dumps(config))
    with pytest.raises(RotateKError, match="head_dim 20 of layer 0 is not a multiple of 8"):
        models.checked_geometry(models.load_config(models.resolve(str(broken_checkpoint))))


def test_dtype(checkpoint):
    config = models.load_config(models.resolve(str(checkpoint)))
    assert models.choose_dtype(None, config, torch.device("cpu")) == torch.float32
    assert models.choose_dtype(None, config, torch.device("cuda")) == torch.bfloat16  # the checkpoint's
    assert models.choose_dtype("float16", config, torch.device("cpu")) == torch.float16
    with pytest.raises(UsageError, match="unknown dtype 'fp4'"):
        models.choose_dtype("fp4", config, torch.device("cpu"))


@pytest.mark.parametrize(("name", "kind"), [("gpu", UsageError), ("meta", UsageError), ("mps", UsageError), ("cuda:-1", UsageError)])
def test_device_names(name, kind):
    with pytest.raises(kind, match="use cpu, cuda, cuda:N or auto"):
        models.choose_device(name)
    assert models.choose_device("cpu") == torch.device("cpu")


def test_weights_are_cast_and_in_eval_mode(checkpoint):
    model = models.load_model(models.resolve(str(checkpoint)), torch.float32, torch.device("cpu"))
    assert model.dtype == torch.float32 and not model.training


def test_fingerprint(checkpoint, broken_checkpoint, tmp_path):
    same = models.fingerprint(checkpoint)
    assert models.fingerprint(broken_checkpoint) == same
    assert models.fingerprint(shutil.copytree(checkpoint, tmp_path / "elsewhere")) == same
    (broken_checkpoint / "notes.txt").write_text("not part of the model")
    assert models.fingerprint(broken_checkpoint) == same
    weights = broken_checkpoint / "model.safetensors"
    data = weights.read_bytes()
    middle = len(data) // 2  # inside one of the pieces that are hashed
    weights.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    changed_weights = models.fingerprint(broken_checkpoint)
    weights.write_bytes(data)
    config = json.loads((broken_checkpoint / "config.json").read_text())
    (broken_checkpoint / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -2}))
    assert len({same, changed_weights, models.fingerprint(broken_checkpoint)}) == 3


def test_identity(checkpoint):
    source = models.resolve(str(checkpoint))
    assert models.identity(source, None) == {"id": str(checkpoint), "revision": None, "fingerprint": models.fingerprint(checkpoint)}

    class Config:
        _commit_hash = "c0ffee"

    assert models.identity(models.resolve("org/name", "main"), Config()) == {"id": "org/name", "revision": "c0ffee", "fingerprint": None}
    # weights and processor are taken from the commit that the config came from
    assert models.pinned(models.resolve("org/name", "main"), Config()).revision == "c0ffee"
    assert models.pinned(models.resolve("org/name", "main"), object()).revision == "main"
    assert models.pinned(source, Config()) == source
