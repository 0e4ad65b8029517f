"""rotatek-compile as a function: checkpoint and calibration documents in, artifact directory out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import allocate as allocation
from .allocate import Plan
from .artifact import Artifact, Method, library_versions, write_artifact
from .bases import Basis, calibrated_basis, two_sided
from .batches import Encoded, end_ids, processor_hash, rope_index, template_hash
from .calibrate_together import calibrate_together
from .calibration_data.registry import DataSource, open_data
from .card import model_card
from .card_picture import draw_heads
from .compile_options import CompileOptions
from .compile_rival import compile_rival, rival_artifact
from .cutter import Cutter, Prefilled
from .documents import Documents, usable
from .errors import RotateKError, UsageError
from .geometry import Geometry
from .hub import PICTURE_FILE, check_space
from .knockout import diagnosis, measure_knockouts
from .models import (
    Source,
    checked_geometry,
    choose_device,
    choose_dtype,
    identity,
    load_config,
    load_model,
    load_processor,
    pinned,
    resolve,
)
from .moments import Moments
from .names import OURS
from .output import atomic_directory, refuse_existing
from .parallel import Processes, local_device, processes
from .placement import AUTO
from .sensitivity import NOTHING, JointCheck, levels_for, measure
from .weights import check_include, include_weights

SENSITIVITY_DOCUMENTS = 18  # two of each skill of `mixed`: a head that none of them needs would look worthless
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, slots=True)
class CompilePlan:
    """What `--dry-run` shows: nothing but configs was read."""

    source: Source
    config: Any
    geometry: Geometry
    data: DataSource
    device: torch.device
    dtype: torch.dtype
    rival: Artifact | None  # what a rival's artifact will be, but for its measured tensors

    def bytes_per_token(self, keep_ratio: float | None) -> tuple[int, float]:
        """Dense bytes per coded token over the compressed layers, and those of the plan's codes and raw Values (or of the rival)."""
        dense = self.geometry.dense_bytes_per_token()
        if self.rival is not None:
            return dense, self.rival.bytes_per_token()
        assert keep_ratio is not None
        ranks = allocation.uniform_plan(self.geometry, keep_ratio)
        values = dense / 2
        return dense, values + sum(2 * sum(r) for r in ranks.values())


def prepare(options: CompileOptions) -> CompilePlan:
    """Check everything that can be checked without weights: names, geometry, the output directory, the data's columns."""
    source = resolve(options.model, options.revision, options.trust_remote_code)
    refuse_existing(options.output, options.overwrite)
    config = load_config(source)
    source = pinned(source, config)
    geometry = checked_geometry(config)
    check_space(options.output, sidecar_bytes(geometry, options), "the artifact")
    if options.with_weights:
        check_include(source, options.output)
    rival = None if options.method == OURS else rival_artifact(options, geometry, None)
    _check_span(options, geometry)
    data = open_data(options.calib, "calibration", options.seed, options.calib_revision, images=not geometry.text_only)
    device = choose_device(options.device)
    return CompilePlan(source, config, geometry, data, device, choose_dtype(options.dtype, config, device), rival)


def sidecar_bytes(geometry: Geometry, options: CompileOptions) -> int:
    """At most this much our own method's artifact takes: means, bases and spectra of Keys and Values in float32; the rest is small."""
    if options.method != OURS:
        return 0
    kinds = 1 if options.span == "visual" else 2
    layers = [geometry.layers[i] for i in geometry.compressible]
    return sum(4 * kinds * 2 * layer.kv_heads * layer.head_dim * (layer.head_dim + 2) for layer in layers)


def compile_artifact(options: CompileOptions) -> dict[str, Any]:
    """Compile and write an artifact; returns the summary that `--json` prints.

    Under torchrun or accelerate launch every process calls this; they share the documents, and the main one writes.

    Raises:
        RotateKError, DataError: anything the user can act on; nothing half-written is left.
    """
    with processes() as together:
        if together.size > 1:
            if options.method != OURS:
                raise UsageError(f"--method {options.method} has no calibration pass to share; start it without a launcher")
            options = replace(options, device=local_device(options.device), quiet=options.quiet or not together.main)
        return _compile(options, together)


