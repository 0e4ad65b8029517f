"""What calibration costs: moments and bases against a plain forward pass over the same batches, and the sensitivities apart.

OMP_NUM_THREADS=2 python benchmarks/bench_calibration.py --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from rotatek_compile.batches import Encoded, encode, end_ids, merge_media, pad, position_ids
from rotatek_compile.calibrate import MomentStore, calibrate
from rotatek_compile.calibration_data.bundled import BundledSet
from rotatek_compile.compile_options import SENSITIVITY_SAMPLES
from rotatek_compile.compiler import bases_of
from rotatek_compile.cutter import Cutter
from rotatek_compile.models import checked_geometry, load_config, load_model, load_processor, resolve
from rotatek_compile.sensitivity import levels_for, measure


def plain_forward(model: Any, items: list[Encoded], batch_size: int, pad_id: int) -> None:
    """The same batches through the model with nothing attached."""
    device = next(model.parameters()).device
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        chunk = pad([item.prompt + item.answer for item in batch], pad_id)
        mask = chunk.mask.to(device)
        inputs = {"input_ids": chunk.ids.to(device), "attention_mask": mask, "position_ids": position_ids(mask)}
        with torch.inference_mode():
            model(**inputs, use_cache=False, logits_to_keep=1, **merge_media(batch, device, model.dtype))


def main() -> None:
    """Measure, print one line, save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = resolve("tiny-llava-next")
    geometry = checked_geometry(load_config(source))
    model, processor = load_model(source, torch.float32, device), load_processor(source)
    items = [encode(processor, s, geometry, end_ids(model)[0]) for s in BundledSet("mixed", "calibration").iterate(args.documents)]
    pad_id = processor.tokenizer.pad_token_id
    plain_forward(model, items[:8], args.batch_size, pad_id)  # warm-up

    seconds: dict[str, list[float]] = {"plain_forward": [], "moments_and_bases": []}
    for _ in range(3):
        start = time.perf_counter()
        plain_forward(model, items, args.batch_size, pad_id)
        seconds["plain_forward"].append(time.perf_counter() - start)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            moments = calibrate(model, items, geometry, MomentStore({}, Path(scratch)), args.batch_size, False, pad_id, quiet=True)
        bases = bases_of(moments, geometry, "two-sided", "visual")
        seconds["moments_and_bases"].append(time.perf_counter() - start)
    start = time.perf_counter()
    cutter = Cutter(model, geometry, bases["key"], False, bases["value"])
    measure(cutter, items[:SENSITIVITY_SAMPLES], levels_for(geometry.layers[0].head_dim), quiet=True)
    result = {
        "documents": args.documents,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{name: sorted(values)[1] for name, values in seconds.items()},
        "ratio": sorted(b / a for a, b in zip(*seconds.values(), strict=True))[1],
        "sensitivities": time.perf_counter() - start,
    }
    print(json.dumps(result))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"calibration-{device.type}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
