"""How tests of examples run them: commands of ours in this process, scripts and fragments through their own parsers."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(name, file):
    """A module of the tests or tools by its file."""
    spec = importlib.util.spec_from_file_location(name, ROOT / file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


reading = load("rotatek_page_examples", "tests/page_examples.py")
SMALL = {
    "compile": ["--num-samples", 2, "--batch-size", 1, "--device", "cpu", "--quiet", "--json"],
    "run": ["--max-new-tokens", 8, "--device", "cpu", "--json"],
    "eval": ["--num-samples", 1, "--max-new-tokens", 8, "--device", "cpu", "--quiet", "--json"],
    "push": ["--json"],
    "inspect": [],
}


def parse(example):
    """Our command with real options and values; a fragment may lack arguments, and stand for others by `...`."""
    import click

    from rotatek_compile.commands.main import group

    _, name = example.words[0].split("-")
    command = group.get_command(None, name)
    try:
        command.make_context(name, [word for word in example.words[1:] if word != "..."])
    except click.MissingParameter:
        assert "..." in example.text or example.kind == "inline", example


class Parsed(Exception):
    """Stops a script once its own parser took the arguments."""


@pytest.fixture
def parse_script(monkeypatch):
    """`python FILE ARGUMENTS` up to the parsed arguments, which it returns."""
    import argparse
    import runpy

    stock = argparse.ArgumentParser.parse_args

    def stop(self, *arguments):
        raise Parsed(stock(self, *arguments))

    def parse(example):
        interpreter, script, *words = [word for word in example.words if not re.match("[A-Z_]+=", word)]
        assert interpreter == "python", example
        monkeypatch.setattr(sys, "argv", [script, *words])
        monkeypatch.syspath_prepend((ROOT / script).parent)
        with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return parsed.value.args[0]

    return parse


@pytest.fixture
def make(parse_script):
    """`make TARGET` has such a target, and the scripts that it would run take its arguments."""

    def check(example):
        told = subprocess.run(["make", "-n", *example.words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert told.returncode == 0 and told.stdout.strip(), (example, told.stderr)
        for line in told.stdout.splitlines():
            line = re.sub(r"\S+/bin/", "", line)
            script = re.match(r"python \w+/\w+\.py", line)
            if script and "demo.py" not in line:
                parse_script(reading.Example("Makefile", 0, "make", line))
            elif line.startswith("rotatek-"):
                parse(reading.Example("Makefile", 0, "make", line))
        return told.stdout

    return check


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to run in, and less to measure."""
    from rotatek_compile import compile_options, compiler, suite

    monkeypatch.setattr(compile_options, "SENSITIVITY_SAMPLES", 1)
    monkeypatch.setattr(suite, "QUICK_DOCUMENTS", 1)
    monkeypatch.setattr(compiler, "draw_heads", lambda *_: False)  # the card's picture: test_card.py
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(cli, here):
    """Runs an example of a command of ours and looks at what it made; words in `replace` stand for others."""

    def call(example, replace=(), more=()):
        name = example.words[0].removeprefix("rotatek-")
        words = [dict(replace).get(word, word) for word in shlex.split(example.text.removesuffix(" ..."))[1:]]
        small = [*SMALL[name], *more]
        if "--quick" in words:
            small = small[2:]
        if name == "compile" and any(word.startswith("--list-") for word in words):
            small = []
        ended = cli(name, *words, *small)
        assert ended.code == 0, (str(example), ended.err)
        said = json.loads(ended.out) if "--json" in [*words, *small] else ended.out
        looked = globals()[f"look_at_{name}"](said, words)
        assert looked is not False, (str(example), said)
        return said

    return call


def look_at_compile(said, words):
    if isinstance(said, str):  # a list
        return len(said.splitlines()) > 5
    made = {file.name for file in Path(said["artifact"]).iterdir()}
    assert made >= {"rotatek_config.json", "rotatek.safetensors", "report.json", "README.md"}
    return said["kv_bytes_per_token"]["compressed"] < said["kv_bytes_per_token"]["dense"]


def look_at_run(said, words):
    assert said["text"].strip() and 0 < said["new_tokens"] <= 8
    assert ("--compare-dense" in words) == (said["dense"] is not None)
    return 0 < said["kv_bytes"] < said["kv_bytes_dense"]


def look_at_eval(said, words):
    named = [words[n + 1] for n, word in enumerate(words) if word == "--method"]
    methods = [row["method"] for row in said["rows"]]
    assert methods[:2] == ["dense", "artifact"] and (not named or methods[2:] == named)
    assert all(0 <= row["exact_match"] <= 1 and row["kv_bytes"] > 0 for row in said["rows"])
    if "--output" in words:
        made = {file.name for file in Path(words[words.index("--output") + 1]).iterdir()}
        assert made >= {"results.csv", "documents.jsonl"}
    return said["samples"] == 1


def look_at_inspect(said, words):
    if "--html" not in words:
        return bool(said)
    page = Path(words[words.index("--html") + 1]).read_text(encoding="utf-8")
    assert said.startswith("wrote ") and page.lower().startswith("<!doctype html") and page.count("<svg") > 3
    return re.search(r"<script|<link|\bsrc=|url\(http", page) is None


def look_at_push(said, words):
    return said["repo"] == words[1] and re.fullmatch("[0-9a-f]{40}", said["commit"])


@pytest.fixture
def caches(monkeypatch):
    """The caches that `generate` filled, in order."""
    from transformers import GenerationMixin

    stock, filled = GenerationMixin.generate, []

    def generate(self, *arguments, **options):
        whole = options.pop("return_dict_in_generate", False)
        out = stock(self, *arguments, **options, return_dict_in_generate=True)
        filled.append(out.past_key_values)
        return out if whole else out.sequences

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    return filled


def total(cache):
    from rotatek_compile.runtime.accounting import cache_bytes

    return cache_bytes(cache).total
