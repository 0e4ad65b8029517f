"""Clocks of bench_decode.py: microseconds of a call in a CUDA graph, of one eager call and of the host, and what ran on what.

Without a GPU they are wall times of the calls, to try the scripts out.
"""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import time

import torch
from decode_cases import Step, place


def graph_us(steps: list[Step], *, ahead: bool = False, enough_ms: float = math.inf) -> float:
    """Microseconds per step of a CUDA graph of all steps: median of `graph_times`."""
    return statistics.median(graph_times(steps, ahead=ahead, enough_ms=enough_ms))


def graph_times(steps: list[Step], *, ahead: bool = False, enough_ms: float = math.inf) -> list[float]:
    """Microseconds per step of a CUDA graph of all steps, one for each of 27 replays.

    Args:
        ahead: keep the device busy while the host launches a replay, so that the launch is not counted; it is where a replay is short.
        enough_ms: after so much measured time, 7 replays do.
    """
    if place() == "cpu":
        return [wall_us(steps)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps * 2:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    for _ in range(3):
        graph.replay()
    times: list[float] = []
    while len(times) < 27 and (len(times) < 7 or sum(times) < enough_ms):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if ahead:
            torch.cuda._sleep(1_000_000)  # cycles, some 0.5 ms
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return [ms * 1e3 / len(steps) for ms in times]


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """The 10th, the 50th and the 90th."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[0], statistics.median(times), tenths[-1]


def wall_us(steps: list[Step]) -> float:
    """Microseconds per step on the host: median of 3 rounds."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for step in steps:
            step()
        times.append((time.perf_counter() - start) * 1e6 / len(steps))
    return statistics.median(times)


def eager_us(step: Step) -> float:
    """One call, L2 overwritten before each."""
    return bench_us(step, warmup=20, rep=80) if place() == "cuda" else wall_us([step])


def bench_us(step: Step, **options: int) -> float:
    """Median of Triton's do_bench."""
    from triton.testing import do_bench

    return float(do_bench(step, return_mode="median", **options)) * 1e3


def host_us(step: Step, calls: int = 200) -> float:
    """Microseconds the host needs to launch one call."""
    if place() == "cpu":
        return wall_us([step])
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / calls * 1e6


def copy_rate() -> float:
    """TB/s of a device copy, bytes read plus written."""
    x = torch.empty(1 << (30 if place() == "cuda" else 20), dtype=torch.uint8, device=place())
    y = torch.empty_like(x)
    us = bench_us(lambda: y.copy_(x)) if place() == "cuda" else wall_us([lambda: y.copy_(x)])
    return 2 * x.numel() / us / 1e6


def clock() -> int:
    """The SM clock in MHz just after some work, or 0 where the driver does not tell."""
    if place() == "cpu":
        return 0
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(50):
        x @ x
    torch.cuda.synchronize()
    if shutil.which("nvidia-smi") is None:
        return 0
    command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return int(answer[0]) if answer and answer[0].isdigit() else 0


def multiprocessors() -> int:
    """Of the GPU; some number where there is none."""
    return torch.cuda.get_device_properties(0).multi_processor_count if place() == "cuda" else 4


def l2_bytes() -> int:
    """Of the GPU's last cache; 0 where there is no GPU."""
    return torch.cuda.get_device_properties(0).L2_cache_size if place() == "cuda" else 0


def facts() -> dict[str, object]:
    """What every row of the tables states."""
    import triton

    return {
        "device": torch.cuda.get_device_name(0) if place() == "cuda" else "cpu", "multiprocessors": multiprocessors(),
        "torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version(), "sm_MHz": clock(),
        "copy_TBps": round(copy_rate(), 3), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
