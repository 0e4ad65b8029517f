"""Checkpoints that cannot be compiled, or do not fit the artifact."""

import json
import shutil

import pytest


def attempt(cli, model, data_file, target, small_run, *more):
    return cli("compile", "--model", model, "--calib", data_file, "-o", target, *small_run, *more)


def config_only(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert"}, "model type 'bert' is not supported"),
        ({"model_type": "t5"}, "model type 't5' is an encoder-decoder"),
        ({"model_type": "clip"}, "model type 'clip' is not supported: transformers has no image-text-to-text and no causal language model"),
        ({"model_type": "gemma2"}, "model type 'gemma2' caps its attention logits"),
        ({"model_type": "never-heard-of"}, "could not read the config"),
        ({}, "could not read the config"),
        ([1, 2], "could not read the config"),
        ("text", "could not read the config"),
        ({"model_type": "llava_next", "text_config": {"model_type": "llama", "hidden_size": "wide"}}, "could not read the config"),
    ],
)
def test_unsupported_config(cli, data_file, tmp_path, untouched, small_run, config, words):
    model = config_only(tmp_path / "model", config)
    assert words in attempt(cli, model, data_file, tmp_path / "out", small_run).sentence()
    untouched(tmp_path, "model")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", "model path ./nowhere does not exist"),
        ("/no/such/model", "model path /no/such/model does not exist"),
        ("someone/nothing-of-this-name", "could not read the config of someone/nothing-of-this-name"),
        ("{data}", "is a file; pass the checkpoint's directory"),
        ("{data.parent}", "holds no config.json"),
        ("{compiled}", "is an artifact, not a checkpoint"),
        ("/" + "x" * 5000, "File name too long"),
    ],
)
def test_place(cli, data_file, compiled, tmp_path, untouched, small_run, name, words):
    name = name.format(data=data_file, compiled=compiled)
    assert words in attempt(cli, name, data_file, tmp_path / "out", small_run).sentence()
    untouched(tmp_path)


def test_only_sliding_layers(cli, broken_checkpoint, data_file, tmp_path, untouched, small_run):
    file = broken_checkpoint / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] |= {"model_type": "mistral", "sliding_window": 64}
    file.write_text(json.dumps(config))
    said = attempt(cli, broken_checkpoint, data_file, tmp_path / "out", small_run).sentence()
    assert "nothing to compress" in said and "sliding_attention" in said
    untouched(tmp_path, "broken")


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1000])


def drop_tensor(file):
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    del tensors[next(name for name in tensors if "layers.1.self_attn.k_proj" in name)]
    save_file(tensors, file, metadata={"format": "pt"})


def drop_template(file):
    file.unlink()


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model.safetensors", truncate, "could not load the weights"),
        ("model.safetensors", lambda file: file.write_bytes(b""), "could not load the weights"),
        ("model.safetensors", lambda file: file.unlink(), "could not load the weights"),
        ("model.safetensors", drop_tensor, "lack 1 tensors, the first is"),
        ("processor_config.json", lambda file: file.unlink(), "processor"),
        ("processor_config.json", lambda file: file.write_text("{"), "could not load the processor"),
        ("tokenizer.json", lambda file: file.write_text("{}"), "could not load the processor"),
        ("tokenizer.json", lambda file: file.write_text("no json"), "could not load the processor"),
        ("chat_template.jinja", drop_template, "has no chat template; add chat_template.jinja"),
        ("config.json", lambda file: file.write_text('{"model_type": '), "could not read the config"),
    ],
)
def test_damaged_file(cli, broken_checkpoint, data_file, tmp_path, untouched, small_run, name, damage, words):
    assert (broken_checkpoint / name).is_file()
    damage(broken_checkpoint / name)
    assert words in attempt(cli, broken_checkpoint, data_file, tmp_path / "out", small_run).sentence()
    untouched(tmp_path, "broken")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 2}, "3 text layers against 2"),
        ({"heads": 2}, "layer 0 has query heads 4 against 2"),
        ({"kv_heads": 4}, "layer 0 has KV heads 2 against 4"),
        ({"head_dim": 64}, "layer 0 has head_dim 32 against 64"),
    ],
)
def test_other_geometry(cli, compiled, data_file, make_checkpoint, changes, words):
    other = make_checkpoint(**changes)
    for command, more in (("run", ["--prompt", "What?"]), ("eval", ["--data", data_file])):
        said = cli(command, compiled, *more, "--model", other).sentence()
        assert words in said and f"{other} does not fit artifact {compiled}" in said


def test_base_model_that_moved(cli, checkpoint, data_file, tmp_path, small_run):
    here = shutil.copytree(checkpoint, tmp_path / "here")
    assert attempt(cli, here, data_file, tmp_path / "out", small_run, "--allocation", "uniform").code == 0
    here.rename(tmp_path / "there")
    ask = ("run", tmp_path / "out", "--prompt", "What?", "--max-new-tokens", 2, "--json")
    assert f"was at {here}, which is gone; pass its new place with --model" in cli(*ask).sentence()
    assert cli(*ask, "--model", tmp_path / "there").code == 0


def test_other_weights_of_the_same_geometry_are_warned_of(cli, compiled, make_checkpoint):
    other = make_checkpoint(seed=1)
    ended = cli("run", compiled, "--prompt", "What?", "--max-new-tokens", 2, "--json", "--model", other)
    assert ended.code == 0 and "warning: " in ended.err and "same geometry, other weights" in ended.err
