"""Documents built to break the calibration: does the answer stay, or does the report say that it may not have?

    python benchmarks/bench_broken_inputs.py ARTIFACT --samples 60 --output broken.csv
    python benchmarks/bench_broken_inputs.py --print broken.csv

Every document is read as it is and with its pages changed: colours inverted, strong noise, mirrored print, other glyphs (every small cell
of the page transposed), blank pages, random pixels. For each the exact match of ours and of the dense model on the same changed pages, the
KL between them, how many answers are the same text, how many heads fell back and how far the Keys lie from the calibrated directions.

A row is good where ours is within 0.02 of dense, heads fell back, or the drift is such that a warning is given; the exit status is 1 if a
row is neither. A dense model that answers nothing right cannot lose answers, so read the KL and the share of equal answers there.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps

from rotatek_compile.api import base_source, load_base
from rotatek_compile.artifact import read_artifact
from rotatek_compile.batches import end_ids, rope_index
from rotatek_compile.calibration_data.errors import DataError
from rotatek_compile.calibration_data.registry import open_data
from rotatek_compile.calibration_data.sample import Sample
from rotatek_compile.documents import Documents, usable
from rotatek_compile.errors import RotateKError, UsageError
from rotatek_compile.evaluate import Evaluator, evaluate
from rotatek_compile.methods import ARTIFACT, DENSE
from rotatek_compile.outcomes import Row, exact_match_loss
from rotatek_compile.replan import replanned
from rotatek_compile.runtime.cache import RotateKCache
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.monitor import DRIFT

ALLOWED = 0.02  # of exact match
NOISE = 90.0  # standard deviation in grey levels
CELL = 4  # pixels: smaller than any glyph, so that strokes change and lines stay
Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def of_array(make: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Change:
    """A change of pixels uint8 [H, W, 3]."""
    return lambda page, random: Image.fromarray(make(np.asarray(page.convert("RGB")), random))


def noisy(page: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return (page + random.normal(0, NOISE, page.shape)).clip(0, 255).astype(np.uint8)


def other_glyphs(page: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Rows and columns swapped within every cell of CELL x CELL pixels; what does not fill a cell stays."""
    out = page.copy()
    high, wide = (size // CELL * CELL for size in page.shape[:2])
    cells = page[:high, :wide].reshape(high // CELL, CELL, wide // CELL, CELL, 3)
    out[:high, :wide] = cells.transpose(0, 3, 2, 1, 4).reshape(high, wide, 3)
    return out


CHANGES: dict[str, Change] = {
    "as they are": lambda page, random: page,
    "colours inverted": lambda page, random: ImageOps.invert(page.convert("RGB")),
    "strong noise": of_array(noisy),
    "mirrored": lambda page, random: ImageOps.mirror(page),
    "other glyphs": of_array(other_glyphs),
    "blank": of_array(lambda page, random: np.full_like(page, 255)),
    "random pixels": of_array(lambda page, random: random.integers(0, 256, page.shape, dtype=np.uint8)),
}


def broken(sample: Sample, change: Change, seed: int) -> Sample:
    """A sample with its pages changed; the same document gets the same noise for every method."""
    random = np.random.default_rng([seed, *sample.id.encode()])
    return replace(sample, images=tuple(change(page, random) for page in sample.images))


class Watch:
    """Keeps the caches of a batch until their statistics are read."""

    def __init__(self, active: enable) -> None:
        self.active = active
        self.caches: list[RotateKCache] = []
        self.angles: list[tuple[float, float]] = []

    def make(self) -> RotateKCache:
        cache = self.active.new_cache()
        self.caches.append(cache)
        return cache

    def read(self, number: int, found: Any) -> None:
        """After every batch: its angle and the calibrated one."""
        for cache in self.caches:
            stats = cache.stats()
            if stats["angle"] is not None:
                self.angles.append((stats["angle"], stats["calibrated_angle"]))
        self.caches = []

    def worst(self) -> tuple[float, float] | None:
        """Of the batch that lies farthest beyond its calibrated angle."""
        return max(self.angles, key=lambda pair: pair[0] - pair[1]) if self.angles else None


def row_of(words: str, dense: Row, ours: Row, angles: tuple[float, float] | None) -> dict[str, Any]:
    """One line of the table, and whether it is good."""
    loss, (low, high) = exact_match_loss(dense, ours)
    own, fallback = ours.accuracy(), ours.sizes()["fallback_heads"]
    warned = angles is not None and angles[0] - angles[1] > DRIFT
    same = sum(a == b for a, b in zip(dense.texts, ours.texts, strict=True)) / max(ours.samples, 1)
    span = sum(o.bytes["span"] for o in ours.outcomes) / max(sum(o.bytes["span_dense"] for o in ours.outcomes), 1)
    return {
        "pages": words,
        "documents": ours.samples,
        "dense": dense.accuracy()["exact_match"],
        "ours": own["exact_match"],
        "loss": loss,
        "loss_low": low,
        "loss_high": high,
        "kl": own["kl"],
        "kl_low": own["kl_interval"][0],
        "kl_high": own["kl_interval"][1],
        "same_answers": same,
        "span": span,
        "fallback_heads": fallback,
        "angle": angles[0] if angles else "",
        "calibrated_angle": angles[1] if angles else "",
        "warned": int(warned),
        "good": int(abs(loss) <= ALLOWED or fallback > 0 or warned),
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All changes of the same documents."""
    artifact = read_artifact(args.artifact)
    if artifact.method.rival:
        raise UsageError(f"{args.artifact} was compiled for {artifact.method.rival}, which has no fallback; pass one of our own method")
    if args.kv_budget:
        artifact = replanned(artifact, kv_budget=args.kv_budget)
    data = open_data(args.data, "evaluation", args.seed)
    places = usable(data, args.samples, artifact.geometry.text_only)
    model, processor = load_base(artifact, model=args.model, dtype=args.dtype, device=args.device)
    eos, rope = end_ids(model), rope_index(model)
    evaluator = Evaluator(model, processor, args.ask, eos, args.max_new_tokens)
    source, place = base_source(artifact, args.model), evaluator.device
    record = {
        "model": Path(source.name).name if source.is_local else source.name,
        "data": args.data,
        "budget": artifact.method.kv_budget or "",
        "fallback_factor": artifact.method.fallback_factor,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "dtype": str(evaluator.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    rows = []
    with enable(model, artifact, backend=args.backend, fallback=not args.no_fallback) as active:
        record["fallback_factor"] = active.artifact.method.fallback_factor
        for words, change in CHANGES.items():
            changed = replace(data, sample=lambda n, change=change: broken(data.sample(n), change, args.seed))
            items = Documents(changed, places, processor, artifact.geometry, eos[0], rope)
            watch = Watch(active)
            methods = {DENSE: evaluator.dense_cache, ARTIFACT: watch.make}
            dense, ours = evaluate(evaluator, items, methods, args.batch_size, quiet=True, keep=watch.read)
            rows.append(row_of(words, dense, ours, watch.worst()) | record)
            print(f"{words}: dense {rows[-1]['dense']:.3f}, ours {rows[-1]['ours']:.3f}", file=sys.stderr, flush=True)
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of one model."""
    first = rows[0]
    budget = f"KV budget {float(first['budget']):.4g}" if first["budget"] else "the artifact's keep ratio"
    versions = f"{first['device']}, {first['dtype']}, torch {first['torch']}, transformers {first['transformers']}"
    guard = f"fallback factor {float(first['fallback_factor']):g}"
    lines = [f"{first['model']}, {first['documents']} documents of {first['data']}, {budget}, {guard}, {versions}", ""]
    columns = ("pages", "dense", "ours", "dense less ours", "KL per token", "same answers", "coded span", "heads that fell back",
               "angle (calibrated)", "drift warning")  # fmt: skip
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        angle = f"{float(row['angle']):.0f}° ({float(row['calibrated_angle']):.0f}°)" if row["angle"] != "" else "-"
        loss, low, high, kl = (float(row[name]) for name in ("loss", "loss_low", "loss_high", "kl"))
        cells = [
            row["pages"],
            f"{float(row['dense']):.3f}",
            f"{float(row['ours']):.3f}",
            f"{loss:.3f} [{low:.3f}, {high:.3f}]",
            f"{kl:.1e}",
        ]
        cells += [f"{float(row['same_answers']):.3f}", f"{float(row['span']):.4f}", str(row["fallback_heads"]), angle]
        lines.append(f"| {' | '.join([*cells, 'yes' if int(row['warned']) else 'no'])} |")
    bad = [row["pages"] for row in rows if not int(row["good"])]
    said = f"Neither within {ALLOWED:g} of dense nor said to be off: {', '.join(bad)}" if bad else (
        f"Every row is within {ALLOWED:g} of dense, or fell back, or was warned of.")  # fmt: skip
    return "\n".join([*lines, "", said])


def main() -> int:
    """Measure and save, or only print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--print", type=Path, dest="table", help="only print the table of this CSV")
    parser.add_argument("--output", type=Path, help="CSV to write")
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--kv-budget", type=float, help="planned for this budget instead of the artifact's")
    parser.add_argument("--no-fallback", action="store_true", help="hold every head to its plan: what the fallback is there for")
    parser.add_argument("--data", default="mixed")
    parser.add_argument("--ask", choices=("after", "with"), default="after")
    parser.add_argument("--model", help="base weights other than the recorded ones")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "torch", "reconstruct"))
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    args = parser.parse_args()
    if (args.artifact is None) == (args.table is None):
        parser.error("pass an ARTIFACT to measure, or --print FILE")
    try:
        if args.table:
            with args.table.open(newline="", encoding="utf-8") as stream:
                rows: list[dict[str, Any]] = list(csv.DictReader(stream))
        else:
            rows = measure(args)
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                with args.output.open("w", newline="", encoding="utf-8") as stream:
                    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
    except (RotateKError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    print(markdown(rows))
    return int(not args.table and not args.no_fallback and any(not int(row["good"]) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
