"""`--method rap+rotatek`: a smaller checkpoint, and our coded cache for it, in one artifact.

The checkpoint is pruned as `--method rap` does it, loaded again, and compiled for as any model is: calibrated, its heads cut, a plan
spent and checked. Its Keys and Values take part as heads of D channels of which those behind the kept ones are zero (`whole_heads`), so
geometry, codec and kernels are those of the base model, whose bytes a budget is a share of; directions without energy get none of it.
The plan is chosen by KL to the pruned model, which is all that codes can keep; rotatek-eval measures both against the base.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from .artifact import Artifact, write_artifact
from .batches import rope_index
from .card_picture import draw_heads
from .compile_inputs import CompilePlan
from .compile_options import CompileOptions
from .compile_rap import dry_run as dry_run_of_pruning
from .compile_rap import plan_pruning, prepare_rap, write_pruned
from .compiler import check_setting, compile_ours, plan_summary, sidecar_bytes
from .documents import Documents
from .hub import PICTURE_FILE, check_space
from .names import STACKED
from .output import atomic_directory
from .parallel import Processes
from .rap_artifact import pruned_part
from .rap_card import stacked_card
from .rap_report import summary as summary_of_pruning
from .rap_report import words as words_of_pruning
from .runtime.rap_attention import whole_heads
from .token_budget import with_total


def prepare_stacked(options: CompileOptions) -> CompilePlan:
    """Check everything that can be checked without weights, of both parts.

    Raises:
        RotateKError, UsageError: as `prepare_rap` and `compiler.check_setting`.
    """
    prepared = prepare_rap(options)
    check_setting(options.of_coding(), prepared.geometry)
    check_space(options.output, sidecar_bytes(prepared.geometry, options.of_coding()), "the artifact")
    return prepared


def compile_stacked(options: CompileOptions) -> dict[str, Any]:
    """Prune, write, compile for what was written; returns the summary that `--json` prints.

    Raises:
        RotateKError, DataError: anything the user can act on; nothing half-written is left.
    """
    prepared = prepare_stacked(options)
    planned = plan_pruning(options.of_pruning(), prepared)
    processor, base, record, pad_id, start = planned.processor, planned.base, planned.record, planned.pad_id, planned.start
    with atomic_directory(options.output, options.overwrite) as staging:
        pruned, model = write_pruned(planned, options, staging)
        # M-RoPE documents hold on to the model that numbers their tokens: not to the dense one any longer
        items = Documents(prepared.data, planned.items.places, processor, prepared.geometry, planned.items.eos, rope_index(model))
        key = base | {"pruned": planned.digest()}  # moments of other weights are other moments
        del planned
        with whole_heads(model, prepared.geometry.compressible):
            coded = compile_ours(options.of_coding(), prepared, model, items, key, record, pad_id, Processes(), pruned)
        artifact = stacked(pruned, coded, base)
        artifact.report["seconds"] |= {"total": time.perf_counter() - start}
        picture = draw_heads(artifact, staging / PICTURE_FILE)
        write_artifact(artifact, staging, stacked_card(artifact, picture))
        processor.save_pretrained(staging)
    return summary(options, artifact)


def stacked(pruned: Artifact, coded: Artifact, base: dict[str, Any]) -> Artifact:
    """One artifact of both: what was compiled for the pruned model, with the report on the pruning as part `rap` of its own.

    Args:
        base: the dense model, by which the artifact is known.
    """
    seconds = pruned.report["seconds"] | coded.report["seconds"]
    seconds.pop("total")  # of each by itself
    report = coded.report | {"seconds": seconds, "rap": dict(pruned.report)}
    report["rap"] |= {"kept_aside": pruned.calibration["kept_aside"]}
    return replace(coded, base_model=base, report=report)


def summary(options: CompileOptions, artifact: Artifact) -> dict[str, Any]:
    """What `--json` prints: as for our own method, and what `--method rap` says as part `rap`."""
    pruning = summary_of_pruning(options, pruned_part(artifact))
    return {
        "artifact": str(options.output),
        "model": artifact.base_model["id"],
        "method": STACKED,
        "layers": len(artifact.geometry.compressible),
        "kv_bytes_per_token": artifact.report["kv_bytes_per_token"],
        "seconds": {name: round(value, 2) for name, value in artifact.report["seconds"].items()},
        "knockout": artifact.report["knockout"],
        "plan": plan_summary(artifact),
        "rap": {name: pruning[name] for name in ("kv_bytes_per_token", "counts", "plan")},
    }


def words(done: dict[str, Any]) -> str:
    """A summary for people."""
    from .card import checked_on

    sizes, plan = done["kv_bytes_per_token"], done["plan"]
    pruning = words_of_pruning(done | done["rap"]).splitlines()
    return "\n".join(
        [
            *pruning[:-1],  # seconds come once
            f"coded for it: {plan['setting']}; {sizes['dense']} -> {sizes['compressed']:.0f} bytes per coded token",
            f"plan KL to the pruned model on {checked_on(plan['kept_aside'])}: {plan['predicted_kl']:.2e} nats per answer token, "
            f"at {plan['share']:.4f} of the dense bytes of 512 tokens with all they need",
            "rotatek-eval measures both against the base model",
            "seconds: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in done["seconds"].items()),
        ]
    )


def dry_run(options: CompileOptions) -> tuple[dict[str, Any], str]:
    """What `--dry-run` prints, as JSON and for people."""
    prepared, method = prepare_stacked(options), options.of_coding().own_method()
    if method.kv_budget is not None:
        method = with_total(method, prepared.geometry, method.kv_budget)
    found, text = dry_run_of_pruning(options, prepared)
    dense, coded = prepared.bytes_per_token(method)
    found = found | {"method": STACKED, "kv_bytes_per_token": {"dense": dense, "compressed": coded}, "rap": found["kv_bytes_per_token"]}
    size = "the smallest that fits" if coded is None else f"about {coded:.0f} coded"
    *before, last = text.splitlines()
    lines = [*before, f"{method.words}, span {method.span}, window {method.window}", f"bytes per coded token: {dense} dense, {size}", last]
    return found, "\n".join(lines)
