"""The curves of the decode benchmark: what is measured, what its tables say, and how pages get them."""

import csv
import runpy
import sys
from pathlib import Path

import bench_decode
import decode_baselines
import decode_cases
import decode_curves
import decode_timing
import fill_tables
import print_decode
import pytest
import torch
from decode_cases import Case

FOLDER = Path(print_decode.__file__).parent
FACTS = {"device": "GPU", "torch": "2", "triton": "3", "cudnn": "9", "copy_TBps": "3.00"}


@pytest.fixture
def on_the_cpu(monkeypatch):
    for module in (bench_decode, decode_baselines, decode_cases, decode_timing):
        monkeypatch.setattr(module, "place", lambda: "cpu")


def linear(method, batch, tokens, ms, megabytes):
    place = {"B": batch, "T": tokens, "query_heads": 32, "heads": 8, "method": method}
    return place | {"ms": ms, "read_MB": megabytes, "us_per_1k_tokens": ms * 1e6 / tokens, "TBps": megabytes / ms / 1e3} | FACTS


def small(method, heads, batch, tokens, ms, megabytes):
    query_heads, kv_heads = heads.split("/")
    place = {"B": batch, "T": tokens, "query_heads": query_heads, "heads": kv_heads, "method": method}
    return place | {"dense_MB": megabytes, "ms": ms} | FACTS


LINEAR = [
    linear("SDPA cuDNN", 1, 1000, 1.0, 100),
    linear("SDPA flash", 1, 1000, 0.9, 100),
    linear("ours a", 1, 1000, 0.47, 60),
    linear("SDPA cuDNN", 1, 2000, 2.0, 200),
    linear("SDPA flash", 1, 2000, 2.5, 200),
    linear("ours a", 1, 2000, 0.78, 110),
    linear("SDPA cuDNN", 1, 4000, 4.0, 400),
    linear("SDPA flash", 1, 4000, 5.0, 400),
    linear("ours a", 1, 4000, 1.4, 210),
]


def test_slopes_by_hand():
    found = {(row["method"], row["T"]): row["slope_ratio"] for row in print_decode.with_slopes(LINEAR)}
    assert found["SDPA cuDNN", 1000] == "" and found["SDPA cuDNN", 2000] == found["SDPA cuDNN", 4000] == 1
    # 50 MB in 0.31 ms, then 100 in 0.62, at 210 MB / 1.4 ms = 150 MB per ms
    assert found["ours a", 2000] == pytest.approx(0.31 / (50 / 150)) and found["ours a", 4000] == pytest.approx(0.93)
    assert found["SDPA flash", 2000] == pytest.approx(1.6 / (100 * 5 / 400))


def test_linear_table():
    rows = [{name: str(x) for name, x in row.items()} for row in print_decode.with_slopes(LINEAR)]
    out = print_decode.linear_table(rows)
    assert out[0] == "GPU, torch 2, Triton 3, cuDNN 9, copy 3.00 TB/s; 32 query and 8 KV heads of 128, append included"
    assert not any("flash" in line for line in out)  # slower at the largest T
    assert out[4] == "| 1 | 1000 | SDPA cuDNN | 1.0000 | 1000.000 | 100.0 | 0.10 |  | 0.90 |"  # flash took 0.9 there
    assert out[9] == "| 1 | 4000 | ours a | 1.4000 | 350.000 | 210.0 | 0.15 | 0.93 | 2.86 |"
    assert out[-2:] == ["Slopes within 10 %: SDPA cuDNN at B 1 (1.00), ours a at B 1 (0.93).", "Slopes that are not: none."]
    rows[5]["ms"] = "0.7"
    out = print_decode.linear_table(print_decode.with_slopes(rows))
    assert out[-1] == "Slopes that are not: ours a at B 1 (0.69 to 1.05)."