def _compile(options: CompileOptions, together: Processes) -> dict[str, Any]:
    start = time.perf_counter()
    plan = prepare(options)
    wanted = options.num_samples if options.method == OURS else min(options.num_samples, SENSITIVITY_DOCUMENTS)
    samples = usable(plan.data, wanted, plan.geometry.text_only)  # before weights are loaded: a picture that does not open is said at once
    if len(samples) == 1:
        warnings.warn(f"{plan.data.name} has one calibration document: what is kept fits that one; pass dozens like yours", stacklevel=2)
    processor = load_processor(plan.source)
    model = load_model(plan.source, plan.dtype, plan.device, spread=options.device == AUTO)
    base = identity(plan.source, plan.config)
    items = Documents(plan.data, samples, processor, plan.geometry, end_ids(model)[0], rope_index(model))
    record = {
        "data": plan.data.name,
        **({"repository": plan.data.repository} if plan.data.repository else {}),
        "revision": plan.data.revision,
        "split": plan.data.split,
        "num_samples": len(items),
        "seed": options.seed,
        "samples": plan.data.hash_ids(list(samples.values())),
        "template": template_hash(processor),
        "processor": processor_hash(processor),
    }
    if options.method == OURS:
        artifact = compile_ours(options, plan, model, items, base, record, processor.tokenizer.pad_token_id or 0, together)
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
    if options.method == OURS:
        ranks = {str(i): r for i, r in artifact.ranks().items()}
        kept_aside = artifact.calibration["kept_aside"]
        return summary | {"plan": {"predicted_kl": artifact.report["plan_kl"], "kept_aside": kept_aside, "ranks": ranks}}
    return summary | {"plan": {"setting": artifact.method.words}}


def compile_ours(
    options: CompileOptions,
    plan: CompilePlan,
    model: Any,
    items: Documents,
    base: dict[str, Any],
    record: dict[str, Any],
    pad_id: int,
    together: Processes,
) -> Artifact:
    """Moments, bases, sensitivities, knock-outs and the plan of our own method."""
    geometry = plan.geometry
    assert options.keep_ratio is not None
    aside = len(items) // 8 if len(items) > 1 else 0  # kept for checking the joint plan
    used, held = items[: len(items) - aside], items[len(items) - aside :]

    key = {"base": base, "record": record, "documents": len(used), "dtype": DTYPE_NAMES[plan.dtype], "geometry": geometry.to_json()}
    before = time.perf_counter()
    moments = calibrate_together(model, used, geometry, key, options.batch_size, options.resume, pad_id, options.quiet, together)
    method = Method(
        basis=options.basis,
        span=options.span,
        window=options.window,
        keep_ratio=options.keep_ratio,
        allocation=options.allocation,
        levels=levels_for(geometry.layers[geometry.compressible[0]].head_dim),
        text_only=geometry.text_only,
    )
    if lack := moments.missing(geometry, method.kinds):
        wanted = "longer questions" if geometry.text_only else "images and questions after them"
        raise RotateKError(f"the calibration data cannot be used: {lack}; pass documents with {wanted}")
    query = {i: moments.query_moment(i) for i in geometry.compressible}
    bases = {
        kind: {i: calibrated_basis(method.basis, moments.covariance(i, kind, "key"), query[i]) for i in query} for kind in method.kinds
    }
    seconds_moments = time.perf_counter() - before

    before = time.perf_counter()
    main = bases[method.kinds[0]]  # of images, unless the model reads text alone
    cutter = Cutter(model, geometry, main, span_all=method.span == "all")
    read, rows = used[:SENSITIVITY_DOCUMENTS], geometry.rows_at_once(options.batch_size)
    measured = measure(cutter, together.share(read), method.levels, options.quiet, rows, together)
    sensitivities = measured.kl
    if (method.span == "visual" or method.text_only) and method.levels[0] == 0:
        knockouts = {i: table[:, 0].clone() for i, table in sensitivities.items()}  # the same thing: see knockout.py
    else:
        knockouts = measure_knockouts(cutter, together.share(read), options.quiet, rows, together)
    docs = _prefilled(cutter, together.share((held or used)[:SENSITIVITY_DOCUMENTS]), rows)
    ranks, checks = plan_from(geometry, main, sensitivities, JointCheck(cutter, docs, together), method)
    seconds_sensitivity = time.perf_counter() - before

    tensors = artifact_tensors(geometry, method, moments, bases, ranks, sensitivities, knockouts)
    seconds = {"total": 0.0, "moments_and_bases": seconds_moments, "sensitivities": seconds_sensitivity}
    record = record | {"documents": len(used), "kept_aside": len(held)}
    artifact = Artifact(geometry, method, tensors, base, record, libraries=library_versions())
    artifact.report = report(artifact, main, moments, sensitivities, checks, seconds)
    artifact.report["sensitivity"] = {"nothing": NOTHING, "bounded": measured.bounded}
    return artifact


def _check_span(options: CompileOptions, geometry: Geometry) -> None:
    """Refuse what would code nothing: images of a model that reads none.

    Raises:
        UsageError: a text-only model with --span visual or a rival.
    """
    if not geometry.text_only:
        return
    if options.method != OURS:
        raise UsageError(f"--method {options.method} codes images, and {options.model} reads text alone; use --method {OURS} --span all")
    if options.span == "visual":
        raise UsageError(f"--span visual codes images, and {options.model} reads text alone; use --span all")


