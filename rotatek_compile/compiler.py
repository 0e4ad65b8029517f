"""rotatek-compile as a function: checkpoint and calibration documents in, artifact directory out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .artifact import Artifact, Method, library_versions, write_artifact
from .bases import Basis, calibrated_basis, two_sided
from .batches import Encoded
from .calibrate_together import calibrate_together
from .calibration_data.registry import open_data
from .card import model_card
from .card_picture import draw_heads
from .compile_inputs import DTYPE_NAMES, CompilePlan, load_inputs
from .compile_options import CompileOptions
from .compile_report import report
from .compile_rival import compile_rival, rival_artifact
from .cutter import Cutter, Prefilled
from .deciding import coding_chosen, plan_from
from .documents import Documents
from .errors import RotateKError, UsageError
from .geometry import Geometry
from .hub import PICTURE_FILE, check_space
from .knockout import measure_knockouts
from .models import (
    checked_geometry,
    choose_device,
    choose_dtype,
    load_config,
    pinned,
    resolve,
)
from .moments import Moments
from .names import OURS, RAP, STACKED
from .output import atomic_directory, refuse_existing
from .parallel import Processes, local_device, processes
from .plan import SIDES, Plan, plan_tensors
from .planning import Costs, refuse_too_small
from .sensitivity import NOTHING, JointCheck, Sensitivities, levels_for, measure
from .token_budget import kept_tokens, with_total
from .usual import FACTOR, UsualSegments
from .weights import check_include, include_weights

Bases = dict[str, dict[int, Basis]]  # by side and layer
CHECKED = 3  # most documents of the check, over those that heads are cut on


def prepare(options: CompileOptions) -> CompilePlan:
    """Check everything that can be checked without weights: names, geometry, the output directory, the data's columns."""
    if options.method == RAP:
        from .compile_rap import prepare_rap

        return prepare_rap(options)
    if options.method == STACKED:
        from .compile_stacked import prepare_stacked

        return prepare_stacked(options)
    source = resolve(options.model, options.revision, options.trust_remote_code)
    refuse_existing(options.output, options.overwrite)
    config = load_config(source)
    source = pinned(source, config)
    geometry = checked_geometry(config)
    check_space(options.output, sidecar_bytes(geometry, options), "the artifact")
    if options.with_weights:
        check_include(source, options.output)
    rival = None if options.method == OURS else rival_artifact(options, geometry, None)
    check_setting(options, geometry)
    data = open_data(options.calib, "calibration", options.seed, options.calib_revision, images=not geometry.text_only)
    device = choose_device(options.device)
    return CompilePlan(source, config, geometry, data, device, choose_dtype(options.dtype, config, device), rival)


def sidecar_bytes(geometry: Geometry, options: CompileOptions) -> int:
    """At most this much our own method's artifact takes: means, bases, spectra and ratios of both sides in float32; the rest is small."""
    if options.method != OURS:
        return 0
    kinds = 1 if options.span == "visual" else 2
    layers = [geometry.layers[i] for i in geometry.compressible]
    return sum(4 * kinds * 2 * layer.kv_heads * layer.head_dim * (layer.head_dim + 5) for layer in layers)


def compile_artifact(options: CompileOptions) -> dict[str, Any]:
    """Compile and write an artifact; returns the summary that `--json` prints.

    Under torchrun or accelerate launch every process calls this; they share the documents, and the main one writes.

    Raises:
        RotateKError, DataError: anything the user can act on; nothing half-written is left.
    """
    if options.method == RAP:
        from .compile_rap import compile_rap

        return compile_rap(options)
    if options.method == STACKED:
        from .compile_stacked import compile_stacked

        return compile_stacked(options)
    with processes() as together:
        if together.size > 1:
            if options.method != OURS:
                raise UsageError(f"--method {options.method} has no calibration pass to share; start it without a launcher")
            options = replace(options, device=local_device(options.device), quiet=options.quiet or not together.main)
        return _compile(options, together)


def _compile(options: CompileOptions, together: Processes) -> dict[str, Any]:
    start = time.perf_counter()
    plan = prepare(options)
    assert options.sensitivity_samples is not None
    wanted = options.num_samples if options.method == OURS else options.sensitivity_samples
    loaded = load_inputs(plan, wanted, options)
    model, processor, items, base, record = loaded.model, loaded.processor, loaded.items, loaded.base, loaded.record
    if options.method == OURS:
        artifact = compile_ours(options, plan, model, items, base, record, loaded.pad_id, together)
    else:
        artifact = compile_rival(options, plan.geometry, model, items, base, record)
    seconds = artifact.report["seconds"]
    seconds["total"] = time.perf_counter() - start
    if together.main:
        with atomic_directory(options.output, options.overwrite) as staging:
            picture = draw_heads(artifact, staging / PICTURE_FILE)
            write_artifact(artifact, staging, model_card(artifact, picture, options.with_weights))
            processor.save_pretrained(staging)
            if options.with_weights:
                include_weights(plan.source, staging)
    summary: dict[str, Any] = {
        "artifact": str(options.output),
        "model": base["id"],
        "method": options.method,
        "layers": len(plan.geometry.compressible),
        "kv_bytes_per_token": {"dense": plan.geometry.dense_bytes_per_token(), "compressed": artifact.bytes_per_token()},
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "knockout": artifact.report["knockout"],
    }
    return summary | {"plan": plan_summary(artifact) if options.method == OURS else {"setting": artifact.method.words}}


