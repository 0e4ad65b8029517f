"""rotatek-run: answer a question about images from an artifact, streaming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .. import aliases
from ..errors import UsageError
from ..names import check_fraction
from ..parallel import is_main, launched, local_device
from .completion import DEVICES, DTYPES, complete_model, one_of, paths


@click.command(
    "run", help="Answer PROMPT about images or a video with the compressed cache of ARTIFACT (a directory, or ORG/NAME on the Hub)."
)
@click.argument("artifact", shell_complete=paths("dir"))
@click.option("--image", "images", multiple=True, shell_complete=paths("file"), help="Image file; repeat for several pages.")
@click.option("--video", shell_complete=paths("file"), help="Video file, or a folder of frames; it becomes one segment of the cache.")
@click.option("--num-frames", type=int, default=16, show_default=True, help="Most frames of the video, evenly spread.")
@click.option("--fps", type=float, help="Frames a second of a folder of frames (1 unless given).")
@click.option("--prompt", required=True, help="The question.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--compare-dense", is_flag=True, help="Answer with the stock cache too, and show both.")
@click.option("--backend", type=click.Choice(["auto", "triton", "torch", "reconstruct"]), default="auto", show_default=True)
@click.option("--no-fallback", is_flag=True, help="Never keep more than planned, however unusual the image.")
@click.option("--keep-ratio", type=float, help="Another fraction of Key directions than the artifact's plan keeps.")
@click.option("--kv-budget", type=float, help="Another budget, as a fraction of the dense bytes of coded tokens.")
@click.option("--adapter", shell_complete=paths("dir"), help="A peft adapter (directory or Hub id) to put on the base weights.")
@click.option("--attn-implementation", help="What attends tokens that arrive together: sdpa, flash_attention_2, eager.")
@click.option("--model", shell_complete=complete_model, help="Base weights other than the recorded ones.")
@click.option("--revision", help="Branch, tag or commit of an artifact on the Hub.")
@click.option("--dtype", shell_complete=one_of(DTYPES), help="float32, float16 or bfloat16.")
@click.option("--device", shell_complete=one_of(DEVICES), help="cpu, cuda, cuda:N, or auto: spread over all GPUs.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="Print the answer only.")
def command(artifact: str, images: tuple[str, ...], prompt: str, **options: Any) -> None:
    if options["max_new_tokens"] < 1:
        raise UsageError(f"--max-new-tokens {options['max_new_tokens']} is out of range; it must be at least 1")
    if not prompt.strip():
        raise UsageError("--prompt is empty; write a question")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError("--prompt is not valid text in this terminal's encoding; pass it as UTF-8")
    if options["fps"] is not None and not options["video"]:
        raise UsageError(f"--fps {options['fps']:g} belongs to --video; name the folder of frames")
    for name in ("keep_ratio", "kv_budget"):
        check_fraction(f"--{name.replace('_', '-')}", options[name])
    if options["model"] is not None:
        aliases.refuse_unknown(options["model"])
    from ..answer import answer_once, comparison
    from ..api import dressed, load_base
    from ..calibration_data.local import open_named
    from ..hub import open_artifact
    from ..models import choose_device
    from ..replan import replanned
    from ..runtime.backends import choose_backend
    from ..runtime.enable import enable
    from ..video import read_clip

    read = open_artifact(artifact, options["revision"])
    plan = {name: options[name] for name in ("keep_ratio", "kv_budget")}
    used = read if all(value is None for value in plan.values()) else replanned(read, **plan)
    pages = [open_named(name, Path(), f"--image {name}") for name in images]
    clip = read_clip(Path(options["video"]), options["num_frames"], options["fps"]) if options["video"] else None
    device, shared = local_device(options["device"]), launched()[1] > 1  # under torchrun the processes share the model's heads
    choose_backend(options["backend"], choose_device(device))  # refused before weights are loaded
    model, processor = load_base(read, model=options["model"], dtype=options["dtype"], device=device, tensor_parallel=shared)
    model = dressed(model, options["attn_implementation"], options["adapter"])
    show = not options["as_json"] and is_main()
    asked = (model, processor, pages, prompt, options["max_new_tokens"])
    with enable(model, used, backend=options["backend"], fallback=not options["no_fallback"]):
        result = answer_once(*asked, stream=show, clip=clip)
    dense = answer_once(*asked, stream=False, clip=clip) if options["compare_dense"] else None
    summary = result.to_json() | {"dense": dense.to_json() if dense else None}
    if not is_main():
        return
    if not show:
        click.echo(json.dumps(summary))
    elif not options["quiet"]:
        click.echo(comparison(result, dense))
