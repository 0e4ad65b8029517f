"""Counters of the split kernel: what is read from the output of ncu, what is kept of it, and the table."""

import csv
import io
import sys

import count_decode
import pytest
from count_decode import counted, kept, main, printed, scaled, waits
from measuring import read_csv

from rotatek_compile.errors import UsageError

STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
ISSUED = "smsp__issue_active.avg.per_cycle_active"
HEAD = {  # counters of a made-up ncu, their units, and the values of two launches
    "ID": ("", "0", "1"),
    "Host Name": ("", "somewhere", "somewhere"),
    "gpu__time_duration.sum": ("ns", "94,848", "1,500"),
    "dram__bytes_read.sum": ("Mbyte", "218.5", "3"),
    "smsp__inst_executed.sum": ("inst", "n/a", "2,000,000"),
    "sm__inst_executed.sum": ("inst", "42,894,336", "n/a"),
    "smsp__issue_active.avg.pct_of_peak_sustained_active": ("%", "no data", "30.5"),
    ISSUED: ("inst", "0.51", "0.3"),
    "smsp__warps_active.avg.per_cycle_active": ("warp", "3.87", "2.9"),
    "launch__registers_per_thread": ("register/thread", "127", "168"),
    "sm__cycles_active.min": ("cycle", "1,480", "800"),
    "sm__cycles_active.avg": ("cycle", "1,550", "850"),
    "sm__cycles_active.max": ("cycle", "1,600", "900"),
    "sm__cycles_elapsed.max": ("cycle", "2,000", "1,000"),
    STALL.format("long_scoreboard"): ("inst", "2.84", "0.96"),
    STALL.format("wait"): ("inst", "0.81", "1.5"),
    STALL.format("gmma"): ("inst", "n/a", "0"),
    "smsp__average_warps_issue_stalled_wait.max_rate": ("inst", "5", "5"),
    "l1tex__throughput.avg.pct_of_peak_sustained_active": ("%", "7", "7"),
}
ABOUT = {"device": "a GPU", "multiprocessors": 4, "torch": "2", "triton": "3", "cudnn": 1, "sm_MHz": 5, "copy_TBps": 3.0, "date": "today"}


def written(launches):
    """What ncu prints for so many launches, with lines of its own and of the program before and after."""
    stream = io.StringIO()
    writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
    writer.writerow(HEAD)
    for row in range(1 + launches):
        writer.writerow([values[row if row < 2 else 2] for values in HEAD.values()])
    return f"==PROF== Connected to process 7\nwarming up\n{stream.getvalue()}==PROF== Disconnected\n"


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """Puts a program of this name on an otherwise empty PATH; returns what says how many launches it counts, and its arguments."""

    def counts(launches):
        (tmp_path / "out.txt").write_text(written(launches) if launches else "==ERROR== ERR_NVGPUCTRPERM\n")
        program = tmp_path / "ncu"
        program.write_text(f'#!{sys.executable}\nimport sys\nprint("\\n".join(sys.argv[1:]), file=open("{tmp_path}/arguments.txt", "w"))\n')
        with program.open("a") as stream:
            stream.write(f'print(open("{tmp_path}/out.txt").read(), end="")\n')
        program.chmod(0o755)
        return tmp_path / "arguments.txt"

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(count_decode, "SHAPES", ((32, 16384), (1, 32768)))
    return counts


def test_rows_have_their_units(ncu):
    arguments = ncu(2)
    first, second = counted(["K 32x4 V 64x4"])
    assert scaled(first, "gpu__time_duration.sum") == pytest.approx(94.848) and scaled(first, "dram__bytes_read.sum") == 218.5
    assert scaled(first, "smsp__inst_executed.sum") is None and scaled(first, "sm__inst_executed.sum") == pytest.approx(42.894336)
    assert scaled(first, ISSUED) == pytest.approx(51) and scaled(first, "not there") is None
    assert scaled(second, "gpu__time_duration.sum") == 1.5 and scaled(second, "launch__registers_per_thread") == 168
    assert waits(first) == [("long scoreboard", 2.84), ("wait", 0.81), ("gmma", 0)]
    assert [name for name, _ in waits(second)] == ["wait", "long scoreboard", "gmma"]
    words = arguments.read_text().splitlines()
    assert words[words.index("--kernel-name") + 1] == "split_kernel" and words[-2:] == ["--launch", "K 32x4 V 64x4"]


def test_other_numbers_of_launches_are_refused(ncu):
    for launches in (1, 3):
        ncu(launches)
        with pytest.raises(UsageError, match=f"ncu counted {launches} launches of 2: .*Disconnected$"):
            counted(["K 32x4 V 64x4"])
    ncu(0)
    with pytest.raises(UsageError, match="ncu counted 0 launches of 2: ==ERROR== ERR_NVGPUCTRPERM"):
        counted(["K 32x4 V 64x4"])


def test_without_ncu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="this needs ncu"):
        counted(["K 32x4 V 64x4"])


def test_what_is_kept_prints_the_same(ncu, monkeypatch, capsys, tmp_path):
    """Of ncu's columns those of the table are saved, with their units; the saved file prints what the run printed."""
    ncu(2)
    monkeypatch.setattr(count_decode, "PLANS", dict.fromkeys(["K 32x4 V 64x4"]))
    monkeypatch.setattr(count_decode, "facts", lambda: ABOUT)
    file, again = tmp_path / "counters.csv", tmp_path / "again.csv"
    assert main(["--output", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[4:] == [
        "| 32 | 16384 | K 32x4 V 64x4 | 94.85 | 218.5 | 42.89 | 51 | 3.87 | 127 | 2.30 | 0.74 to 0.80 |"
        " long scoreboard 2.8, wait 0.81, gmma 0 |",
        "| 1 | 32768 | K 32x4 V 64x4 | 1.5 | 3 | 2 | 30.5 | 2.9 | 168 | 2.00 | 0.80 to 0.90 | wait 1.5, long scoreboard 0.96, gmma 0 |",
    ]
    dropped = {"ID", "Host Name", "smsp__average_warps_issue_stalled_wait.max_rate", "l1tex__throughput.avg.pct_of_peak_sustained_active"}
    counters = HEAD.keys() - dropped
    assert read_csv(file)[0].keys() == counters | {f"{name} unit" for name in counters} | ABOUT.keys() | {"batch", "tokens", "plan"}
    assert main(["--print", str(file), "--output", str(again)]) == 0
    assert capsys.readouterr().out == out and again.read_bytes() == file.read_bytes()


def test_a_row_without_counters_is_printed():
    row = kept({"batch": 1, "tokens": 2, "plan": "p", "process": 3} | ABOUT)
    assert "process" not in row and printed([row]).splitlines()[-1] == "| 1 | 2 | p | - | - | - | - | - | - | - | - |  |"
