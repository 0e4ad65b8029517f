"""Train LeanK's scales (rotatek_compile/learn_leank.py) on a model and write the file that rotatek-eval --learned takes.

    python benchmarks/learn_leank.py --model tiny-llava-next --calib mixed --num-samples 144 --output leank-tiny-llava-next.safetensors
    rotatek-eval ARTIFACT --data mixed --suite proof --learned leank-tiny-llava-next.safetensors --output DIR

Without --ratios masks are trained at ten, those of the committed results: the shares of channels that the suite asks for lie between the
halves of halves (docs/rivals.md). Losses are printed: errors of the hidden states, each the mean over a twentieth of the steps. Documents
are those that rotatek-compile reads with the same --calib, --num-samples and --seed.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

from measuring import ended

from rotatek_compile.calibration_data.registry import open_data
from rotatek_compile.compile_inputs import CompilePlan, load_inputs
from rotatek_compile.compile_options import CompileOptions
from rotatek_compile.errors import UsageError
from rotatek_compile.learn_leank import BINARY_RATE, BINARY_STEPS, RATE, STEPS, WEIGHT, LeanOptions, Losses, check_model, learn
from rotatek_compile.learned import save_learned
from rotatek_compile.models import checked_geometry, choose_device, choose_dtype, load_config, pinned, resolve
from rotatek_compile.runtime.rivals.leank_learned import tensors_of

RATIOS = (1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16, 3 / 64, 1 / 32, 1 / 64)


def train(args: argparse.Namespace) -> Losses:
    """Load, train, write; returns what the errors were.

    Raises:
        RotateKError: options out of range, a model or data that cannot be used, or a file that cannot be written.
    """
    if args.output.is_dir() or (args.output.exists() and not args.overwrite):
        raise UsageError(f"--output {args.output} exists; pass --overwrite to replace it, or choose another file")
    options = LeanOptions(
        ratios=tuple(args.ratios),
        steps=args.steps,
        binary_steps=args.steps_binary,
        rate=args.lr,
        binary_rate=args.lr_binary,
        weight=args.weight,
        batch_size=args.batch_size,
        seed=args.seed,
        quiet=args.quiet,
    )
    asked = CompileOptions(model=args.model, calib=args.calib, output=args.output, num_samples=args.num_samples, seed=args.seed)
    source = resolve(args.model)
    config = load_config(source)
    geometry, device = checked_geometry(config), choose_device(args.device)
    check_model(geometry)
    data = open_data(args.calib, "calibration", args.seed)
    plan = CompilePlan(pinned(source, config), config, geometry, data, device, choose_dtype(args.dtype, config, device), None)
    inputs = load_inputs(plan, args.num_samples, asked)
    start = time.perf_counter()
    scales, losses = learn(inputs.model, inputs.items, geometry, options)
    training = {name: value for name, value in asdict(options).items() if name != "quiet"} | {"ratios": list(options.ratios)}
    training |= {"seconds": time.perf_counter() - start, "errors": losses.first, "binary_errors": list(losses.second.values())}
    facts = {"base_model": inputs.base, "geometry": geometry.to_json(), "calibration": inputs.record, "training": training}
    save_learned(args.output, "leank-learned", tensors_of(scales), facts)
    return losses


def main() -> None:
    """Train, print the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", default="mixed")
    parser.add_argument("--num-samples", type=int, default=144)
    parser.add_argument("--ratios", type=float, nargs="*", default=list(RATIOS))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--steps-binary", type=int, default=BINARY_STEPS)
    parser.add_argument("--lr", type=float, default=RATE)
    parser.add_argument("--lr-binary", type=float, default=BINARY_RATE, help="of the second stage, falling to nothing")
    parser.add_argument("--weight", type=float, default=WEIGHT, help="of the mean scale in the loss of the first stage")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()

    def done() -> int:
        losses = train(args)
        for words, errors in (("scales", losses.first), *((f"mask {ratio:g}", errors) for ratio, errors in losses.second.items())):
            print(f"{words}: {' '.join(f'{error:.3g}' for error in errors)}")
        return 0

    sys.exit(ended(done))


if __name__ == "__main__":
    main()
