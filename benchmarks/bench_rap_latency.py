"""What fewer RoPE pairs save in time: attention of one layer, and that layer with its feed-forward part, dense and pruned to a keep ratio.

    python benchmarks/bench_rap_latency.py --output benchmarks/results/rap_latency.csv  # on a GPU: LLaMA-3-8B's shape, 2 k to 64 k
    python benchmarks/bench_rap_latency.py --small --output /tmp/rap_latency.csv        # the same path with a small layer, on a CPU
    python benchmarks/bench_rap_latency.py --print benchmarks/results/rap_latency.csv

Weights, tokens and caches are random. "Attention" is the module: projections, RoPE, attention over the cache, output projection; decode
reads a cache that is full but for the new token and writes that in place, so that no copy of it is timed. Figures are medians.

Two clocks: `ms` is the wall clock around one eager call, in which short calls wait for Python; `graph_ms`, on a GPU, is the time of a CUDA
graph over several modules with weights and a cache each, per module, so that neither the host nor the L2 cache counts. A pruned setting is
timed as the product computes it (our kernels where they serve, and cuDNN at both widths at prefill), by torch alone, and, where Keys and
Values differ in width, with the narrower one padded in every call. What does not run is named and left out; after `--seconds` nothing more
is begun. The file has both clocks, the printed table CUDA graphs where there are any.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import Rows, add_device_options, add_table_options, ended, show_table, versions  # noqa: E402
from rap_latency_cases import COPIES, SETTINGS, SMALL, Kind, beside, caches_of, kinds_of, layer_of, register, steps_of  # noqa: E402

LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
MOST_TOKENS = 65536  # of all sequences of a prefill
ENOUGH = 0.1  # seconds of one clock for one row: after them three calls do
TOLERANCE = 5e-2  # of a variant's output from that of torch; not a test of the kernels, but nothing that is wrong is timed
FIELDS = (
    "phase",
    "batch",
    "tokens",
    "part",
    "setting",
    "ms",
    "share",
    "graph_ms",
    "graph_share",
    "device",
    "dtype",
    "torch",
    "transformers",
)
Step = Callable[[], Any]


def wall_ms(step: Step, device: torch.device, repeats: int) -> float:
    """Median milliseconds of an eager call, after one that is not counted."""
    found: list[float] = []
    while len(found) <= repeats and (len(found) <= 3 or sum(found) < 1e3 * ENOUGH):
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found[1:])


def graph_ms(steps: Sequence[Step], repeats: int) -> float:
    """Median milliseconds per step of replays of a CUDA graph of all steps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    graph.replay()
    found: list[float] = []
    while len(found) < repeats and (len(found) < 3 or sum(found) < 1e3 * ENOUGH):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop))
    return statistics.median(found) / len(steps)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bench:
    """One run: what it is about, when it has to end, and the rows so far."""

    def __init__(self, small: bool, device: torch.device, dtype: torch.dtype, repeats: int, seconds: float) -> None:
        import transformers

        register()
        self.device, self.dtype, self.repeats, self.until = device, dtype, repeats, time.monotonic() + seconds
        self.settings = SMALL if small else SETTINGS
        self.layer, self.rope, self.config = layer_of(small, device, dtype)
        self.modules: dict[str | None, list[Any]] = {}
        self.rows: Rows = []
        self.about = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    @torch.inference_mode()
    def point(self, phase: str, batch: int, tokens: int) -> None:
        """All rows of one phase, batch and length."""
        new = tokens if phase == "prefill" else 1
        x = torch.randn(batch, new, self.config.hidden_size, device=self.device, dtype=self.dtype)
        places = self.rope(x, torch.arange(tokens - new, tokens, device=self.device)[None])
        dense: dict[str, dict[str, float]] = {}
        right: dict[str | None, Tensor] = {}  # what torch gives, by setting
        for kind in kinds_of(self.settings):
            where = f"{phase}, batch {batch}, {tokens} tokens, {kind.name}"
            if time.monotonic() > self.until:
                print(f"{where}: not begun, the time is up", file=sys.stderr)
                continue
            try:
                found = self.times(kind, phase, x, places, tokens, right)
            except Exception as error:  # whatever it is, the other rows are not lost
                reason = (str(error).splitlines() or [""])[0][:200]
                print(f"{where}: does not run here ({type(error).__name__}: {reason})", file=sys.stderr)
                continue
            finally:
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            if kind.setting is None:
                dense = found
            for part, times in found.items():
                row = {"phase": phase, "batch": batch, "tokens": tokens, "part": part, "setting": kind.name}
                for clock, ms in times.items():
                    share = ms / dense[part][clock] if clock in dense.get(part, {}) else None
                    row |= {clock: round(ms, 5), clock.replace("ms", "share"): "" if share is None else round(share, 4)}
                self.rows.append(row | self.about)

    def times(
        self, kind: Kind, phase: str, x: Tensor, places: tuple[Tensor, Tensor], tokens: int, right: dict[str | None, Tensor]
    ) -> dict[str, dict[str, float]]:
        """Milliseconds by part and clock."""
        if kind.setting not in self.modules:
            widths = None if kind.setting is None else self.settings[kind.setting]
            self.modules[kind.setting] = [beside(self.layer.self_attn, widths) for _ in range(COPIES)]
        count = COPIES if phase == "decode" else max(1, min(COPIES, MOST_TOKENS // (4 * x.shape[0] * tokens)))
        modules = self.modules[kind.setting][:count]
        torch.manual_seed(0)  # every variant of a setting reads the same cache
        caches = caches_of(modules[0], count, x.shape[0], tokens if phase == "decode" else 0, x)
        stock = self.layer.self_attn
        found: dict[str, dict[str, float]] = {}
        try:
            for part, steps in steps_of(kind, self.layer, modules, caches, x, places).items():
                output = steps[0]()
                if part == "attention":
                    self._check(output, right.setdefault(kind.setting, output))
                found[part] = {"ms": wall_ms(steps[0], self.device, self.repeats)}
                if self.device.type == "cuda":
                    found[part]["graph_ms"] = graph_ms(steps, self.repeats)
        finally:
            self.layer.self_attn = stock
        return found

    def _check(self, output: Tensor, right: Tensor) -> None:
        error = float((output.float() - right.float()).norm() / right.float().norm())
        if not error <= TOLERANCE:
            raise ValueError(f"its output is off by {error:.2g}")


def table(rows: Rows) -> str:
    """Shares of the dense module's time as markdown: the product's attention by length, and means of what stands beside it.

    By CUDA graph, or where no row has that (without a GPU) by the wall clock. A mean is over the lengths that its own rows have.
    """
    column = "graph_share" if any(row.get("graph_share") not in (None, "") for row in rows) else "share"
    shares: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for row in rows:
        if row.get(column) not in (None, ""):
            shares.setdefault((row["phase"], str(row["batch"]), row["part"], row["setting"]), {})[row["tokens"]] = float(row[column])

    def mean(*key: str) -> str:
        return f"{statistics.mean(shares[key].values()):.3f}" if key in shares else "-"

    lengths = list(dict.fromkeys(row["tokens"] for row in rows))
    columns = ["phase", "batch", "setting", *(f"{int(n):,}" for n in lengths), "mean", "padded", "torch", "whole layer"]
    clock = "in a CUDA graph" if column == "graph_share" else "by the wall clock of eager calls"
    lines = [f"{versions(rows[0])}; share of the dense module's time {clock}", ""]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for phase, batch, setting in dict.fromkeys((row["phase"], str(row["batch"]), setting_of(row)) for row in rows):
        own = shares.get((phase, batch, "attention", setting), {})
        cells = [phase, batch, setting, *(f"{own[n]:.3f}" if n in own else "-" for n in lengths), mean(phase, batch, "attention", setting)]
        cells += [mean(phase, batch, "attention", f"{setting}, {way}") for way in ("padded", "torch")]
        if setting != "dense":
            lines.append(f"| {' | '.join([*cells, mean(phase, batch, 'layer', setting)])} |")
    return "\n".join(lines)


def setting_of(row: dict[str, Any]) -> str:
    """A row's setting without the way that it was computed."""
    return str(row["setting"]).removesuffix(", padded").removesuffix(", torch")


def measured(options: argparse.Namespace) -> Rows:
    """Rows of the settings that were asked for: decoding first, of which more is to be learned and which takes less time."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    lengths = (64, 128) if options.small else tuple(n for n in LENGTHS if n <= options.longest)
    bench = Bench(options.small, device, dtype, options.repeats, options.seconds)
    for phase, batch, tokens in product(("decode", "prefill"), options.batches, lengths):
        if phase == "decode" or batch * tokens <= MOST_TOKENS:
            bench.point(phase, batch, tokens)
    return bench.rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small layer and short texts")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="no longer texts than this")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="sequences at once.  [default: 1 8]")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=130.0, help="begin no row after so long.  [default: 130]")
    add_device_options(parser)
    add_table_options(parser)
    show_table(parser.parse_args(arguments), measured, table, FIELDS)
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
