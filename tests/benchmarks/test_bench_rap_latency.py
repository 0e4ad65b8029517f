"""The script that times pruned attention: every setting in every phase and batch, as shares of the dense layer's time."""

from contextlib import nullcontext

import bench_rap_latency
import pytest
import rap_latency_cases
import torch
from bench_rap_latency import Bench, main, table
from measuring import read_csv
from rap_latency_cases import SETTINGS, Filled, kinds_of

from rotatek_compile.runtime import rap_attention, rap_kernels

SMALL = ("--small", "--device", "cpu", "--repeats", "1", "--batches", "1", "2")
DECODE = ["dense", "K 16, V 24, torch", "K 16, V 24", "K 16, V 24, padded", "K 16, V 16, torch", "K 16, V 16"]


def test_small_run_and_its_table(tmp_path, capsys):
    file = tmp_path / "latency.csv"
    assert main([*SMALL, "--output", str(file)]) == 0
    first, said = capsys.readouterr()
    rows = read_csv(file)
    found = [
        row["setting"] for row in rows if (row["phase"], row["batch"], row["tokens"], row["part"]) == ("decode", "2", "128", "attention")
    ]
    assert found == DECODE
    assert len(rows) == 2 * 2 * 2 * (6 + 3)  # phases, batches and lengths; 6 ways to attend, and three layers
    for row in rows:
        same = [r for r in rows if all(r[k] == row[k] for k in ("phase", "batch", "tokens", "part")) and r["setting"] == "dense"]
        assert len(same) == 1 and abs(float(row["share"]) - float(row["ms"]) / float(same[0]["ms"])) < 0.02
        assert row["graph_ms"] == row["graph_share"] == ""  # there is no GPU
    assert said == "" and "share of the dense module's time by the wall clock of eager calls" in first
    lines = [line for line in first.splitlines() if line.startswith("| ")]
    assert lines[0] == "| phase | batch | setting | 64 | 128 | mean | padded | torch | whole layer |" and len(lines) == 1 + 2 * 2 * 2
    of = {
        (row["setting"], row["tokens"]): row["share"]
        for row in rows
        if (row["phase"], row["batch"], row["part"]) == ("prefill", "2", "layer")
    }
    cells = lines[7].split(" | ")
    assert cells[:3] == ["| prefill", "2", "K 16, V 24"] and "-" not in cells
    assert float(cells[-1].strip(" |")) == pytest.approx(sum(float(of["K 16, V 24", n]) for n in ("64", "128")) / 2, abs=6e-4)
    assert main(["--print", str(file)]) == 0 and capsys.readouterr().out == first
    assert not rap_kernels._left_out


def test_the_table_is_of_graphs_and_has_gaps():
    about = {"device": "H", "dtype": "bfloat16", "torch": "2", "transformers": "5"}
    base = {"phase": "decode", "batch": 8, "part": "attention"} | about
    rows = [
        base | {"tokens": 2048, "setting": "dense", "share": 1.0, "graph_share": 1.0},
        base | {"tokens": 2048, "setting": "dense", "share": 1.0, "graph_share": 1.0, "part": "layer"},
        base | {"tokens": 2048, "setting": "K 8, V 4, torch", "share": 9.0, "graph_share": 2.0},
        base | {"tokens": 2048, "setting": "K 8, V 4", "share": 9.0, "graph_share": 0.75},
        base | {"tokens": 2048, "setting": "K 8, V 4", "share": 9.0, "graph_share": 0.875, "part": "layer"},
        base | {"tokens": 4096, "setting": "dense", "share": 1.0, "graph_share": 1.0},
        base | {"tokens": 4096, "setting": "K 8, V 4, torch", "share": 9.0, "graph_share": 3.0},
        base | {"tokens": 4096, "setting": "K 8, V 4", "share": 9.0, "graph_share": 0.5},
        base | {"tokens": 4096, "setting": "K 8, V 8", "share": 9.0, "graph_share": ""},
    ]
    assert table(rows).splitlines() == [
        "H, bfloat16, torch 2, transformers 5; share of the dense module's time in a CUDA graph",
        "",
        "| phase | batch | setting | 2,048 | 4,096 | mean | padded | torch | whole layer |",
        "|---|---|---|---|---|---|---|---|---|",
        "| decode | 8 | K 8, V 4 | 0.750 | 0.500 | 0.625 | - | 2.500 | 0.875 |",
        "| decode | 8 | K 8, V 8 | - | - | - | - | - | - |",
    ]


