"""What commands print when they succeed: results only on stdout, and the JSON shapes that scripts rely on (DESIGN.md §7)."""

import json
import re
import shutil

import pytest
import torch

COMPILE_KEYS = {"artifact", "model", "method", "layers", "kv_bytes_per_token", "seconds"}
RUN_KEYS = {"text", "new_tokens", "kv_bytes", "kv_bytes_dense", "seconds_prefill", "seconds_decode", "dense"}
ROW_KEYS = {
    "method", "exact_match", "anls", "kl", "kv_bytes", "kv_bytes_dense", "span_bytes", "span_bytes_dense", "window_bytes", "basis_bytes",
    "slack_bytes", "fallback_heads",
}  # fmt: skip
POOR = "KL to it says little: check that it can read such pages, and how the answers are written"
DENSE_BYTES = 3 * 2 * 4 * 32  # layers, KV heads, 4 bytes for Key and Value numbers, head_dim


def test_compile_json(cli, checkpoint, data_file, small_run, tmp_path):
    ended = cli("compile", "--model", checkpoint, "--calib", data_file, "-o", tmp_path / "out", *small_run, "--json")
    result = json.loads(ended.out)  # nothing but one JSON value on stdout
    assert result.keys() >= COMPILE_KEYS
    assert (result["artifact"], result["method"], result["layers"]) == (str(tmp_path / "out"), "rotatek", 3)
    assert result["model"] == str(checkpoint)
    # a quarter of 6 heads times 32 directions is kept, Values are raw
    assert result["kv_bytes_per_token"] == {"dense": DENSE_BYTES, "compressed": DENSE_BYTES / 2 + 2 * 6 * 8}
    assert result["seconds"]["total"] >= result["seconds"]["sensitivities"] > 0


