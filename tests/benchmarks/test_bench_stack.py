"""The table of RAP, RotateK and both at equal bytes: one run on a tiny model, printed again from its file."""

import csv
import sys

import bench_stack
import pytest


def test_equal_bytes(make_checkpoint, data_file, tmp_path, monkeypatch, capsys):
    model = make_checkpoint(name="wide", layers=1, heads=2, kv_heads=1, head_dim=128)
    file, work = tmp_path / "stack.csv", tmp_path / "work"
    ask = ["--model", model, "--calib", data_file, "--data", data_file, "--work", work, "--output", file, "--device", "cpu", "--quiet"]
    ask += ["--shares", 0.6, 0.25, 0.001, "--keep", 0.6, "--equal", "images", "--num-samples", 2, "--documents", 2, "--batch-size", 1]
    monkeypatch.setattr(sys, "argv", ["bench_stack.py", *map(str, ask), "--max-new-tokens", "2"])
    monkeypatch.setattr(bench_stack, "TRIED", 2)
    with pytest.raises(SystemExit) as stop:
        bench_stack.main()
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert sorted(folder.name for folder in work.iterdir()) == ["rap-0.6", "rotatek", "stacked-0.6"]
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    ways = [(float(row["share"]), row["way"]) for row in rows]
    both = ["rotatek alone", "rap+rotatek"]
    assert ways == [(0.6, "rap alone"), *((share, way) for share in (0.6, 0.25) for way in both)]  # means alone take more than 0.001
    for row in rows[1:]:
        assert float(row["span_share"]) == pytest.approx(float(row["share"]), rel=0.15)
        assert float(row["kl_low"]) <= float(row["kl"]) <= float(row["kl_high"])
    assert float(rows[0]["kv_share"]) == pytest.approx(0.6, abs=0.05) and rows[0]["span_share"] == ""
    parameters = {row["way"]: int(row["parameters"]) for row in rows}
    assert parameters["rap alone"] == parameters["rap+rotatek"] < parameters["rotatek alone"]
    assert len({row["kv_bytes_dense"] for row in rows}) == 1
    monkeypatch.setattr(sys, "argv", ["bench_stack.py", "--print", str(file)])
    with pytest.raises(SystemExit):
        bench_stack.main()
    assert capsys.readouterr().out == said and "| 0.25 | rap 0.6 + rotatek | 0." in said
