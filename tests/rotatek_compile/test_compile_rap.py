"""`--method rap` through the commands: what is written and counted, the five commands on it, and what is refused before any work."""

import importlib.util
import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rotatek_compile
from rotatek_compile import CompileOptions, RotateKError, UsageError, compile_artifact
from rotatek_compile.artifact import read_artifact
from rotatek_compile.rap_counts import counted
from rotatek_compile.rap_plan import RapPlan
from rotatek_compile.runtime.rap_attention import PairPrunedAttention, attention_modules

sys.path.append(str(Path(__file__).parents[1] / "runtime"))
from rap_cases import builders, drawn_plan  # noqa: E402

_spec = importlib.util.spec_from_file_location("rotatek_hub_fixtures", Path(__file__).parents[1] / "hub_fixtures.py")
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
server = _shared.server
SMALL = {"num_samples": 4, "batch_size": 2, "device": "cpu", "quiet": True}


@pytest.fixture(scope="module")
def wide(make_checkpoint):
    """A tiny LLaVA-NeXT with heads of 128 channels, so that steps of 8 come near any keep ratio."""
    return make_checkpoint(name="wide", layers=2, heads=2, kv_heads=1, head_dim=128)


@pytest.fixture(scope="module")
def pruned(wide, data_file, tmp_path_factory):
    """Summary and folder of a checkpoint pruned to 0.7."""
    folder = tmp_path_factory.mktemp("rap") / "pruned"
    return compile_artifact(CompileOptions(model=str(wide), calib=str(data_file), output=folder, method="rap", **SMALL)), folder


def test_what_is_written_is_what_was_counted(pruned, wide):
    summary, folder = pruned
    artifact = read_artifact(folder)
    assert artifact.rap is not None and (artifact.rap.keep_ratio, artifact.rap.score, artifact.rap.budget) == (0.7, "logit", "sensitivity")
    assert artifact.base_model["id"] == str(wide) and artifact.calibration["documents"] == 4
    model, _ = rotatek_compile.load(folder, device="cpu")
    modules = [module for _, module in attention_modules(model).values()]
    assert all(isinstance(module, PairPrunedAttention) for module in modules)
    widths = [(module.pairs.shape[1], module.v_proj.out_features) for module in modules]
    assert widths == [(layer["pairs"], layer["value_width"]) for layer in artifact.report["layers"]]
    found, dense = counted(model, artifact.geometry).to_json(), summary["counts"]["dense"]
    assert found == summary["counts"]["pruned"] == artifact.report["counts"]["pruned"]
    biases = sum(module.o_proj.bias.numel() for module in modules if module.o_proj.bias is not None)
    shares = {name: found[name] / dense[name] for name in found}
    assert shares["kv_bytes_per_token"] <= 0.7 and shares["attention_flops"] <= 0.7
    assert (found["attention_parameters"] - biases) / dense["attention_parameters"] <= 0.7
    assert shares["kv_bytes_per_token"] > 0.6 and dense["kv_bytes_per_token"] == 2 * 2 * 256
    assert sum(p.numel() for p in model.parameters()) == found["parameters"] < dense["parameters"]
    assert summary["kv_bytes_per_token"] == {"dense": dense["kv_bytes_per_token"], "compressed": found["kv_bytes_per_token"]}
    assert artifact.bytes_per_token() == found["kv_bytes_per_token"]
    assert summary["plan"]["predicted_kl"] > 0 and summary["plan"]["kept_aside"] == 0


def test_everything_kept_says_the_same(wide, data_file, tmp_path, cli):
    options = ("--model", wide, "--calib", data_file, "--num-samples", 4, "--device", "cpu", "--quiet")
    done = cli("compile", *options, "--method", "rap", "--keep-ratio", 1, "-o", tmp_path / "whole")
    assert done.code == 0 and "KL on the calibration documents themselves" in done.out and ": 0.00e+00 nats" in done.out, done
    page = data_file.parent / "page0.png"
    ask = ("--image", page, "--prompt", "What is it?", "--max-new-tokens", 5, "--device", "cpu", "--json", "--compare-dense")
    said = json.loads(cli("run", tmp_path / "whole", *ask).out)
    assert said["text"] == said["dense"]["text"] and said["kv_bytes"] == said["kv_bytes_dense"] == said["dense"]["kv_bytes"] > 0
    rows = json.loads(cli("eval", tmp_path / "whole", "--data", data_file, "--device", "cpu", "--json", "--max-new-tokens", 3).out)["rows"]
    assert [row["method"] for row in rows] == ["dense", "artifact"] and [row["kl"] for row in rows] == [0, 0]