def test_small_caches():
    rows = []
    for heads, batch, tokens, megabytes, dense, ours in (
        ("32/8", 1, 1024, 4.2, 9.0, 10.0),
        ("32/8", 1, 4096, 16.777, 12.0, 10.0),
        ("28/4", 1, 8192, 16.777, 9.5, 10.0),
        ("28/4", 4, 8192, 67.1, 30.0, 10.0),
        ("32/8", 4, 8192, 134.2, 50.0, 20.0),
    ):
        rows += [
            small("SDPA cuDNN", heads, batch, tokens, dense + 1, megabytes),
            small("SDPA flash", heads, batch, tokens, dense, megabytes),
        ]
        rows.append(small("ours a", heads, batch, tokens, ours, megabytes))
    rows.append(small("ours a", "32/32", 1, 1024, 1.0, 16.777))  # no baseline ran
    out = print_decode.small_table(rows)
    assert out[2:] == [
        "| heads | B | T 1024 | T 4096 | T 8192 |",
        "|---|---|---|---|---|",
        "| 32/8 | 1 | 0.90 (4) | 1.20 (17) | - |",
        "| 32/8 | 4 | - | - | 2.50 (134) |",
        "| 28/4 | 1 | - | - | 0.95 (17) |",
        "| 28/4 | 4 | - | - | 3.00 (67) |",
        "",
        "Never slower from 67.1 MB of dense cache per layer up (5 points, up to 134 MB; 32/8 heads from 16.8, 28/4 heads from 67.1).",
        "Slower although 17 MB or more: 28/4 B 1 T 8192 (0.95).",
    ]
    assert print_decode.small_table(rows[:6])[-1] == "Slower although 17 MB or more: none."
    assert print_decode.never_slower_from([{"dense_MB": 1, "ratio": 0.9}]) is None
    assert print_decode.never_slower_from([{"dense_MB": 2, "ratio": 1}, {"dense_MB": 1, "ratio": 3}]) == 1


def test_rates_by_hand():
    rows = []
    for batch, methods in (
        (1, {"SDPA cuDNN": 10, "SDPA flash": 12, "ours dense": 8, "ours K 32x4 V 64x4": 4, "ours mixed, mean K 32x4 V 64x4": 5}),
        (8, {"SDPA cuDNN": 22, "SDPA flash": 20, "ours dense": 25, "ours K 32x4 V 64x4": 6, "ours mixed, mean K 32x4 V 64x4": 10}),
        (8, {"ours K 64x8 V 128x8": 10, "ours K 32x8 V 128x8": 5, "ours K 32x4 V 128x4": 5}),
    ):
        for method, us in methods.items():
            times = {"graph_append_us": us, "graph_us": 2 * us, "eager_us": 10 * us, "eager_append_us": 40 - us, "graph_TBps": us / 10}
            rows.append({"B": str(batch), "T": "64", "method": method} | times | FACTS)
    assert " ".join(print_decode.rates(rows)) == (
        "Over these shapes `ours dense` has 0.80 to 1.25 times the speed of the faster SDPA with the append, 0.80 to 1.25 without. "
        "Codes of 8 bits are read at 0.5 to 1.0 TB/s, those of 4 bits at 0.4 to 0.6, where a copy reaches 3.0. "
        "The mixed map has 0.60 to 0.80 of the speed of its uniform row. One eager call at batch 1, launched from Python, has "
        "0.78 to 0.88 times the speed of SDPA with the append, 1.25 to 2.50 without."
    )


def test_what_does_not_run_or_fit_is_named_and_left_out(monkeypatch, capsys):
    def dense(case, name):
        if name == "SDPA cuDNN":
            raise RuntimeError("No available kernel.\nAborting")
        return {"ms": 1.0}

    def ours(case, name):
        if case.tokens == 512:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return {"ms": 2.0}

    monkeypatch.setattr(decode_curves, "dense", dense)
    monkeypatch.setattr(decode_curves, "ours", ours)
    times = iter([True, True, False])
    found = list(decode_curves.measured([Case(1, 256), Case(1, 512), Case(1, 1024)], ("a",), lambda: next(times)))
    assert [(row["T"], row["method"], row["ms"]) for row in found] == [(256, "SDPA flash", 1), (256, "ours a", 2), (512, "SDPA flash", 1)]
    assert capsys.readouterr().out.splitlines() == [
        "  32/8 heads, B 1, T 256, SDPA cuDNN: does not run here (No available kernel.)",
        "  32/8 heads, B 1, T 512, SDPA cuDNN: does not run here (No available kernel.)",
        "  32/8 heads, B 1, T 512, ours a: does not fit in memory",
        "  32/8 heads, B 1, T 1024: no time left",
    ]
    monkeypatch.setattr(decode_curves, "ours", lambda case, name: dense(case, "SDPA cuDNN"))
    with pytest.raises(RuntimeError, match="No available kernel"):  # ours must run
        list(decode_curves.measured([Case(1, 256)], ("a",), lambda: True))


def test_a_wrong_result_is_not_timed(on_the_cpu, monkeypatch):
    monkeypatch.setattr(decode_curves, "timed_shape_error", lambda *_, **__: float("nan"))
    with pytest.raises(SystemExit, match="ours K 32x4 V 64x4 at 8/2 heads, B 1, T 256: error nan, limit 0.02"):
        decode_curves.ours(Case(1, 256, 8, 2), "K 32x4 V 64x4")


