"""README and docs show what the committed results print."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fill_tables.py"
spec = importlib.util.spec_from_file_location("fill_tables", SCRIPT)
fill_tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fill_tables)


def test_tables_are_those_of_the_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--check"])
    ended = fill_tables.main()
    assert (ended, capsys.readouterr().out) == (0, "")


def test_a_stale_table_is_noticed_and_written(monkeypatch, capsys, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "rivals.md").write_text("before\n<!-- t -->\nold\n<!-- /t -->\nafter\n")
    monkeypatch.setattr(fill_tables, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr(fill_tables, "prints", lambda: {("docs/rivals.md", "t"): [["a"], ["b"]]})
    monkeypatch.setattr(fill_tables, "printed", lambda command: f"| {command[0]} |")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--check"])
    assert fill_tables.main() == 1 and "old" in (tmp_path / "docs" / "rivals.md").read_text()
    assert capsys.readouterr().out == "docs/rivals.md: t is not what the results print\n"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert fill_tables.main() == 0
    assert (tmp_path / "docs" / "rivals.md").read_text() == "before\n<!-- t -->\n| a |\n\n| b |\n<!-- /t -->\nafter\n"


def test_markers_must_stand_once():
    with pytest.raises(ValueError, match="<!-- t --> and <!-- /t --> must stand once each"):
        fill_tables.filled("<!-- t -->", "t", "")
