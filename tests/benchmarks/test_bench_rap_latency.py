"""The script that times pruned attention: every setting in every phase, as shares of the dense layer's time."""

import torch
from bench_rap_latency import Filled, main
from measuring import read_csv


def test_small_run_and_its_table(tmp_path, capsys):
    file = tmp_path / "latency.csv"
    assert main(["--small", "--device", "cpu", "--repeats", "1", "--output", str(file)]) == 0
    first = capsys.readouterr().out
    rows = read_csv(file)
    settings = ["dense", "K 16, V 24", "K 16, V 24, padded"]
    assert len(rows) == 2 * 2 * 2 * len(settings) and [row["setting"] for row in rows[:3]] == settings
    for row in rows:
        dense = next(r for r in rows if r["setting"] == "dense" and all(r[k] == row[k] for k in ("phase", "tokens", "part")))
        assert abs(float(row["share"]) - float(row["ms"]) / float(dense["ms"])) < 0.02
    lines = [line for line in first.splitlines() if line.startswith("| ")]
    assert lines[0] == "| phase | part | setting | 64 | 128 | mean |" and len(lines) == 1 + 2 * 2 * 2
    assert main(["--print", str(file)]) == 0 and capsys.readouterr().out == first


def test_a_filled_cache_takes_one_token_in_place():
    cache = Filled(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 4))
    keys, values = cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 4), 0)
    assert keys is cache.keys and keys[0, 0, :, 0].tolist() == [0, 0, 1] and values[0, 0, :, 3].tolist() == [0, 0, 1]
    prefill = torch.ones(1, 1, 5, 2)
    assert cache.update(prefill, prefill, 0)[0] is prefill
