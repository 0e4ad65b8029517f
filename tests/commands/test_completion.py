"""What Tab offers in a shell, and that neither it nor a wrong name waits for torch."""

import subprocess
import sys
from importlib import import_module

import pytest
from click.shell_completion import ShellComplete

from rotatek_compile import names
from rotatek_compile.runtime.rivals.registry import RIVALS


def offered(command, *words):
    """(type, value) pairs for the last word."""
    complete = ShellComplete(import_module(f"rotatek_compile.commands.{command}").command, {}, command, "_COMPLETE")
    return [(item.type, item.value) for item in complete.get_completions(list(words[:-1]), words[-1])]


def plain(*values):
    return [("plain", value) for value in values]


def test_names_are_those_of_the_registry():
    assert tuple(RIVALS) == names.RIVAL_NAMES


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (("compile", "--method", "ki"), ("kivi4", "kivi2")),
        (("compile", "--basis", ""), ("two-sided", "pca", "paper")),
        (("compile", "--allocation", "a"), ("allocated",)),
        (("compile", "--span", ""), ("visual", "all")),
        (("compile", "--model", "llava-next"), ("llava-next", "llava-next-llama3", "llava-next-vicuna")),
        (("compile", "--calib", "t"), ("tables", "textvqa")),
        (("eval", "a", "--data", "char"), ("charts", "chartqa")),
        (("eval", "a", "--method", "head"), ("head-drop", "head-drop-native")),
        (("eval", "a", "--ask", ""), ("after", "with")),
        (("eval", "a", "--suite", ""), ("rivals", "proof")),
        (("run", "a", "--backend", "t"), ("triton", "torch")),
        (("run", "a", "--dtype", "f"), ("float32", "float16")),
    ],
)
def test_names(words, values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert offered(*words) == plain(*values)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("run", "art"), "dir"),
        (("eval", "art"), "dir"),
        (("inspect", "art"), "dir"),
        (("inspect", "art", "art"), "dir"),
        (("push", "art"), "dir"),
        (("run", "a", "--image", "art"), "file"),
        (("run", "a", "--video", "art"), "file"),
        (("compile", "--calib", "art"), "file"),
        (("eval", "a", "--data", "art"), "file"),
        (("eval", "a", "--learned", "art"), "file"),
        (("compile", "--model", "art"), "dir"),
        (("compile", "--output", "art"), "file"),
    ],
)
def test_paths_are_the_shells_to_complete(words, kind):
    assert offered(*words) == [(kind, "art")]


def test_names_beside_files(tmp_path, monkeypatch):
    for name in ("formulas.csv", "other.csv", ".formed"):
        (tmp_path / name).touch()
    (tmp_path / "forests").mkdir()
    (tmp_path / "qwen-mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert offered("compile", "--calib", "fo") == plain("forms", "forests/", "formulas.csv")
    assert offered("compile", "--model", "qwen") == plain("qwen2.5-vl", "qwen3-vl", "qwen3", "qwen-mine/")
    assert offered("compile", "--calib", "") == plain(*_data(), "forests/", "formulas.csv", "other.csv", "qwen-mine/")


def _data():
    from rotatek_compile.calibration_data.registry import listing

    return list(listing())


WITHOUT_TORCH = """
import sys
from rotatek_compile.commands import main
sys.argv = sys.argv[1:]
try:
    getattr(main, sys.argv[0].replace("rotatek-", "") + "_main")()
except SystemExit as stop:
    assert not {"torch", "transformers", "datasets"} & sys.modules.keys(), "heavy"
    sys.exit(stop.code)
"""


@pytest.mark.parametrize(
    "words",
    [
        "rotatek-compile --model tiny-llava-next --calib forms --keep-ratio 1.5",
        "rotatek-compile --model tiny-llava-next --calib forms --method kivi3",
        "rotatek-compile --model lava --calib forms",
        "rotatek-compile --model tiny-llava-next --calib form",
        "rotatek-eval artifact --data form",
        "rotatek-eval artifact --data forms --suite all",
        "rotatek-run artifact --prompt What --model lava",
        "rotatek-run artifact --prompt What --keep-ratio 1.5",
    ],
)
def test_wrong_names_are_refused_before_torch_is_imported(words):
    ended = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words.split()], capture_output=True, text=True)
    assert ended.returncode == 2 and "heavy" not in ended.stderr, ended.stderr


def test_completion_without_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("_ROTATEK_COMPILE_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "rotatek-compile --calib doc")
    monkeypatch.setenv("COMP_CWORD", "2")
    ended = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, "rotatek-compile"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "plain,docvqa\n"), ended.stderr
