"""`--method rap+rotatek` through the commands: run, eval, inspect, push, resuming, and what is refused."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import stacked_cases
import torch
from artifact_edits import edit_config, edit_tensors, refused
from stacked_cases import BUDGET, compiled_to

import rotatek_compile
from rotatek_compile import RotateKError, UsageError
from rotatek_compile.artifact import read_artifact
from rotatek_compile.rap_card import stacked_card
from rotatek_compile.runtime.enable import enable

_spec = importlib.util.spec_from_file_location("rotatek_hub_fixtures", Path(__file__).parents[1] / "hub_fixtures.py")
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
server = _shared.server
wide, drawn, stacked, whole, page = (getattr(stacked_cases, name) for name in ("wide", "drawn", "stacked", "whole", "page"))
CPU = ("--device", "cpu", "--quiet")


@pytest.fixture
def copy(stacked, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(stacked[1], tmp_path / "copy")


def test_run_and_eval(stacked, data_file, page, cli, tmp_path):
    summary, folder = stacked
    ask = ("--image", page, "--prompt", "What?", "--max-new-tokens", 4, "--device", "cpu", "--json")
    said = json.loads(cli("run", folder, *ask, "--compare-dense").out)
    assert said["kv_bytes_dense"] == said["dense"]["kv_bytes"] > said["kv_bytes"]
    assert 0 < said["bytes"]["span"] <= BUDGET * said["bytes"]["span_dense"]
    less = json.loads(cli("run", folder, *ask, "--kv-budget", 0.125).out)
    assert less["dense"] is None and less["bytes"]["span"] <= 0.125 * less["bytes"]["span_dense"]
    assert less["kv_bytes_dense"] == said["kv_bytes_dense"]
    own = ("eval", folder, "--data", data_file, *CPU, "--max-new-tokens", 3, "--method", "rotatek", "--kv-budget", 0.05)
    found = json.loads(cli(*own, "--json", "-o", tmp_path / "results", "--write-card").out)
    dense, pruned, coded, fewer = found["rows"]
    assert [row["method"] for row in found["rows"]] == ["dense", "rap", "artifact", "rotatek"]
    assert dense["kl"] == 0 < pruned["kl"] and coded["kl"] > 0 and len({row["kv_bytes_dense"] for row in found["rows"]}) == 1
    share = summary["rap"]["kv_bytes_per_token"]["compressed"] / 1024
    assert pruned["kv_bytes"] == pytest.approx(share * pruned["kv_bytes_dense"]) and pruned["span_bytes"] == 0
    assert coded["span_bytes"] <= BUDGET * coded["span_bytes_dense"] and fewer["span_bytes"] <= 0.05 * fewer["span_bytes_dense"]
    assert fewer["kv_bytes"] < coded["kv_bytes"] < pruned["kv_bytes"] and fewer["kl"] > coded["kl"]
    assert all(row["against"] is None for row in found["rows"])  # nothing of it is a rival
    assert "| artifact |" in (folder / "README.md").read_text()
    assert json.loads(cli(*own, "--json", "-o", tmp_path / "results", "--resume").out)["rows"] == found["rows"]


def test_the_pruned_model_alone_is_as_it_was(stacked, data_file, tmp_path, cli):
    """Rows of the pruned model with the stock cache are those of an artifact of `--method rap` with the same weights."""
    folder = shutil.copytree(stacked[1], tmp_path / "rap")
    (folder / "rotatek.safetensors").unlink()
    edit_config(folder, lambda config: (config.pop("rotatek"), config["files"].pop("rotatek.safetensors"), config)[-1])
    ask = ("--data", data_file, "--device", "cpu", "--max-new-tokens", 3, "--quiet", "--json")
    alone, both = (json.loads(cli("eval", where, *ask).out)["rows"][1] for where in (folder, stacked[1]))
    assert alone["kl"] == pytest.approx(both["kl"], rel=1e-3) and alone["kv_bytes"] == both["kv_bytes"]


def test_inspect_and_card(stacked, cli, compiled, tmp_path):
    folder, widths = stacked[1], stacked[0]["rap"]["plan"]["widths"]
    text = cli("inspect", folder).out
    assert f"    0  {widths['0']['pairs']} of 64" in text and "coded for this smaller model:" in text and "KV budget 0.25" in text
    assert "KL when the Keys of one head alone are cut" in text
    found = json.loads(cli("inspect", folder, "--json").out)
    assert found["rap"]["method"]["layers"][0]["pairs"] == widths["0"]["pairs"] and found["method"]["kv_budget"] == BUDGET
    assert "plan: the same in all 2 heads" in (said := cli("inspect", folder, folder).out) and "| 56 pairs" in said
    assert "the other a sidecar" in cli("inspect", folder, compiled).sentence()
    assert cli("inspect", folder, "--html", tmp_path / "page.html").code == 0
    card = (folder / "README.md").read_text()
    assert "with fewer RoPE pairs" in card and "coded for these smaller heads: basis two-sided" in card
    assert "model.generate(**inputs) with the compressed cache" in card and "heads.png" not in card
    assert "](heads.png)\n\n## Limits" in stacked_card(read_artifact(folder), True)


def test_push_and_load_from_the_hub(stacked, server, cli):
    folder = stacked[1]
    said = json.loads(cli("push", folder, "lab/stacked", "--json").out)
    assert {"model.safetensors", "config.json", "rap.safetensors", "rotatek.safetensors", "rotatek_config.json"} <= said["files"].keys()
    (model, _), (own, _) = rotatek_compile.load("lab/stacked", device="cpu"), rotatek_compile.load(folder, device="cpu")
    ids = torch.arange(60, 80)[None]
    assert rotatek_compile.enabled(model) is not None and torch.equal(model(input_ids=ids).logits, own(input_ids=ids).logits)


def test_resume_and_overwrite(wide, data_file, tmp_path, monkeypatch, cli, untouched, drawn):
    """A run that ends in its second half leaves saved parts alone, and --resume takes the plan up; other weights have other moments."""
    from rotatek_compile import compile_stacked

    monkeypatch.setenv("ROTATEK_CACHE", str(tmp_path / "cache"))
    before = len(drawn)
    ask = ("compile", "--model", wide, "--calib", data_file, "-o", tmp_path / "out", "--method", "rap+rotatek", "--kv-budget", 0.25)
    ask += ("--num-samples", 2, "--device", "cpu", "--quiet")

    def killed(*args):
        raise RotateKError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(compile_stacked, "stacked", killed)
        assert cli(*ask).sentence() == "error: killed"
    untouched(tmp_path, "cache")
    saved = len(list((tmp_path / "cache").iterdir()))
    assert saved == 2  # the plan and the moments
    first = cli(*ask, "--resume")
    assert first.code == 0 and len(drawn) - before == 1 and "starting anew" not in first.err
    assert "is not empty; pass --overwrite" in cli(*ask).sentence()
    assert cli(*ask, "--overwrite", "--no-repair").code == 0 and len(drawn) - before == 2
    assert len(list((tmp_path / "cache").iterdir())) == saved + 2
    untouched(tmp_path, "out", "cache")


def test_dry_run(wide, data_file, tmp_path, cli):
    ask = ("compile", "--model", wide, "--calib", data_file, "-o", tmp_path / "out", "--method", "rap+rotatek", *CPU, "--dry-run")
    said = cli(*ask, "--kv-budget", 0.125).out
    assert "RAP, keep ratio 0.7 of Keys" in said and "KV budget 0.125" in said and "1024 dense, about 128 coded" in said
    found = json.loads(cli(*ask, "--max-kl", 0.01, "--json").out)
    assert found["method"] == "rap+rotatek" and found["kv_bytes_per_token"] == {"dense": 1024, "compressed": None}
    assert found["rap"] == {"dense": 1024, "compressed": 0.7 * 1024} and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_budget": None}, "needs --kv-budget or --max-kl for the coded cache: its --keep-ratio says what the weights keep"),
        ({"max_kl": 0.1}, "--kv-budget and --max-kl are budgets of different kinds"),
        ({"with_weights": True}, "--method rap\\+rotatek writes weights of its own"),
        ({"rap_score": "best"}, "unknown --rap-score 'best'"),
        ({"keep_ratio": 2.0}, "--keep-ratio 2.0 is out of range"),
        ({"key_bits": "3"}, "unknown --key-bits '3'"),
        ({"kv_budget": 0.001}, "--kv-budget 0.001 is too small"),
        ({"keep_ratio": 0.01}, "--keep-ratio 0.01 is below the least that this model can keep"),
    ],
)
def test_refused_before_any_work(options, words, wide, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr("rotatek_compile.compile_inputs.load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError, match=words):
        compiled_to(tmp_path / "out", wide, data_file, **options)


def test_what_goes_with_it_and_what_does_not(stacked, whole, wide, data_file, cli):
    folder, where = stacked[1], (stacked[1], "--data", data_file)
    run = ("run", folder, "--prompt", "What?")
    assert "--keep-ratio 0.5 cannot be chosen" in cli(*run, "--keep-ratio", 0.5).sentence(2)
    assert "--model tiny-llava-next cannot be chosen" in cli(*run, "--model", "tiny-llava-next").sentence(2)
    assert "--method int4 is not made for it" in cli("eval", *where, "--method", "int4").sentence(2)
    assert "--suite compares with methods" in cli("eval", *where, "--suite", "rivals", "-o", "results").sentence(2)
    assert "--keep-ratio 0.5 cannot be chosen" in cli("eval", *where, "--method", "rotatek", "--keep-ratio", 0.5).sentence(2)
    with pytest.raises(UsageError, match="tensor_parallel True cannot be chosen"):
        rotatek_compile.load(folder, tensor_parallel=True)
    artifact = read_artifact(folder)
    plain, _ = rotatek_compile.load(whole[0], device="cpu")
    rotatek_compile.disable(plain)
    with pytest.raises(RotateKError, match="compiled for the smaller checkpoint beside it, not for this model"):
        enable(plain, artifact)
    kept, _ = rotatek_compile.load(whole[1], device="cpu")  # pruned as well, but another checkpoint
    rotatek_compile.disable(kept)
    with pytest.raises(RotateKError, match="compiled for the smaller checkpoint beside it"):
        enable(kept, artifact)
    with pytest.raises(RotateKError, match="the model is a pruned one .* was compiled for a whole one; load the base model"):
        enable(kept, read_artifact(whole[0]))
    with enable(kept, read_artifact(whole[1]), kv_budget=0.125) as again:
        assert again.artifact.method.kv_budget == 0.125


@pytest.mark.filterwarnings("ignore:.*ignoring unknown tensors")
def test_contradictions_are_refused(copy, whole):
    def said(change):
        text = (copy / "rotatek_config.json").read_text()
        edit_config(copy, change)
        words = refused(copy)
        (copy / "rotatek_config.json").write_text(text)
        return words

    def without(section):
        return lambda config: {name: part for name, part in config.items() if name != section}

    assert "rival is 'int4' beside section rap, and only our own goes with it" in said(
        lambda config: config["rotatek"].update(rival="int4")
    )
    assert "rival is 'rap', which has a section of its own" in said(lambda config: config["rotatek"].update(rival="rap"))
    assert "no section rotatek, but files names rotatek.safetensors" in said(without("rotatek"))
    assert "no section rap, but files names rap.safetensors" in said(without("rap"))
    assert "was changed after it was written" in said(lambda config: config["files"].pop("rap.safetensors") and None)
    wider = said(lambda config: config["rap"]["layers"][0].update(value_width=24))
    assert "value_mean is not zero in 8 channels beyond the 24 that section rap keeps" in wider
    assert "layer 0 has pairs 72, expected 1 to 64" in said(lambda config: config["rap"]["layers"][0].update(pairs=72))
    assert "has shape [1, 40], section rap says [1, 48]" in said(lambda config: config["rap"]["layers"][1].update(pairs=48))
    shutil.copy(copy / "rap.safetensors", copy / "kept")
    (copy / "rap.safetensors").unlink()
    assert "is incomplete: it has no rap.safetensors" in refused(copy)
    (copy / "kept").rename(copy / "rap.safetensors")
    edit_tensors(copy, lambda tensors: tensors["layers.1.visual.key_spectrum"][:, -1].fill_(1.0))
    assert "key_spectrum is not zero in 1 channels beyond the" in refused(copy)
