"""Options that make no sense end with exit code 2 and one sentence, before any weights are read."""

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep-ratio", "0"], "--keep-ratio 0.0 is out of range"),
        (["--keep-ratio", "1.5"], "--keep-ratio 1.5 is out of range"),
        (["--keep-ratio", "-0.25"], "--keep-ratio -0.25 is out of range"),
        (["--keep-ratio", "nan"], "--keep-ratio nan is out of range"),
        (["--keep-ratio", "a quarter"], "'a quarter' is not a valid float"),
        (["--window", "0"], "--window 0 is out of range; it must be at least 1"),
        (["--num-samples", "0"], "--num-samples 0 is out of range"),
        (["--batch-size", "-1"], "--batch-size -1 is out of range"),
        (["--basis", "svd"], "unknown --basis 'svd'; choose one of two-sided, pca, paper"),
        (["--allocation", "greedy"], "unknown --allocation 'greedy'; choose one of allocated, uniform"),
        (["--span", "images"], "unknown --span 'images'; choose one of visual, all"),
        (["--dtype", "int8"], "unknown dtype 'int8'; choose one of float32, float16, bfloat16"),
        (["--device", "gpu"], "unknown device 'gpu'; use cpu, cuda, cuda:N or auto"),
        (["--device", "meta"], "device 'meta' is not supported; use cpu, cuda, cuda:N or auto"),
        (["--revision", "main"], "--revision main is for Hub models"),
        (["--resume", "--dry-run"], "--resume and --dry-run contradict each other"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_compile_options(cli, checkpoint, data_file, tmp_path, untouched, arguments, words):
    said = cli("compile", "--model", checkpoint, "--calib", data_file, "-o", tmp_path / "out", *arguments).sentence(2)
    assert words in said
    untouched(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--calib", "forms"], "--model is missing; see --list-models"),
        (["--model", "tiny-llava-next"], "--calib is missing"),
        (["--model", "lava", "--calib", "forms"], "unknown model 'lava'; use one of tiny-llava-next, tiny-qwen3-vl, llava-next, "),
        (["--model", "", "--calib", "forms"], "unknown model ''"),
        (["--model", "lava-next", "--calib", "forms"], "or a Hub id like org/name; did you mean llava-next?"),
        (
            ["--model", "tiny-llava-next", "--calib", "forms", "--method", "kivi3"],
            "unknown --method 'kivi3'; choose one of rotatek, int8, int4",
        ),
    ],
)
def test_compile_names(cli, tmp_path, untouched, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in cli("compile", *arguments).sentence(2)
    untouched(tmp_path)


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("run", ["--prompt", "  "], "--prompt is empty"),
        ("run", ["--prompt", "What?", "--sample", 1], "--sample 1 says which document of --data"),
        ("run", ["--data", "mixed", "--sample", -1], "--sample -1 is out of range"),
        ("run", ["--data", "mixed", "--image", "page.png"], "--data brings its own pages"),
        ("run", ["--data", "mixde"], "did you mean mixed?"),
        ("run", [], "there is no question; write one with --prompt"),
        ("run", ["--prompt", "\udcff"], "--prompt is not valid text"),
        ("run", ["--prompt", "What?", "--max-new-tokens", "0"], "--max-new-tokens 0 is out of range"),
        ("run", ["--prompt", "What?", "--backend", "cudnn"], "cudnn"),
        ("run", ["--prompt", "What?", "--dtype", "fp8"], "unknown dtype 'fp8'"),
        ("run", ["--prompt", "What?", "--model", "lava"], "unknown model 'lava'"),
        ("eval", ["--data", "forms", "--model", "qwen-vl"], "did you mean qwen3-vl?"),
        ("eval", [], "Missing option '--data'"),
        ("eval", ["--data", "forms", "--ask", "before"], "unknown --ask 'before'; choose one of after, with"),
        ("eval", ["--data", "forms", "--num-samples", "0"], "--num-samples 0 is out of range"),
        ("eval", ["--data", "forms", "--batch-size", "0"], "--batch-size 0 is out of range"),
        ("eval", ["--data", "forms", "--max-new-tokens", "-1"], "--max-new-tokens -1 is out of range"),
        ("eval", ["--data", "forms", "--backend", "cudnn"], "cudnn"),
    ],
)
def test_run_and_eval_options(cli, compiled, command, arguments, words):
    assert words in cli(command, compiled, *arguments).sentence(2)


@pytest.mark.parametrize("command", ["run", "eval", "inspect"])
def test_artifact_that_is_none(cli, tmp_path, checkpoint, data_file, command):
    more = {"run": ["--prompt", "What?"], "eval": ["--data", data_file], "inspect": []}[command]
    assert f"artifact {tmp_path / 'no'} does not exist" in cli(command, tmp_path / "no", *more).sentence()
    assert "it has no rotatek_config.json" in cli(command, checkpoint, *more).sentence()
    assert "is no artifact" in cli(command, data_file, *more).sentence()
    assert "Missing argument 'ARTIFACT'" in cli(command, *more).sentence(2)


@pytest.mark.parametrize("command", ["run", "eval"])
def test_triton_without_a_gpu(cli, compiled, data_file, command, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    more = {"run": ["--prompt", "What?"], "eval": ["--data", data_file]}[command]
    said = cli(command, compiled, *more, "--backend", "triton", "--device", "cpu").sentence()
    assert "triton" in said and "torch" in said


def test_gpu_that_is_not_there(cli, compiled, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said = cli("run", compiled, "--prompt", "What?", "--device", "cuda:3").sentence()
    assert "device cuda:3 is not available" in said and "--device cpu" in said


def test_lists(cli):
    import json

    models = cli("compile", "--list-models")
    assert models.code == 0 and "llava-hf/llava-v1.6-mistral-7b-hf" in models.out and models.err == ""
    listed = json.loads(cli("compile", "--list-models", "--json").out)
    assert listed["tiny-qwen3-vl"]["id"] == "bundled with this package"
    assert listed["llava-next"] == {"id": "llava-hf/llava-v1.6-mistral-7b-hf", "family": "LLaVA-NeXT", "licence": "apache-2.0"}
    names = ["forms", "tables", "letters", "charts", "mixed"]
    names += ["docvqa", "infovqa", "chartqa", "textvqa", "ocrbench", "scienceqa", "mathvista", "refcoco"]
    data = json.loads(cli("compile", "--list-data", "--json").out)
    assert list(data) == names and data["chartqa"]["metric"] == "relaxed_accuracy"
    assert [line.split()[0] for line in cli("compile", "--list-data").out.splitlines()] == ["name", *names]