def test_run_and_eval(pruned, data_file, cli, tmp_path):
    summary, folder = pruned
    share = summary["kv_bytes_per_token"]["compressed"] / summary["kv_bytes_per_token"]["dense"]
    page = data_file.parent / "page0.png"
    done = cli("run", folder, "--image", page, "--prompt", "What?", "--max-new-tokens", 4, "--device", "cpu", "--json")
    said = json.loads(done.out)
    assert said["dense"] is None and said["kv_bytes"] == pytest.approx(share * said["kv_bytes_dense"]) and done.err == ""
    ask = ("eval", folder, "--data", data_file, "--device", "cpu", "--max-new-tokens", 3, "--quiet")
    card = (folder / "README.md").read_text()
    found = json.loads(cli(*ask, "--json", "-o", tmp_path / "results", "--write-card").out)
    dense, own = found["rows"]
    assert found["samples"] == 4 and own["kl"] > 0 == dense["kl"] and own["keep_ratio"] == 0.7
    assert own["kv_bytes"] == pytest.approx(share * own["kv_bytes_dense"]) and own["span_bytes"] == 0
    assert own["kl"] == pytest.approx(summary["plan"]["predicted_kl"], rel=0.2)  # the same four documents; both are of the size of rounding
    assert "| artifact |" in (folder / "README.md").read_text() and "| artifact |" not in card
    resumed = json.loads(cli(*ask, "--json", "-o", tmp_path / "results", "--resume").out)
    assert resumed["rows"] == found["rows"]
    assert "RAP, keep ratio 0.7" in (tmp_path / "results" / "results.csv").read_text()


def test_eval_and_compare_without_the_base(pruned, data_file, cli, tmp_path, wide):
    folder = shutil.copytree(pruned[1], tmp_path / "moved")
    config = json.loads((folder / "rotatek_config.json").read_text())
    config["base_model"]["id"] = "/nowhere/wide"
    (folder / "rotatek_config.json").write_text(json.dumps(config))
    ask = ("eval", folder, "--data", data_file, "--device", "cpu", "--max-new-tokens", 1, "--num-samples", 1)
    assert "base model was at /nowhere/wide, which is gone; pass its new place with --model" in cli(*ask).sentence()
    assert cli(*ask, "--model", wide).code == 0
    run = ("run", folder, "--prompt", "What?", "--max-new-tokens", 2, "--device", "cpu")
    assert cli(*run).code == 0
    assert "/nowhere/wide, which is gone" in cli(*run, "--compare-dense", "--quiet", "--json").sentence()


def test_inspect(pruned, cli, compiled):
    summary, folder = pruned
    text = cli("inspect", folder).out
    first = summary["plan"]["widths"]["0"]
    assert "RAP, keep ratio 0.7, score logit" in text and f"    0  {first['pairs']} of 64" in text
    assert f"{first['value_width']} of 128" in text and "attention FLOPs 0." in text
    head = next(line for line in text.splitlines() if line.startswith("    0    0  "))
    assert head.count("#") == first["pairs"] and len(head.split()[-1]) == 64
    assert "KL on the calibration documents themselves" in text  # four are too few to keep any aside
    found = json.loads(cli("inspect", folder, "--json").out)
    assert found["method"]["layers"][0]["pairs"] == first["pairs"] == len(found["pairs"]["0"][0])
    assert f"{first['pairs']} | {first['pairs']} pairs" in cli("inspect", folder, folder).out
    assert "the other a sidecar" in cli("inspect", folder, compiled).sentence()
    assert "a smaller checkpoint (RAP) has none" in cli("inspect", folder, "--html", "page.html").sentence(2)


def test_inspect_a_report_that_was_edited(pruned, cli, tmp_path):
    folder = shutil.copytree(pruned[1], tmp_path / "edited")
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(report | {"plan_kl": "0.25"}))
    done = cli("inspect", folder)
    assert done.code == 0 and ": 2.50e-01 nats" in done.out


