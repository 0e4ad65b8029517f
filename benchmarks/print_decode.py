"""The README's table of decode attention, from the CSV that bench_decode.py saved.

python benchmarks/print_decode.py [benchmarks/results/bench_decode.csv]
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "bench_decode.csv"


def main(file: Path) -> None:
    """Microseconds with the append, in a CUDA graph, and the ratio to the faster SDPA backend of the same shape."""
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    facts = rows[0]
    shapes = list(dict.fromkeys((row["B"], row["T"]) for row in rows))
    print(f"{facts['device']}, torch {facts['torch']}, Triton {facts['triton']}, cuDNN {facts['cudnn']}, copy {facts['copy_TBps']} TB/s\n")
    print("| |" + "".join(f" B {b}, T {t} |" for b, t in shapes))
    print("|---|" + "---|" * len(shapes))
    times = {(row["method"], row["B"], row["T"]): float(row["graph_append_us"]) for row in rows}
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for shape in shapes:
            best = min(times[("SDPA cuDNN", *shape)], times[("SDPA flash", *shape)])
            cells.append(f" {times[(method, *shape)]:.0f} us, {best / times[(method, *shape)]:.2f}x |")
        print(f"| {method} |" + "".join(cells))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the table of decode attention that bench_decode.py measured.")
    parser.add_argument(
        "file", nargs="?", type=Path, default=RESULTS, help="CSV of bench_decode.py.  [default: benchmarks/results/bench_decode.csv]"
    )
    main(parser.parse_args().file)
