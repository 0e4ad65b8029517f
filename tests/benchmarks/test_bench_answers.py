"""Whole answers: every step is taken and counted once, text stays, leaves or is coded as a row says, and the table's figures."""

import sys
import types

import bench_answers
import pytest
import step_loops
import torch
from bench_full_size import llava_next, random_model
from bench_steps import SMALL_PLANS
from measuring import read_csv, write_csv

from rotatek_compile.kernels.table import KIND, Kind
from rotatek_compile.runtime.graphs import DecodeGraphs

PLAN = next(iter(SMALL_PLANS.values()))


@pytest.fixture(scope="module")
def model():
    return random_model(llava_next(small=True), torch.device("cpu"))


@torch.no_grad()
@pytest.mark.parametrize("text", bench_answers.KINDS)
def test_a_row_is_what_its_name_says(model, monkeypatch, text):
    caches, seconds = [], iter(range(1, 1000))

    class Seen(bench_answers.Answer):
        def call(self, cache, number):
            assert number == len(caches)
            caches.append(cache)
            super().call(cache, number)

    monkeypatch.setattr(bench_answers, "Answer", Seen)
    for module in (bench_answers, step_loops):  # the clock is read after the warm steps, after 5 more, and twice around the rest
        monkeypatch.setattr(module, "now", lambda device: float(next(seconds) ** 2))
    row = bench_answers.measured(model, "2x192", PLAN, text, types.SimpleNamespace(steps=5, tokens=220))
    assert len(caches) == step_loops.WARM + 220
    assert row["step_ms"] == pytest.approx((4 - 1) / 5 * 1e3)
    assert row["answer_ms"] == pytest.approx((16 - 9 + 4 - 1) / 220 * 1e3)
    layer = caches[-1].layers[0]
    window, kinds = layer.store.window.host, layer.store.table[:, 0, :, KIND].tolist()
    held = 24 + step_loops.WARM + 220
    assert window.tolist() == [held, held] if text == "text stays" else (window <= 128 + 64).all()
    assert any(int(Kind.DENSE) in row for row in kinds) == (text == "text leaves")
    assert layer.prepared.method.span == bench_answers.KINDS[text]


def test_captures_are_those_of_the_answer(model, monkeypatch):
    """The first one comes while the clock is not read yet."""
    bench = bench_answers.Answer(model, 1, 64, 3, 10)
    graphs = types.SimpleNamespace(capture=lambda: DecodeGraphs._captured(None, "history", "call"))
    monkeypatch.setattr(DecodeGraphs, "_captured", lambda self, history, call: f"{history} {call}")
    seen = []
    bench.clock(lambda number: seen.append(graphs.capture()) if number in (2, 16, 20) else None, 3)
    assert bench.captures == 2 and seen == ["history call"] * 3


def test_the_table(capsys, monkeypatch, tmp_path):
    facts = {"model": "m", "point": "8x1", "device": "G", "sm_MHz": 1, "torch": "t", "transformers": "f", "cache_gb": 1.0}
    dense = facts | {"cache": "dense", "text": "", "tokens": 40, "captures": 0, "step_ms": 20.0, "answer_ms": 20.0}
    ours = facts | {"cache": "K", "text": "text stays", "tokens": 500, "captures": 2, "step_ms": 10.0, "answer_ms": 10.4}
    write_csv(tmp_path / "a.csv", [dense, ours], bench_answers.COLUMNS)
    monkeypatch.setattr(sys, "argv", ["bench_answers.py", "--print", str(tmp_path / "a.csv")])
    bench_answers.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "G, torch t, transformers f; answers of 500 tokens"
    assert lines[-2:] == ["| m | 8x1 | dense |  | 20.00 |  |  |  |  |", "| m | 8x1 | K | text stays | 10.00 | 10.40 | 2 | 100 | 1.92 |"]
    monkeypatch.setattr(sys, "argv", ["bench_answers.py", "--small", "--tokens", "30", "--steps", "30"])
    with pytest.raises(SystemExit):
        bench_answers.main()
    assert "pass more --tokens" in capsys.readouterr().err


def test_rows_are_saved_as_they_come(monkeypatch, capsys, tmp_path):
    """A run that is cut keeps what it has measured; the file prints the same table."""
    figures = {"tokens": 9, "captures": 1, "step_ms": 1.2345678, "answer_ms": 2.0, "cache_gb": 0.5}
    seen = []

    def measured(model, point, plan, text, args):
        seen.append((point, plan is None, text))
        assert len(seen) == 1 or len(read_csv(tmp_path / "answers.csv")) == len(seen) - 1
        return figures

    monkeypatch.setattr(bench_answers, "measured", measured)
    monkeypatch.setattr(bench_answers, "random_model", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["bench_answers.py", "--small", "--models", "qwen3-vl-4b", "--output", str(tmp_path)])
    bench_answers.main()
    assert seen == [("2x192", True, ""), *(("2x192", False, text) for text in bench_answers.KINDS)]
    rows, out = read_csv(tmp_path / "answers.csv"), capsys.readouterr().out
    assert [row["step_ms"] for row in rows] == ["1.2346"] * 4 and tuple(rows[0]) == bench_answers.COLUMNS
    assert out.endswith("\n".join(bench_answers.table(rows)) + "\n")
