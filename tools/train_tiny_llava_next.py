"""Train the bundled checkpoint `tiny-llava-next` on `forms` and check it by the library's own `generate`.

    python tools/train_tiny_llava_next.py --seconds 500 --output DIR --work DIR [--eval-documents 500]

--output gets the checkpoint alone; --work gets state.pt (for --resume), training_log.csv and result.json.
`--seconds 0` writes a checkpoint with random weights. For another model or other data, replace llava_next.py, documents.py or packing.py
of tools/tiny_training; the loop knows neither.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
started = time.monotonic()

import torch  # noqa: E402
import transformers  # noqa: E402

from tiny_training.evaluation import exact_match  # noqa: E402
from tiny_training.llava_next import build_config, build_model, save_checkpoint  # noqa: E402
from tiny_training.loop import Settings, Trainer  # noqa: E402

MAX_BYTES = 20_000_000


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, required=True, help="training time, compiling included, evaluation excluded")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="folder for state, log and result")
    parser.add_argument("--eval-documents", type=int, default=500)
    parser.add_argument("--pages-per-step", type=int, default=Settings.__dataclass_fields__["pages_per_step"].default)
    parser.add_argument("--turns", type=int, default=Settings.__dataclass_fields__["turns"].default)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from --work/state.pt if it is there")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    transformers.utils.logging.disable_progress_bar()
    settings = Settings(
        seconds=arguments.seconds, work=arguments.work, pages_per_step=arguments.pages_per_step, turns=arguments.turns,
        compile_layers=not arguments.no_compile, max_steps=arguments.max_steps, seed=arguments.seed,
    )  # fmt: skip
    model = build_model(build_config(), seed=arguments.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, torch {torch.__version__}, transformers {transformers.__version__}, {device}", flush=True)
    if arguments.seconds > 0:
        trainer = Trainer(model, settings, device)
        if arguments.resume:
            trainer.resume()
        trainer.run(started)
        trainer.write_log(arguments.work / "training_log.csv")
    save_checkpoint(model.cpu(), arguments.output)
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    print(f"wrote {arguments.output}: {size:,} bytes after {time.monotonic() - started:.0f} s", flush=True)
    if size > MAX_BYTES:
        raise SystemExit(f"{arguments.output} has {size:,} bytes; at most {MAX_BYTES:,} can be shipped")
    if arguments.eval_documents:
        scores = exact_match(arguments.output, arguments.eval_documents, device)
        arguments.work.mkdir(parents=True, exist_ok=True)
        result = {"exact_match": scores, "documents": arguments.eval_documents, "bytes": size, "torch": torch.__version__,
                  "transformers": transformers.__version__, "seconds": arguments.seconds}  # fmt: skip
        (arguments.work / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"exact match {scores} after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