def test_push_and_load_from_the_hub(pruned, server, cli, data_file):
    folder = pruned[1]
    said = json.loads(cli("push", folder, "lab/pruned", "--json").out)
    assert {"model.safetensors", "config.json", "rap.safetensors", "rotatek_config.json", "tokenizer.json"} <= said["files"].keys()
    card = server.repos["lab/pruned"].files()["README.md"].decode()
    assert 'rotatek_compile.load("lab/pruned")' in card and "base model's, unchanged" not in card
    model, _ = rotatek_compile.load("lab/pruned", device="cpu")
    own, _ = rotatek_compile.load(folder, device="cpu")
    ids = torch.arange(60, 80)[None]
    assert torch.equal(model(input_ids=ids).logits, own(input_ids=ids).logits)


def test_resume_overwrite_and_dry_run(wide, data_file, tmp_path, monkeypatch, cli, untouched):
    from rotatek_compile import rap_maps, rap_statistics

    def fixed(model, statistics, geometry, **options):
        return RapPlan(drawn_plan(geometry, [(40, 88)]).layers, {})

    counts = []
    monkeypatch.setenv("ROTATEK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rap_maps, "make_plan", fixed)
    monkeypatch.setattr(rap_statistics, "collect", lambda *args, **options: counts.append(options["gradients"]))
    folder = tmp_path / "out"
    ask = (
        "compile",
        "--model",
        wide,
        "--calib",
        data_file,
        "-o",
        folder,
        "--method",
        "rap",
        "--num-samples",
        2,
        "--device",
        "cpu",
        "--quiet",
    )
    dry = cli(*ask, "--dry-run")
    assert "RAP, keep ratio 0.7 of Keys, Values, attention parameters and FLOPs" in dry.out and "64 RoPE pairs each" in dry.out
    assert json.loads(cli(*ask, "--dry-run", "--json").out)["kv_bytes_per_token"] == {"dense": 1024, "compressed": 0.7 * 1024}
    assert not folder.exists() and not (tmp_path / "cache").exists()
    first = cli(*ask, "--resume")
    assert first.code == 0 and "--resume: nothing saved, starting anew" in first.err and counts == [False]
    assert "is not empty; pass --overwrite" in cli(*ask).sentence()
    again = json.loads(cli(*ask, "--overwrite", "--resume", "--json").out)
    assert counts == [False] and "statistics" not in again["seconds"]  # the plan was there
    assert cli(*ask, "--overwrite", "--rap-score", "fisher").code == 0 and counts == [False, True]
    assert read_artifact(folder).rap.score == "fisher"
    untouched(tmp_path, "out", "cache")


@pytest.mark.parametrize("helps", [True, False])
def test_recovery_trains_attention_and_nothing_else(wide, data_file, tmp_path, monkeypatch, helps):
    pytest.importorskip("peft")
    from rotatek_compile import rap_maps, rap_recover, rap_statistics

    distances = iter([4.0, *((3.0, 2.0, 1.0) if helps else (4.0, 5.0, 6.0))])
    monkeypatch.setattr(rap_recover, "_distance", lambda *args: next(distances))

    monkeypatch.setenv("ROTATEK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rap_maps, "make_plan", lambda model, statistics, geometry, **options: drawn_plan(geometry, [(40, 88)], hidden=64))
    monkeypatch.setattr(rap_statistics, "collect", lambda *args, **options: None)
    found = {}
    for steps in (None, 3):
        folder = tmp_path / str(steps)
        options = CompileOptions(model=str(wide), calib=str(data_file), output=folder, method="rap", recover=steps, **SMALL)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            summary = compile_artifact(options)
        words = "--recover: 3 steps brought the model no nearer to the dense one on documents held out (KL 4.00e+00); it is left as it was"
        assert (words in [str(one.message) for one in said]) == (steps is not None and not helps)
        found[steps] = load_file(folder / "model.safetensors")
        assert read_artifact(folder).rap.recover == ((steps or 0) if helps else 0)  # no steps are in weights that were left as they were
        assert ("recovery" in summary["seconds"]) is (steps is not None)
    changed = {name.split(".")[-2] for name, tensor in found[None].items() if not torch.equal(tensor, found[3][name])}
    assert found[None].keys() == found[3].keys()
    if not helps:
        assert changed == set()
        return
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not any(
        torch.equal(t, found[3][name]) for name, t in found[None].items() if "language_model" in name and "q_proj.weight" in name
    )


def test_recovery_needs_its_package(wide, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr("rotatek_compile.compile_inputs.load_model", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RotateKError, match="--recover trains adapters with the package peft"):
        compile_artifact(CompileOptions(model=str(wide), calib=str(data_file), output=tmp_path / "o", method="rap", recover=3, **SMALL))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "rap+rotatek"}, "--method rap\\+rotatek needs --kv-budget or --max-kl"),
        ({"method": "rap", "kv_budget": 0.5}, "--kv-budget 0.5 speaks of a coded cache, --method rap has none"),
        ({"method": "rap", "key_bits": "4"}, "--key-bits 4 speaks of a coded cache"),
        ({"method": "rap", "span": "all"}, "--span all speaks of a coded cache"),
        ({"method": "rap", "window": 64}, "--window 64 speaks of a coded cache"),
        ({"method": "rap", "with_weights": True}, "--method rap writes weights of its own"),
        ({"method": "rap", "rap_score": "guess"}, "unknown --rap-score 'guess'; choose one of logit, fisher, fisher-weight"),
        ({"method": "rap", "rap_budget": "guess"}, "unknown --rap-budget 'guess'"),
        ({"method": "rap", "recover": 0}, "--recover 0 is out of range"),
        ({"method": "rap", "keep_ratio": 1.2}, "--keep-ratio 1.2 is out of range"),
        ({"method": "rap", "keep_ratio": 0.01}, "--keep-ratio 0.01 is below the least that this model can keep"),
        ({"method": "rotatek", "rap_score": "logit"}, "--rap-score logit comes with --method rap"),
        ({"method": "int4", "recover": 3}, "--recover 3 comes with --method rap"),
        ({"method": "rotatek", "repair": False}, "--no-repair comes with --method rap"),
    ],
)
def test_options_refused(wide, data_file, tmp_path, untouched, monkeypatch, options, words):
    monkeypatch.setattr("rotatek_compile.compile_inputs.load_model", None)
    with pytest.raises(UsageError, match=words):
        compile_artifact(CompileOptions(model=str(wide), calib=str(data_file), output=tmp_path / "out", device="cpu", **options))
    untouched(tmp_path)


