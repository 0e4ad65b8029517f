"""What text costs beside its attention: appending a token, and then room for raw text, or coding text that leaves the window.

    python benchmarks/bench_retire.py --output benchmarks/results [--seconds 120]
    python benchmarks/bench_retire.py --print benchmarks/results/retire.csv
    python benchmarks/bench_retire.py --small --output /tmp/small              # the same path with short caches, also without a GPU

One layer with 32 query and 8 KV heads of 128 in bf16, an artifact with K 32x8, V 128x8. The cache is filled with pages. While an answer
grows, raw text stays in the windows, which need room for a block of it; text that is coded leaves in blocks, of which every row's window
holds one more than its size here. Columns, all for one layer:

- attend_us: decode attention of one token in a CUDA graph, without the append; append_us: what the append in the launch adds; both from
  the fastest of three turns.
- block: tokens at once. In plain steps windows get room for 32 at least, and 64 are coded; between two captured stretches up to 256.
- retire_us: the wall time of that (encoding, moving, the pool, a new work list; or making room, the mean over an answer of 1,024 tokens,
  because one work list serves many sizes of windows), all rows together, until the GPU is done; busy_us: of this, or of the first room,
  what kernels and copies take on the GPU.
- share: append and retire_us per token, over attention. The target is 0.05 from 134 MB of dense cache per layer up. The table also has the
  share of the GPU's own work, busy_us for retire_us and without the append.

Attention over the cache afterwards is checked against the specification in float64 before it is timed.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_full_size import llava_next, random_model  # noqa: E402
from decode_timing import facts, graph_us  # noqa: E402
from measuring import read_csv  # noqa: E402
from step_caches import artifact_of, fill_ours, with_text  # noqa: E402

from rotatek_compile.geometry import geometry_of
from rotatek_compile.kernels.decode_torch import decode_attention_torch
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.runtime.enable import enable

POINTS = ((1, 32768), (8, 4096), (8, 8192), (32, 4096), (8, 32768), (32, 16384))  # batch, tokens: 134 MB of dense cache and more
KEYS, VALUES = Slabs(0, 32, 0), Slabs(0, 128, 0)
BLOCKS = {"visual": (32, 256), "all": (64, 256)}
ROUNDS, TURNS = 4, 3
ANSWER = 1024  # tokens of raw text over which room is a mean
LIMIT = 2e-2
COLUMNS = ("batch", "tokens", "dense_MB", "span", "block", "attend_us", "append_us", "retire_us", "busy_us", "share", "error")


def model_of_one_layer(small: bool, device: torch.device) -> Any:
    """LLaVA-NeXT with one layer of Mistral-7B's attention and hardly anything else."""
    config = llava_next(small=True)
    text = config.text_config
    text.num_hidden_layers, text.hidden_size = 1, 64
    if not small:
        text.num_attention_heads, text.num_key_value_heads, text.head_dim = 32, 8, 128
    return random_model(config, device)


def wall_us(act: Callable[[], object], device: torch.device) -> float:
    """Microseconds until the device is done."""
    wait(device)
    start = time.perf_counter()
    act()
    wait(device)
    return (time.perf_counter() - start) * 1e6


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def busy_us(act: Callable[[], object], device: torch.device) -> float:
    """Microseconds that kernels and copies take on the GPU; NaN without one."""
    if device.type != "cuda":
        act()
        return float("nan")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        act()
        wait(device)
    return float(sum(event.self_device_time_total for event in profile.key_averages()))


