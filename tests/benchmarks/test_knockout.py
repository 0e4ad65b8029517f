"""The knock-out script on a random checkpoint: its CSV against knock-outs measured here, and the tables it prints."""

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "knockout.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("rotatek_benchmark_knockout", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, checkpoint, data_file, tmp_path, monkeypatch, capsys):
    def call(*more):
        file = tmp_path / "out" / "knockout.csv"
        sizes = ["--documents", "4", "--calibration", "2", "--batch-size", "3", "--random", "2", "--max-new-tokens", "2"]
        arguments = ["--model", checkpoint, "--data", data_file, "--output", file, "--device", "cpu", "--quiet", *sizes, *more]
        monkeypatch.setattr(sys, "argv", ["knockout.py", *map(str, arguments)])
        script.main()
        with file.open(newline="") as stream:
            return list(csv.DictReader(stream)), capsys.readouterr().out

    return call


def test_rows_and_tables(run, script, checkpoint, data_file):
    from rotatek_compile.calibration_data.registry import open_data
    from rotatek_compile.cutter import Cutter
    from rotatek_compile.documents import Documents
    from rotatek_compile.knockout import all_pairs, drop_all_but_best, knock_out, measure_knockouts
    from rotatek_compile.models import checked_geometry, load_config, load_model, load_processor, resolve

    rows, said = run()
    source = resolve(str(checkpoint))
    geometry = checked_geometry(load_config(source))
    model = load_model(source, torch.float32, torch.device("cpu"))
    eos = model.generation_config.eos_token_id
    items = Documents(open_data(str(data_file), "evaluation"), range(4), load_processor(source), geometry, eos)
    cutter = Cutter(model, geometry, {}, span_all=False)
    pairs = all_pairs(geometry)
    single = knock_out(cutter, items, [[pair] for pair in pairs])
    got = [row for row in rows if row["kind"] == "single"]
    assert [(int(row["layer"]), int(row["head"])) for row in got] == pairs
    assert [float(row["kl"]) for row in got] == pytest.approx(single.per_token().tolist(), rel=1e-3)
    assert all(float(row["kl_low"]) <= float(row["kl"]) <= float(row["kl_high"]) for row in got)
    chosen = measure_knockouts(cutter, items[:2], True)
    assert [float(row["calibration_kl"]) for row in got] == pytest.approx(torch.cat(list(chosen.values())).tolist(), rel=1e-3)
    kept = {(row["kind"], int(row["kept"])): row for row in rows if row["kind"] != "single"}
    assert set(kept) == {("dense", 6), ("none", 0), *((kind, n) for kind in ("best", "random") for n in (1, 2, 3))}
    best = knock_out(cutter, items, [drop_all_but_best(chosen, 0.25)])
    assert float(kept["best", 2]["kl"]) == pytest.approx(float(best.per_token()[0]), rel=1e-3)
    assert float(kept["dense", 6]["kl"]) < 1e-9
    assert kept["random", 2]["sets"] == "2"
    assert {row["model"] for row in rows} == {checkpoint.name}  # no path of this machine
    assert "| all | 4 | 6 | " in said
    assert "| 6 of 6 (dense) | 0.000 [0.000, 0.000] | 0 [0, 0] | - | - |" in said
    assert len([line for line in said.splitlines() if " of 6 " in line]) == 5


def test_summary_by_hand(script):
    summary = script.Summary(np.array([True, False, True]), np.array([2, 5, 3]), 0)
    assert summary.kl(np.array([[1.0, 3.0], [9.0, 9.0], [4.0, 4.0]]))["kl"] == pytest.approx((2 + 4) / 5)
    assert summary.exact(np.array([[1, 0], [0, 0], [1, 1]]))["exact_match"] == pytest.approx(0.75)


def test_skills_get_their_own_rows(run, script, monkeypatch):
    from dataclasses import replace

    registered = script.open_data

    def with_skills(*arguments):
        data = registered(*arguments)
        sample = data.sample
        return replace(data, sample=lambda n: replace(sample(n), skill=("count", "copy")[n % 2]))

    monkeypatch.setattr(script, "open_data", with_skills)
    rows, said = run()
    assert list(dict.fromkeys((row["skill"], row["documents"]) for row in rows)) == [("all", "4"), ("copy", "2"), ("count", "2")]
    assert "| exact match, pairs kept | 6 | 0 | 1 | 2 | 3 |" in said
