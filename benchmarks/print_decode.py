"""Tables of decode attention for README and docs, from the CSV files that bench_decode.py saved.

python benchmarks/print_decode.py [benchmarks/results/bench_decode.csv]           # the README's table
python benchmarks/print_decode.py --rates                                         # what that table comes to, in a sentence or two
python benchmarks/print_decode.py --linear benchmarks/results/decode_linear.csv [--plot docs/decode_linear.png]
python benchmarks/print_decode.py --small benchmarks/results/decode_small.csv
python benchmarks/print_decode.py --baselines benchmarks/results/decode_baselines.csv
python benchmarks/print_decode.py --steps benchmarks/results/steps.csv              # whole steps, of bench_steps.py
python benchmarks/print_decode.py --reached benchmarks/results/steps.csv            # what these come to, a line for each model
"""

from __future__ import annotations

import argparse
import csv
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from step_tables import Row, reached, span, steps_table  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "bench_decode.csv"
UNIFORM, MIXED = "ours K 32x4 V 64x4", "ours mixed, mean K 32x4 V 64x4"
BITS = {8: ("ours K 64x8 V 128x8", "ours K 32x8 V 128x8"), 4: ("ours K 32x4 V 128x4", UNIFORM)}
SMALL_TARGET = 16.7  # MB of dense cache per layer from which ours is to be never slower: 2**24 bytes, whatever a file rounds them to
SLOPE_TARGET = 0.1


def read(file: Path) -> list[Row]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def is_dense(row: Row) -> bool:
    """Whether a row is a baseline over a whole dense cache of 16-bit numbers."""
    return not str(row["method"]).startswith("ours") and not any(word in str(row["method"]) for word in ("thin", "fp8"))


def measured_on(row: Row) -> str:
    return f"{row['device']}, torch {row['torch']}, Triton {row['triton']}, cuDNN {row['cudnn']}, copy {row['copy_TBps']} TB/s"


def table(rows: list[Row]) -> list[str]:
    """Microseconds with the append, in a CUDA graph, and the ratio to the fastest dense baseline of the same shape."""
    shapes = list(dict.fromkeys((row["B"], row["T"]) for row in rows))
    lines = [measured_on(rows[0]), "", "| |" + "".join(f" B {b}, T {t} |" for b, t in shapes), "|---|" + "---|" * len(shapes)]
    times = {(row["method"], row["B"], row["T"]): float(row["graph_append_us"]) for row in rows}
    ratios = ratios_to_dense(rows, "graph_append_us")
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [f" {times[(method, *shape)]:.0f} us, {ratios[(method, *shape)]:.2f}x |" for shape in shapes]
        lines.append(f"| {method} |" + "".join(cells))
    return lines


def ratios_to_dense(rows: list[Row], column: str) -> dict[tuple[str, Any, Any], float]:
    """Time of the fastest dense baseline of the same (B, T) over this one's, by (method, B, T), where there is one."""
    best: dict[tuple[Any, Any], float] = {}
    for row in filter(is_dense, rows):
        shape = row["B"], row["T"]
        best[shape] = min(best.get(shape, float("inf")), float(row[column]))
    return {(row["method"], *shape): best[shape] / float(row[column]) for row in rows for shape in [(row["B"], row["T"])] if shape in best}


def rates(rows: list[Row]) -> list[str]:
    """What the README says beside its table: own dense, rates by precision, the mixed map, one eager call at batch 1."""
    graph, plain = (ratios_to_dense(rows, column) for column in ("graph_append_us", "graph_us"))
    own = [span((ratio for key, ratio in ratios.items() if key[0] == "ours dense"), 2) for ratios in (graph, plain)]
    read_at = {bits: span((float(row["graph_TBps"]) for row in rows if row["method"] in names), 1) for bits, names in BITS.items()}
    mixed = span((graph[key] / graph[(UNIFORM, *key[1:])] for key in graph if key[0] == MIXED), 2)
    one = [key for key in graph if int(key[1]) == 1 and key[0].startswith("ours")]
    eager = [span((ratios_to_dense(rows, column)[key] for key in one), 2) for column in ("eager_append_us", "eager_us")]
    alone = all(str(row["method"]).startswith("SDPA") for row in rows if is_dense(row))
    fastest, dense = ("faster SDPA", "SDPA") if alone else ("fastest dense kernel", "the fastest dense kernel")
    words = (
        f"Over these shapes `ours dense` has {own[0]} times the speed of the {fastest} with the append, {own[1]} without. "
        f"Codes of 8 bits are read at {read_at[8]} TB/s, those of 4 bits at {read_at[4]}, where a copy reaches "
        f"{float(rows[0]['copy_TBps']):.1f}. The mixed map has {mixed} of the speed of its uniform row. One eager call at batch 1, "
        f"launched from Python, has {eager[0]} times the speed of {dense} with the append, {eager[1]} without."
    )
    return textwrap.wrap(words, 140)


