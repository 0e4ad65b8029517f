"""Learns what the rival `palu` needs of a model, into one file for `rotatek-eval --learned FILE` (rotatek_compile/learn_palu.py says what).

    python benchmarks/learn_palu.py --model tiny-llava-next --calib mixed --num-samples 144 --output palu-tiny-llava-next.safetensors

Documents are those that `rotatek-compile` takes with the same --calib, --num-samples and --seed. Minutes on a CPU for the bundled models.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from measuring import ended

from rotatek_compile.calibration_data.registry import open_data
from rotatek_compile.compile_inputs import CompilePlan, load_inputs
from rotatek_compile.compile_options import CompileOptions
from rotatek_compile.errors import UsageError
from rotatek_compile.learn_palu import learn_palu
from rotatek_compile.learned import save_learned
from rotatek_compile.models import checked_geometry, choose_device, choose_dtype, load_config, pinned, resolve


def learn(options: CompileOptions) -> None:
    """Read the documents and write `options.output`.

    Raises:
        RotateKError: a model, data or statistics that cannot be used; a file that is there already.
    """
    if options.seed < 0:
        raise UsageError(f"--seed {options.seed} is out of range; it must be at least 0")
    if options.output.exists():
        raise UsageError(f"{options.output} is there already; name another --output, or remove it")
    started, source = time.perf_counter(), resolve(options.model)
    config = load_config(source)
    source, geometry = pinned(source, config), checked_geometry(config)
    data = open_data(options.calib, "calibration", options.seed, images=not geometry.text_only)
    device = choose_device(options.device)
    plan = CompilePlan(source, config, geometry, data, device, choose_dtype(options.dtype, config, device), None)
    inputs = load_inputs(plan, options.num_samples, options)
    found = learn_palu(
        inputs.model, inputs.items, geometry, batch_size=options.batch_size, pad_id=inputs.pad_id, quiet=options.quiet
    )  # fmt: skip
    training = {"documents": len(inputs.items), "seconds": round(time.perf_counter() - started, 1)}
    facts = {"base_model": inputs.base, "geometry": geometry.to_json(), "calibration": inputs.record, "training": training}
    save_learned(options.output, "palu", found, facts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llava-next")
    parser.add_argument("--calib", default="mixed")
    parser.add_argument("--num-samples", type=int, default=144)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--quiet", action="store_true")
    options = CompileOptions(**vars(parser.parse_args()))

    def done() -> int:
        learn(options)
        return 0

    return ended(done)


if __name__ == "__main__":
    sys.exit(main())
