"""The script that measures token selection: which rows it makes, and what it says of the claim."""

import importlib.util
import sys
from pathlib import Path

import bench_codec  # noqa: F401 - the folder is on the path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
spec = importlib.util.spec_from_file_location("rotatek_bench_tokens", FOLDER / "bench_tokens.py")
bench = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = bench
spec.loader.exec_module(bench)

from rotatek_compile.methods import Entry  # noqa: E402
from rotatek_compile.outcomes import Outcome, Row  # noqa: E402
from rotatek_compile.suite import Measured  # noqa: E402

FACTS = {name: name for name in ("model", "data", "device", "dtype", "torch", "transformers", "rotatek")}


def row(name, exact, span):
    sizes = {"total": 1.0, "dense": 1.0, "stored": 1.0, "span": span, "span_dense": 1.0, "window": 0.0, "basis": 0.0, "slack": 0.0,
             "tables": 0.0, "fallback_heads": 0.0}  # fmt: skip
    return Row(name, [Outcome(str(n), "", name, bool(one), 0.0, 0.5, 2, "", sizes) for n, one in enumerate(exact)])


def test_rows_and_the_claim():
    dense = row("dense", [1] * 20, 0.0)
    settings = {
        "a": ("tokens", "fastv", 0.25, 0.25), "b": ("channels", "", 1.0, 0.25), "c": ("joint", "fastv", 0.5, 0.25),
        "d": ("tokens", "snapkv", 0.25, 0.25), "e": ("joint", "snapkv", 0.5, 0.25),
        "f": ("tokens", "divprune", 0.25, 0.25), "g": ("joint", "divprune", 0.5, 0.25),
    }  # fmt: skip
    exact = {"a": [1] * 10 + [0] * 10, "b": [1] * 20, "c": [1] * 18 + [0] * 2, "d": [1] * 16 + [0] * 4, "e": [1] * 16 + [0] * 4,
             "f": [1] * 18 + [0] * 2, "g": [1] * 20}  # fmt: skip
    entries = {name: Entry(name, lambda: None) for name in settings}
    measured = [Measured("after", Entry("dense", lambda: None), dense, dense)]
    measured += [Measured("after", entries[name], row(name, exact[name], 0.25), dense) for name in settings]
    rows = bench.table(measured, {name: (entries[name], settings[name]) for name in settings}, FACTS)
    by = {(r["kind"], r["token_method"]): r for r in rows}
    assert float(by["joint", "fastv"]["over_tokens"]) == 0.4 and by["joint", "fastv"]["claim"] == "holds"
    assert by["joint", "snapkv"]["claim"] == "fails"  # no better
    assert "claim" not in by["joint", "divprune"]  # tokens alone have lost a tenth only
    assert float(by["channels", ""]["share"]) == 0.25 and float(by["tokens", "fastv"]["lost"]) == 0.5
    text = bench.markdown(rows)
    assert "in 1 of 2 comparisons" in text and "| 0.25 | fastv and channels | 0.5 | 0.2500 | 0.900" in text
    short = bench.brief([{name: str(value) for name, value in r.items()} for r in rows])
    assert "| budget | channels alone | fastv alone / 0.5 | snapkv alone / 0.5 | divprune alone / 0.5 |" in short
    assert "| 0.25 | 1.000 | 0.500 / 0.900 | 0.800 / 0.800 | 0.900 / 1.000 |" in short and "in 1 of 2 comparisons" in short