class Bench:
    """One layer's cache with `batch` rows of `tokens` tokens."""

    def __init__(self, model: Any, cache: Any, batch: int, tokens: int) -> None:
        self.geometry, self.like = geometry_of(model.config), next(model.parameters())
        self.device = self.like.device
        fill_ours(cache, self.geometry, batch, tokens, self.like)
        self.layer, self.batch = cache.layers[0], batch
        self.lengths = torch.zeros(-(-batch // 4) * 4, dtype=torch.int32, device=self.device)  # as captured stretches count them
        shape = self.geometry.layers[0]
        self.query = self.random(batch, shape.query_heads, 1, shape.head_dim)
        self.new = tuple(self.random(batch, shape.kv_heads, 1, shape.head_dim) for _ in "kv")

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.like.dtype)

    def fill_windows(self, tokens: int) -> None:
        """So many tokens of text in every window, and no room for more."""
        store = self.layer.store
        store.window.trim(max(int(store.window.host.max()) - tokens, 0))
        store.window.buffer = store.window.buffer[:, :, :, :tokens].clone()
        self.append(tokens)

    def append(self, tokens: int) -> None:
        """Text in every window, up to so many tokens."""
        window, shape = self.layer.store.window, self.geometry.layers[0]
        for row in range(self.batch):
            missing = tokens - int(window.host[row])
            window.append_row(row, *(self.random(shape.kv_heads, missing, shape.head_dim) for _ in "kv"))

    def view(self) -> Any:
        return self.layer.store.view(splits=self.layer.backend.needs_splits)

    def retire(self, block: int) -> None:
        """Room for so many tokens, or so many leave the windows; then the next step's view is made, as in a step."""
        if self.layer.text_stays():
            self.layer.store.reserve(block, self.lengths[: self.batch])
        else:
            self.layer._retire()
        self.view()

    def room_us(self, window: int, block: int) -> float:
        """Microseconds of a room for `block` tokens, the mean over an answer in windows that held `window` tokens before it."""
        self.fill_windows(window)
        self.view()  # the answer's first step had one
        walls = []
        for held in range(window, window + ANSWER, block):
            walls.append(wall_us(partial(self.retire, block), self.device))
            self.append(held + block)
        return sum(walls) / len(walls)

    def attend(self, append: bool) -> Tensor:
        """One token's attention, by Triton where there is a GPU; without append its numbers are there already."""
        view = self.view()
        if self.device.type != "cuda":
            return decode_attention_torch(self.query, view, 0.09)
        from rotatek_compile.kernels.decode import decode_attention

        return decode_attention(self.query, view, 0.09, new=self.new if append else None)

    def error(self) -> float:
        """Of the first and the last row, against float64."""
        found, worst = self.attend(False), 0.0
        view = self.view()
        for row in {0, self.batch - 1}:
            one = slice(row, row + 1)
            cut = {"table": view.table[one], "window_lengths": view.window_lengths[one]}
            own = replace(view, **cut, windows=view.windows[:, one])
            expected = decode_attention_torch(self.query[one].double(), own, 0.09)
            worst = max(worst, float((found[one].double() - expected).abs().max() / expected.abs().max()))
        return worst


def rows_at(model: Any, batch: int, tokens: int, span: str, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Both blocks of one point.

    Raises:
        SystemExit: attention over the cache is wrong after text has left.
    """
    geometry = geometry_of(model.config)
    artifact = (
        artifact_of(geometry, KEYS, VALUES)
        if geometry.layers[0].head_dim >= 128
        else artifact_of(geometry, Slabs(0, 8, 0), Slabs(0, 16, 0))
    )
    rows = []
    with enable(model, with_text(artifact) if span == "all" else artifact, graphs=False) as enabled:
        cache = enabled.new_cache()
        bench = Bench(model, cache, batch, tokens)
        for block in BLOCKS[span]:
            walls, busy = [], float("nan")
            window, act = artifact.method.window, partial(bench.retire, block)
            for number in range(rounds + 2):
                last = number == rounds + 1
                if span == "visual" and not last:
                    walls.append(bench.room_us(window, block))
                    continue
                bench.fill_windows(window + block * (span == "all"))
                if last:
                    busy = busy_us(act, bench.device)
                else:
                    walls.append(wall_us(act, bench.device))
            error = bench.error()
            if not error < LIMIT:
                sys.exit(f"B {batch}, T {tokens}, span {span}: error {error:.2e} after text has left, limit {LIMIT}")
            timed = [
                [graph_us([lambda append=append: bench.attend(append)] * 2, ahead=True) for append in (False, True)] for _ in range(TURNS)
            ]
            attend, appended = (min(times) for times in zip(*timed, strict=True))  # what disturbs a run makes it longer
            retire = sorted(walls[1:])[len(walls[1:]) // 2]
            shape = geometry.layers[0]
            row = {"batch": batch, "tokens": tokens, "dense_MB": batch * tokens * shape.kv_heads * shape.head_dim * 4 / 1e6, "span": span}
            row |= {"block": block, "attend_us": attend, "append_us": appended - attend, "retire_us": retire, "busy_us": busy}
            rows.append(row | {"share": (appended - attend + retire / block) / attend, "error": error})
            print("  " + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows


@torch.no_grad()
def main() -> None:
    """Measure, save, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="short caches, to try the path")
    parser.add_argument("--seconds", type=float, default=120, help="begin no point after so long")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--print", type=Path, dest="table", metavar="FILE", help="only print the table of this CSV")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(read_csv(args.table))))
        return
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.small else "cpu")
    model, record = model_of_one_layer(args.small, device), facts()
    args.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for batch, tokens in ((2, 200),) if args.small else POINTS:
        for span in ("visual", "all"):
            if time.perf_counter() - began > args.seconds:
                print(f"  B {batch}, T {tokens}, span {span}: no time left")
                continue
            rows += [row | record for row in rows_at(model, batch, tokens, span)]
            if device.type == "cuda":
                torch.cuda.empty_cache()
            with (args.output / "retire.csv").open("w", newline="") as stream:
                writer = csv.DictWriter(stream, [*COLUMNS, *record], lineterminator="\n")
                writer.writeheader()
                writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print("\n".join(table(rows)))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Shares of attention as markdown."""
    first = rows[0]
    lines = [f"{first['device']}, torch {first['torch']}, Triton {first['triton']}; one layer, us", ""]
    columns = "B | T | dense MB | text | tokens at once | attention | append | room or leaving, wall | the same, GPU | share | share, GPU"
    lines += [f"| {columns} |", "|" + "---|" * 11]
    for row in rows:
        cells = [str(row["batch"]), str(row["tokens"]), f"{float(row['dense_MB']):.0f}", "raw" if row["span"] == "visual" else "coded"]
        cells += [str(row["block"]), *(f"{float(row[name]):.1f}" for name in ("attend_us", "append_us", "retire_us", "busy_us"))]
        cells += [f"{float(row['share']):.3f}", f"{float(row['busy_us']) / float(row['block']) / float(row['attend_us']):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