def _prefilled(cutter: Cutter, items: Sequence[Encoded], batch_size: int) -> list[Prefilled]:
    """The documents prefilled, batch by batch; on a GPU, caches beyond a small part of the model's own size wait in main memory."""
    room = sum(p.numel() * p.element_size() for p in cutter.model.parameters()) // 16
    docs: list[Prefilled] = []
    for start in range(0, len(items), batch_size):
        docs.append(cutter.prefill(*items[start : start + batch_size]))
        room -= docs[-1].bytes()
        if room < 0 and cutter.device.type == "cuda":
            docs[-1].park()
    return docs


def plan_from(
    geometry: Geometry, bases: dict[int, Basis], sensitivities: dict[int, Tensor], check: JointCheck, method: Method
) -> tuple[Plan, dict[str, Any]]:
    """Ranks per head for the method's budget, and what checking the whole plan gave; the main process decides for all."""
    found: tuple[Plan, dict[str, Any]] = check.lead(lambda: _searched(geometry, bases, sensitivities, check, method))
    return found


def _searched(
    geometry: Geometry, bases: dict[int, Basis], sensitivities: dict[int, Tensor], check: JointCheck, method: Method
) -> tuple[Plan, dict[str, Any]]:
    uniform = allocation.uniform_plan(geometry, method.keep_ratio)
    if method.allocation == "uniform" or method.keep_ratio == 1:
        return uniform, {"kl": check(uniform), "swaps": 0, "plan": "uniform"}
    curves = {
        i: [allocation.cost_curve(method.levels, heads[h], bases[i].spectrum[h]) for h in range(len(heads))]
        for i, heads in sensitivities.items()
    }
    plan = allocation.allocate(geometry, curves, method.keep_ratio)
    plan, kl, swaps = allocation.repair(plan, curves, check, uniform)
    return plan, {"kl": kl, "swaps": swaps, "plan": "uniform" if plan == uniform else "allocated"}


def artifact_tensors(
    geometry: Geometry,
    method: Method,
    moments: Moments,
    bases: dict[str, dict[int, Basis]],
    ranks: Plan,
    sensitivities: dict[int, Tensor],
    knockouts: dict[int, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Everything of `rotatek.safetensors` (names in artifact.py)."""
    tensors: dict[str, Tensor] = {}
    for i in geometry.compressible:
        tensors[f"layers.{i}.key_rank"] = allocation.plan_tensor(ranks[i])
        tensors[f"layers.{i}.sensitivity"] = sensitivities[i]
        if knockouts is not None:
            tensors[f"layers.{i}.knockout"] = knockouts[i]
        for kind in method.kinds:
            values = two_sided(moments.covariance(i, kind, "value"), moments.output_gram(i))
            for side, basis in (("key", bases[kind][i]), ("value", values)):
                prefix = f"layers.{i}.{kind}.{side}"
                tensors[f"{prefix}_mean"] = moments.mean(i, kind, side).float()
                tensors[f"{prefix}_encode"] = basis.encode.float()
                tensors[f"{prefix}_spectrum"] = basis.spectrum.float()
    return tensors


def report(
    artifact: Artifact,
    bases: dict[int, Basis],
    moments: Moments,
    sensitivities: dict[int, Tensor],
    checks: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """What `rotatek-inspect` shows: per layer and head the plan, kept energy, expected logit error and measured KL."""
    layers, knockouts = [], artifact.knockout()
    for i, ranks in artifact.ranks().items():
        heads = []
        for h, rank in enumerate(ranks):
            spectrum = bases[i].spectrum[h]
            total = float(spectrum.sum())
            heads.append(
                {
                    "rank": rank,
                    "energy_kept": float(spectrum[:rank].sum()) / total if total > 0 else 1.0,
                    "expected_squared_logit_error": float(spectrum[rank:].sum()),
                    "kl_when_cut": [float(x) for x in sensitivities[i][h]],
                    "kl_when_knocked_out": float(knockouts[i][h]) if knockouts else None,
                }
            )
        layers.append({"layer": i, "heads": heads})
    dense = artifact.geometry.dense_bytes_per_token()
    return {
        "levels": list(artifact.method.levels),
        "plan_kl": checks["kl"],
        "plan_swaps": checks["swaps"],
        "plan_kind": checks["plan"],
        "kv_bytes_per_token": {"dense": dense, "compressed": artifact.bytes_per_token()},
        "calibration_tokens": {k: int(moments.sums[f"{artifact.geometry.compressible[0]}.{k}.count"]) for k in artifact.method.kinds},
        "seconds": seconds,
        "knockout": diagnosis(knockouts) if knockouts else None,
        "layers": layers,
    }
