"""Documents built to break the calibration: does the answer stay, or does the report say that it may not have?

    python benchmarks/bench_broken_inputs.py ARTIFACT --samples 60 --output broken.csv
    python benchmarks/bench_broken_inputs.py --print broken.csv

    python benchmarks/bench_broken_inputs.py ARTIFACT --values DIR --shard 2/8                   # one process of eight
    python benchmarks/bench_broken_inputs.py --merge DIR/*.jsonl --output broken.csv             # all eight together

Every document is read as it is and with its pages changed: colours inverted, strong noise, mirrored print, other glyphs (every small cell
of the page transposed), blank pages, random pixels. For each the exact match of ours and of the dense model on the same changed pages, the
KL between them, how many answers are the same text, and of how many documents something is said: heads fell back, or the warning came that
the Keys lie off the calibrated directions. Documents are read one at a time, so that what is said is said of one.

A row is good where ours is within 0.02 of dense on the documents of which nothing is said; the exit status is 1 if a row is not. A dense
model that answers nothing right cannot lose answers, so read the KL and the share of equal answers there.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Rows, add_run_options, add_table_options, ended, opened, record_of, show_table, versions
from PIL import Image, ImageOps
from shards import Shard, Values, read_values

from rotatek_compile.api import base_source, load_base
from rotatek_compile.artifact import read_artifact
from rotatek_compile.batches import end_ids, rope_index
from rotatek_compile.calibration_data.sample import Sample
from rotatek_compile.documents import Documents, usable
from rotatek_compile.errors import UsageError
from rotatek_compile.evaluate import Evaluator, evaluate
from rotatek_compile.methods import ARTIFACT, DENSE
from rotatek_compile.names import ASK
from rotatek_compile.outcomes import Row, exact_match_loss
from rotatek_compile.replan import replanned
from rotatek_compile.runtime.cache import RotateKCache
from rotatek_compile.runtime.enable import enable

ALLOWED = 0.02  # of exact match
NOISE = 90.0  # standard deviation in grey levels
CELL = 4  # pixels: smaller than any glyph, so that strokes change and lines stay
FAR_OFF, CALIBRATED = ("deviation", "angle"), ("usual_deviation", "calibrated_angle")  # as `RotateKCache.stats` calls them
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


def said_of(cache: RotateKCache) -> dict[str, Any]:
    """What the report of one cache says: how many heads fell back, how unlike the calibration its pages are, whether a warning came."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache.check_drift()
    stats = cache.stats()
    return {name: stats.get(name) for name in ("fallback_heads", *FAR_OFF, *CALIBRATED)} | {"warned": cache.drift_said}


