"""`--method rap`: checkpoint and calibration documents in, a smaller checkpoint with an artifact out.

Documents give statistics, statistics a plan, the plan smaller weights; what was written is loaded again, counted and read on documents
kept aside before it takes its place.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import importlib.util
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .artifact import Artifact, library_versions, write_artifact
from .batches import Encoded
from .calibration_data.registry import open_data
from .compile_inputs import DTYPE_NAMES, CompilePlan, load_inputs
from .compile_options import CompileOptions
from .documents import Documents
from .errors import RotateKError, UsageError
from .geometry import Geometry
from .hub import check_space
from .models import (
    checked_geometry,
    choose_device,
    choose_dtype,
    load_config,
    pinned,
    resolve,
)
from .names import RAP
from .output import atomic_directory, refuse_existing
from .parallel import launched
from .placement import AUTO
from .rap_artifact import RapSection, pair_tensors
from .rap_budget import room
from .rap_card import rap_card
from .rap_checkpoint import fold, refuse_quantised, write_checkpoint
from .rap_counts import Counts, check_counts, counted, full_widths, reckoned
from .rap_plan import RapPlan
from .rap_plan_store import PlanStore
from .rap_report import divergence, logprobs, report, summary
from .rap_tensors import attention_tensors, stored_tensors
from .runtime.rap_attention import attention_modules, refuse_text, replace_attention
from .runtime.rap_load import load_pruned, set_pairs
from .weights import PATTERNS, checkpoint_directory

if TYPE_CHECKING:
    from .models import Source

KEPT_ASIDE = 8  # one document in so many gives nothing but the check


def prepare_rap(options: CompileOptions) -> CompilePlan:
    """Check everything that can be checked without weights.

    Raises:
        RotateKError: a model that RAP cannot prune, no safetensors weights, no room for the result, peft missing for `recover`.
        UsageError: started by a launcher, or a keep ratio below what the model can keep.
    """
    if launched()[1] > 1:
        raise UsageError(f"--method {options.method} runs in one process; start it without a launcher")
    source = resolve(options.model, options.revision, options.trust_remote_code)
    refuse_existing(options.output, options.overwrite)
    config = load_config(source)
    source = pinned(source, config)
    geometry = checked_geometry(config)
    refuse_quantised(config, source.name)
    refuse_text(config.get_text_config(decoder=True))
    if any(layer.head_dim % 2 for layer in geometry.layers):
        raise RotateKError(f"--method {RAP} does not support {source.name}: an odd head_dim has no RoPE pairs")
    if options.recover is not None:
        if importlib.util.find_spec("peft") is None:
            raise RotateKError("--recover trains adapters with the package peft: pip install peft")
        if options.device == AUTO:
            raise UsageError("--recover trains on one device; name it with --device, or leave --recover out")
    check_space(options.output, _weight_bytes(source, geometry), "the smaller checkpoint")
    assert options.keep_ratio is not None
    room(geometry, options.keep_ratio)
    data = open_data(options.calib, "calibration", options.seed, options.calib_revision, images=not geometry.text_only)
    device = choose_device(options.device)
    return CompilePlan(source, config, geometry, data, device, choose_dtype(options.dtype, config, device), None)


def _weight_bytes(source: Source, geometry: Geometry) -> int:
    """At most what will be written: the dense weights. The attention weights of a local checkpoint are looked for at once."""
    if source.is_local:
        stored = stored_tensors(Path(source.location), source.name)
        attention_tensors(stored, geometry)
        return sum(tensor.bytes for tensor in stored.values())
    from .hub import remote_sizes

    sizes = remote_sizes(source.location, source.revision, PATTERNS)
    if sizes is not None and not any(name.endswith(".safetensors") for name in sizes):
        raise RotateKError(f"{source.name} has no safetensors weights; weights in other formats are not pruned")
    return 0 if sizes is None else sum(sizes.values())


@dataclass(frozen=True, slots=True)
class Planned:
    """What is to be written, once the dense model is not needed any more.

    trained: attention tensors after recovery, by (layer, "q_proj.weight" and the like). checked, reference: documents that the result is
    read on, and the dense model's log-probabilities of each. dense: its counts. start: when the work began, `time.perf_counter()`.
    """

    prepared: CompilePlan
    plan: RapPlan
    section: RapSection
    trained: Mapping[tuple[int, str], Tensor]
    processor: Any
    items: Documents
    checked: Documents
    reference: Sequence[Tensor]
    dense: Counts
    base: dict[str, Any]
    record: dict[str, Any]
    pad_id: int
    seconds: dict[str, float]
    start: float

    def digest(self) -> str:
        """SHA-256 of what makes the smaller weights of the dense ones."""
        found = hashlib.sha256()
        tensors = self.plan.tensors() | {f"trained.{i}.{name}": tensor for (i, name), tensor in self.trained.items()}
        for name in sorted(tensors):
            found.update(f"{name} {tuple(tensors[name].shape)}".encode())
            found.update(tensors[name].detach().cpu().to(torch.float32).contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()


def compile_rap(options: CompileOptions) -> dict[str, Any]:
    """Prune, write and check; returns the summary that `--json` prints.

    Raises:
        RotateKError, DataError: anything the user can act on; nothing half-written is left.
    """
    planned = plan_pruning(options, prepare_rap(options))
    with atomic_directory(options.output, options.overwrite) as staging:
        artifact, _ = write_pruned(planned, options, staging)
        write_artifact(artifact, staging, rap_card(artifact))
        planned.processor.save_pretrained(staging)
    return summary(options, artifact)


def plan_pruning(options: CompileOptions, prepared: CompilePlan) -> Planned:
    """Load the dense model, plan with it, train if that is asked for, and note what it says and costs; then it is let go."""
    start = time.perf_counter()
    geometry = prepared.geometry
    loaded = load_inputs(prepared, options.num_samples, options)
    model, items, base, pad_id = loaded.model, loaded.items, loaded.base, loaded.pad_id
    attention_modules(model)
    aside = len(items) // KEPT_ASIDE
    used, checked = (items[:-aside], items[-aside:]) if aside else (items, items)
    record = loaded.record | {"documents": len(used), "kept_aside": aside}
    plan, seconds = _plan(options, prepared, model, used, base, record, pad_id)
    assert options.keep_ratio is not None and options.rap_score is not None and options.rap_budget is not None
    before = time.perf_counter()
    trained = recovered(options, model, plan, geometry, used, pad_id) if options.recover else {}
    section = RapSection.of(
        plan,
        keep_ratio=options.keep_ratio,
        score=options.rap_score,
        budget=options.rap_budget,
        repair=options.repair,
        recover=(options.recover or 0) if trained else 0,
    )
    seconds |= {"recovery": time.perf_counter() - before} if options.recover else {}
    dense, reference = counted(model, geometry), [logprobs(model, [item], geometry, pad_id) for item in checked]
    return Planned(
        prepared, plan, section, trained, loaded.processor, items, checked, reference, dense, base, record, pad_id, seconds, start
    )


def write_pruned(planned: Planned, options: CompileOptions, staging: Path) -> tuple[Artifact, Any]:
    """Write the smaller weights into a staging directory and load them again; the artifact with its report, and the model.

    Raises:
        RotateKError: the weights cannot be written, or what was written is not what the widths say.
        OSError: the file system refused.
    """
    gc.collect()  # the dense model
    before, geometry, prepared, section = time.perf_counter(), planned.prepared.geometry, planned.prepared, planned.section
    tensors = pair_tensors(planned.plan)
    artifact = Artifact(geometry, section.method(), tensors, planned.base, planned.record, libraries=library_versions(), rap=section)
    directory, name = checkpoint_directory(prepared.source), prepared.source.name
    write_checkpoint(directory, name, staging, geometry, planned.plan, planned.trained)
    hidden = prepared.config.get_text_config(decoder=True).hidden_size
    biases = {place for place in attention_tensors(stored_tensors(directory, name), geometry).values() if "bias" in place[1]}
    check_counts(planned.dense, reckoned(geometry, full_widths(geometry), hidden, biases), "dense model")
    pruned = load_pruned(artifact, staging, prepared.dtype, prepared.device, options.device == AUTO)
    compact = counted(pruned, geometry)
    check_counts(compact, reckoned(geometry, section.layers, hidden, biases), "pruned model")
    kl = divergence(pruned, planned.checked, planned.reference, geometry, planned.pad_id)
    now = time.perf_counter()
    seconds = planned.seconds | {"writing_and_check": now - before, "total": now - planned.start}
    artifact.report = report(artifact, planned.plan, planned.dense, compact, kl, seconds)
    return artifact, pruned


def _plan(
    options: CompileOptions, prepared: CompilePlan, model: Any, used: Documents, base: dict[str, Any], record: dict[str, Any], pad_id: int
) -> tuple[RapPlan, dict[str, float]]:
    """The plan, made or (with --resume) as an interrupted run left it, and what its parts took."""
    from .rap_maps import make_plan
    from .rap_statistics import RapStatistics, collect

    assert options.keep_ratio is not None and options.rap_score is not None and options.rap_budget is not None
    chosen = {"keep_ratio": options.keep_ratio, "score": options.rap_score, "budget": options.rap_budget, "repair": options.repair}
    store = PlanStore(
        {"base": base, "record": record, "dtype": DTYPE_NAMES[prepared.dtype], "geometry": prepared.geometry.to_json(), **chosen}
    )
    if options.resume:
        if (saved := store.load(prepared.geometry, chosen)) is not None:
            return saved, {}
        warnings.warn("--resume: nothing saved, starting anew", stacklevel=3)
    gradients = options.rap_score.startswith("fisher") or options.rap_budget == "published"
    before = time.perf_counter()
    # on a CPU one by one: without padding there is no mask, and attention computes half of the logits only
    rows = 1 if prepared.device.type == "cpu" else prepared.geometry.rows_at_once(options.batch_size)
    statistics = RapStatistics()
    if options.keep_ratio < 1:  # else nothing is chosen
        statistics = collect(model, used, prepared.geometry, batch_size=rows, pad_id=pad_id, quiet=options.quiet, gradients=gradients)
    middle = time.perf_counter()
    plan = make_plan(
        model,
        statistics,
        prepared.geometry,
        keep_ratio=options.keep_ratio,
        score=options.rap_score,
        budget=options.rap_budget,
        repair=options.repair,
    )
    plan.check(prepared.geometry)
    store.save(plan)
    return plan, {"statistics": middle - before, "plan": time.perf_counter() - middle}


def pruned_copy(model: Any, plan: RapPlan, geometry: Geometry) -> Any:
    """A pruned model beside the dense one, which stays as it is; they share all weights but those of the text layers' attention."""
    own = {id(p) for _, module in attention_modules(model).values() for p in module.parameters()}
    shared = {id(p): p for p in model.parameters() if id(p) not in own}
    copied = copy.deepcopy(model, dict(shared))
    stock = {i: module for i, (_, module) in attention_modules(model).items()}
    made = replace_attention(copied, {i: layer.widths for i, layer in plan.layers.items()})
    with torch.no_grad():
        for i, module in made.items():
            for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
                dense, narrow = getattr(stock[i], projection), getattr(module, projection)
                narrow.weight.copy_(fold(plan.layers[i], projection, "weight", dense.weight))
                if narrow.bias is not None:
                    bias = dense.bias if dense.bias is not None else torch.zeros_like(narrow.bias)
                    narrow.bias.copy_(fold(plan.layers[i], projection, "bias", bias))
    set_pairs(copied, {i: layer.pairs for i, layer in plan.layers.items()})
    return copied


