"""rotatek-run: answer a question about images from an artifact, streaming."""

from __future__ import annotations

import functools
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from .. import aliases
from ..errors import UsageError
from ..names import TOKEN_METHODS, check_fraction, refuse_unknown
from ..parallel import is_main, launched, local_device
from .completion import DEVICES, DTYPES, complete_data, complete_model, one_of, paths


@click.command(
    "run", help="Answer PROMPT about images or a video with the compressed cache of ARTIFACT (a directory, or ORG/NAME on the Hub)."
)
@click.argument("artifact", shell_complete=paths("dir"))
@click.option("--image", "images", multiple=True, shell_complete=paths("file"), help="Image file; repeat for several pages.")
@click.option("--video", shell_complete=paths("file"), help="Video file, or a folder of frames; it becomes one segment of the cache.")
@click.option("--num-frames", type=int, default=16, show_default=True, help="Most frames of the video, evenly spread.")
@click.option("--fps", type=float, help="Frames a second of a folder of frames (1 unless given).")
@click.option("--data", shell_complete=complete_data, help="A document of this data set instead of --image, with its question.")
@click.option("--sample", type=int, help="Which, from 0, in the order in which rotatek-eval reads them.  [default: 0]")
@click.option("--prompt", help="The question; with --data in place of the document's.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--compare-dense", is_flag=True, help="Answer with the stock cache too, and show both.")
@click.option("--backend", type=click.Choice(["auto", "triton", "torch", "reconstruct"]), default="auto", show_default=True)
@click.option("--no-fallback", is_flag=True, help="Never keep more than planned, however unusual the image.")
@click.option("--keep-ratio", type=float, help="Another fraction of Key directions than the artifact's plan keeps.")
@click.option("--kv-budget", type=float, help="Another budget, as a fraction of the dense bytes of coded tokens.")
@click.option("--token-keep-ratio", type=float, metavar="F", help="Another share of each image's tokens than the artifact's; 1 keeps all.")
@click.option("--token-method", shell_complete=one_of(TOKEN_METHODS), help="Which tokens stay: fastv, visionzip, divprune or snapkv.")
@click.option("--adapter", shell_complete=paths("dir"), help="A peft adapter (directory or Hub id) to put on the base weights.")
@click.option("--attn-implementation", help="What attends tokens that arrive together: sdpa, flash_attention_2, eager.")
@click.option("--model", shell_complete=complete_model, help="Base weights other than the recorded ones.")
@click.option("--revision", help="Branch, tag or commit of an artifact on the Hub.")
@click.option("--dtype", shell_complete=one_of(DTYPES), help="float32, float16 or bfloat16.")
@click.option("--device", shell_complete=one_of(DEVICES), help="cpu, cuda, cuda:N, or auto: spread over all GPUs.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="Print the answer only.")
def command(artifact: str, images: tuple[str, ...], prompt: str | None, **options: Any) -> None:
    if options["max_new_tokens"] < 1:
        raise UsageError(f"--max-new-tokens {options['max_new_tokens']} is out of range; it must be at least 1")
    _check_question(prompt, images, options)
    if options["fps"] is not None and not options["video"]:
        raise UsageError(f"--fps {options['fps']:g} belongs to --video; name the folder of frames")
    for name in ("keep_ratio", "kv_budget"):
        check_fraction(f"--{name.replace('_', '-')}", options[name])
    if options["token_method"] is not None:
        refuse_unknown("token-method", options["token_method"], TOKEN_METHODS)
    check_fraction("--token-keep-ratio", options["token_keep_ratio"])
    if options["model"] is not None:
        aliases.refuse_unknown(options["model"])
    from ..answer import answer_once, comparison
    from ..api import dressed, load_base, load_smaller, refuse_for_pruned
    from ..calibration_data.local import open_named
    from ..calibration_data.registry import open_data
    from ..documents import document
    from ..hub import open_artifact
    from ..models import choose_device
    from ..runtime.backends import choose_backend
    from ..runtime.enable import enable
    from ..token_budget import selecting
    from ..video import read_clip

    read = open_artifact(artifact, options["revision"])
    tokens = options["token_method"], options["token_keep_ratio"]
    if read.rap is not None:
        budgets = ("keep_ratio", "kv_budget", "token_keep_ratio", "token_method")
        asked_for = {f"--{name.replace('_', '-')}": options[name] for name in budgets}
        asked_for["--backend"] = None if options["backend"] == "auto" else options["backend"]
        asked_for["--model"] = None if options["compare_dense"] else options["model"]  # the base, which only a comparison loads
        refuse_for_pruned(asked_for, read)
        if options["no_fallback"] and not read.coded:
            raise UsageError(f"--no-fallback speaks of a coded cache, and {artifact} is a smaller checkpoint (RAP); leave it out")
        if launched()[1] > 1:
            raise UsageError(f"{artifact} is a smaller checkpoint (RAP), which runs in one process; start it without a launcher")
    if read.coded:
        used = selecting(read, *tokens, keep_ratio=options["keep_ratio"], kv_budget=options["kv_budget"])
    found = None
    if options["data"] is not None:
        found = document(open_data(options["data"], "evaluation", images=not read.geometry.text_only), options["sample"] or 0)
    pages = [open_named(name, Path(), f"--image {name}") for name in images] if found is None else list(found.images)
    question = prompt or (found.question if found is not None else "")
    clip = read_clip(Path(options["video"]), options["num_frames"], options["fps"]) if options["video"] else None
    device, shared = local_device(options["device"]), launched()[1] > 1  # under torchrun the processes share the model's heads
    choose_backend(options["backend"], choose_device(device))  # refused before weights are loaded
    base = functools.partial(load_base, read, model=options["model"], dtype=options["dtype"], device=device, tensor_parallel=shared)
    model, processor = base() if read.rap is None else load_smaller(read, dtype=options["dtype"], device=device)
    model = dressed(model, options["attn_implementation"], options["adapter"])
    show = not options["as_json"] and is_main()
    asked = (processor, pages, question, options["max_new_tokens"])
    if found is not None and show and not options["quiet"]:
        click.echo(f"{found.id}: {question}")
    coded: Any = nullcontext()
    if read.coded:
        coded = enable(model, used, backend=options["backend"], fallback=not options["no_fallback"])
    with coded:
        result = answer_once(model, *asked, stream=show, clip=clip)
    if read.rap is not None and options["compare_dense"]:
        del model  # its memory is wanted for the base
        model = dressed(base()[0], options["attn_implementation"])
    dense = answer_once(model, *asked, stream=False, clip=clip) if options["compare_dense"] else None
    summary = result.to_json() | {"dense": dense.to_json() if dense else None}
    if found is not None:
        summary["document"] = {"id": found.id, "question": found.question, "answers": list(found.answers)}
    if not is_main():
        return
    if not show:
        click.echo(json.dumps(summary))
    elif not options["quiet"]:
        click.echo(comparison(result, dense))
        if found is not None and question == found.question:
            click.echo(f"right: {' or '.join(found.answers) or 'the data set says no answer'}")


def _check_question(prompt: str | None, images: tuple[str, ...], options: dict[str, Any]) -> None:
    """Refuse what is no question, or no pages to ask about; unknown data at once, before anything is opened."""
    if prompt is None and options["data"] is None:
        raise UsageError("there is no question; write one with --prompt, or take a document of a data set with --data")
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty; write a question")
    if prompt is not None and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError("--prompt is not valid text in this terminal's encoding; pass it as UTF-8")
    if options["sample"] is not None and options["data"] is None:
        raise UsageError(f"--sample {options['sample']} says which document of --data; name the data set")
    if options["sample"] is not None and options["sample"] < 0:
        raise UsageError(f"--sample {options['sample']} is out of range; the first document is 0")
    if options["data"] is not None and (images or options["video"]):
        raise UsageError("--data brings its own pages; leave --image and --video out, or --data")
    if options["data"] is not None:
        from ..calibration_data import registry

        registry.refuse_unknown(options["data"])