def plan_summary(artifact: Artifact) -> dict[str, Any]:
    """What `--json` prints of the plan of our own method."""
    decided = artifact.plan()
    return {
        "predicted_kl": artifact.report["plan_kl"],
        "kept_aside": artifact.calibration["kept_aside"],
        "documents": artifact.report["plan_documents"],
        "share": artifact.report["segment"]["bytes"] / artifact.report["segment"]["dense_bytes"],
        "setting": artifact.method.words,
        "ranks": {str(i): [head.key.rank for head in heads] for i, heads in decided.items()},
        "heads": {str(i): [{side: list(getattr(head, side)) for side in SIDES} for head in heads] for i, heads in decided.items()},
    }


def compile_ours(
    options: CompileOptions,
    plan: CompilePlan,
    model: Any,
    items: Documents,
    base: dict[str, Any],
    record: dict[str, Any],
    pad_id: int,
    together: Processes,
    pruned: Artifact | None = None,
) -> Artifact:
    """Moments, bases, sensitivities, knock-outs and the plan of our own method.

    Args:
        base, record: sections of the artifact, and in the name under which moments are saved.
        pruned: of the smaller checkpoint that the model was loaded from, if it is one; the artifact is then one of both.
    """
    geometry = plan.geometry
    assert options.sensitivity_samples is not None
    used, read, checked = shared_out(items, options.sensitivity_samples)

    key = {"base": base, "record": record, "documents": len(used), "dtype": DTYPE_NAMES[plan.dtype], "geometry": geometry.to_json()}
    before = time.perf_counter()
    moments = calibrate_together(model, used, geometry, key, options.batch_size, options.resume, pad_id, options.quiet, together)
    levels = levels_for(max(geometry.layers[i].head_dim for i in geometry.compressible))
    method = replace(options.own_method(), levels=levels, text_only=geometry.text_only)
    if method.kv_budget is not None:
        method = with_total(method, geometry, method.kv_budget)
    if lack := moments.missing(geometry, method.kinds):
        wanted = "longer questions" if geometry.text_only else "images and questions after them"
        raise RotateKError(f"the calibration data cannot be used: {lack}; pass documents with {wanted}")
    bases = {kind: bases_of(moments, geometry, method.basis, kind) for kind in method.kinds}
    seconds_moments = time.perf_counter() - before

    before = time.perf_counter()
    main = bases[method.kinds[0]]  # of images, unless the model reads text alone
    window = None if method.text_only else method.window  # short passages of a text-only model would leave nothing to measure
    cutter = Cutter(model, geometry, main["key"], method.span == "all", main["value"], window)
    usual = UsualSegments(geometry, moments, bases)
    cutter.watch = usual.see
    rows = geometry.rows_at_once(options.batch_size)
    measured = measure(cutter, together.share(read), method.levels, options.quiet, rows, together)
    if method.span == "visual" or method.text_only:
        knockouts = {i: table[:, 0].clone() for i, table in measured.key.items()}  # no direction of the Keys: see knockout.py
    else:
        knockouts = measure_knockouts(cutter, together.share(read), options.quiet, rows, together)
    docs = prefilled(cutter, together.share(checked or read), rows)
    known = together.sum(torch.tensor([sum(doc.dense_right() for doc in docs), sum(len(doc.items) for doc in docs)]))
    limits, deviation = usual.tensors(together)
    if limits:
        method = replace(method, fallback_factor=FACTOR, usual_deviation=deviation)
    if (length := usual.image_tokens(together)) is not None:
        method = replace(method, image_tokens=kept_tokens(length, method.token_keep_ratio))
    spectra = {side: {i: basis.spectrum for i, basis in main[side].items()} for side in SIDES}
    costs = Costs.of(geometry, method.levels, {"key": measured.key, "value": measured.value}, spectra)
    decided, method, checks = plan_from(geometry, costs, JointCheck(cutter, docs, together), method)
    seconds = {"total": 0.0, "moments_and_bases": seconds_moments, "sensitivities": time.perf_counter() - before}

    tensors = artifact_tensors(geometry, method, moments, bases, decided, measured, knockouts) | limits
    record = record | {"documents": len(used), "sensitivity_documents": len(read), "kept_aside": len(checked)}
    artifact = Artifact(geometry, method, tensors, base, record, libraries=library_versions())
    if pruned is not None:
        artifact = replace(artifact, tensors=tensors | pruned.tensors, rap=pruned.rap)
    if options.chooses_coding:
        before = time.perf_counter()
        artifact = coding_chosen(artifact, options, cutter, docs, costs, checks, together)
        seconds["escapes_and_bases"] = time.perf_counter() - before
    artifact.report = report(artifact, main, moments, checks, seconds)
    artifact.report["plan_documents"] = dict(zip(("dense_right", "count"), known.long().tolist(), strict=True))
    artifact.report["sensitivity"] = {"nothing": NOTHING, "bounded": measured.bounded}
    return artifact