def baselines_table(rows: list[Row]) -> list[str]:
    """Each method with and without the append, what it read per second without, and the time of the fastest dense kernel over its own."""
    head = ["B", "T", "method", "us", "TB/s", "with the append, us", "speed over the fastest dense", "with the append"]
    lines = [measured_on(rows[0]), "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    plain, appended = (ratios_to_dense(rows, column) for column in ("graph_us", "graph_append_us"))
    for row in rows:
        key = row["method"], row["B"], row["T"]
        cells = [row["B"], row["T"], row["method"], f"{float(row['graph_us']):.0f}", f"{float(row['graph_TBps']):.2f}"]
        cells += [f"{float(row['graph_append_us']):.0f}", f"{plain[key]:.2f}", f"{appended[key]:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def with_slopes(rows: list[Row]) -> list[Row]:
    """Rows with `slope_ratio`: from the next smaller T of the same method and B, the time per token over what its bytes take.

    Bytes are taken at the rate of the method's largest T. The smallest T has none, `""`.
    """
    out = []
    for row in rows:
        same = sorted((r for r in rows if (r["method"], r["B"]) == (row["method"], row["B"])), key=lambda r: int(r["T"]))
        before = [r for r in same if int(r["T"]) < int(row["T"])]
        ratio: float | str = ""
        if before:
            spent, size = (float(row[column]) - float(before[-1][column]) for column in ("ms", "read_MB"))
            ratio = spent / (size * float(same[-1]["ms"]) / float(same[-1]["read_MB"]))
        out.append(row | {"slope_ratio": ratio})
    return out


def linear_table(rows: list[Row]) -> list[str]:
    """Our methods and, for each B, the SDPA backend that is faster at its largest T; then whose slopes are within 10 %."""
    facts = f"{measured_on(rows[0])}; {rows[0]['query_heads']} query and {rows[0]['heads']} KV heads of 128, append included"
    head = "| B | T | method | ms | us per 1,000 tokens of T | MB read | TB/s | slope over bytes at the last rate | over the faster SDPA |"
    ratios = ratios_to_dense(rows, "ms")
    lines = [facts, "", head, "|---" * (head.count("|") - 1) + "|"]
    wrong: list[str] = []
    right: list[str] = []
    for batch in dict.fromkeys(row["B"] for row in rows):
        of_batch = [row for row in rows if row["B"] == batch]
        dense = max((row for row in of_batch if is_dense(row)), key=lambda row: (int(row["T"]), -float(row["ms"])), default=of_batch[0])
        for method in dict.fromkeys(row["method"] for row in of_batch if not is_dense(row) or row["method"] == dense["method"]):
            mine = [row for row in of_batch if row["method"] == method]
            lines += [linear_row(row, ratios.get((method, batch, row["T"]))) for row in mine]
            slopes = [float(row["slope_ratio"]) for row in mine if row["slope_ratio"] != ""]
            if slopes:
                good = max(abs(slope - 1) for slope in slopes) <= SLOPE_TARGET
                (right if good else wrong).append(f"{method} at B {batch} ({span(slopes, 2)})")
    words = (("Slopes within 10 %", right), ("Slopes that are not", wrong))
    return lines + ["", *(f"{say}: {', '.join(found) or 'none'}." for say, found in words)]


def linear_row(row: Row, ratio: float | None) -> str:
    """A line of `linear_table`; `ratio` is to the faster SDPA, where one ran."""
    cells = [row["B"], row["T"], row["method"]]
    cells += [f"{float(row[x]):.{digits}f}" for x, digits in (("ms", 4), ("us_per_1k_tokens", 3), ("read_MB", 1), ("TBps", 2))]
    cells.append(f"{float(row['slope_ratio']):.2f}" if row["slope_ratio"] != "" else "")
    cells.append("-" if ratio is None else f"{ratio:.2f}")
    return f"| {' | '.join(map(str, cells))} |"


def small_table(rows: list[Row]) -> list[str]:
    """Ratios to the faster SDPA backend by heads, B and T, and from which dense size ours is never slower."""
    points = small_points(rows)
    if not points:
        return [measured_on(rows[0]), "", "No shape has been measured with both a dense baseline and ours."]
    tokens = sorted({int(row["T"]) for row in points})
    method = points[0]["method"]
    lines = [f"{measured_on(rows[0])}; {method}, append included; times the speed of the faster SDPA (MB of dense cache per layer)", ""]
    lines += ["| heads | B |" + "".join(f" T {t} |" for t in tokens), "|---|---|" + "---|" * len(tokens)]
    cells = {(heads_of(row), int(row["B"]), int(row["T"])): f" {row['ratio']:.2f} ({float(row['dense_MB']):.0f}) |" for row in points}
    for heads, batch in sorted({key[:2] for key in cells}, key=lambda key: (-int(key[0].split("/")[0]), key)):
        lines.append(f"| {heads} | {batch} |" + "".join(cells.get((heads, batch, t), " - |") for t in tokens))
    from_size = never_slower_from(points)
    slower = [row for row in points if row["ratio"] < 1 and float(row["dense_MB"]) >= SMALL_TARGET]
    found = "Slower at the largest size" if from_size is None else f"Never slower from {from_size:.1f} MB of dense cache per layer up"
    each = ", ".join(
        f"{heads} heads {'at no size' if size is None else f'from {size:.1f}'}"
        for heads in dict.fromkeys(map(heads_of, points))
        for size in [never_slower_from([row for row in points if heads_of(row) == heads])]
    )
    where = ", ".join(f"{heads_of(row)} B {row['B']} T {row['T']} ({row['ratio']:.2f})" for row in slower)
    largest = max(float(row["dense_MB"]) for row in points)
    return [
        *lines,
        "",
        f"{found} ({len(points)} points, up to {largest:.0f} MB; {each}).",
        f"Slower although 17 MB or more: {where or 'none'}.",
    ]


def heads_of(row: Row) -> str:
    return f"{row['query_heads']}/{row['heads']}"


def small_points(rows: list[Row]) -> list[Row]:
    """Our rows with `ratio`, the time of the faster SDPA backend of the same shape over ours; shapes without one are left out."""
    best: dict[tuple[Any, ...], float] = {}
    for row in filter(is_dense, rows):
        key = heads_of(row), row["B"], row["T"]
        best[key] = min(best.get(key, float("inf")), float(row["ms"]))
    keyed = [(row, (heads_of(row), row["B"], row["T"])) for row in rows if not is_dense(row)]
    return [row | {"ratio": best[key] / float(row["ms"])} for row, key in keyed if key in best]


def never_slower_from(points: list[Row]) -> float | None:
    """The smallest dense size in MB at and above which no ratio is below 1; None if the largest has one."""
    slower = max((float(row["dense_MB"]) for row in points if row["ratio"] < 1), default=0.0)
    return min((float(row["dense_MB"]) for row in points if float(row["dense_MB"]) > slower), default=None)


def plot_linear(rows: list[Row], file: Path) -> None:
    """Time over T for each method, a panel for each B, with bytes over the last rate as dashed lines through the last point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    batches = list(dict.fromkeys(row["B"] for row in rows))
    figure, panels = plt.subplots(1, len(batches), figsize=(5 * len(batches), 3.8), squeeze=False, layout="constrained")
    colours = dict(zip(dict.fromkeys(row["method"] for row in rows), ("#999999", "#000000", "#0072B2", "#D55E00", "#009E73"), strict=False))
    for panel, batch in zip(panels[0], batches, strict=True):
        for method, colour in colours.items():
            mine = sorted((row for row in rows if (row["method"], row["B"]) == (method, batch)), key=lambda row: int(row["T"]))
            if not mine:
                continue
            at, ms = [int(row["T"]) / 1024 for row in mine], [float(row["ms"]) for row in mine]
            ideal = [float(row["read_MB"]) * ms[-1] / float(mine[-1]["read_MB"]) for row in mine]
            panel.plot(at, ideal, "--", color=colour, linewidth=0.8)
            panel.plot(at, ms, "o-", color=colour, markersize=4, linewidth=1.5, label=method)
        panel.set(
            title=f"B {batch}", xlabel="T, 1024 tokens", xlim=(0, None), ylim=(0, None), xticks=sorted({int(r["T"]) / 1024 for r in rows})
        )
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("ms per layer and new token")
    panels[0][0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle(f"Decode attention, {rows[0]['device']}; dashed: bytes over the rate at the last point", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": ""})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print tables of decode attention that bench_decode.py measured.")
    parser.add_argument(
        "file", nargs="?", type=Path, default=RESULTS, help="CSV of bench_decode.py.  [default: benchmarks/results/bench_decode.csv]"
    )
    parser.add_argument("--rates", action="store_true", help="what its table comes to, instead of the table")
    parser.add_argument("--linear", type=Path, metavar="CSV", help="cost from 16k to 128k tokens, of bench_decode.py --linear, instead")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="with --linear: draw it too (needs matplotlib)")
    parser.add_argument("--small", type=Path, metavar="CSV", help="small caches, of bench_decode.py --small, instead")
    parser.add_argument("--baselines", type=Path, metavar="CSV", help="other dense kernels, of bench_decode.py --only-baselines, instead")
    parser.add_argument("--reached", type=Path, metavar="CSV", help="what whole steps come to, instead of their table")
    parser.add_argument("--steps", type=Path, metavar="CSV", help="whole steps, of bench_steps.py, instead")
    args = parser.parse_args()
    if args.plot and not args.linear:
        parser.error("--plot draws what --linear names")
    if args.linear:
        lines = linear_table(read(args.linear))
    elif args.small:
        lines = small_table(read(args.small))
    elif args.baselines:
        lines = baselines_table(read(args.baselines))
    elif args.steps:
        lines = steps_table(read(args.steps))
    elif args.reached:
        lines = reached(read(args.reached))
    else:
        lines = (rates if args.rates else table)(read(args.file))
    print("\n".join(lines))
    if args.plot:
        plot_linear(read(args.linear), args.plot)


if __name__ == "__main__":
    main()
