"""The output directory: never half-written, never something else's, the same bytes every time; and calibration that is not repeated."""

import errno
import json
import shutil

import pytest
import safetensors.torch

from rotatek_compile import calibrate
from rotatek_compile.artifact import TENSOR_FILE


@pytest.fixture
def compile_to(cli, checkpoint, data_file, small_run):
    """Compiles the tiny checkpoint to a place."""

    def call(target, *more, model=checkpoint, data=data_file):
        return cli("compile", "--model", model, "--calib", data, "-o", target, *small_run, *more)

    return call


@pytest.fixture
def batches(monkeypatch):
    """Counts calibration batches; `stop_at` raises an interruption in that one."""
    seen = {"count": 0, "stop_at": None}
    run_batch = calibrate.run_batch

    def counted(*arguments):
        seen["count"] += 1
        run_batch(*arguments)
        if seen["count"] == seen["stop_at"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "run_batch", counted)
    return seen


@pytest.fixture
def fresh_moments(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh-moments")
    monkeypatch.setenv("ROTATEK_CACHE", str(folder))
    return folder


def test_full_directory_needs_overwrite(compile_to, broken_artifact, tmp_path, untouched):
    before = (broken_artifact / TENSOR_FILE).read_bytes()
    (broken_artifact / "stale.txt").touch()
    assert "is not empty; pass --overwrite to replace it" in compile_to(broken_artifact).sentence()
    assert "is not empty" in compile_to(broken_artifact, "--dry-run").sentence()
    assert (broken_artifact / TENSOR_FILE).read_bytes() == before and (broken_artifact / "stale.txt").exists()
    assert compile_to(broken_artifact, "--overwrite", "--keep-ratio", "0.5").code == 0
    assert json.loads((broken_artifact / "rotatek_config.json").read_text())["rotatek"]["keep_ratio"] == 0.5
    assert not (broken_artifact / "stale.txt").exists()
    untouched(tmp_path, "artifact")


def test_overwrite_refuses_what_is_no_artifact(compile_to, tmp_path, untouched):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("words")
    said = compile_to(tmp_path / "thesis", "--overwrite").sentence()
    assert "holds no rotatek_config.json, so --overwrite will not delete it" in said
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "words"
    untouched(tmp_path, "thesis")


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_output_that_is_or_lies_below_a_file(compile_to, tmp_path, untouched, more):
    (tmp_path / "file").write_text("words")
    assert "is a file; choose another --output" in compile_to(tmp_path / "file", *more).sentence()
    assert "file/below" in compile_to(tmp_path / "file" / "below", *more).sentence()
    assert (tmp_path / "file").read_text() == "words"
    untouched(tmp_path, "file")


def test_empty_directory_link_and_working_directory(compile_to, tmp_path, untouched, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert compile_to(tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / TENSOR_FILE).is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert compile_to(".").code == 0
    assert (tmp_path / "here" / TENSOR_FILE).is_file()
    untouched(tmp_path, "empty", "link", "here")
    monkeypatch.chdir(tmp_path)


def test_paths_with_blanks_brackets_and_umlauts(compile_to, cli, checkpoint, data_file, tmp_path):
    home = tmp_path / "größe [1] *"
    model, pages = shutil.copytree(checkpoint, home / "mödel 1"), shutil.copytree(data_file.parent, home / "päges [x]")
    assert compile_to(home / "ärt 1", model=model, data=pages / data_file.name).code == 0
    ended = cli("run", home / "ärt 1", "--image", pages / "page1.png", "--prompt", "Größe?", "--max-new-tokens", 2, "--json")
    assert ended.code == 0 and json.loads(ended.out)["new_tokens"] <= 2


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_full_disk(compile_to, broken_artifact, tmp_path, untouched, monkeypatch, more):
    target = broken_artifact if more else tmp_path / "new"
    before = (broken_artifact / TENSOR_FILE).read_bytes()

    def save_file(tensors, file, metadata=None):
        if file.name != TENSOR_FILE:
            return save(tensors, file, metadata=metadata)
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    save = safetensors.torch.save_file
    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    said = compile_to(target, *more).sentence()
    assert said == f"error: could not write {target}: No space left on device; free space or choose another --output"
    assert (broken_artifact / TENSOR_FILE).read_bytes() == before
    untouched(tmp_path, "artifact")


def test_moments_cannot_be_saved(compile_to, tmp_path, untouched, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ROTATEK_CACHE", str(tmp_path / "file"))
    said = compile_to(tmp_path / "out").sentence()
    assert "could not save moments" in said and "set ROTATEK_CACHE" in said
    untouched(tmp_path, "file")


def test_same_options_same_bytes_and_no_path_in_the_card(compile_to, tmp_path, checkpoint, data_file, fresh_moments):
    for name in ("a", "b"):
        for file in fresh_moments.iterdir():
            file.unlink()
        assert compile_to(tmp_path / name).code == 0
    assert (tmp_path / "a" / TENSOR_FILE).read_bytes() == (tmp_path / "b" / TENSOR_FILE).read_bytes()
    assert (tmp_path / "a" / "rotatek_config.json").read_bytes() == (tmp_path / "b" / "rotatek_config.json").read_bytes()
    card = (tmp_path / "a" / "README.md").read_text()
    assert "base_model" not in card and "# RotateK artifact for a local checkpoint" in card and "samples of local data" in card
    assert not [word for word in (str(tmp_path), str(checkpoint), str(data_file), "/tmp", str(data_file.parent)) if word in card]


@pytest.mark.parametrize(
    ("samples", "words"), [(7, "the calibration documents themselves (too few to keep any aside)"), (8, "documents kept aside")]
)
def test_what_a_plan_was_checked_on_is_told(compile_to, write_data, tmp_path, samples, words):
    rows = write_data(*({"question": f"{n}?", "answer": "a", "image": "page0.png"} for n in range(samples)))
    ended = compile_to(tmp_path / "out", "--num-samples", samples, data=rows)
    assert f"plan KL on {words}: " in ended.out
    assert f"KL of the plan on {words}: " in (tmp_path / "out" / "README.md").read_text()
    assert "one calibration document" not in ended.err


@pytest.mark.parametrize("more", [(), ("--method", "head-drop", "--kv-budget", 0.2)])
def test_a_single_document_is_warned_of(compile_to, write_data, tmp_path, more):
    rows = write_data({"question": "1?", "answer": "a", "image": "page0.png"}, {"question": "2?", "image": "page1.png"})
    ended = compile_to(tmp_path / "out", *more, data=rows)
    words = f"warning: {rows} has one calibration document: what is kept fits that one; pass dozens like yours"
    assert ended.code == 0 and ended.err.splitlines().count(words) == 1


def test_dry_run_counts_local_rows(compile_to, data_file, tmp_path, untouched):
    """Without opening pictures: none lies beside this copy."""
    moved = tmp_path / "rows.jsonl"
    shutil.copy(data_file, moved)
    few, all_there = (
        compile_to(tmp_path / "out", "--dry-run", "--num-samples", 3, data=moved),
        compile_to(tmp_path / "out", "--dry-run", "--num-samples", 64, data=moved),
    )
    assert f"data {moved}, 3 samples\n" in few.out
    assert f"data {moved}, 4 samples (all there are; --num-samples 64)\n" in all_there.out
    told = json.loads(compile_to(tmp_path / "out", "--dry-run", "--num-samples", 64, "--json", data=moved).out)
    assert told["data"]["num_samples"] == 4
    untouched(tmp_path, "rows.jsonl")


def test_resuming_nothing_is_told(compile_to, tmp_path, fresh_moments):
    note = "warning: --resume: nothing saved, starting anew"
    ended = compile_to(tmp_path / "a", "--resume")
    assert ended.code == 0 and ended.err.splitlines().count(note) == 1
    ended = compile_to(tmp_path / "b", "--resume")  # the moments are whole by now
    assert ended.code == 0 and "nothing saved" not in ended.err


def test_another_budget_needs_no_second_calibration(compile_to, tmp_path, fresh_moments, batches):
    assert compile_to(tmp_path / "a").code == 0
    assert batches["count"] == 2
    assert compile_to(tmp_path / "b", "--keep-ratio", "0.5", "--basis", "pca", "--window", "64").code == 0
    assert batches["count"] == 2
    assert compile_to(tmp_path / "c", "--num-samples", "3").code == 0
    assert batches["count"] == 4


def test_changed_picture_is_calibrated_again(compile_to, write_data, tmp_path, fresh_moments, batches):
    from PIL import Image

    rows = write_data(*({"question": f"{n}?", "answer": "a", "image": "page0.png"} for n in range(2)))
    assert compile_to(tmp_path / "a", data=rows).code == 0
    Image.new("RGB", (96, 80), "red").save(tmp_path / "page0.png")
    assert compile_to(tmp_path / "b", data=rows).code == 0
    assert batches["count"] == 2
    assert (tmp_path / "a" / TENSOR_FILE).read_bytes() != (tmp_path / "b" / TENSOR_FILE).read_bytes()


def test_changed_processor_is_calibrated_again(compile_to, cli, checkpoint, data_file, tmp_path, fresh_moments, batches):
    """How pictures are read stands beside the weights, not in them: neither moments nor an evaluation go on with other pictures."""
    model = shutil.copytree(checkpoint, tmp_path / "model")
    assert compile_to(tmp_path / "a", "--model", model).code == 0
    settings = json.loads((model / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.5, 0.9]
    (model / "processor_config.json").write_text(json.dumps(settings))
    assert compile_to(tmp_path / "b", "--model", model).code == 0
    assert batches["count"] == 4
    assert (tmp_path / "a" / TENSOR_FILE).read_bytes() != (tmp_path / "b" / TENSOR_FILE).read_bytes()
    measure = ("eval", tmp_path / "a", "--data", data_file, "--num-samples", 1, "--max-new-tokens", 1, "--device", "cpu")
    assert cli(*measure, "--output", tmp_path / "out").code == 0
    shutil.copy(tmp_path / "b" / "processor_config.json", tmp_path / "a" / "processor_config.json")
    assert "was made with processor" in cli(*measure, "--output", tmp_path / "out", "--resume").sentence()


def test_interrupted_and_resumed_equals_uninterrupted(compile_to, tmp_path, untouched, fresh_moments, batches):
    from safetensors.torch import load_file

    assert compile_to(tmp_path / "whole").code == 0
    whole = {file.name: load_file(file) for file in fresh_moments.iterdir()}
    for file in fresh_moments.iterdir():
        file.unlink()
    batches |= {"count": 0, "stop_at": 2}
    said = compile_to(tmp_path / "out").sentence()
    assert said == "error: interrupted; 2 of 4 documents are saved, run the same command with --resume to go on"
    untouched(tmp_path, "whole")
    batches |= {"count": 0, "stop_at": None}
    ended = compile_to(tmp_path / "out", "--resume")
    assert ended.code == 0 and "nothing saved" not in ended.err
    assert batches["count"] == 1
    resumed = {file.name: load_file(file) for file in fresh_moments.iterdir()}
    assert resumed.keys() == whole.keys() and len(whole) == 1
    for name, sums in whole.items():
        assert sums.keys() == resumed[name].keys()
        assert all((sums[key] == resumed[name][key]).all() for key in sums)
    assert (tmp_path / "out" / TENSOR_FILE).read_bytes() == (tmp_path / "whole" / TENSOR_FILE).read_bytes()


@pytest.mark.parametrize("more", [(), ("--resume",)])
@pytest.mark.parametrize("damage", [lambda data: b"noise" * 100, lambda data: data[: len(data) // 2]])
def test_corrupt_moments_are_computed_again(compile_to, tmp_path, fresh_moments, batches, damage, more):
    assert compile_to(tmp_path / "a", "--allocation", "uniform").code == 0
    [file] = fresh_moments.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert compile_to(tmp_path / "b", "--allocation", "uniform", *more).code == 0
    assert batches["count"] == 4
    assert (tmp_path / "a" / TENSOR_FILE).read_bytes() == (tmp_path / "b" / TENSOR_FILE).read_bytes()
