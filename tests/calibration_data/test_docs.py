"""docs/data.md: its table is the one the code has, and its commands run."""

import re
import shlex
from pathlib import Path

import pytest

from rotatek_compile.calibration_data.known_sets import KNOWN
from rotatek_compile.calibration_data.registry import listing
from rotatek_compile.scores import METRICS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


def table_after(heading):
    """Rows of the first table of a section, as lists of cells without markup."""
    lines = TEXT.split(f"## {heading}\n")[1].splitlines()
    rows = [
        line for line in lines[: lines.index(next(x for x in lines if x.startswith("- ") or x.startswith("A new")))] if line.startswith("|")
    ]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_table_of_benchmarks():
    shown = listing()
    columns = ("calibration", "evaluation", "licence", "metric")
    assert table_after("Benchmarks by name") == [[name, *(shown[name][column] for column in columns)] for name in KNOWN]


def test_table_of_metrics():
    assert [row[0] for row in table_after("Metrics")] == list(METRICS)


def test_answer_lengths():
    special = {name: known.max_new_tokens for name, known in KNOWN.items() if known.max_new_tokens != 32}
    for name, tokens in special.items():
        assert f"{tokens} for `{name}`" in TEXT
    assert len(special) == 3


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(cli, checkpoint, compiled, hub_cache, make_png, small_run, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    for name in ("HuggingFaceM4/DocumentVQA", "HuggingFaceM4/ChartQA", "lmms-lab-encoder/DocVQA", "lmms-lab-encoder/RefCOCO"):
        hub_cache(name)
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "page1.png").write_bytes(make_png(1, (96, 80)))
    example = next(line.strip() for line in TEXT.splitlines() if line.startswith('    {"file_name"'))
    (tmp_path / "scans" / "metadata.jsonl").write_text(example + "\n")
    program, *words = shlex.split(line)
    small = small_run if program == "rotatek-compile" else ("--num-samples", 2, "--max-new-tokens", 2, "--device", "cpu")
    named = {"llava-next": checkpoint} | ({"artifact": compiled} if program == "rotatek-eval" else {})
    ended = cli(program.removeprefix("rotatek-"), *(named.get(word, word) for word in words), *small)
    assert ended.code == 0, ended.err