@pytest.fixture
def bench():
    return Bench(True, torch.device("cpu"), torch.float32, 1, 60.0)


def test_one_way_that_fails_loses_no_other(bench, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no memory\nfor this")

    monkeypatch.setattr(rap_attention, "equal_widths", broken)  # padding
    bench.point("decode", 1, 64)
    assert "K 16, V 24, padded: does not run here (RuntimeError: no memory)" in capsys.readouterr().err
    assert list(dict.fromkeys(row["setting"] for row in bench.rows)) == [name for name in DECODE if "padded" not in name]


def test_what_is_wrong_is_not_timed(bench, monkeypatch, capsys):
    right = rap_attention.equal_widths
    monkeypatch.setattr(rap_attention, "equal_widths", lambda q, k, v: right(q, k, 2 * v))
    bench.point("decode", 1, 64)
    assert "padded: does not run here (ValueError: its output is off by 1)" in capsys.readouterr().err


def test_dense_may_fail_too(bench, monkeypatch):
    times = bench.times
    monkeypatch.setattr(bench, "times", lambda kind, *args: times(kind, *args) if kind.setting else 1 / 0)
    bench.point("decode", 1, 64)
    assert len(bench.rows) == 7 and {row["share"] for row in bench.rows} == {""}


def test_nothing_is_begun_when_time_is_up(bench, capsys):
    bench.until = 0
    bench.point("prefill", 1, 64)
    assert not bench.rows and "dense: not begun, the time is up" in capsys.readouterr().err


def test_kernels_are_on_and_off(bench, monkeypatch):
    """Rows "torch" leave them out; padded ones have that for RoPE only."""
    asked = []
    monkeypatch.setattr(rap_kernels, "runs_on", lambda device: asked.append(kind.name) and False)
    x, right = torch.randn(1, 1, 64), {}
    places = bench.rope(x, torch.tensor([[63]]))
    for kind in kinds_of(bench.settings):
        with torch.inference_mode():
            bench.times(kind, "decode", x, places, 64, right)
    assert set(asked) == {name for name in DECODE if name != "dense" and "torch" not in name}
    assert len(bench.modules[None]) == rap_latency_cases.COPIES and bench.layer.self_attn not in bench.modules[None]
    assert bench_rap_latency.COPIES == rap_latency_cases.COPIES


def test_graph_time_is_that_of_one_step(monkeypatch):
    """With CUDA's classes played on the CPU: replays of 8, 6 and 7 ms of two steps are 3.5 ms each."""
    calls, times = [], iter((8.0, 6.0, 7.0))

    class Fake:
        def __init__(self, *args, **kwargs):
            pass

        wait_stream = replay = record = synchronize = lambda self, *args: calls.append("")
        elapsed_time = lambda self, other: next(times)  # noqa: E731

    for name in ("Stream", "CUDAGraph", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Fake)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: nullcontext())
    monkeypatch.setattr(bench_rap_latency, "ENOUGH", 0)
    steps = []
    assert bench_rap_latency.graph_ms([lambda: steps.append(1), lambda: steps.append(2)], 20) == 3.5
    assert steps == [1, 2, 1, 2]  # a warm-up and the capture


def test_ways_of_real_settings():
    names = [kind.name for kind in kinds_of(SETTINGS)]
    assert len(names) == 1 + 2 * 7 + 5 and "K 80, V 96, padded" in names and "K 88, V 88, padded" not in names
    kept = {name: (2 * w.pairs + w.value) / 256 for name, w in SETTINGS.items()}
    assert sorted(kept.values()) == [0.6875] * 6 + [0.75] and kept["K 96, V 96"] == 0.75
    assert all(name == f"K {2 * w.pairs}, V {w.value}" for name, w in SETTINGS.items())


def test_a_filled_cache_takes_one_token_in_place():
    cache = Filled(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 4))
    keys, values = cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 4), 0)
    assert keys is cache.keys and keys[0, 0, :, 0].tolist() == [0, 0, 1] and values[0, 0, :, 3].tolist() == [0, 0, 1]
    prefill = torch.ones(1, 1, 5, 2)
    assert cache.update(prefill, prefill, 0)[0] is prefill
