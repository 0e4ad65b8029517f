"""rotatek-run: answer a question about images from an artifact, streaming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import UsageError


@click.command("run", help="Answer PROMPT about images with the compressed cache of ARTIFACT.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--image", "images", multiple=True, help="Image file; repeat for several pages.")
@click.option("--prompt", required=True, help="The question.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--compare-dense", is_flag=True, help="Answer with the stock cache too, and show both.")
@click.option("--backend", type=click.Choice(["auto", "triton", "torch", "reconstruct"]), default="auto", show_default=True)
@click.option("--no-fallback", is_flag=True, help="Never keep more than planned, however unusual the image.")
@click.option("--model", help="Base weights other than the recorded ones.")
@click.option("--dtype", help="float32, float16 or bfloat16.")
@click.option("--device", help="cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="Print the answer only.")
def command(artifact: Path, images: tuple[str, ...], prompt: str, **options: Any) -> None:
    if options["max_new_tokens"] < 1:
        raise UsageError(f"--max-new-tokens {options['max_new_tokens']} is out of range; it must be at least 1")
    if not prompt.strip():
        raise UsageError("--prompt is empty; write a question")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError("--prompt is not valid text in this terminal's encoding; pass it as UTF-8")
    from ..answer import answer_once, comparison
    from ..api import load_base
    from ..artifact import read_artifact
    from ..calibration_data.local import open_image
    from ..models import choose_device
    from ..runtime.backends import choose_backend
    from ..runtime.enable import enable

    read = read_artifact(artifact)
    pages = [open_image(Path(name), f"--image {name}") for name in images]
    choose_backend(options["backend"], choose_device(options["device"]))  # refused before weights are loaded
    model, processor = load_base(read, model=options["model"], dtype=options["dtype"], device=options["device"])
    show = not options["as_json"]
    with enable(model, read, backend=options["backend"], fallback=not options["no_fallback"]):
        result = answer_once(model, processor, pages, prompt, options["max_new_tokens"], stream=show)
    dense = answer_once(model, processor, pages, prompt, options["max_new_tokens"], stream=False) if options["compare_dense"] else None
    summary = result.to_json() | {"dense": dense.to_json() if dense else None}
    if not show:
        click.echo(json.dumps(summary))
    elif not options["quiet"]:
        click.echo(comparison(result, dense))