def test_models_refused(data_file, tmp_path, monkeypatch, wide):
    monkeypatch.setattr("rotatek_compile.compile_inputs.load_model", None)
    folder = builders.build("qwen3-vl", tmp_path / "qwen3-vl")
    with pytest.raises(RotateKError, match="does not support text model 'qwen3_vl_text': q/k-norm divides"):
        compile_artifact(CompileOptions(model=str(folder), calib=str(data_file), output=tmp_path / "out", method="rap", **SMALL))
    damaged = shutil.copytree(wide, tmp_path / "damaged")
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(RotateKError, match="model.safetensors is damaged or truncated"):
        compile_artifact(CompileOptions(model=str(damaged), calib=str(data_file), output=tmp_path / "out", method="rap", **SMALL))
    assert not (tmp_path / "out").exists()


def test_options_of_other_caches_are_refused_on_a_pruned_checkpoint(pruned, data_file, cli):
    folder = pruned[1]
    run, ev = ("run", folder, "--prompt", "What?"), ("eval", folder, "--data", data_file)
    for words in (("--keep-ratio", 0.5), ("--backend", "torch"), ("--model", "tiny-llava-next")):
        assert f"{words[0]} {words[1]} cannot be chosen" in cli(*run, *words).sentence(2)
    assert "--no-fallback speaks of a coded cache" in cli(*run, "--no-fallback").sentence(2)
    for words in (("--method", "int4"), ("--backend", "torch"), ("--no-fallback",)):
        assert words[0] in cli(*ev, *words).sentence(2)
    with pytest.raises(UsageError, match="kv_budget 0.5 cannot be chosen"):
        rotatek_compile.load(folder, kv_budget=0.5)
