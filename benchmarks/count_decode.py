"""What bounds the split kernel of decode attention: hardware counters of one launch for each plan, read by Nsight Compute (`ncu`).

    python benchmarks/count_decode.py --output benchmarks/results/decode_counters.csv      # one GPU with ncu on the PATH, a minute
    python benchmarks/count_decode.py --print benchmarks/results/decode_counters.csv

The plans are those of bench_decode.py at the same shapes: a uniform map, the mixed map of the same mean bytes, and that with all heads as
wide as the mixed map's widest, through whose tiles its heads go. Every launch is the first of its plan, caches overwritten before it by ncu
and the clock left as it is, so that its microseconds are not those of the benchmark. The script starts itself under ncu.

Rows: a launch. Bytes read of device memory and their rate; the share of cycles in which a scheduler issued (100 % is one instruction per
cycle and scheduler); warps in flight per scheduler; of the cycles between two instructions of a warp, how many it waits for what; and the
cycles that a multiprocessor is at work, fewest and most, over the launch's (a tail shows here). Of the thousand columns that ncu writes,
the file keeps those that the table is made of.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from decode_cases import CONFIGURATIONS, MIXED, Case, make_layer, our_steps  # noqa: E402
from decode_timing import facts  # noqa: E402
from measuring import Rows, add_table_options, ended, read_csv, write_csv  # noqa: E402

from rotatek_compile.errors import UsageError
from rotatek_compile.kernels.slabs import Slabs

SHAPES = ((32, 16384), (8, 8192), (1, 32768))
UNIFORM, MAP = "K 32x4 V 64x4", "mixed, mean K 32x4 V 64x4"
WIDEST = Slabs(0, 0, max(x.nibble for x in MIXED[0])), Slabs(0, 0, max(x.nibble for x in MIXED[1]))
PLANS = {UNIFORM: CONFIGURATIONS[UNIFORM], MAP: CONFIGURATIONS[MAP], "as wide as its widest": WIDEST} | {
    name: CONFIGURATIONS[name] for name in ("K 32x4 V 128x4", "K 32x8 V 128x8")
}
KERNEL = "split_kernel"
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "InstructionStats", "MemoryWorkloadAnalysis")
CYCLES = tuple(f"sm__cycles_active.{part}" for part in ("min", "avg", "max")) + ("sm__cycles_elapsed.max", "dram__bytes_read.sum")
STALLED, PER_ISSUE = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
SHOWN = {
    "us": ("gpu__time_duration.sum",),
    "MB read": ("dram__bytes_read.sum",),
    "instructions, millions": ("smsp__inst_executed.sum", "sm__inst_executed.sum"),
    "issuing, %": ("smsp__issue_active.avg.pct_of_peak_sustained_active", "smsp__issue_active.avg.per_cycle_active"),
    "warps per scheduler": ("smsp__warps_active.avg.per_cycle_active",),
    "registers": ("launch__registers_per_thread",),
}
"""Columns of the table and the counters that they may be read from; the units are made alike in `scaled`."""
NOT_COUNTED = ("", "n/a", "no data")  # what ncu writes for a counter that it has not
ABOUT = ("batch", "tokens", "plan", "device", "multiprocessors", "torch", "triton", "cudnn", "sm_MHz", "copy_TBps", "date")
UNITS = {
    "ns": 1e-3,
    "nsecond": 1e-3,
    "us": 1.0,
    "usecond": 1.0,
    "ms": 1e3,
    "msecond": 1e3,
    "byte": 1e-6,
    "Kbyte": 1e-3,
    "Mbyte": 1.0,
    "Gbyte": 1e3,
}


def launches(names: list[str]) -> None:
    """One launch of the split kernel for each plan and shape, in the order of the rows."""
    for batch, tokens in SHAPES:
        for name in names:
            layer = make_layer(Case(batch, tokens), *PLANS[name], seed=0)
            our_steps([layer.planned()], False)[0]()


def counted(names: list[str]) -> list[dict[str, str]]:
    """What ncu counted, a row per launch, by the names of its counters; "NAME unit" holds the unit.

    Raises:
        UsageError: there is no ncu, or it counted something else than the launches asked for.
    """
    if shutil.which("ncu") is None:
        raise UsageError("this needs ncu (Nsight Compute) on the PATH")
    command = ["ncu", "--csv", "--page", "raw", "--clock-control", "none", "--kernel-name", KERNEL, "--metrics", ",".join(CYCLES)]
    for section in SECTIONS:
        command += ["--section", section]
    child = [sys.executable, __file__, "--launch", *names]
    done = subprocess.run([*command, *child], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    found = list(csv.DictReader(io.StringIO("\n".join(lines))))
    if len(found) != 1 + len(SHAPES) * len(names):  # the first row has units
        tail = " ".join((done.stdout + done.stderr).split())[-400:]
        raise UsageError(f"ncu counted {max(0, len(found) - 1)} launches of {len(SHAPES) * len(names)}: {tail}")
    units, *rows = found
    return [row | {f"{name} unit": unit for name, unit in units.items() if unit} for row in rows]


def kept(row: dict[str, Any]) -> dict[str, Any]:
    """Of a row what the table needs: launch and device, its counters with their units, the cycles, what warps wait for."""
    wanted = {*ABOUT, *CYCLES, *(counter for counters in SHOWN.values() for counter in counters)}
    wanted |= {name for name in row if name.startswith(STALLED) and name.endswith(PER_ISSUE)}
    return {name: row[name] for name in row if name.removesuffix(" unit") in wanted}


def measured() -> Rows:
    names = list(PLANS)
    made = ((batch, tokens, name) for batch, tokens in SHAPES for name in names)
    about = facts()
    return [
        {"batch": batch, "tokens": tokens, "plan": name} | counters | about
        for (batch, tokens, name), counters in zip(made, counted(names), strict=True)
    ]


def scaled(row: dict[str, str], counter: str) -> float | None:
    """A counter in microseconds, megabytes, or as it is; None where it was not counted."""
    text = str(row.get(counter, "")).replace(",", "")
    if text in NOT_COUNTED:
        return None
    value = float(text) * UNITS.get(str(row.get(f"{counter} unit", "")), 1.0)
    if counter.endswith("inst_executed.sum"):
        return value / 1e6
    return 100 * value if counter.endswith("issue_active.avg.per_cycle_active") else value


def waits(row: dict[str, str]) -> list[tuple[str, float]]:
    """Cycles that a warp waits for each reason between two of its instructions, most first."""
    found = {}
    for name in row:
        if name.startswith(STALLED) and name.endswith(PER_ISSUE):
            found[name.removeprefix(STALLED).removesuffix(PER_ISSUE).replace("_", " ")] = scaled(row, name) or 0.0
    return sorted(found.items(), key=lambda item: -item[1])


def printed(rows: Rows) -> str:
    """Markdown, a row per launch."""
    lines = [f"{rows[0]['device']}, torch {rows[0]['torch']}, Triton {rows[0]['triton']}; `{KERNEL}`, counters of ncu", ""]
    titles = ["B", "T", "plan", *SHOWN, "TB/s", "busy, fewest to most", "waits of a warp, cycles per instruction"]
    lines += [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows:
        values = {title: next((x for x in (scaled(row, c) for c in names) if x is not None), None) for title, names in SHOWN.items()}
        cells = [f"{x:.4g}" if x is not None else "-" for x in values.values()]
        us, megabytes = values["us"], values["MB read"]
        rate = f"{megabytes / us:.2f}" if us and megabytes else "-"
        least, most, all_of = (scaled(row, f"sm__cycles_{part}") for part in ("active.min", "active.max", "elapsed.max"))
        busy = f"{least / all_of:.2f} to {most / all_of:.2f}" if least and most and all_of else "-"
        why = ", ".join(f"{name} {cycles:.2g}" for name, cycles in waits(row)[:5])
        lines.append(f"| {row['batch']} | {row['tokens']} | {row['plan']} | {' | '.join(cells)} | {rate} | {busy} | {why} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launch", nargs="+", choices=list(PLANS), metavar="PLAN", help="only launch the kernel: what ncu is given to run")
    add_table_options(parser)
    options = parser.parse_args(arguments)
    if options.launch:
        launches(options.launch)
        return 0
    rows = [kept(row) for row in (read_csv(options.table) if options.table else measured())]
    if options.output:
        write_csv(options.output, rows)
    print(printed(rows))
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
