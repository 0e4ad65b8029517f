"""rotatek-compile as a function: checkpoint and calibration documents in, artifact directory out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import allocate as allocation
from .artifact import ALLOCATIONS, SPANS, Artifact, Method, library_versions, write_artifact
from .bases import BASES, Basis, calibrated_basis, two_sided
from .batches import end_ids, template_hash
from .calibrate import MomentStore, calibrate
from .calibration_data.registry import DataSource, open_data
from .card import model_card
from .documents import Documents, usable
from .errors import RotateKError, UsageError
from .geometry import Geometry
from .models import Source, checked_geometry, choose_device, choose_dtype, identity, load_config, load_model, load_processor, resolve
from .moments import Moments
from .output import atomic_directory, refuse_existing
from .sensitivity import Cutter, Plan, Prefilled, joint_kl, levels_for, measure

SENSITIVITY_DOCUMENTS = 8
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions:
    """Everything `rotatek-compile` can be told; validated on construction.

    Raises:
        UsageError: an option out of range.
    """

    model: str
    calib: str
    output: Path
    keep_ratio: float = 0.25
    basis: str = "two-sided"
    allocation: str = "allocated"
    span: str = "visual"
    window: int = 128
    num_samples: int = 64
    batch_size: int = 4
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise UsageError(f"--keep-ratio {self.keep_ratio} is out of range; it is a fraction kept, above 0 and up to 1")
        for name, least in (("window", 1), ("num_samples", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} is out of range; it must be at least {least}")
        for name, allowed in (("basis", BASES), ("allocation", ALLOCATIONS), ("span", SPANS)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"unknown --{name} {getattr(self, name)!r}; choose one of {', '.join(allowed)}")


@dataclass(frozen=True, slots=True)
class CompilePlan:
    """What `--dry-run` shows: nothing but configs was read."""

    source: Source
    config: Any
    geometry: Geometry
    data: DataSource
    device: torch.device
    dtype: torch.dtype

    def bytes_per_token(self, keep_ratio: float) -> tuple[int, float]:
        """Dense bytes per coded token over the compressed layers, and those of the plan's codes and raw Values."""
        dense = self.geometry.dense_bytes_per_token()
        ranks = allocation.uniform_plan(self.geometry, keep_ratio)
        values = dense / 2
        return dense, values + sum(2 * sum(r) for r in ranks.values())


def prepare(options: CompileOptions) -> CompilePlan:
    """Check everything that can be checked without weights: names, geometry, the output directory, the data's columns."""
    source = resolve(options.model, options.revision, options.trust_remote_code)
    refuse_existing(options.output, options.overwrite)
    config = load_config(source)
    geometry = checked_geometry(config)
    data = open_data(options.calib, "calibration", options.seed)
    device = choose_device(options.device)
    return CompilePlan(source, config, geometry, data, device, choose_dtype(options.dtype, config, device))


