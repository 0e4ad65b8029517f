"""Accuracy and bytes of the bundled model: keep ratio × basis × {allocated, uniform}, both ways of asking.

    python benchmarks/bench_accuracy.py --output benchmarks/results            # measure (a GPU; 200 documents)
    python benchmarks/bench_accuracy.py --print benchmarks/results/accuracy.csv   # the README's tables

Everything is calibrated once on 64 documents; each basis has its own sensitivities, each row its own plan. All rows of a mode answer
the same documents in the same batches beside one dense run.
"""

from __future__ import annotations

import argparse
import csv
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from rotatek_compile.artifact import Artifact, Method
from rotatek_compile.bases import BASES, calibrated_basis
from rotatek_compile.batches import encode, end_ids
from rotatek_compile.calibrate import MomentStore, calibrate
from rotatek_compile.calibration_data.forms import Forms
from rotatek_compile.compiler import SENSITIVITY_DOCUMENTS, artifact_tensors, plan_from
from rotatek_compile.evaluate import ASK, Evaluator, evaluate
from rotatek_compile.models import DTYPES, checked_geometry, load_config, load_model, load_processor, resolve
from rotatek_compile.runtime.backends import choose_backend
from rotatek_compile.runtime.cache import RotateKCache
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.prepared import PreparedArtifact
from rotatek_compile.sensitivity import Cutter, levels_for, measure

RATIOS = (0.5, 0.25, 0.125, 0.0625)
FIELDS = ("ask", "keep_ratio", "basis", "allocation", "samples", "exact_match", "kl")
SIZES = ("kv_bytes", "kv_bytes_dense", "span_bytes", "span_bytes_dense")
RECORD = ("basis_bytes", "fallback_heads", "plan_kl", "ranks", "device", "dtype", "torch", "transformers")


Made = dict[tuple[float, str, str], tuple[Artifact, float]]


def artifacts(model: Any, processor: Any, geometry: Any, documents: int, scratch: Path) -> Made:
    """Every artifact of the table, made in memory, with the KL of its plan on documents kept aside."""
    eos = end_ids(model)[0]
    items = [encode(processor, s, geometry, eos) for s in Forms("calibration").iterate(documents)]
    used, held = items[: -documents // 8], items[-documents // 8 :]
    moments = calibrate(model, used, geometry, MomentStore({}, scratch), 8, False, processor.tokenizer.pad_token_id, quiet=True)
    made = {}
    for name in BASES:
        bases = {i: calibrated_basis(name, moments.covariance(i, "visual", "key"), moments.query_moment(i)) for i in geometry.compressible}
        cutter = Cutter(model, geometry, bases, span_all=False)
        levels = levels_for(geometry.layers[0].head_dim)
        sensitivities = measure(cutter, used[:SENSITIVITY_DOCUMENTS], levels, quiet=True)
        docs = [cutter.prefill(item) for item in held]
        for ratio in RATIOS:
            for allocation in ("allocated", "uniform"):
                method = Method(basis=name, keep_ratio=ratio, allocation=allocation, levels=levels)
                ranks, checks = plan_from(cutter, geometry, bases, sensitivities, docs, method)
                tensors = artifact_tensors(geometry, method, moments, {"visual": bases}, ranks, sensitivities)
                made[ratio, name, allocation] = (Artifact(geometry, method, tensors, {}, {}), checks["kl"])
    return made


def run(args: argparse.Namespace) -> None:
    """Measure and save the CSV."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = resolve(args.model)
    config = load_config(source)
    geometry = checked_geometry(config)
    dtype = DTYPES[args.dtype]  # float32 by default: the bundled model's losses drown in bfloat16's rounding
    model, processor = load_model(source, dtype, device), load_processor(source)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        made = artifacts(model, processor, geometry, args.calibration, Path(scratch))
    print(f"{len(made)} artifacts in {time.perf_counter() - start:.0f} s", flush=True)
    eos = end_ids(model)
    items = [encode(processor, s, geometry, eos[0]) for s in Forms("evaluation").iterate(args.documents)]
    backend = choose_backend(args.backend, device)
    rows = []
    record = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    first = next(iter(made.values()))[0]
    with enable(model, first, backend=args.backend):
        for ask in ASK:
            evaluator = Evaluator(model, processor, ask, eos, 24)
            methods: dict[str, Any] = {"dense": evaluator.dense_cache}
            for key, (artifact, _) in made.items():
                prepared = PreparedArtifact(replace(artifact, method=replace(artifact.method, fallback_factor=args.fallback_factor)))
                methods["|".join(map(str, key))] = lambda p=prepared: RotateKCache(config, p, backend)
            for row, key in zip(evaluate(evaluator, items, methods, args.batch_size), [None, *made], strict=True):
                numbers = row.to_json()
                if key is None:
                    about = {"keep_ratio": 1.0, "basis": "dense", "allocation": "", "plan_kl": 0.0, "ranks": ""}
                else:
                    ranks = ";".join(" ".join(map(str, r)) for r in made[key][0].ranks().values())
                    about = {"keep_ratio": key[0], "basis": key[1], "allocation": key[2], "plan_kl": made[key][1], "ranks": ranks}
                rows.append({"ask": ask, "samples": row.samples} | about | numbers | record)
            print(f"ask {ask} done at {time.perf_counter() - start:.0f} s", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "accuracy.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*FIELDS, *SIZES, *RECORD], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    show(args.output / "accuracy.csv")


def show(file: Path) -> None:
    """The README's tables as Markdown."""
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    sample = rows[0]
    versions = f"torch {sample['torch']}, transformers {sample['transformers']}"
    print(f"{sample['samples']} documents, {sample['device']}, {sample['dtype']}, {versions}")
    print("\n| keep ratio | basis | ranks | `after`: exact / KL | `with`: exact / KL | KV bytes / dense | coded span / dense |")
    print("|---|---|---|---|---|---|---|")
    other = {(r["keep_ratio"], r["basis"], r["allocation"]): r for r in rows if r["ask"] == "with"}
    for row in rows:
        if row["ask"] != "after":
            continue
        pair = other[row["keep_ratio"], row["basis"], row["allocation"]]
        cells = [f"{float(r['exact_match']):.3f} / {float(r['kl']):.1e}" for r in (row, pair)]
        share = float(row["kv_bytes"]) / float(row["kv_bytes_dense"])
        span = float(row["span_bytes"]) / float(row["span_bytes_dense"]) if float(row["span_bytes_dense"]) else 1.0
        sizes = f"{share:.3f} | {span:.3f}" if row["allocation"] else f"1 ({share:.2f} with padding) | 1"
        print(f"| {row['keep_ratio']} | {row['basis']} | {row['allocation'] or '-'} | {cells[0]} | {cells[1]} | {sizes} |")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--print", type=Path, dest="table", help="only print the tables of this CSV")
    parser.add_argument("--model", default="tiny-llava-next")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--fallback-factor", type=float, default=Method().fallback_factor)
    args = parser.parse_args()
    if args.table:
        show(args.table)
    else:
        run(args)


if __name__ == "__main__":
    main()
