"""Training LeanK's scales by the script, and evaluating what it wrote: one run on a tiny model."""

import json
import shutil
import sys

import learn_leank
import pytest

from rotatek_compile.artifact import read_artifact, write_artifact
from rotatek_compile.learned import load_learned

QUICK = ("--max-new-tokens", 1, "--device", "cpu", "--num-samples", 2, "--batch-size", 2, "--ask", "after")


@pytest.fixture
def train(checkpoint, data_file, tmp_path, monkeypatch, capsys):
    """Runs the script; returns the file, what it printed, and how it ended."""

    def run(*more, model=checkpoint, name="learned.safetensors"):
        file = tmp_path / name
        words = [
            "learn_leank.py",
            "--model",
            model,
            "--calib",
            data_file,
            "--num-samples",
            4,
            "--output",
            file,
            "--device",
            "cpu",
            "--quiet",
        ]
        words += ["--steps", 6, "--steps-binary", 3, "--batch-size", 2, "--ratios", 0.5, 0.25, *more]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        code = None
        try:
            learn_leank.main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return file, said.out, code if not code else (code, said.err.splitlines()[-1])

    return run


def test_trained_and_evaluated(train, cli, compiled, data_file, tmp_path):
    file, out, code = train()
    assert code == 0 and [line.split(":")[0] for line in out.splitlines()] == ["scales", "mask 0.5", "mask 0.25"]
    assert [len(line.split(":")[1].split()) for line in out.splitlines()] == [6, 3, 3]
    read = load_learned(file)
    assert read.calibration["num_samples"] == 4 and read.calibration["seed"] == 0 and read.training["steps"] == 6
    assert list(read.state().second) == [0.5, 0.25]
    assert 0 < float(read.state().first[0].mean()) < 1
    ended = cli(
        "eval", compiled, "--data", data_file, *QUICK, "--method", "leank-learned", "--keep-ratio", 0.5, "--learned", file, "--json"
    )
    row = json.loads(ended.out)["rows"][-1]
    assert row["method"] == "leank-learned" and row["setting"].endswith("of 192 channels") and row["keep_ratio"] == 0.5
    also = shutil.copytree(compiled, tmp_path / "also")
    other = read_artifact(also)
    other.tensors["layers.0.knockout"] = other.tensors["layers.0.knockout"] + 0.5  # as another seed would measure it
    write_artifact(other, also, "card")
    suite = ("eval", compiled, "--data", data_file, *QUICK, "--suite", "proof", "--also", also, "--output", tmp_path / "out", "--json")
    found = [row for row in json.loads(cli(*suite, "--learned", file).out)["rows"] if row["method"] == "leank-learned"]
    assert {row["axis"] for row in found} >= {"kv"} and {row["calibrations"] for row in found} == {1}
    header = json.loads((tmp_path / "out" / "documents.jsonl").read_text().splitlines()[0])["evaluation"]
    assert list(header["learned"]) == ["leank-learned"] and len(header["learned"]["leank-learned"]) == 16
    other, _, _ = train("--seed", 1, name="other.safetensors")
    assert "was made with learned" in cli(*suite, "--learned", other, "--resume").sentence()


def test_what_evaluation_refuses(train, cli, compiled, data_file, make_checkpoint, tmp_path):
    asked = ("eval", compiled, "--data", data_file, *QUICK, "--method", "leank-learned", "--keep-ratio", 0.5)
    assert "leank-learned needs what it learned by training; name the file with --learned" in cli(*asked).sentence(2)
    assert "is no file; name one that a training script wrote" in cli(*asked, "--learned", tmp_path / "none").sentence(2)
    file, _, _ = train(model=make_checkpoint(seed=5))
    assert "was trained on weights of fingerprint" in cli(*asked, "--learned", file).sentence(2)


def test_what_the_script_refuses(train):
    file, _, code = train("--steps", -1)
    assert code == (2, "error: --steps -1 is out of range; it must be at least 0") and not file.exists()
    file.write_text("something")
    assert train()[2] == (2, f"error: --output {file} exists; pass --overwrite to replace it, or choose another file")
    assert train("--overwrite", "--model", "tiny-llava")[2][1].startswith("error: ") and file.read_text() == "something"
    assert train("--overwrite", "--calib", "nosuch")[2][1].startswith("error: ") and file.read_text() == "something"
    many = [number / 100 for number in range(1, 67)]
    assert train("--overwrite", "--ratios", *many)[2] == (2, "error: 66 --ratios are more than one file may hold; it holds 64")
    assert [path.name for path in file.parent.iterdir()] == [file.name]
