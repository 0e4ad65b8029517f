"""rotatek-eval: exact match, KL to the dense model, and bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import UsageError


@click.command("eval", help="Measure ARTIFACT against the dense model on a data set.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="Data set name or local path.")
@click.option("--ask", default="after", show_default=True, help="after: the question comes once the images are compressed; with: before.")
@click.option("--num-samples", type=int, default=50, show_default=True)
@click.option("--batch-size", type=int, default=4, show_default=True)
@click.option("--max-new-tokens", type=int, default=32, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--backend", type=click.Choice(["auto", "triton", "torch", "reconstruct"]), default="auto", show_default=True)
@click.option("--no-fallback", is_flag=True, help="Never keep more than planned.")
@click.option("--model", help="Base weights other than the recorded ones.")
@click.option("--dtype", help="float32, float16 or bfloat16.")
@click.option("--device", help="cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(artifact: Path, data: str, **options: Any) -> None:
    for name in ("num_samples", "batch_size", "max_new_tokens"):
        if options[name] < 1:
            raise UsageError(f"--{name.replace('_', '-')} {options[name]} is out of range; it must be at least 1")
    from ..evaluate import ASK

    if options["ask"] not in ASK:
        raise UsageError(f"unknown --ask {options['ask']!r}; choose one of {', '.join(ASK)}")
    from ..api import load_base
    from ..artifact import read_artifact
    from ..batches import end_ids
    from ..calibration_data.registry import open_data
    from ..documents import Documents, usable
    from ..evaluate import Evaluator, evaluate
    from ..models import choose_device
    from ..runtime.backends import choose_backend
    from ..runtime.enable import enable

    read = read_artifact(artifact)
    source = open_data(data, "evaluation", options["seed"])
    choose_backend(options["backend"], choose_device(options["device"]))
    samples = usable(source, options["num_samples"])  # before weights are loaded: a picture that does not open is said at once
    model, processor = load_base(read, model=options["model"], dtype=options["dtype"], device=options["device"])
    eos = end_ids(model)
    items = Documents(source, samples, processor, read.geometry, eos[0])
    evaluator = Evaluator(model, processor, options["ask"], eos, options["max_new_tokens"])
    with enable(model, read, backend=options["backend"], fallback=not options["no_fallback"]) as active:
        methods = {"dense": evaluator.dense_cache, "artifact": active.new_cache}
        rows = evaluate(evaluator, items, methods, options["batch_size"], options["quiet"])
    result = {"data": data, "samples": len(items), "ask": options["ask"], "rows": [row.to_json() for row in rows]}
    if options["as_json"]:
        click.echo(json.dumps(result))
        return
    click.echo(f"{data}, {len(items)} samples, question asked {options['ask']} compression")
    click.echo(f"{'method':10} {'exact':>7} {'ANLS':>7} {'KL':>10} {'KV bytes':>12} {'dense':>12} {'coded span':>12} {'dense':>12}")
    for row in result["rows"]:
        click.echo(
            f"{row['method']:10} {row['exact_match']:7.3f} {row['anls']:7.3f} {row['kl']:10.2e} {row['kv_bytes']:12,.0f} "
            f"{row['kv_bytes_dense']:12,.0f} {row['span_bytes']:12,.0f} {row['span_bytes_dense']:12,.0f}"
        )
