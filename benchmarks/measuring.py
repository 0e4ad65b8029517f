"""What the measuring scripts of this folder share: common options, a record of what ran on what, CSV tables, and how a run ends."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sparse_pages
import torch
import transformers

from rotatek_compile.calibration_data.errors import DataError
from rotatek_compile.calibration_data.registry import DataSource, open_data
from rotatek_compile.errors import RotateKError
from rotatek_compile.models import Source

BACKENDS = ("auto", "triton", "torch", "reconstruct")
Rows = list[dict[str, Any]]


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options of every script that runs an artifact."""
    parser.add_argument("--data", default="mixed", help=f"a data set, or {sparse_pages.NAME}: nearly blank pages")
    parser.add_argument("--model", help="base weights other than the recorded ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    add_device_options(parser)


def add_run_options(parser: argparse.ArgumentParser, batch_size: int = 10) -> None:
    """Those, and how batches of documents are answered."""
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    add_data_options(parser)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Where and how precisely a model runs."""
    parser.add_argument("--dtype")
    parser.add_argument("--device")


def add_table_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Where a table goes, and how it is printed again; with `several`, from the CSVs of several runs."""
    parser.add_argument("--output", type=Path, help="CSV to write")
    words = "only print the table of these CSVs, and write them to --output as one" if several else "only print the table of this CSV"
    parser.add_argument("--print", type=Path, dest="table", metavar="FILE", nargs="+" if several else None, help=words)


def opened(name: str, seed: int) -> DataSource:
    """The evaluation split of a data set, or the nearly blank pages, which only these scripts know."""
    return sparse_pages.source("evaluation", seed) if name == sparse_pages.NAME else open_data(name, "evaluation", seed)


def record_of(source: Source, data: str, place: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Columns that say what was measured on what; local models and files by the last part of their path."""
    return {
        "model": Path(source.name).name if source.is_local else source.name,
        "data": data,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def versions(row: dict[str, Any]) -> str:
    """Device, dtype and versions of a row that has the columns of `record_of`."""
    return f"{row['device']}, {row['dtype']}, torch {row['torch']}, transformers {row['transformers']}"


def write_csv(file: Path, rows: Rows, fields: Sequence[str] = ()) -> None:
    """Write rows with these columns, by default those of the first row; what a row does not have stays empty."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fields or list(rows[0]), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(file: Path) -> Rows:
    """Rows of a CSV, every cell as text.

    Raises:
        RotateKError: there is none.
    """
    with file.open(newline="", encoding="utf-8") as stream:
        rows: Rows = list(csv.DictReader(stream))
    if not rows:
        raise RotateKError(f"{file} holds no rows")
    return rows


def show_table(
    args: argparse.Namespace, measure: Callable[[argparse.Namespace], Rows], markdown: Callable[[Rows], str], fields: Sequence[str] = ()
) -> Rows:
    """Measure and save to `--output`, or read what `--print` names; print the table and return its rows."""
    files = [] if args.table is None else args.table if isinstance(args.table, list) else [args.table]
    rows = [row for file in files for row in read_csv(file)] if files else measure(args)
    if args.output:
        write_csv(args.output, rows, fields)
    print(markdown([{name: row.get(name, "") for name in fields} for row in rows] if fields else rows))
    return rows


def ended(run: Callable[[], int]) -> int:
    """The exit status of a run; a mistake of the user's is one sentence."""
    try:
        return run()
    except (RotateKError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))