def test_dry_run_of_the_curves(on_the_cpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(decode_curves, "LINEAR_DRY", [Case(1, 160, 8, 2), Case(1, 192, 8, 2)])
    monkeypatch.setattr(decode_curves, "SMALL_DRY", [Case(2, 192, 7, 1), Case(1, 160, 7, 1)])
    monkeypatch.setattr(sys, "argv", ["bench_decode.py", "--linear", "--small", "--dry-run", "--output", str(tmp_path)])
    bench_decode.main()
    lines, small_rows = (list(csv.DictReader((tmp_path / f"decode_{name}.csv").open(newline=""))) for name in ("linear", "small"))
    assert [(row["T"], row["method"]) for row in lines] == [
        (tokens, method)
        for tokens in ("160", "192")
        for method in ("SDPA cuDNN", "SDPA flash", "ours K 32x8 V 128x8", "ours K 32x4 V 64x4", "ours dense")
    ]
    assert [row["slope_ratio"] == "" for row in lines] == [True] * 5 + [False] * 5
    for row in lines:
        assert float(row["TBps"]) == pytest.approx(float(row["read_MB"]) / float(row["ms"]) / 1e3, rel=1e-3)
        assert float(row["us_per_1k_tokens"]) == pytest.approx(float(row["ms"]) * 1e6 / int(row["T"]), rel=1e-3)
    assert float(lines[3]["read_MB"]) == pytest.approx(2 * (32 * 48 + 128 * 512) / 1e6, rel=1e-4) and 0 < float(lines[3]["error"]) < 2e-2
    assert [(row["B"], row["T"]) for row in small_rows[::3]] == [("1", "160"), ("2", "192")]  # by size
    assert lines[0]["device"] == "cpu" and lines[0]["torch"] == torch.__version__
    out = capsys.readouterr().out
    # What the script printed last is what the files print.
    printed = "\n".join(print_decode.linear_table(lines)) + "\n\n" + "\n".join(print_decode.small_table(small_rows)) + "\n"
    assert out.endswith(printed) and "| 7/1 | 2 | - | " in printed


def test_dry_run_of_the_main_table(on_the_cpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_decode, "DRY_SHAPES", {(1, 160): 1})
    monkeypatch.setattr(sys, "argv", ["bench_decode.py", "--quick", "--dry-run", "--output", str(tmp_path)])
    bench_decode.main()
    rows = print_decode.read(tmp_path / "bench_decode.csv")
    methods = ["SDPA cuDNN", "SDPA flash", "ours r32", "ours r32 two-part", "ours dense", "ours K 32x4 V 64x4"]
    methods += ["FlexAttention", "FlexAttention thin K 32"]
    assert [row["method"] for row in rows] == methods and rows[0]["read_MB"] == "0.7"
    assert rows[6]["read_MB"] == "0.7" and rows[7]["read_MB"] == "0.4" and 0 < float(rows[7]["error"]) < 2e-2
    assert [print_decode.is_dense(row) for row in rows] == [True, True, *[False] * 4, True, False]
    out = capsys.readouterr().out
    assert "host time of one call" in out and "FlashInfer fa2: does not run here (the package flashinfer-python is not installed)" in out
    assert "the fastest dense kernel" in " ".join(print_decode.rates([row | {"B": 1} for row in mixed_too(rows)]))


def test_only_the_baselines(on_the_cpu, monkeypatch, capsys, tmp_path):
    """Those of other packages beside SDPA and three rows of ours, in a file of their own."""
    monkeypatch.setattr(bench_decode, "DRY_SHAPES", {(1, 160): 1})
    monkeypatch.setattr(sys, "argv", ["bench_decode.py", "--only-baselines", "--dry-run", "--output", str(tmp_path)])
    bench_decode.main()
    rows = print_decode.read(tmp_path / "decode_baselines.csv")
    ours = ["ours dense", "ours K 32x8 V 128x8", "ours K 32x4 V 64x4"]
    assert [row["method"] for row in rows] == ["SDPA cuDNN", "SDPA flash", *ours, "FlexAttention", "FlexAttention thin K 32"]
    assert not (tmp_path / "bench_decode.csv").exists() and "FlashInfer fa2: does not run here" in capsys.readouterr().out
    assert len(print_decode.baselines_table(rows)) == 4 + len(rows)


def test_baselines_by_hand():
    """Ratios are to the fastest dense row of the same shape, thin Keys not among them, with and without the append."""
    times = {"SDPA cuDNN": (50, 60), "FlashInfer fa2": (40, 80), "FlexAttention thin K 32": (10, 20), "ours dense": (20, 30)}
    rows = [
        {"B": "1", "T": "64", "method": name, "graph_us": us, "graph_append_us": appended, "graph_TBps": us / 20} | FACTS
        for name, (us, appended) in times.items()
    ]
    assert print_decode.baselines_table(rows)[4:] == [
        "| 1 | 64 | SDPA cuDNN | 50 | 2.50 | 60 | 0.80 | 1.00 |",
        "| 1 | 64 | FlashInfer fa2 | 40 | 2.00 | 80 | 1.00 | 0.75 |",
        "| 1 | 64 | FlexAttention thin K 32 | 10 | 0.50 | 20 | 4.00 | 3.00 |",
        "| 1 | 64 | ours dense | 20 | 1.00 | 30 | 2.00 | 2.00 |",
    ]


def mixed_too(rows):
    """Rows with those that `rates` speaks of."""
    names = (print_decode.MIXED, *print_decode.BITS[8], *print_decode.BITS[4][:1])
    return rows + [rows[2] | {"method": name} for name in names]


@pytest.mark.parametrize("append", [False, True])
def test_flex_attention_over_thin_keys(on_the_cpu, append):
    """The newest Key and Value go to the last place; the error is that of another formulation."""
    case = Case(2, 40, 8, 2)
    steps = decode_baselines.FAMILIES["flex"]["FlexAttention thin K 32"](case, 2, append)
    query, key, value, new_key, new_value = steps[1].args
    assert query.shape == (2, 8, 1, 32) and key.shape == (2, 2, 40, 32) and value.shape == (2, 2, 40, 128)
    new_key.fill_(3), new_value.fill_(5)
    assert steps[1]().shape == (2, 8, 1, 128)
    assert bool((key[:, :, -1] == 3).all() & (value[:, :, -1] == 5).all()) is append
    assert decode_baselines.step_error(steps[0], case) < 1e-2
    steps[0].args[2][0, 0, 7] += 9
    wrong = decode_baselines.partial(lambda *args: steps[0]() + 1, *steps[0].args)
    assert decode_baselines.step_error(wrong, case) > 0.05


def test_baselines_that_do_not_run_are_named(monkeypatch):
    assert "power of two" in decode_baselines.missing("flex", Case(1, 64, 28, 4))
    assert decode_baselines.missing("flex", Case(1, 64)) is None
    for family in ("flashinfer-fa2", "flashinfer-fa3"):
        with monkeypatch.context() as there:
            there.setattr(decode_baselines, "place", lambda: "cuda")
            assert "flashinfer-python" in decode_baselines.missing(family, Case(1, 64))
            there.setattr(decode_baselines.importlib.util, "find_spec", lambda name: name)
            assert decode_baselines.missing(family, Case(1, 64)) is None
            there.setattr(decode_baselines, "place", lambda: "cpu")
            assert decode_baselines.missing(family, Case(1, 64)) == "there is no CUDA GPU"


@pytest.mark.parametrize(
    ("options", "said"), [([], "needs a CUDA GPU; --dry-run tries it out"), (["--dry-run", "--sweep"], "--sweep has no smaller shapes")]
)
def test_refused_in_a_sentence(on_the_cpu, monkeypatch, capsys, options, said):
    monkeypatch.setattr(sys, "argv", ["bench_decode.py", *options])
    with pytest.raises(SystemExit) as ended:
        bench_decode.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_nothing_measured_is_said(on_the_cpu, capsys):
    decode_curves.run(True, True, None, 0.0, True)
    assert capsys.readouterr().out.splitlines()[-3:] == ["--linear: nothing was measured", "", "--small: nothing was measured"]


def test_plot_and_command_line(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    rows = print_decode.with_slopes(LINEAR)
    with (tmp_path / "linear.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture = tmp_path / "docs" / "linear.png"
    command = ["print_decode.py", "--linear", str(tmp_path / "linear.csv"), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(FOLDER / "print_decode.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines() == print_decode.linear_table(print_decode.read(tmp_path / "linear.csv"))
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    monkeypatch.setattr(sys, "argv", ["print_decode.py", "--plot", "x.png"])
    with pytest.raises(SystemExit):
        print_decode.main()


def test_markers_are_filled_where_they_stand(monkeypatch, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("<!-- decode-rates -->\n<!-- /decode-rates -->\n")
    (tmp_path / "docs" / "a.md").write_text("nothing\n")
    (tmp_path / "docs" / "b.md").write_text("<!-- decode-linear -->\n<!-- /decode-linear -->\n")
    monkeypatch.setattr(fill_tables, "HERE", tmp_path / "benchmarks")
    found = fill_tables.prints()
    assert found["README.md", "decode-rates"] == [["print_decode.py", "--rates"]]
    assert ("docs/b.md", "decode-linear") not in found  # no results yet
    (tmp_path / "benchmarks" / "results" / "decode_linear.csv").touch()
    assert fill_tables.prints()["docs/b.md", "decode-linear"] == [["print_decode.py", "--linear", "decode_linear.csv"]]
    assert fill_tables.placed("decode-small") is None
