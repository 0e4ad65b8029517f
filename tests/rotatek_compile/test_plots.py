"""Plots of results: files, equal for equal results, and a sentence where matplotlib is missing."""

import sys

import pytest

from rotatek_compile.errors import RotateKError
from rotatek_compile.plots import plot_results


def row(method, span, score, kl, ask="after", skill="all"):
    numbers = {"span_bytes": span, "span_bytes_dense": 100.0 if span else 0.0, "exact_match": score, "kl": kl}
    limits = {f"{name}_{end}": numbers[name] for name in ("exact_match", "kl") for end in ("low", "high")}
    return {"ask": ask, "skill": skill, "method": method} | {k: str(v) for k, v in (numbers | limits).items()}


METHODS = (("dense", 0, 1, 0), ("int4", 26, 0.9, 0.1), ("int8", 51, 1, 0.0))
ROWS = [row(*numbers, ask) for ask in ("after", "with") for numbers in METHODS]


def test_files(tmp_path):
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        written = plot_results(ROWS, folder)
        assert sorted(file.name for file in written) == ["exact_match.png", "exact_match.svg", "kl.png", "kl.svg"]
    assert (first / "kl.png").read_bytes()[:4] == b"\x89PNG" and (first / "kl.svg").read_text().count("int4") >= 1
    assert (first / "kl.svg").read_bytes() == (second / "kl.svg").read_bytes()


def test_budgets_and_keep_ratios_are_two_curves(tmp_path):
    """They would cross one another: uniform native ranks take more bytes than any budget."""
    pytest.importorskip("matplotlib")
    own = [
        row("rotatek", span, 1, 0.01 * span) | {"kv_budget": budget} for span, budget in ((12, "0.125"), (25, "0.25"), (75, ""), (60, ""))
    ]
    plot_results([*ROWS[:3], *own], tmp_path)
    drawn = (tmp_path / "kl.svg").read_text()
    assert drawn.count("<!-- rotatek -->") == 1 and drawn.count("<!-- rotatek, uniform ranks -->") == 1


def test_axes_have_figures_of_their_own(tmp_path):
    """A method of Keys alone beside raw Values is no point among plans of both."""
    pytest.importorskip("matplotlib")
    keys = [row("think", 75, 0.8, 0.2) | {"axis": "keys"}, row("think", 62, 0.7, 0.3) | {"axis": "keys"}]
    values = [row("raw Keys", 60, 0.9, 0.01) | {"axis": "values"}]
    written = plot_results([*ROWS[:3], *keys, *values], tmp_path)
    names = {file.name for file in written}
    assert names == {f"{m}{a}.{s}" for m in ("exact_match", "kl") for a in ("", "-keys") for s in ("png", "svg")}
    drawn = {name: (tmp_path / name).read_text() for name in ("kl.svg", "kl-keys.svg")}
    assert "<!-- think -->" in drawn["kl-keys.svg"] and "<!-- think -->" not in drawn["kl.svg"]
    assert "<!-- int4 -->" in drawn["kl.svg"] and "<!-- int4 -->" not in drawn["kl-keys.svg"]
    assert "Values raw" in drawn["kl-keys.svg"]


def test_no_such_skill(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(RotateKError, match="no row of skill 'chart'"):
        plot_results(ROWS, tmp_path, "chart")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RotateKError, match=r"plots need matplotlib.*rotatek-compile\[plot\]"):
        plot_results(ROWS, tmp_path)
