"""Does a model need the pages, and their details? Dense exact match per skill, beside runs that take the pages away.

    python benchmarks/check_skills.py --model tiny-llava-next --data mixed --documents 400 --output benchmarks/results/skills.csv
    python benchmarks/check_skills.py --print benchmarks/results/skills.csv

Runs: the page as it is; text only (no image in the prompt); 4x smaller (each page reduced four times and enlarged back, so that the
number of tokens stays); a blank page of the same size. Chance is what the best constant answer of a skill would score on the same
documents; a skill is not answerable from a run if the run's interval does not lie above it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import add_device_options, add_table_options, ended, record_of, show_table
from PIL import Image

from rotatek_compile.batches import end_ids, rope_index
from rotatek_compile.calibration_data.registry import open_data
from rotatek_compile.calibration_data.sample import Sample
from rotatek_compile.documents import Documents, usable
from rotatek_compile.evaluate import Evaluator, evaluate
from rotatek_compile.models import checked_geometry, choose_device, choose_dtype, load_config, load_model, load_processor, resolve
from rotatek_compile.outcomes import Row
from rotatek_compile.scores import normalise

ALL = "all"
REDUCTION = 4


def text_only(sample: Sample) -> Sample:
    """The question alone."""
    return replace(sample, images=())


def reduced(sample: Sample) -> Sample:
    """Pages that lost all detail below four pixels, at their old size."""
    return replace(sample, images=tuple(_reduced(image) for image in sample.images))


def blank(sample: Sample) -> Sample:
    """White pages of the same sizes."""
    return replace(sample, images=tuple(Image.new("RGB", image.size, "white") for image in sample.images))


def _reduced(image: Image.Image) -> Image.Image:
    small = tuple(max(1, side // REDUCTION) for side in image.size)
    return image.convert("RGB").resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


RUNS: dict[str, Callable[[Sample], Sample]] = {"dense": lambda s: s, "text only": text_only, "4x smaller": reduced, "blank page": blank}


def best_constant(answers: Sequence[Sequence[str]]) -> tuple[str, int]:
    """The answer that is right for most documents, and for how many; `answers` are the references of each."""
    counts = Counter(text for own in answers for text in {normalise(answer) for answer in own})
    return max(counts.items(), key=lambda pair: (pair[1], pair[0]))


def chances(skills: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, tuple[str, float]]:
    """Per skill the best constant answer and its exact match; `all` answers each skill's own constant."""
    found: dict[str, tuple[str, float]] = {}
    right = 0
    for skill in sorted(set(skills)):
        own = [a for a, s in zip(answers, skills, strict=True) if s == skill]
        text, count = best_constant(own)
        found[skill], right = (text, count / len(own)), right + count
    return {ALL: ("", right / len(skills))} | found


def table_rows(rows: dict[str, Row], chance: dict[str, tuple[str, float]], record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per skill and run."""
    made = []
    for skill in [ALL, *next(iter(rows.values())).skills]:
        for run, row in rows.items():
            found = (row if skill == ALL else row.of_skill(skill)).accuracy()
            low, high = found["exact_match_interval"]
            scores = {"exact_match": found["exact_match"], "low": low, "high": high, "chance": chance[skill][1]}
            about = {"skill": skill, "run": run, "documents": found["samples"]}
            made.append(about | {k: f"{v:.4f}" for k, v in scores.items()} | {"constant": chance[skill][0]} | record)
    return made


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs over the same documents."""
    source = resolve(args.model)
    config = load_config(source)
    geometry, device = checked_geometry(config), choose_device(args.device)
    data = open_data(args.data, "evaluation", args.seed)
    places = usable(data, args.documents)
    model, processor = load_model(source, choose_dtype(args.dtype, config, device), device), load_processor(source)
    eos, rope = end_ids(model), rope_index(model)
    evaluator = Evaluator(model, processor, "with", eos, args.max_new_tokens)
    rows = {}
    for run, change in RUNS.items():
        changed = replace(data, sample=lambda n, change=change: change(data.sample(n)))
        items = Documents(changed, places, processor, geometry, eos[0], rope)
        rows[run] = evaluate(evaluator, items, {run: evaluator.dense_cache}, args.batch_size, quiet=False)[0]
        print(f"{run}: {rows[run].accuracy()['exact_match']:.3f}", file=sys.stderr, flush=True)
    samples = [data.sample(place) for place in places]
    name = data.name if data.split != "local" else Path(data.name).name
    record = record_of(source, name, device, evaluator.dtype)
    return table_rows(rows, chances([s.skill for s in samples], [s.answers for s in samples]), record)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, and the skills that can be answered without the pages or without their details."""
    first = rows[0]
    runs = list(dict.fromkeys(row["run"] for row in rows))
    lines = [f"{first['model']}, {first['data']}, {first['device']}, {first['dtype']}, transformers {first['transformers']}", ""]
    lines += [f"| skill | documents | {' | '.join(runs)} | chance |", "|" + "---|" * (len(runs) + 3)]
    for skill in dict.fromkeys(row["skill"] for row in rows):
        own = {row["run"]: row for row in rows if row["skill"] == skill}
        cells = [f"{float(r['exact_match']):.3f} [{float(r['low']):.3f}, {float(r['high']):.3f}]" for r in own.values()]
        one = own[runs[0]]
        lines.append(f"| {skill} | {one['documents']} | {' | '.join(cells)} | {float(one['chance']):.3f} |")
    lines.append("")
    for run in runs[1:]:
        above = [row["skill"] for row in rows if row["run"] == run and row["skill"] != ALL and float(row["low"]) > float(row["chance"])]
        lines.append(f"- {run}: {'above chance in ' + ', '.join(above) if above else 'no skill above chance'}")
    return "\n".join(lines)


def main() -> int:
    """Measure and save, or only print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llava-next")
    parser.add_argument("--data", default="mixed")
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    add_device_options(parser)
    add_table_options(parser)
    args = parser.parse_args()
    return ended(lambda: int(not show_table(args, measure, markdown)))


if __name__ == "__main__":
    sys.exit(main())
