"""`rotatek-compile --method`: what a rival's artifact holds, says and does; and what is refused."""

import json

import pytest
import torch

import rotatek_compile
from rotatek_compile import ArtifactError, CompileOptions, UsageError, compile_artifact
from rotatek_compile.artifact import TENSOR_FILE, read_artifact

DENSE = 3 * 2 * 4 * 32


@pytest.fixture(scope="module")
def rival(checkpoint, data_file, tmp_path_factory):
    made = {}

    def make(method, **setting):
        key = (method, *setting.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("rival") / "artifact"
            options = {"num_samples": 4, "batch_size": 2, "device": "cpu", "quiet": True} | setting
            made[key] = compile_artifact(
                CompileOptions(model=str(checkpoint), calib=str(data_file), output=folder, method=method, **options)
            )
        return made[key]

    return make


def test_head_drop_holds_its_knockouts_and_bytes(rival, compiled):
    said = rival("head-drop-native", kv_budget=0.5)
    artifact = read_artifact(said["artifact"])
    assert (artifact.method.rival, artifact.method.kv_budget) == ("head-drop-native", 0.5)
    assert set(artifact.tensors) == {f"layers.{i}.knockout" for i in range(3)}
    ours = read_artifact(compiled).knockout()
    for layer, row in artifact.knockout().items():
        assert torch.allclose(row, ours[layer], rtol=1e-3)  # four documents of two batches, as for our own method
    assert said["method"] == "head-drop-native"
    # two heads of six at 2 bytes, fp32 means of the other four, a byte of mask per layer, over 512 tokens
    assert said["kv_bytes_per_token"] == {"dense": DENSE, "compressed": pytest.approx(2 * 4 * 32 + (4 * 32 * 8 + 3) / 512)}
    assert said["kv_bytes_per_token"]["compressed"] <= 0.5 * DENSE
    assert "rival method head-drop-native, KV budget 0.5" in (artifact.path / "README.md").read_text()


def test_a_rival_artifact_answers_with_its_own_method(rival, checkpoint):
    """All heads at native precision is the stock cache; half of them is not."""
    texts = {}
    for ratio in (1.0, 0.5):
        folder = rival("head-drop-native", keep_ratio=ratio)["artifact"]
        model, processor = rotatek_compile.load(folder, device="cpu")
        from PIL import Image

        page = Image.linear_gradient("L").resize((96, 80)).convert("RGB")
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}], add_generation_prompt=True
        )
        inputs = processor(text=[text], images=[page], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
        texts[ratio] = torch.stack(out.logits)
        if ratio == 1.0:
            source = rotatek_compile.models.load_model(rotatek_compile.models.resolve(str(checkpoint)), torch.float32, torch.device("cpu"))
            stock = source.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
            assert (torch.stack(stock.logits) - texts[1.0]).abs().max() < 1e-4
    # the first token comes from the exact prefill
    assert (texts[1.0] - texts[0.5])[1:].abs().max() > 1e-4


def test_rivals_without_state_are_named_too(rival):
    artifact = read_artifact(rival("int4")["artifact"])
    assert (artifact.method.rival, artifact.method.kv_budget, artifact.method.words) == ("int4", None, "rival method int4")
    assert artifact.bytes_per_token() == 3 * 2 * 2 * (32 // 2 + 4)  # codes, scale and smallest value, of Keys and Values


def test_words_and_dry_run(cli, checkpoint, data_file, small_run, tmp_path):
    ask = ("compile", "--model", checkpoint, "--calib", data_file, "-o", tmp_path / "out", *small_run)
    dry = cli(*ask, "--method", "head-drop", "--kv-budget", "0.2", "--dry-run").out
    assert "rival method head-drop, KV budget 0.2, span visual" in dry
    assert json.loads(cli(*ask, "--method", "head-drop", "--kv-budget", "0.2", "--dry-run", "--json").out)["method"] == "head-drop"
    done = cli(*ask, "--method", "int4")
    assert (done.code, len(done.out.splitlines())) == (0, 3)
    assert "\nrival method int4\nseconds: sensitivities " in done.out
    assert "rival method int4" in cli("inspect", tmp_path / "out").out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "int4", "key_bits": "4"}, "--key-bits comes with --method rotatek; .* use --kv-budget"),
        ({"method": "int4", "max_kl": 0.1}, "--max-kl comes with --method rotatek"),
        ({"method": "zip"}, "unknown --method 'zip'; choose one of rotatek, "),
        ({"method": "head-drop"}, "head-drop takes a KV budget or a keep ratio, one of the two"),
        ({"method": "head-drop", "kv_budget": 0.5, "keep_ratio": 0.5}, "one of the two"),
        ({"method": "head-drop", "kv_budget": 1e-6}, "cannot meet a KV budget of 1e-06"),
        ({"method": "head-drop", "kv_budget": 1.5}, "--kv-budget 1.5 is out of range"),
        ({"method": "head-drop", "kv_budget": "0.5"}, "--kv-budget is '0.5', expected a number"),
        ({"method": "head-drop", "kv_budget": float("nan")}, "--kv-budget nan is out of range"),
        ({"method": "int4", "keep_ratio": 0.5}, "int4 has no keep ratio"),
        ({"method": "int4", "span": "all"}, "--span all comes with --method rotatek"),
        ({"method": "int4", "basis": "pca"}, "--basis pca comes with --method rotatek"),
    ],
)
def test_refused_before_any_work(checkpoint, data_file, tmp_path, untouched, monkeypatch, options, words):
    monkeypatch.setattr("rotatek_compile.compile_inputs.load_model", None)
    with pytest.raises(UsageError, match=words):
        compile_artifact(CompileOptions(model=str(checkpoint), calib=str(data_file), output=tmp_path / "out", device="cpu", **options))
    untouched(tmp_path)


def test_a_rival_artifact_without_its_knockouts_is_refused(rival, tmp_path):
    import hashlib
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(rival("head-drop-native", kv_budget=0.5)["artifact"], tmp_path / "copy")
    tensors = load_file(folder / TENSOR_FILE)
    del tensors["layers.1.knockout"]
    save_file(tensors, folder / TENSOR_FILE)
    config = json.loads((folder / "rotatek_config.json").read_text())
    config["files"][TENSOR_FILE]["sha256"] = hashlib.sha256((folder / TENSOR_FILE).read_bytes()).hexdigest()
    (folder / "rotatek_config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"tensor layers\.1\.knockout is missing"):
        read_artifact(folder)