def recovered(
    options: CompileOptions, model: nn.Module, plan: RapPlan, geometry: Geometry, items: Sequence[Encoded], pad_id: int
) -> dict[tuple[int, str], Tensor]:
    """Attention weights after `--recover` steps of distillation, by (layer, "q_proj.weight" and the like), on the CPU; {} if in vain."""
    from .rap_recover import recover

    assert options.recover is not None
    pruned = pruned_copy(model, plan, geometry)
    rows, seed = options.batch_size, options.seed
    sizes = {"batch_size": rows, "pad_id": pad_id}
    first, last = recover(pruned, model, items, options.recover, geometry=geometry, quiet=options.quiet, seed=seed, **sizes)
    if not last < first:
        warnings.warn(
            f"--recover: {options.recover} steps brought the model no nearer to the dense one on documents held out (KL {first:.2e}); "
            f"it is left as it was",
            stacklevel=2,
        )
        return {}
    return {
        (i, name): tensor.detach().cpu()
        for i, (_, module) in attention_modules(pruned).items()
        for name, tensor in module.named_parameters()
    }


def dry_run(options: CompileOptions, prepared: CompilePlan | None = None) -> tuple[dict[str, Any], str]:
    """What `--dry-run` prints, as JSON and for people; the widths are for measuring to say, their sum is not."""
    prepared = prepared or prepare_rap(options)
    geometry, asked = prepared.geometry, options.num_samples
    assert options.keep_ratio is not None
    dense = 2 * sum(2 * layer.kv_heads * layer.head_dim for layer in geometry.layers)
    samples = asked if prepared.data.size is None else min(asked, prepared.data.size)
    shape = geometry.layers[0]
    found = {
        "artifact": str(options.output),
        "model": prepared.source.name,
        "method": RAP,
        "layers": len(geometry.layers),
        "kv_bytes_per_token": {"dense": dense, "compressed": options.keep_ratio * dense},
        "seconds": None,
        "geometry": geometry.to_json(),
        "data": {"name": prepared.data.name, "split": prepared.data.split, "num_samples": samples},
    }
    text = (
        f"{prepared.source.name} ({geometry.model_type}): {len(geometry.layers)} text layers, "
        f"{shape.query_heads}/{shape.kv_heads} heads of {shape.head_dim}, {shape.head_dim // 2} RoPE pairs each\n"
        f"RAP, keep ratio {options.keep_ratio:g} of Keys, Values, attention parameters and FLOPs, score {options.rap_score}, "
        f"budget {options.rap_budget}{'' if options.repair else ', no repair'}"
        f"{f', {options.recover} steps of recovery' if options.recover else ''}\n"
        f"data {prepared.data.name}, {samples} sample{'s' if samples > 1 else ''}\n"
        f"bytes of Keys and Values per token, all layers: {dense} dense, at most {options.keep_ratio * dense:.0f} kept\n"
        f"would write {options.output}, a checkpoint of its own"
    )
    return found, text
