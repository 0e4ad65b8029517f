"""What a document costs that is compressed once and asked many questions: bytes in memory and on disk, and seconds.

    python benchmarks/bench_ask_many.py ARTIFACT [--documents 6] [--questions 4] [--output FILE.json]

Pages are those of the bundled set `mixed`, each asked the set's own question, fresh (a prompt of its own through `generate`) and as a
document: on the compressed cache, and on the cache loaded from its file. Printed as a Markdown table; seconds are medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import rotatek_compile
from rotatek_compile.answer import model_inputs
from rotatek_compile.calibration_data.bundled import BundledSet
from rotatek_compile.placement import input_device
from rotatek_compile.runtime.accounting import cache_bytes
from rotatek_compile.runtime.fork import cache_bytes_of


def timed(call: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    found = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def measure(model: Any, processor: Any, documents: int, questions: int) -> dict[str, Any]:
    """Sums of bytes over the documents, medians of seconds, and how often both ways answered alike."""
    data = BundledSet("mixed", "evaluation")
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(documents):
            sample, file = data.sample(number), Path(folder) / f"{number}.rtk"

            def fresh(sample: Any = sample) -> str:
                inputs = model_inputs(processor, list(sample.images), sample.question).to(input_device(model), model.dtype)
                out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
                return str(processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

            alone, whole = timed(fresh)
            read, document = timed(lambda sample=sample: rotatek_compile.compress(model, processor, list(sample.images)))
            ask, answer = timed(lambda document=document, sample=sample: document.ask(sample.question, max_new_tokens=16))
            save, _ = timed(lambda document=document, file=file: document.save(file))
            load, again = timed(lambda file=file: rotatek_compile.load_document(file, model, processor))
            held, forks = cache_bytes(document.cache), [document.cache.fork() for _ in range(questions)]
            rows.append(
                {
                    "fresh": alone, "read": read, "ask": ask, "save": save, "load": load,
                    "tokens": sum(document.cache.tokens()), "dense": held.dense, "held": held.stored, "disk": file.stat().st_size,
                    "forked": cache_bytes_of([document.cache, *forks]),
                    "as_loaded": again.ask(sample.question, max_new_tokens=16) == answer,
                    "as_fresh": whole == answer, "right": answer in sample.answers,
                }
            )  # fmt: skip
    sums = ("tokens", "dense", "held", "disk", "forked", "as_loaded", "as_fresh", "right")
    result: dict[str, Any] = {key: sum(row[key] for row in rows) for key in sums}
    return result | {key: statistics.median(row[key] for row in rows) for key in ("fresh", "read", "ask", "save", "load")}


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    dense = found["dense"]

    def size(key: str) -> str:
        return f"{found[key] / 1e6:.2f} MB, {found[key] / dense:.3f}"

    lines = [
        ("tokens read", f"{found['tokens']:,} of {found['documents']} documents"),
        ("dense cache at 2 bytes a number", f"{dense / 1e6:.2f} MB, 1"),
        ("compressed cache in memory", size("held")),
        ("file", size("disk")),
        (f"the cache and {found['questions']} forks of it in memory", size("forked")),
        ("answers the same after loading", f"{found['as_loaded']} of {found['documents']}"),
        ("answers the same as asked with the page", f"{found['as_fresh']} of {found['documents']}"),
        ("page and question, one prompt", f"{found['fresh']:.3f} s"),
        ("compress", f"{found['read']:.3f} s"),
        ("a question on it", f"{found['ask']:.3f} s"),
        ("save, load", f"{found['save']:.3f} s, {found['load']:.3f} s"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("artifact")
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--output", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    model, processor = rotatek_compile.load(args.artifact)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    described = {"dtype": str(model.dtype).removeprefix("torch."), "method": rotatek_compile.enabled(model).artifact.method.words}
    with torch.inference_mode():
        found = measure(model, processor, args.documents, args.questions)
    found |= {"documents": args.documents, "questions": args.questions, **versions, **described}
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    heading = f"{found['documents']} documents, {described['method']}, {described['dtype']}"
    print(f"{heading}, {device}, torch {versions['torch']}, transformers {versions['transformers']}\n\n{table(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
