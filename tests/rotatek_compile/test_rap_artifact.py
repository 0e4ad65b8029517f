"""Section `rap` and rap.safetensors: written, read again, and every kind of damage refused in one sentence."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rotatek_compile.artifact import read_artifact, write_artifact
from rotatek_compile.errors import ArtifactError
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.rap_artifact import RAP_FILE, pairs_of

sys.path.append(str(Path(__file__).parents[1] / "runtime"))
from rap_cases import artifact_of, drawn_plan  # noqa: E402

SHAPE = LayerGeometry(layer_type="full_attention", query_heads=4, kv_heads=2, head_dim=32)
GEOMETRY = Geometry(model_type="llama", layers=(SHAPE, SHAPE), visual_token_ids=())
PLAN = drawn_plan(GEOMETRY, [(8, 16), (12, 8)], hidden=8)


@pytest.fixture
def folder(tmp_path):
    artifact = artifact_of(GEOMETRY, PLAN)
    artifact.base_model = {"id": "/somewhere/model", "revision": None, "fingerprint": "0" * 64}
    write_artifact(artifact, tmp_path, "# card\n")
    return tmp_path


def edit(folder, change):
    file = folder / "rotatek_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def put(folder, tensors):
    """Other tensors with their checksum, as a faulty writer would leave them."""
    save_file(tensors, folder / RAP_FILE)
    digest = hashlib.sha256((folder / RAP_FILE).read_bytes()).hexdigest()
    edit(folder, lambda config: config["files"][RAP_FILE].update(sha256=digest))


def refused(folder, words):
    with pytest.raises(ArtifactError, match=words) as error:
        read_artifact(folder)
    assert len(str(error.value).splitlines()) == 1


def test_written_and_read_again(folder):
    read = read_artifact(folder)
    assert read.rap is not None and read.rap.layers == ((8, 16, True), (12, 8, False))
    assert read.rap.words == "RAP, keep ratio 0.7, score logit, budget sensitivity, repaired"
    assert read.method.words == "RAP, keep ratio 0.7" and read.plan() == {} and read.knockout() == {}
    assert read.bytes_per_token() == 2 * 2 * (16 + 16 + 24 + 8)
    assert all(torch.equal(pairs, PLAN.layers[i].pairs) for i, pairs in pairs_of(read).items())
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", RAP_FILE, "report.json", "rotatek_config.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rap: rap.update(keep_ratio=1.5), "keep_ratio is 1.5"),
        (lambda rap: rap.update(keep_ratio=True), "keep_ratio is True"),
        (lambda rap: rap.pop("score"), "score is None"),
        (lambda rap: rap.update(budget="guess"), "budget is 'guess'"),
        (lambda rap: rap.update(repair=1), "repair is 1"),
        (lambda rap: rap.update(recover=-1), "recover is -1"),
        (lambda rap: rap.update(layers=rap["layers"][:1]), "layers is .*, expected a list of 2"),
        (lambda rap: rap["layers"].__setitem__(1, 7), "layer 1 is 7, expected an object"),
        (lambda rap: rap["layers"][0].update(pairs=0), "layer 0 has pairs 0, expected 1 to 16"),
        (lambda rap: rap["layers"][0].update(pairs=17), "layer 0 has pairs 17, expected 1 to 16"),
        (lambda rap: rap["layers"][0].update(value_width=33), "layer 0 has value_width 33, expected 1 to 32"),
        (lambda rap: rap["layers"][0].update(output_bias=None), "output_bias None, expected true or false"),
        (lambda rap: rap["layers"][0].update(pairs=9), r"layers\.0\.pairs has shape \[2, 8\], section rap says \[2, 9\]"),
    ],
)
def test_wrong_sections(folder, change, words):
    edit(folder, lambda config: change(config["rap"]))
    refused(folder, f"(section rap|rap.safetensors).*{words}")


def test_both_sections_and_none(folder):
    """Both are of `rap+rotatek` (test_compile_stacked.py), which has tensors for both."""
    edit(folder, lambda config: config.update(rotatek={"text_only": True, "span": "all"}))
    refused(folder, "is incomplete: it has no rotatek.safetensors")
    edit(folder, lambda config: (config.pop("rap"), config.pop("rotatek")))
    refused(folder, "section rotatek is missing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("layers.1.pairs"), r"tensor layers\.1\.pairs is missing"),
        (lambda t: t.update({"layers.0.pairs": t["layers.0.pairs"][:, :4].contiguous()}), r"has shape \[2, 4\], section rap says \[2, 8\]"),
        (lambda t: t.update({"layers.0.pairs": t["layers.0.pairs"].float()}), r"is 'F32', expected I32"),
        (lambda t: t["layers.0.pairs"].add_(16), "layer 0: pair .* is out of range, expected 0 to 15"),
        (lambda t: t["layers.0.pairs"].neg_(), "layer 0: pair -.* is out of range"),
        (lambda t: t["layers.1.pairs"].fill_(3), "layer 1: the pairs of a head are doubled"),
    ],
)
def test_wrong_pairs(folder, change, words):
    tensors = load_file(folder / RAP_FILE)
    change(tensors)
    put(folder, tensors)
    refused(folder, words)


def test_damaged_files(folder):
    file = folder / RAP_FILE
    data = file.read_bytes()
    file.write_bytes(data[:-4])
    refused(folder, "rap.safetensors is damaged or truncated")
    file.write_bytes(data[:5])
    refused(folder, "rap.safetensors is damaged or truncated")
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(folder, "rap.safetensors was changed after it was written")
    file.unlink()
    refused(folder, "is incomplete: it has no rap.safetensors")