def shared_out(items: Documents, sensitivity_samples: int) -> tuple[Documents, Documents, Documents]:
    """Which documents give moments, which of these are read with cut heads, and which check the plan as a whole.

    From eight on, the last eighth gives nothing but the check: what the plan costs on it is an honest figure. That alone would be few
    documents (eight of 64, fewer than a set may have skills), and a plan repaired by what few say is fitted to them. So documents that
    gave moments but were not read with cuts check it too, up to `CHECKED` times as many as are read: the plan comes from the cuts, and
    means and bases of dozens of documents hardly know a single one. At least a quarter is left for checking. Fewer than eight are read
    all, and are the check as well (none is returned for it).
    """
    count = len(items)
    if count < 8:
        return items, items[:sensitivity_samples], items[:0]
    used = items[: count - count // 8]
    reads = min(sensitivity_samples, count * 3 // 4)
    return used, used[:reads], items[max(reads, count - CHECKED * sensitivity_samples) :]


def bases_of(moments: Moments, geometry: Geometry, name: str, kind: str) -> Bases:
    """Calibrated bases of a token kind: of the Keys by name, of the Values by what their errors do to the residual stream."""
    layers = geometry.compressible
    return {
        "key": {i: calibrated_basis(name, moments.covariance(i, kind, "key"), moments.query_moment(i)) for i in layers},
        "value": {i: two_sided(moments.covariance(i, kind, "value"), moments.output_gram(i)) for i in layers},
    }


def check_setting(options: CompileOptions, geometry: Geometry) -> None:
    """Refuse a budget that no plan can meet, and what would code nothing: images of a model that reads none.

    Raises:
        UsageError: such a budget, or a text-only model with --span visual or a rival.
    """
    if options.method == OURS and options.kv_budget is not None:
        refuse_too_small(geometry, options.kv_budget, options.escape_ratio or 0.0)
        with_total(options.own_method(), geometry, options.kv_budget)
    if not geometry.text_only:
        return
    if options.method != OURS:
        raise UsageError(f"--method {options.method} codes images, and {options.model} reads text alone; use --method {OURS} --span all")
    if options.span == "visual":
        raise UsageError(f"--span visual codes images, and {options.model} reads text alone; use --span all")


def prefilled(cutter: Cutter, items: Sequence[Encoded], batch_size: int) -> list[Prefilled]:
    """The documents prefilled, batch by batch; on a GPU, caches beyond a small part of the model's own size wait in main memory."""
    room = sum(p.numel() * p.element_size() for p in cutter.model.parameters()) // 16
    docs: list[Prefilled] = []
    for start in range(0, len(items), batch_size):
        docs.append(cutter.prefill(*items[start : start + batch_size]))
        room -= docs[-1].bytes()
        if room < 0 and cutter.device.type == "cuda":
            docs[-1].park()
    return docs


def artifact_tensors(
    geometry: Geometry,
    method: Method,
    moments: Moments,
    bases: dict[str, Bases],
    plan: Plan,
    sensitivities: Sensitivities,
    knockouts: dict[int, Tensor],
) -> dict[str, Tensor]:
    """Everything of `rotatek.safetensors` (names in artifact.py)."""
    tensors = plan_tensors(plan)
    for i in geometry.compressible:
        tensors[f"layers.{i}.key_sensitivity"], tensors[f"layers.{i}.value_sensitivity"] = sensitivities.key[i], sensitivities.value[i]
        tensors[f"layers.{i}.knockout"] = knockouts[i]
        for kind in method.kinds:
            for side in SIDES:
                basis = bases[kind][side][i]
                prefix = f"layers.{i}.{kind}.{side}"
                tensors[f"{prefix}_mean"] = moments.mean(i, kind, side).float()
                tensors[f"{prefix}_encode"] = basis.encode.float()
                tensors[f"{prefix}_spectrum"] = basis.spectrum.float()
    return tensors