def compile_artifact(options: CompileOptions) -> dict[str, Any]:
    """Compile and write an artifact; returns the summary that `--json` prints.

    Raises:
        RotateKError, DataError: anything the user can act on; nothing half-written is left.
    """
    start = time.perf_counter()
    plan = prepare(options)
    source, geometry = plan.source, plan.geometry
    samples = usable(plan.data, options.num_samples)  # before weights are loaded: a picture that does not open is said at once
    processor = load_processor(source)
    model = load_model(source, plan.dtype, plan.device)
    base = identity(source, plan.config)
    items = Documents(plan.data, samples, processor, geometry, end_ids(model)[0])
    record = {
        "data": plan.data.name,
        "revision": plan.data.revision,
        "split": plan.data.split,
        "num_samples": len(items),
        "seed": options.seed,
        "samples": plan.data.hash_ids(list(samples.values())),
        "template": template_hash(processor),
    }
    aside = len(items) // 8 if len(items) > 1 else 0  # kept for checking the joint plan
    used, held = items[: len(items) - aside], items[len(items) - aside :]

    key = {"base": base, "record": record, "documents": len(used), "dtype": DTYPE_NAMES[plan.dtype], "geometry": geometry.to_json()}
    before = time.perf_counter()
    pad_id = processor.tokenizer.pad_token_id or 0
    moments = calibrate(model, used, geometry, MomentStore(key), options.batch_size, options.resume, pad_id, options.quiet)
    method = Method(
        basis=options.basis,
        span=options.span,
        window=options.window,
        keep_ratio=options.keep_ratio,
        allocation=options.allocation,
        levels=levels_for(geometry.layers[geometry.compressible[0]].head_dim),
    )
    if lack := moments.missing(geometry, method.kinds):
        raise RotateKError(f"the calibration data cannot be used: {lack}; pass documents with images and questions after them")
    query = {i: moments.query_moment(i) for i in geometry.compressible}
    bases = {
        kind: {i: calibrated_basis(method.basis, moments.covariance(i, kind, "key"), query[i]) for i in query} for kind in method.kinds
    }
    seconds_moments = time.perf_counter() - before

    before = time.perf_counter()
    cutter = Cutter(model, geometry, bases["visual"], span_all=method.span == "all")
    sensitivities = measure(cutter, used[:SENSITIVITY_DOCUMENTS], method.levels, options.quiet)
    docs = [cutter.prefill(item) for item in (held or used)[:SENSITIVITY_DOCUMENTS]]
    ranks, checks = plan_from(cutter, geometry, bases["visual"], sensitivities, docs, method)
    seconds_sensitivity = time.perf_counter() - before

    tensors = artifact_tensors(geometry, method, moments, bases, ranks, sensitivities)
    seconds = {"total": 0.0, "moments_and_bases": seconds_moments, "sensitivities": seconds_sensitivity}
    record |= {"documents": len(used), "kept_aside": len(held)}
    artifact = Artifact(geometry, method, tensors, base, record, libraries=library_versions())
    artifact.report = report(artifact, bases["visual"], moments, sensitivities, checks, seconds)
    seconds["total"] = time.perf_counter() - start
    with atomic_directory(options.output, options.overwrite) as staging:
        write_artifact(artifact, staging, model_card(artifact))
        processor.save_pretrained(staging)
    dense, _ = plan.bytes_per_token(options.keep_ratio)
    return {
        "artifact": str(options.output),
        "model": base["id"],
        "method": "rotatek",
        "layers": len(geometry.compressible),
        "kv_bytes_per_token": {"dense": dense, "compressed": artifact.bytes_per_token()},
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "plan": {"predicted_kl": checks["kl"], "ranks": {str(i): r for i, r in ranks.items()}},
    }


def plan_from(
    cutter: Cutter, geometry: Geometry, bases: dict[int, Basis], sensitivities: dict[int, Tensor], docs: list[Prefilled], method: Method
) -> tuple[Plan, dict[str, Any]]:
    """Ranks per head for the method's budget, and what checking the whole plan on `docs` gave."""
    uniform = allocation.uniform_plan(geometry, method.keep_ratio)
    if method.allocation == "uniform" or method.keep_ratio == 1:
        return uniform, {"kl": joint_kl(cutter, docs, uniform), "swaps": 0, "plan": "uniform"}
    curves = {
        i: [allocation.cost_curve(method.levels, heads[h], bases[i].spectrum[h]) for h in range(len(heads))]
        for i, heads in sensitivities.items()
    }
    plan = allocation.allocate(geometry, curves, method.keep_ratio)
    plan, kl, swaps = allocation.repair(plan, curves, lambda p: joint_kl(cutter, docs, p), uniform)
    return plan, {"kl": kl, "swaps": swaps, "plan": "uniform" if plan == uniform else "allocated"}


def artifact_tensors(
    geometry: Geometry, method: Method, moments: Moments, bases: dict[str, dict[int, Basis]], ranks: Plan, sensitivities: dict[int, Tensor]
) -> dict[str, Tensor]:
    """Everything of `rotatek.safetensors` (names in artifact.py)."""
    tensors: dict[str, Tensor] = {}
    for i in geometry.compressible:
        tensors[f"layers.{i}.key_rank"] = allocation.plan_tensor(ranks[i])
        tensors[f"layers.{i}.sensitivity"] = sensitivities[i]
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
    layers = []
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
        "layers": layers,
    }


