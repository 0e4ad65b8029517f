"""rotatek-eval with rivals, suites, files and resuming, through the console entry point."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest

ROW_KEYS = {
    "method", "setting", "requested_budget", "kv_budget", "keep_ratio", "exact_match", "exact_match_interval", "anls", "kl", "kl_interval",
    "exact_match_loss", "exact_match_loss_interval", "samples", "skills", "kv_bytes", "span_bytes",
}  # fmt: skip
QUICK = ("--max-new-tokens", 2, "--device", "cpu", "--num-samples", 3, "--batch-size", 2)


@pytest.fixture(scope="session")
def measured(compiled, tmp_path_factory):
    """The compiled artifact; with knock-outs added if the compiler made none."""
    import torch
    from safetensors.torch import load_file

    if any(name.endswith("knockout") for name in load_file(compiled / "rotatek.safetensors")):
        return compiled
    from rotatek_compile.artifact import read_artifact, write_artifact

    target = shutil.copytree(compiled, tmp_path_factory.mktemp("measured") / "artifact")
    artifact = read_artifact(target)
    artifact.tensors |= {f"layers.{i}.knockout": torch.tensor([0.1, 0.2]) for i in range(3)}
    write_artifact(artifact, target, "card")
    return target


@pytest.fixture(scope="session")
def unmeasured(compiled, tmp_path_factory):
    """The artifact as versions without knock-outs wrote it."""
    from rotatek_compile.artifact import read_artifact, write_artifact

    target = shutil.copytree(compiled, tmp_path_factory.mktemp("unmeasured") / "artifact")
    artifact = read_artifact(target)
    for name in [name for name in artifact.tensors if name.endswith(".knockout")]:
        del artifact.tensors[name]
    write_artifact(artifact, target, "card")
    return target


def test_methods(cli, measured, data_file):
    more = ("--method", "int4", "--method", "head-drop", "--kv-budget", 0.5, "--kv-budget", 0.4)
    ended = cli("eval", measured, "--data", data_file, *QUICK, *more, "--json")
    result = json.loads(ended.out)
    assert [row["method"] for row in result["rows"]] == ["dense", "artifact", "int4", "head-drop"]
    assert result["ask"] == "after" and result["samples"] == 3
    for row in result["rows"]:
        assert row.keys() >= ROW_KEYS and row["skills"] == {} and row["samples"] == 3
        for name in ("exact_match", "kl"):
            low, high = row[f"{name}_interval"]
            assert 0 <= low <= high
    int4, dropped = result["rows"][2:]
    assert int4["requested_budget"] == 0.5 and int4["span_bytes"] <= 0.5 * int4["span_bytes_dense"]
    assert 0 < dropped["span_bytes"] <= 0.5 * dropped["span_bytes_dense"] and dropped["kl"] > 0


def test_own_bases_at_budgets_beside_a_rival(cli, measured, data_file):
    """Every budget is kept for images of 512 tokens; these are shorter, and the comparison is with what takes no more than ours."""
    more = ("--method", "rotatek", "--method", "int4", "--kv-budget", 0.5, "--kv-budget", 0.35)
    ended = cli("eval", measured, "--data", data_file, *QUICK, *more, "--json")
    rows = json.loads(ended.out)["rows"]
    assert [row["method"] for row in rows] == ["dense", "artifact", "rotatek", "rotatek", "int4"]
    large, small, int4 = rows[2:]
    assert (large["requested_budget"], small["requested_budget"]) == (0.5, 0.35) and large["setting"] == "KV budget 0.5"
    assert 0 < small["span_bytes"] < large["span_bytes"] and large["kl"] <= small["kl"]
    assert large["against"]["rival"] == "int4" and large["against"]["rival_kl"] == pytest.approx(int4["kl"]) and int4["against"] is None
    assert rows[1]["against"] is None  # compiled for a keep ratio
    text = cli("eval", measured, "--data", data_file, *QUICK, *more).out
    assert "rotatek (KV budget 0.5): " in text and "of the KL of the best rival within its bytes: int4 at 0." in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "kivi3"], "unknown --method 'kivi3'; choose one of rotatek, int8"),
        (["--method", "int4", "--kv-budget", "0.01"], "int4 cannot meet a KV budget of 0.01; the smallest it can on this model is 0.3"),
        (["--method", "int4", "--kv-budget", "0"], "--kv-budget 0.0 is out of range"),
        (["--method", "think", "--keep-ratio", "2"], "--keep-ratio 2.0 is out of range"),
        (["--kv-budget", "0.5"], "--kv-budget says how a --method is to be run"),
        (["--method", "rotatek"], "--method rotatek needs --kv-budget or --keep-ratio"),
        (["--method", "rotatek", "--kv-budget", "0.001"], "--kv-budget 0.001 "),
        (["--suite", "all", "--output", "x"], "unknown --suite 'all'; choose one of rivals, proof"),
        (["--suite", "rival"], "unknown --suite 'rival'; choose one of rivals, proof"),
        (["--also", "x"], "--also adds calibrations to a suite; choose one with --suite"),
        (["--suite", "rivals"], "--suite writes files; say where with --output DIR"),
        (["--suite", "rivals", "--output", "x", "--method", "int4"], "--suite and --method contradict each other"),
        (["--quick", "--num-samples", "5"], "--quick and --num-samples contradict each other"),
        (["--resume"], "--resume needs --output DIR"),
        (["--plot"], "--plot needs --output DIR"),
        (["--shard", "1/2"], "--shard needs --output DIR"),
        (["--shard", "3/2", "--output", "x"], "--shard '3/2' is not I/N with 1 <= I <= N"),
        (["--shard", "1/2", "--output", "x", "--json"], "--shard measures a part; leave --plot, --write-card and --json to the run that"),
    ],
)
def test_usage(cli, measured, data_file, tmp_path, monkeypatch, untouched, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in cli("eval", measured, "--data", data_file, "--device", "cpu", *arguments).sentence(2)
    untouched(tmp_path)


def test_heads_that_fell_back_are_said(capsys):
    from rotatek_compile.commands.eval import _print_remarks

    rows = [{"method": "artifact", "setting": "x", "fallback_heads": n, "against": None} for n in (0, 3)]
    _print_remarks(rows)
    assert capsys.readouterr().out == "artifact kept more than planned in 3 (document, head, segment) places\n"


def test_learned_method_without_knockouts(cli, unmeasured, data_file):
    said = cli("eval", unmeasured, "--data", data_file, "--device", "cpu", "--method", "head-drop", "--kv-budget", 0.2).sentence(2)
    assert "head-drop needs measured knock-outs" in said and str(unmeasured) in said and "compile it again" in said


def test_suite_files_and_resuming(cli, measured, make_checkpoint, data_file, tmp_path, monkeypatch):
    arguments = ("eval", measured, "--data", data_file, *QUICK, "--suite", "rivals", "--output")
    ended = cli(*arguments, tmp_path / "whole", "--json")
    result = json.loads(ended.out)
    assert (result["suite"], result["ask"]) == ("rivals", ["after", "with"])
    names = {"dense", "artifact", "rotatek", "int8", "int4", "kivi2", "hadamard4", "head-drop", "think", "paper"}
    assert {row["method"] for row in result["rows"]} >= names
    with (tmp_path / "whole" / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(result["rows"]) and {row["ask"] for row in rows} == {"after", "with"}
    assert {row["data"] for row in rows} == {data_file.name}
    assert not any(str(data_file.parent) in file.read_text() for file in (tmp_path / "whole").iterdir())
    assert "holds an evaluation already; pass --resume" in cli(*arguments, tmp_path / "whole").sentence()

    from rotatek_compile import evaluate

    finish, calls = evaluate.Evaluator.finish, []

    def interrupted(self, *rest):
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return finish(self, *rest)

    monkeypatch.setattr(evaluate.Evaluator, "finish", interrupted)
    said = cli(*arguments, tmp_path / "killed").sentence()
    assert "interrupted; what was measured is in" in said and "--resume" in said
    ended = cli(*arguments, tmp_path / "killed", "--resume")
    assert "nothing saved" not in ended.err
    assert ended.code == 0 and "int4" in ended.out and "question asked with compression" in ended.out
    for name in ("results.csv", "documents.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    said = cli(*arguments, tmp_path / "whole", "--resume", "--batch-size", 1).sentence()
    assert "made with batch_size 2, this run has 1" in said
    said = cli(*arguments, tmp_path / "whole", "--resume", "--model", make_checkpoint(seed=2)).sentence()
    assert "made with weights" in said  # of the same name and geometry


def test_an_evaluation_in_two_processes(cli, measured, data_file, tmp_path):
    arguments = ("eval", measured, "--data", data_file, *QUICK, "--batch-size", 1, "--method", "int4", "--output")
    whole = cli(*arguments, tmp_path / "whole")
    for part in ("2/2", "1/2"):
        ended = cli(*arguments, tmp_path / "parts", "--shard", part)
        assert ended.out == f"part {part} is in {tmp_path / 'parts'}; once all are, run without --shard and with --resume\n"
    assert not (tmp_path / "parts" / "results.csv").exists()
    ended = cli(*arguments, tmp_path / "parts", "--resume")
    assert ended.out == whole.out and "nothing saved" not in ended.err
    for name in ("results.csv", "documents.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.fixture
def calibrated_anew(measured, tmp_path):
    """The artifact with other knock-outs, as another seed would measure them."""
    from rotatek_compile.artifact import read_artifact, write_artifact

    target = shutil.copytree(measured, tmp_path / "anew")
    artifact = read_artifact(target)
    artifact.tensors["layers.0.knockout"] = artifact.tensors["layers.0.knockout"] + 0.5
    write_artifact(artifact, target, "card")
    return target


def test_one_calibration_does_not_count_as_two(cli, measured, calibrated_anew, data_file, tmp_path):
    """Neither the artifact itself or a copy of it beside it, nor another one named twice."""
    suite = ("eval", measured, "--data", data_file, "--device", "cpu", "--suite", "proof", "--output", tmp_path / "out", "--also")
    copy = shutil.copytree(measured, tmp_path / "copy")
    for also, name, first in (
        ((measured,), measured, measured),
        ((calibrated_anew, "--also", copy), copy, measured),
        ((calibrated_anew, "--also", calibrated_anew), calibrated_anew, calibrated_anew),
    ):
        said = cli(*suite, *also, "--no-fallback").sentence(2)
        assert f"--also {name} is the same calibration as {first}; name one of other data" in said
    assert not (tmp_path / "out").exists()


def test_proof_over_two_calibrations(cli, measured, calibrated_anew, data_file, tmp_path):
    """What depends on calibration has two."""
    arguments = ("eval", measured, "--data", data_file, "--max-new-tokens", 1, "--device", "cpu", "--num-samples", 1, "--ask", "after")
    ended = cli(*arguments, "--suite", "proof", "--also", calibrated_anew, "--output", tmp_path / "out", "--json")
    rows = json.loads(ended.out)["rows"]
    assert {row["axis"] for row in rows} >= {"kv"} and {row["calibrations"] for row in rows} == {1, 2}
    assert {row["method"] for row in rows if row["calibrations"] == 2} >= {"artifact", "rotatek", "head-drop", "leank"}
    assert {row["method"] for row in rows if row["calibrations"] == 1} >= {"dense", "int4", "kivi2"}
    assert all(row["samples"] == 1 for row in rows)
    with (tmp_path / "out" / "results.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == len(rows) and {row["calibrations"] for row in table} == {"1", "2"}
    header = json.loads((tmp_path / "out" / "documents.jsonl").read_text().splitlines()[0])["evaluation"]
    assert len(header["also"]) == 1 and header["also"] != [header["artifact"]]
    assert sum(label.endswith(" #2") for label in header["methods"]) > 5


def test_another_calibration_must_be_of_the_same_model(cli, measured, unmeasured, make_checkpoint, data_file, tmp_path):
    other = ("--model", make_checkpoint(seed=3), "--calib", data_file, "--keep-ratio", 0.5, "-o", tmp_path / "other")
    assert cli("compile", *other, "--num-samples", 2, "--sensitivity-samples", 1, "--device", "cpu").code == 0
    suite = ("eval", measured, "--data", data_file, "--device", "cpu", "--suite", "proof", "--output", tmp_path / "out")
    assert "was compiled for other weights than" in cli(*suite, "--also", tmp_path / "other").sentence(2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("basis", "pca"), ("window", 64), ("kv_budget", 0.5), ("allocation", "uniform"), ("key_bits", "8"), ("value_bits", "4")],
)
def test_another_calibration_must_have_the_same_options(cli, measured, data_file, tmp_path, option, value):
    config = json.loads((Path(measured) / "rotatek_config.json").read_text())
    assert config["rotatek"][option] != value
    config["rotatek"][option] = value
    shutil.copytree(measured, tmp_path / "other")
    (tmp_path / "other" / "rotatek_config.json").write_text(json.dumps(config))
    suite = ("eval", measured, "--data", data_file, "--device", "cpu", "--suite", "proof", "--output", tmp_path / "out")
    assert f"has {option} {value}, {measured} has" in cli(*suite, "--also", tmp_path / "other").sentence(2)


def test_another_calibration_must_keep_the_same_tokens(cli, measured, data_file, tmp_path):
    config = json.loads((Path(measured) / "rotatek_config.json").read_text())
    config["rotatek"] |= {"token_method": "fastv", "token_keep_ratio": 0.5}
    shutil.copytree(measured, tmp_path / "other")
    (tmp_path / "other" / "rotatek_config.json").write_text(json.dumps(config))
    suite = ("eval", measured, "--data", data_file, "--device", "cpu", "--suite", "proof", "--output", tmp_path / "out")
    assert "has token_method fastv" in cli(*suite, "--also", tmp_path / "other").sentence(2)


def test_resuming_nothing_is_told(cli, measured, data_file, tmp_path):
    ended = cli("eval", measured, "--data", data_file, *QUICK, "--output", tmp_path / "new", "--resume")
    note = f"warning: --resume: nothing saved in {tmp_path / 'new'}, starting anew"
    assert ended.code == 0 and ended.err.splitlines().count(note) == 1 and (tmp_path / "new" / "results.csv").is_file()


def test_plot_without_matplotlib(cli, measured, data_file, tmp_path, monkeypatch, untouched):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = cli("eval", measured, "--data", data_file, *QUICK, "--output", tmp_path / "out", "--plot").sentence()
    assert "plots need matplotlib" in said and "rotatek-compile[plot]" in said
    untouched(tmp_path)


def test_output_and_plot(cli, measured, data_file, tmp_path, untouched):
    pytest.importorskip("matplotlib")
    ended = cli("eval", measured, "--data", data_file, *QUICK, "--method", "int8", "--output", tmp_path / "out", "--plot")
    assert ended.code == 0, ended.err
    untouched(tmp_path / "out", "documents.jsonl", "results.csv", "exact_match.png", "exact_match.svg", "kl.png", "kl.svg")


def test_quick_asks_few_documents(cli, measured, tmp_path, data_file):
    ended = cli("eval", measured, "--data", data_file, "--quick", "--max-new-tokens", 1, "--device", "cpu", "--json")
    assert json.loads(ended.out)["samples"] == 4  # all there are
    from rotatek_compile.suite import QUICK_DOCUMENTS

    assert f"Only {QUICK_DOCUMENTS} documents" in cli("eval", "--help").out


def test_token_selection(cli, measured, data_file):
    more = ("--method", "native", "--method", "rotatek", "--kv-budget", 0.4, "--token-method", "fastv", "--token-keep-ratio", 0.75)
    result = json.loads(cli("eval", measured, "--data", data_file, *QUICK, *more, "--json").out)
    alone, joint = result["rows"][2:]
    assert (alone["method"], joint["method"]) == ("native", "rotatek")
    assert joint["setting"] == "fastv, 0.75 of the tokens, KV budget 0.4" and joint["requested_budget"] == 0.4
    assert alone["span_bytes"] <= 0.4 * alone["span_bytes_dense"] and alone["kl"] > 0
    for words, said in (
        (("--token-method", "h2o"), "unknown --token-method 'h2o'"),
        (("--token-keep-ratio", 0.5), "say which with --token-method"),
        (("--token-method", "fastv"), "say how many with --token-keep-ratio"),
        (("--token-method", "fastv", "--token-keep-ratio", 2), "out of range"),
    ):
        ended = cli("eval", measured, "--data", data_file, *QUICK, *words)
        assert ended.code == 2 and said in ended.err