def test_compile_words(cli, checkpoint, data_file, small_run, tmp_path):
    ended = cli("compile", "--model", checkpoint, "--calib", data_file, "-o", tmp_path / "out", *small_run)
    assert ended.code == 0 and len(ended.out.splitlines()) == 4
    assert f"gives the expected answer to 0 of these 4 documents; {POOR}" in ended.out  # random weights
    assert ended.out.startswith(f"wrote {tmp_path / 'out'}: 3 layers, 768 -> 480 bytes per coded token (1.60x smaller)\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_dry_run_reads_no_weights_and_writes_nothing(cli, broken_checkpoint, data_file, tmp_path, untouched, monkeypatch, as_json):
    (broken_checkpoint / "model.safetensors").unlink()
    monkeypatch.setenv("ROTATEK_CACHE", str(tmp_path / "moments"))
    more = ["--json"] if as_json else []
    ended = cli("compile", "--model", broken_checkpoint, "--calib", data_file, "-o", tmp_path / "out", "--dry-run", *more)
    assert ended.code == 0 and ended.err == ""
    if as_json:
        result = json.loads(ended.out)
        assert result.keys() >= COMPILE_KEYS and result["seconds"] is None
        assert result["kv_bytes_per_token"] == {"dense": 768, "compressed": 480}
        assert [layer["head_dim"] for layer in result["geometry"]["layers"]] == [32, 32, 32]
    else:
        assert "3 text layers, 3 compressed, 4/2 heads of 32" in ended.out and f"would write {tmp_path / 'out'}" in ended.out
    untouched(tmp_path, "broken")


@pytest.mark.parametrize("compare", [False, True])
def test_run_json(cli, compiled, data_file, compare):
    more = ["--compare-dense"] if compare else []
    page = data_file.parent / "page0.png"
    ended = cli("run", compiled, "--image", page, "--prompt", "What?", "--max-new-tokens", 5, "--device", "cpu", "--json", *more)
    result = json.loads(ended.out)
    assert ended.code == 0 and result.keys() >= RUN_KEYS
    assert 1 <= result["new_tokens"] <= 5 and isinstance(result["text"], str)
    assert 0 < result["kv_bytes"] < result["kv_bytes_dense"]
    assert result["kv_bytes_dense"] % DENSE_BYTES == 0
    assert result["seconds_prefill"] > 0 and result["seconds_decode"] >= 0
    if compare:
        assert result["dense"]["kv_bytes"] == result["dense"]["kv_bytes_dense"] == result["kv_bytes_dense"]
    else:
        assert result["dense"] is None


def test_run_streams_the_answer_to_stdout(cli, compiled, data_file):
    ask = ("run", compiled, "--image", data_file.parent / "page0.png", "--prompt", "What?", "--max-new-tokens", 5, "--device", "cpu")
    text = json.loads(cli(*ask, "--json").out)["text"]
    quiet = cli(*ask, "--quiet")
    assert quiet.out.strip() == text
    loud = cli(*ask, "--compare-dense")
    assert loud.out.startswith(quiet.out) and "KV bytes" in loud.out and loud.err == ""
    coded, share, dense = re.search(r"of these coded +([\d,]+) \((0\.\d+)\) +([\d,]+)", loud.out).groups()
    coded, dense = (int(n.replace(",", "")) for n in (coded, dense))
    assert float(share) == pytest.approx(coded / dense, abs=6e-4) and coded < dense
    assert f", of which {coded:,} code {dense:,} ({share}); prefill" in cli(*ask).out


def test_run_without_a_picture(cli, compiled):
    ended = cli("run", compiled, "--prompt", "What?", "--max-new-tokens", 3, "--device", "cpu", "--json", "--compare-dense")
    result = json.loads(ended.out)
    assert result["text"] == result["dense"]["text"]  # nothing to compress: the window is exact


@pytest.mark.parametrize("ask", ["after", "with"])
def test_eval_json(cli, compiled, data_file, ask):
    ended = cli("eval", compiled, "--data", data_file, "--ask", ask, "--max-new-tokens", 3, "--batch-size", 1, "--device", "cpu", "--json")
    result = json.loads(ended.out)
    assert (result["data"], result["samples"], result["ask"]) == (str(data_file), 4, ask)
    dense, ours = result["rows"]
    assert (dense["method"], ours["method"]) == ("dense", "artifact")
    for row in (dense, ours):
        assert row.keys() >= ROW_KEYS
        assert 0 <= row["exact_match"] <= 1 and 0 <= row["anls"] <= 1
    assert dense["kl"] == 0 and dense["kv_bytes_dense"] == ours["kv_bytes_dense"]
    assert 0 <= dense["kv_bytes"] - dense["kv_bytes_dense"] <= DENSE_BYTES  # at most the last token, which nobody reads
    assert ours["kl"] > 0 and ours["span_bytes"] < ours["span_bytes_dense"] and ours["kv_bytes"] < ours["kv_bytes_dense"]


def test_eval_words(cli, compiled, data_file):
    ended = cli("eval", compiled, "--data", data_file, "--num-samples", 1, "--max-new-tokens", 2, "--device", "cpu")
    lines = ended.out.splitlines()
    assert lines[0] == f"{data_file}, 1 samples, question asked after compression"
    assert [line.split()[0] for line in lines[1:4]] == ["method", "dense", "artifact"]
    assert lines[4:] == [f"uncompressed, the model hardly answers as expected here (exact_match below 0.1); {POOR}"]  # random weights


def test_eval_table(cli, compiled, data_file):
    """Every column has a name of its own, over its figures; the dense model codes nothing."""
    arguments = ("eval", compiled, "--data", data_file, "--num-samples", 2, "--max-new-tokens", 2, "--device", "cpu")
    ours = json.loads(cli(*arguments, "--json").out)["rows"][1]
    heading, *rows = cli(*arguments).out.splitlines()[1:4]
    names = re.split(r"\s{2,}|(?<=exact) ", heading.replace("ANLS ", "ANLS  "))
    assert names == ["method", "exact", "ANLS", "KL/token", "KV bytes", "dense KV", "coded span", "dense span", "ratio"]
    assert {len(line) for line in (heading, *rows)} == {len(heading)}
    assert rows[0].split()[-3:] == ["-", "-", "-"]
    span, dense = ours["span_bytes"], ours["span_bytes_dense"]
    assert rows[1].split()[3:] == [
        f"{ours['kl']:.2e}", f"{ours['kv_bytes']:,.0f}", f"{ours['kv_bytes_dense']:,.0f}",
        f"{span:,.0f}", f"{dense:,.0f}", f"{span / dense:.3f}",
    ]  # fmt: skip


def test_inspecting_two_models_points_to_the_page(cli, compiled, make_checkpoint, data_file, small_run, tmp_path):
    other = tmp_path / "other"
    assert cli("compile", "--model", make_checkpoint("two", layers=2), "--calib", data_file, "-o", other, *small_run).code == 0
    said = cli("inspect", compiled, other).sentence()
    assert said.startswith("error: the artifacts are of different models: ") and said.endswith("; --html FILE shows them side by side")
    assert cli("inspect", compiled, other, "--html", tmp_path / "both.html").code == 0


def test_inspect(cli, compiled, broken_artifact):
    result = json.loads(cli("inspect", compiled, "--json").out)
    assert result["kv_bytes_per_token"] == {"dense": 768, "compressed": 480.0}
    assert {i: len(ranks) for i, ranks in result["ranks"].items()} == {"0": 2, "1": 2, "2": 2}
    words = cli("inspect", compiled).out
    assert "bytes per coded token, all layers: 768 dense, 480 compressed (1.60x smaller)" in words
    # a line per layer and head: of the plan, and of what cuts of its Keys and of its Values cost
    assert len([line for line in words.splitlines() if line[:1] == " "]) == 18
    assert "bytes per coded token: 480 | 480" in cli("inspect", compiled, broken_artifact).out


@pytest.mark.parametrize("report", ["[]", "{", "{}", '{"layers": 3}', '{"layers": [{"layer": 0}]}'])
def test_inspect_with_a_damaged_report(cli, broken_artifact, report):
    (broken_artifact / "report.json").write_text(report)
    ended = cli("inspect", broken_artifact)
    if report in ("[]", "{"):
        assert f"{broken_artifact / 'report.json'}" in ended.sentence()
    else:
        assert ended.code == 0 and "3 layers compressed" in ended.out


def test_artifact_runs_with_its_own_processor(cli, broken_checkpoint, compiled, data_file):
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (broken_checkpoint / file).unlink()
    ask = ("--image", data_file.parent / "page0.png", "--prompt", "What?", "--max-new-tokens", 2, "--device", "cpu", "--json")
    assert cli("run", compiled, "--model", broken_checkpoint, *ask).code == 0


def test_python_api_gives_what_run_prints(cli, compiled, data_file, recwarn):
    import rotatek_compile
    from rotatek_compile.answer import answer_once
    from rotatek_compile.calibration_data.local import open_image

    page = data_file.parent / "page0.png"
    printed = json.loads(cli("run", compiled, "--image", page, "--prompt", "What?", "--max-new-tokens", 5, "--device", "cpu", "--json").out)
    model, processor = rotatek_compile.load(compiled, device="cpu")
    assert model.dtype == torch.float32
    answer = answer_once(model, processor, [open_image(page, "page")], "What?", 5, stream=False)
    assert (answer.text, answer.bytes.total) == (printed["text"], printed["kv_bytes"])


def test_strict_refuses_other_weights(compiled, make_checkpoint):
    import rotatek_compile

    with pytest.raises(rotatek_compile.RotateKError, match="has fingerprint .*leave strict off"):
        rotatek_compile.load(compiled, model=str(make_checkpoint(seed=2)), device="cpu", strict=True)


def test_moved_artifact_works(cli, compiled, tmp_path):
    moved = shutil.copytree(compiled, tmp_path / "elsewhere")
    assert cli("run", moved, "--prompt", "What?", "--max-new-tokens", 1, "--device", "cpu", "--json").code == 0


def test_our_warnings_are_shown_and_foreign_ones_are_not(capsys):
    import warnings

    from rotatek_compile import calibration_data, kernels, runtime
    from rotatek_compile.commands.main import _print_warning

    for package in (runtime, kernels, calibration_data):
        _print_warning(UserWarning("ours"), UserWarning, f"{package.__path__[0]}/module.py", 1)
    _print_warning(UserWarning("foreign"), UserWarning, f"/home/rotatek/site-packages/{warnings.__name__}.py", 1)
    assert capsys.readouterr().err == "warning: ours\n" * 3
