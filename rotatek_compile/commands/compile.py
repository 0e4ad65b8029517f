"""rotatek-compile: checkpoint and calibration data in, artifact out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .. import aliases
from ..compile_options import CompileOptions
from ..errors import UsageError
from ..names import (
    ALLOCATIONS,
    BASES,
    BITS,
    COMPILE_METHODS,
    OURS,
    POOR,
    RAP,
    RAP_BUDGETS,
    RAP_SCORES,
    SAYS_LITTLE,
    SPANS,
    STACKED,
    TOKEN_METHODS,
)
from ..parallel import is_main
from .completion import DEVICES, DTYPES, complete_data, complete_model, one_of


@click.command("compile", help="Compile MODEL's KV cache on calibration data and write an artifact.")
@click.option("--model", shell_complete=complete_model, help="Alias, local directory or Hub id; see --list-models.")
@click.option("--calib", shell_complete=complete_data, help="Data set name, local path or Hub id; see --list-data.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Artifact directory. Default: artifacts/MODEL-CALIB.")
@click.option(
    "--method",
    default="rotatek",
    show_default=True,
    shell_complete=one_of(COMPILE_METHODS),
    help="rotatek; rap (a smaller checkpoint); rap+rotatek (both); or a rival: head-drop, head-drop-native, int4, kivi2, ...",
)
@click.option(
    "--keep-ratio",
    type=float,
    help="Fraction of Key directions kept, mean over heads; with rap of Keys and Values in the weights. Default: 0.25, with rap 0.7.",
)
@click.option(
    "--kv-budget", type=float, help="At most this fraction of the dense bytes of Keys and Values, everything a segment needs included."
)
@click.option("--max-kl", type=float, help="The smallest budget that costs at most so many nats per answer token on documents kept aside.")
@click.option(
    "--key-bits",
    shell_complete=one_of(BITS),
    help="Precision of kept Key directions: native, 8, 4 or auto (mixed). Default: native with --keep-ratio, else auto.",
)
@click.option(
    "--value-bits",
    shell_complete=one_of(BITS),
    help="Of Values: native, 8 or 4 (all directions), or auto with --kv-budget or --max-kl. Default: native with --keep-ratio, else auto.",
)
@click.option(
    "--escape-ratio",
    type=float,
    help="Fraction of an image's tokens that stay raw, those whose codes lose most. Default: chosen with --kv-budget or --max-kl, else 0.",
)
@click.option(
    "--prior-tokens",
    type=int,
    help="What calibration counts for, in tokens, where an image gets a basis of its own; 0: never. Default: chosen with a budget of "
    "bytes, else 256.",
)
@click.option("--basis", default="two-sided", show_default=True, shell_complete=one_of(BASES), help="two-sided, pca or paper.")
@click.option(
    "--allocation",
    default="allocated",
    show_default=True,
    shell_complete=one_of(ALLOCATIONS),
    help="How heads share the budget: allocated (by measured KL), energy (by spectrum alone) or uniform.",
)
@click.option(
    "--span", default="visual", show_default=True, shell_complete=one_of(SPANS), help="What is coded: visual, or all (old text too)."
)
@click.option(
    "--rap-score",
    shell_complete=one_of(RAP_SCORES),
    help="With rap: how RoPE pairs are ranked: logit, fisher or fisher-weight.  [default: logit]",
)
@click.option(
    "--rap-budget",
    shell_complete=one_of(RAP_BUDGETS),
    help="With rap: how layers share what is kept: sensitivity or published.  [default: sensitivity]",
)
@click.option("--no-repair", "repair", flag_value=False, default=True, help="With rap: leave what is kept as it is, without a refit.")
@click.option("--recover", type=int, metavar="STEPS", help="With rap: distil into what is kept for so many steps (needs peft).")
@click.option("--window", type=int, default=128, show_default=True, help="Newest text tokens kept raw.")
@click.option(
    "--token-keep-ratio",
    type=float,
    metavar="F",
    help="Share of each image's tokens that stay in the cache after prefill; a KV budget holds for all of them.",
)
@click.option("--token-method", shell_complete=one_of(TOKEN_METHODS), help="Which tokens stay: fastv, visionzip, divprune or snapkv.")
@click.option("--num-samples", type=int, default=64, show_default=True, help="Calibration documents; an eighth gives no moments.")
@click.option(
    "--sensitivity-samples",
    type=int,
    help="Of them, documents on which heads are cut; up to three times as many others check the plan. Default: 36, or fewer of few.",
)
@click.option("--batch-size", type=int, default=4, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--dtype",
    shell_complete=one_of(DTYPES),
    help="float32, float16 or bfloat16. Default: the checkpoint's on a GPU, float32 on a CPU.",
)
@click.option(
    "--device",
    shell_complete=one_of(DEVICES),
    help="cpu, cuda, cuda:N, or auto (spread over all GPUs). Default: a GPU if there is one.",
)
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--calib-revision", help="Branch, tag or commit of calibration data on the Hub.")
@click.option("--trust-remote-code", is_flag=True, help="Let a Hub model run its own code (off).")
@click.option("--with-weights", is_flag=True, help="Put the model's weights beside the artifact (hard links where possible).")
@click.option("--push-to-hub", "repo", metavar="REPO", help="Push the artifact to ORG/NAME on the Hugging Face Hub when it is done.")
@click.option("--private", is_flag=True, help="With --push-to-hub: make a new repository private.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted calibration stopped.")
@click.option("--overwrite", is_flag=True, help="Replace an existing artifact.")
@click.option("--dry-run", is_flag=True, help="Show plan, geometry and estimated bytes; load no weights.")
@click.option("--list-models", is_flag=True, help="Show model aliases.")
@click.option("--list-data", is_flag=True, help="Show data sets.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(model: str | None, calib: str | None, output: Path | None, **options: Any) -> None:
    as_json, dry_run = options.pop("as_json"), options.pop("dry_run")
    if options.pop("list_models"):
        click.echo(json.dumps({name: alias.to_json() for name, alias in aliases.ALIASES.items()}) if as_json else aliases.table())
        return
    if options.pop("list_data"):
        from ..calibration_data import registry

        click.echo(json.dumps(registry.listing()) if as_json else registry.table())
        return
    if model is None or calib is None:
        raise UsageError(f"--{'model' if model is None else 'calib'} is missing; see --list-models and --list-data")
    if options["resume"] and dry_run:
        raise UsageError("--resume and --dry-run contradict each other; leave one out")
    repo, private = options.pop("repo"), options.pop("private")
    if private and repo is None:
        raise UsageError("--private comes with --push-to-hub REPO")
    target = output or Path("artifacts") / f"{Path(model).resolve().name}-{Path(calib).resolve().stem}"
    chosen = CompileOptions(model=model, calib=calib, output=target, **options)
    _check_names(model, calib)
    from ..compiler import compile_artifact, prepare
    from ..token_budget import with_total

    if repo is not None and is_main():
        from ..hub_push import check_target, describe, push_compiled

        place = check_target(repo, private=private)  # before hours of work
    summary: dict[str, Any]
    if chosen.method in (RAP, STACKED):
        summary, text = _rap(chosen, dry_run)
    elif dry_run:
        plan = prepare(chosen)
        there, asked = plan.data.size, chosen.num_samples  # the size is known of local files
        samples = asked if there is None else min(asked, there)
        method = chosen.own_method() if chosen.method == OURS else None
        if method is not None and method.kv_budget is not None:
            method = with_total(method, plan.geometry, method.kv_budget)
        dense, compressed = plan.bytes_per_token(method)
        layers = plan.geometry.layers
        summary = {
            "artifact": str(target),
            "model": plan.source.name,
            "method": chosen.method,
            "layers": len(plan.geometry.compressible),
            "kv_bytes_per_token": {"dense": dense, "compressed": compressed},
            "seconds": None,
            "geometry": plan.geometry.to_json(),
            "data": {"name": plan.data.name, "split": plan.data.split, "num_samples": samples},
        }
        first = layers[plan.geometry.compressible[0]]
        words = plan.rival.method.words if plan.rival else method.words if method else ""
        size = "the smallest that fits" if compressed is None else f"about {compressed:.0f} compressed ({dense / compressed:.2f}x smaller)"
        text = (
            f"{plan.source.name} ({plan.geometry.model_type}): {len(layers)} text layers, {summary['layers']} compressed, "
            f"{first.query_heads}/{first.kv_heads} heads of {first.head_dim}\n"
            f"{words}, span {chosen.span}, window {chosen.window}\n"
            f"data {plan.data.name}, {samples} sample{'s' if samples > 1 else ''}"
            f"{f' (all there are; --num-samples {asked})' if samples < asked else ''}\n"
            f"bytes per coded token, all layers: {dense} dense, {size}\n"
            f"would write {target}"
        )
    else:
        summary = compile_artifact(chosen)
        sizes, seconds = summary["kv_bytes_per_token"], summary["seconds"]
        parts = [name for name in seconds if name != "total"]
        from ..card import checked_on

        text = (
            f"wrote {summary['artifact']}: {summary['layers']} layers, {sizes['dense']} -> {sizes['compressed']:.0f} bytes per coded token "
            f"({sizes['dense'] / max(sizes['compressed'], 1):.2f}x smaller)\n"
            + (
                f"plan KL on {checked_on(summary['plan']['kept_aside'])}: {summary['plan']['predicted_kl']:.2e} nats per answer token, "
                f"at {summary['plan']['share']:.4f} of the dense bytes of 512 tokens with all they need\n"
                if chosen.method == "rotatek" and chosen.token_method is None
                else f"{summary['plan']['setting']}\nplan KL {summary['plan']['predicted_kl']:.2e}: of codes alone, without the dropped "
                "tokens; rotatek-eval measures both\n"
                if chosen.method == "rotatek"
                else f"{summary['plan']['setting']}\n"
            )
            + (_known(**summary["plan"]["documents"]) if chosen.method == "rotatek" else "")
            + "seconds: "
            + ", ".join(f"{name.replace('_', ' ')} {seconds[name]}" for name in (*parts, "total"))
        )
    if repo is not None and is_main() and not dry_run:
        pushed = push_compiled(target, place, options["with_weights"], options["quiet"])
        summary["pushed"], text = pushed.to_json(), f"{text}\n{describe(pushed)}"
    if is_main():  # under torchrun the others have helped
        click.echo(json.dumps(summary) if as_json else text)


def _known(dense_right: int, count: int) -> str:
    """Whether the plan's KL is of answers that are worth having."""
    poor = f"; {SAYS_LITTLE}" if dense_right < POOR * count else ""
    return f"uncompressed, the model gives the expected answer to {dense_right} of these {count} documents{poor}\n"


def _rap(chosen: CompileOptions, dry: bool) -> tuple[dict[str, Any], str]:
    """A smaller checkpoint, with a coded cache or without: the summary as JSON and for people."""
    from .. import compile_rap, compile_stacked, rap_report
    from ..compiler import compile_artifact

    stacked = chosen.method == STACKED
    if dry:
        return compile_stacked.dry_run(chosen) if stacked else compile_rap.dry_run(chosen)
    done = compile_artifact(chosen)
    return done, compile_stacked.words(done) if stacked else rap_report.words(done)


def _check_names(model: str, calib: str) -> None:
    """Refuse unknown names at once; what they name is opened later."""
    from ..calibration_data.registry import refuse_unknown

    aliases.refuse_unknown(model)
    refuse_unknown(calib)
