"""Tuning and leaving text: the search for settings, the row it prints, and what a block that leaves the window costs."""

import csv
import sys

import bench_retire
import pytest
import torch
import tune_decode
from decode_cases import Case, make_layer
from step_caches import QUESTION

from rotatek_compile.kernels.decode_tuning import Tuning
from rotatek_compile.kernels.table import KIND, LENGTH, Kind


@pytest.fixture
def on_the_cpu(monkeypatch):
    import decode_cases
    import decode_timing

    for module in (decode_cases, decode_timing, tune_decode):
        monkeypatch.setattr(module, "place", lambda: "cpu")


def test_the_search_keeps_what_is_faster(on_the_cpu, monkeypatch):
    """One setting after the other; gains below half a percent and what does not fit are left."""

    def us(self, key, tuning):
        found = {2: 10.0, 3: 8.0}.get(tuning.stages, float("inf"))
        found *= 0.996 if tuning.programs == 4 else 1.0
        return found * (0.5 if tuning.many_registers is None else 1) * (0.9 if tuning.nibble > 1 else 1)

    monkeypatch.setattr(tune_decode.Trial, "us", us)
    trial = tune_decode.Trial({(1, 256): 1}, tune_decode.time.perf_counter(), 60)
    found = trial.best(Tuning(stages=2))
    assert found == Tuning(stages=3, many_registers=None, softmax=39.2, byte=0.728, nibble=1.26)
    row = '"A GPU": Tuning(softmax=39.2, byte=0.728, nibble=1.26, many_registers=None),'
    assert tune_decode.row_text("A GPU", found) == row
    assert tune_decode.Trial({(1, 256): 1}, 0.0, 0.0).best(Tuning(stages=2)) == Tuning(stages=2)  # no time
    scaled = tune_decode.changed(Tuning(), "costs", 0.5)
    assert (scaled.softmax, scaled.nibble, scaled.programs) == (14.0, 0.45, 3)


def test_settings_make_the_plan(on_the_cpu, monkeypatch):
    layers = [make_layer(Case(1, 2048), *tune_decode.CONFIGURATIONS["mixed, mean K 32x4 V 64x4"], seed=1)]
    many, few = (tune_decode.planned(layers, Tuning(filled_programs=number))[0].view.splits for number in (32, 8))
    assert (many.num_splits, few.num_splits) == (56, 32)
    trial = tune_decode.Trial({(1, 256): 1}, 0.0, 0.0)
    key = (1, 256, "K 32x4 V 64x4")
    assert trial.us(key, Tuning()) == trial.us(key, Tuning()) and len(trial.rows) == 1 and trial.rows[0]["plan"] == key[2]
    monkeypatch.setattr(tune_decode, "timed_shape_error", lambda *_, **__: 1.0)
    with pytest.raises(SystemExit, match="error 1.00e"):
        trial.us(key, Tuning(stages=2))


@torch.no_grad()
@pytest.mark.parametrize(("span", "blocks"), [("visual", [32, 256]), ("all", [64, 256])])
def test_text_has_room_or_leaves_and_is_attended(monkeypatch, span, blocks):
    """Raw text stays in windows that get room for a block, text that is coded leaves them; the layer still attends to everything."""
    model, seen = bench_retire.model_of_one_layer(True, torch.device("cpu")), []

    class Seen(bench_retire.Bench):
        def retire(self, block):
            before = self.layer.store.window.host.tolist()
            super().retire(block)
            window, table = self.layer.store.window, self.layer.store.table
            seen.append(
                (before[0], window.host.tolist(), window.buffer.shape[3], int(table[..., LENGTH].sum()), set(table[:, 0, -1, KIND]))
            )

    monkeypatch.setattr(bench_retire, "Bench", Seen)
    rows = bench_retire.rows_at(model, 2, 200, span, rounds=1)
    assert [row["block"] for row in rows] == blocks and all(row["error"] < 1e-5 for row in rows)
    stored, turns = 0, [2 * bench_retire.ANSWER // block + 1 if span == "visual" else len(seen) // 2 for block in blocks]
    assert len(seen) == sum(turns)
    for number, (before, windows, room, tokens, kinds) in enumerate(seen):
        block = blocks[number >= turns[0]]
        assert kinds == {int(Kind.CODED)}
        if span == "visual":  # windows go on growing over an answer, and begin anew with the next
            place = (number - turns[0] * (number >= turns[0])) % (bench_retire.ANSWER // block)
            assert before == 128 + place * block and windows == [before] * 2
            assert room == before + block and tokens == 2 * 2 * (200 - QUESTION)
        else:
            assert windows == [128, 128] and before == 128 + block and tokens > stored
        stored = tokens
    monkeypatch.setattr(bench_retire.Bench, "error", lambda self: 1.0)
    with pytest.raises(SystemExit, match="error 1.00e"):
        bench_retire.rows_at(model, 1, 200, "visual", rounds=1)


def test_the_command_saves_what_it_prints(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_retire, "rows_at", lambda model, b, t, span: [dict.fromkeys(bench_retire.COLUMNS, 0.5) | {"span": span}])
    monkeypatch.setattr(sys, "argv", ["bench_retire.py", "--small", "--output", str(tmp_path)])
    bench_retire.main()
    with (tmp_path / "retire.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["span"] for row in rows] == ["visual", "all"]
    assert capsys.readouterr().out.endswith("\n".join(bench_retire.table(rows)) + "\n")
    monkeypatch.setattr(sys, "argv", ["bench_retire.py", "--print", str(tmp_path / "retire.csv")])
    bench_retire.main()
    assert capsys.readouterr().out == "\n".join(bench_retire.table(rows)) + "\n"


def test_shares_of_text_that_leaves():
    """The GPU's own work: 640 us for 64 tokens are 10 per token, a quarter of 40."""
    times = {"attend_us": "40", "append_us": "-0.25", "retire_us": "2560", "busy_us": "640", "share": "0.99375"}
    row = {
        "batch": "8",
        "tokens": "4096",
        "dense_MB": "134.22",
        "span": "all",
        "block": "64",
        "device": "a GPU",
        "torch": "2",
        "triton": "3",
    }
    assert bench_retire.table([row | times])[-1] == "| 8 | 4096 | 134 | coded | 64 | 40.0 | -0.2 | 2560.0 | 640.0 | 0.994 | 0.250 |"
