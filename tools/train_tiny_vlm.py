"""Train a bundled checkpoint on `mixed` and check it by the library's own `generate`.

    python tools/train_tiny_vlm.py --family llava_next --seconds 430 --look-away 1 --curriculum-until 0.6 --output DIR --work DIR \\
        [--eval-documents 900]

--output gets the checkpoint alone; --work gets state.pt (for --resume), training_log.csv and result.json: exact match per skill, and what
knocking out single (layer, KV head) pairs costs. `--seconds 0` writes a checkpoint with random weights; `--probe` only measures state.pt.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
started = time.monotonic()

import torch  # noqa: E402
import transformers  # noqa: E402

from tiny_training.documents import DocumentStream  # noqa: E402
from tiny_training.evaluation import exact_match  # noqa: E402
from tiny_training.loop import Settings, Trainer  # noqa: E402
from tiny_training.probe import Probe  # noqa: E402
from tiny_training.widening import load_weights, widen_heads, without_layer  # noqa: E402

MAX_BYTES = 20_000_000
FAMILIES = {"llava_next": ("forward", "tile_pages"), "qwen3_vl": ("forward_qwen3_vl", "patch_pages")}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = {name: field.default for name, field in Settings.__dataclass_fields__.items()}
    parser.add_argument("--family", choices=list(FAMILIES), required=True)
    parser.add_argument("--seconds", type=float, required=True, help="training time, compiling included, evaluation excluded")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="folder for state, log and result")
    parser.add_argument("--eval-documents", type=int, default=900)
    parser.add_argument("--geometry", default="", help="overrides of build_config, such as layers=5,kv_heads=2")
    parser.add_argument("--begin-with", type=Path, help="a state.pt or checkpoint with as many heads, or fewer, which are then copied")
    parser.add_argument("--drop-layer", type=int, help="of its text layers, leave this one out")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from --work/state.pt if it is there")
    parser.add_argument("--probe", action="store_true", help="measure --work/state.pt and stop")
    parser.add_argument("--no-compile", action="store_true")
    for name in (
        "pages_per_step", "length", "peak_rate", "look_away", "routed", "route_at", "route_ramp", "rest_from", "unroute_from",
        "curriculum_until", "constant_until", "workers", "seed", "warmup_steps",
    ):  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default[name]), default=default[name])
    return parser.parse_args()


def probe(model: Any, forward: Any, prepare: Any, trainer: Trainer) -> dict[str, Any]:
    """Knock-outs on fresh documents of one, two and three pages."""
    settings = trainer.settings
    stream = DocumentStream(settings.seed + 1000, min(96, settings.pages_per_step), settings.length, trainer.stream.vocabulary)
    stream.progress.fill_(1.0)
    batches, source = [], iter(stream)
    while len(batches) < 6:
        batches.append(next(source).to(trainer.device))
    return Probe(model, forward, prepare, trainer.renderer, batches).report()


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    transformers.utils.logging.disable_progress_bar()
    family = importlib.import_module(f"tiny_training.{arguments.family}")
    module, prepare_name = FAMILIES[arguments.family]
    forwards = importlib.import_module(f"tiny_training.{module}")
    prepare = getattr(forwards, prepare_name)
    chosen = {name: getattr(arguments, name) for name in Settings.__dataclass_fields__ if hasattr(arguments, name)}
    settings = Settings(**chosen, compile_layers=not arguments.no_compile)
    geometry = {name: int(value) for name, value in (pair.split("=") for pair in arguments.geometry.split(",") if pair)}
    model = family.build_model(family.build_config(**geometry), seed=arguments.seed).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, torch {torch.__version__}, transformers {transformers.__version__}, {device}", flush=True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.begin_with:
        weights = load_weights(arguments.begin_with, device)
        if arguments.drop_layer is not None:
            weights = without_layer(weights, arguments.drop_layer)
        print(f"every head of {arguments.begin_with} stands {widen_heads(weights, model)} times", flush=True)
    result: dict[str, Any] = {
        "family": arguments.family, "parameters": parameters, "torch": torch.__version__, "transformers": transformers.__version__,
        "settings": {name: str(value) for name, value in chosen.items() if name != "work"},
    }  # fmt: skip
    if arguments.seconds > 0:
        trainer = Trainer(model, forwards.BatchedForward(model, settings.compile_layers), prepare, family.TOKENS, settings, device)
        if arguments.probe and not trainer.state_file.exists():
            raise SystemExit(f"--probe measures {trainer.state_file}, which does not exist: train first, or name another --work")
        if arguments.resume or arguments.probe:
            trainer.resume()
        if not arguments.probe:
            trainer.run(started)
            trainer.write_log(arguments.work / "training_log.csv")
        result["probe"] = probe(model, forwards.BatchedForward(model), prepare, trainer)
        print(json.dumps(result["probe"]), flush=True)
        if arguments.probe:
            return
    model.config.get_text_config()._attn_implementation = "sdpa"
    family.save_checkpoint(model.cpu(), arguments.output)
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    print(f"wrote {arguments.output}: {size:,} bytes after {time.monotonic() - started:.0f} s", flush=True)
    if size > MAX_BYTES:
        raise SystemExit(f"{arguments.output} has {size:,} bytes; at most {MAX_BYTES:,} can be shipped")
    if arguments.eval_documents:
        result["exact_match"] = exact_match(arguments.output, family.build_processor(), arguments.eval_documents, device)
        result["documents"] = arguments.eval_documents
        print(f"exact match {result['exact_match']} after {time.monotonic() - started:.0f} s", flush=True)
    (arguments.work / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