def row_of(words: str, dense: Row, ours: Row, said: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table, and whether it is good; `said` of each document, as `said_of`."""
    loss, (low, high) = exact_match_loss(dense, ours)
    own, count = ours.accuracy(), max(ours.samples, 1)
    silent = [not one["fallback_heads"] and not one["warned"] for one in said]
    lost = [a.exact - b.exact for a, b, unsaid in zip(dense.outcomes, ours.outcomes, silent, strict=True) if unsaid]
    known = [name for name in FAR_OFF if any(one[name] is not None for one in said)]
    worst = (
        max(said, key=lambda one: one[known[0]] if one[known[0]] is not None else -1.0) if known else dict.fromkeys(FAR_OFF + CALIBRATED)
    )
    same = sum(a == b for a, b in zip(dense.texts, ours.texts, strict=True)) / count
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
        "fallback_heads": ours.sizes()["fallback_heads"],
        "fell_back": sum(one["fallback_heads"] > 0 for one in said) / count,
        "warned_of": sum(one["warned"] for one in said) / count,
        **{name: "" if worst[name] is None else worst[name] for name in FAR_OFF + CALIBRATED},
        "silent_loss": sum(lost) / count,
        "good": int(abs(sum(lost)) <= ALLOWED * count),
    }


def measure(args: argparse.Namespace) -> Values:
    """This process's documents with every change."""
    began, artifact, shard = time.monotonic(), read_artifact(args.artifact), Shard.parse(args.shard)
    if artifact.method.rival:
        raise UsageError(f"{args.artifact} was compiled for {artifact.method.rival}, which has no fallback; pass one of our own method")
    if args.kv_budget:
        artifact = replanned(artifact, kv_budget=args.kv_budget)
    data = opened(args.data, args.seed)
    places = usable(data, args.samples, artifact.geometry.text_only)
    model, processor = load_base(artifact, model=args.model, dtype=args.dtype, device=args.device)
    eos, rope = end_ids(model), rope_index(model)
    evaluator = Evaluator(model, processor, args.ask, eos, args.max_new_tokens)
    record = record_of(base_source(artifact, args.model), args.data, evaluator.device, evaluator.dtype)
    record |= {"budget": artifact.method.kv_budget or ""}
    with enable(model, artifact, backend=args.backend, fallback=not args.no_fallback) as active:
        record["fallback_factor"] = active.artifact.method.fallback_factor
        header = {"record": record, "ask": args.ask, "batch_size": args.batch_size, "ids": data.hash_ids(list(places.values()))}
        values = Values.begin(header, shard.file(args.values, "broken") if args.values else None)
        loaded = time.monotonic()
        for done, (number, some) in enumerate(shard.batches(len(places), args.batch_size), 1):
            found, note = {}, {}
            for words, change in CHANGES.items():
                changed = replace(data, sample=lambda n, change=change: broken(data.sample(n), change, args.seed))
                items = Documents(changed, list(places)[some], processor, artifact.geometry, eos[0], rope)
                made: list[RotateKCache] = []
                methods = {DENSE: evaluator.dense_cache, ARTIFACT: lambda made=made: made.append(active.new_cache()) or made[-1]}
                rows = evaluate(evaluator, items, methods, args.batch_size)
                found |= {f"{words}: {row.method}": row.outcomes for row in rows}
                note[words] = said_of(made[0])
            values.add(number, found, note)
            spent, spent_here = time.monotonic() - began, time.monotonic() - loaded
            print(f"broken {args.shard}: {values.documents} documents in {spent:.0f} s", file=sys.stderr, flush=True)
            if args.seconds and spent + spent_here / done > args.seconds:
                break
    return values


def table(values: Values) -> Rows:
    """One row for each change."""
    rows = []
    for words in CHANGES:
        dense, ours = (values.row(f"{words}: {method}", method) for method in (DENSE, ARTIFACT))
        sizes = [(number, len(values.batches[number][f"{words}: {DENSE}"])) for number in sorted(values.batches)]
        said = [values.notes[number][words] for number, size in sizes for _ in range(size)]  # of a batch, so of each of its documents
        rows.append(row_of(words, dense, ours, said) | values.header["record"])
    return rows


def markdown(rows: Rows) -> str:
    """The table of one model."""
    first = rows[0]
    budget = f"KV budget {float(first['budget']):.4g}" if first["budget"] else "the artifact's keep ratio"
    guard = f"fallback factor {float(first['fallback_factor']):g}"
    lines = [f"{first['model']}, {first['documents']} documents of {first['data']}, {budget}, {guard}, {versions(first)}", ""]
    columns = ("pages", "dense", "ours", "dense less ours", "KL per token", "same answers", "coded span", "heads that fell back",
               "documents that fell back", "warned of", "dense less ours where nothing is said", "largest deviation (usual)",
               "its angle (calibrated)")  # fmt: skip
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        angle = f"{float(row['angle']):.0f}° ({float(row['calibrated_angle']):.0f}°)" if row["angle"] != "" else "-"
        unlike = f"{float(row['deviation']):.2f} ({float(row['usual_deviation']):.2f})" if row.get("deviation", "") != "" else "-"
        loss, low, high, kl = (float(row[name]) for name in ("loss", "loss_low", "loss_high", "kl"))
        cells = [
            row["pages"],
            f"{float(row['dense']):.3f}",
            f"{float(row['ours']):.3f}",
            f"{loss:.3f} [{low:.3f}, {high:.3f}]",
            f"{kl:.1e}",
        ]
        cells += [f"{float(row['same_answers']):.3f}", f"{float(row['span']):.4f}", str(row["fallback_heads"])]
        cells += [f"{float(row[name]):.3f}" if row.get(name, "") != "" else "-" for name in ("fell_back", "warned_of", "silent_loss")]
        lines.append(f"| {' | '.join([*cells, unlike, angle])} |")
    bad = [row["pages"] for row in rows if not int(row["good"])]
    said = f"Not within {ALLOWED:g} of dense, and nothing said: {', '.join(bad)}" if bad else (
        f"Every row is within {ALLOWED:g} of dense where nothing is said.")  # fmt: skip
    return "\n".join([*lines, "", said])


def run(args: argparse.Namespace) -> int:
    """Measure one shard, or everything, or only merge or print."""
    if not args.table and not args.merge and Shard.parse(args.shard).count > 1:
        if args.values is None:
            raise UsageError("--shard needs --values DIR, where the processes put what they find")
        print(measure(args).file)
        return 0
    rows = show_table(args, lambda args: table(read_values(args.merge) if args.merge else measure(args)), markdown)
    return int(not args.table and not args.no_fallback and any(not int(row["good"]) for row in rows))


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="?")
    add_table_options(parser)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="measure each N-th batch of the documents, from the I-th")
    parser.add_argument("--seconds", type=float, help="begin no batch that would end later than so long after the start")
    parser.add_argument("--values", type=Path, metavar="DIR", help="folder for the values of documents")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="put these .jsonl files together")
    parser.add_argument("--kv-budget", type=float, help="planned for this budget instead of the artifact's")
    parser.add_argument("--no-fallback", action="store_true", help="hold every head to its plan: what the fallback is there for")
    parser.add_argument("--ask", choices=ASK, default="after")
    add_run_options(parser, batch_size=1)
    args = parser.parse_args()
    if sum(given is not None for given in (args.artifact, args.table, args.merge)) != 1:
        parser.error("pass an ARTIFACT to measure, or --merge FILES, or --print FILE")
    return ended(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
