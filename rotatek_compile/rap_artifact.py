"""The artifact of `--method rap`: section `rap` of rotatek_config.json, and which pairs every KV head keeps, read strictly.

Tensors of `rap.safetensors`, for each text layer i: `layers.{i}.pairs` int32 [Hkv, m], ascending. The weights themselves are a checkpoint
beside it (rap_checkpoint.py). Maps are not kept: they are in the weights, and after `--recover` no map says what the weights became.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .artifact_config import AGAIN, MAX_HEAD_DIM, MAX_TOKENS, Method
from .artifact_tensors import header_of, load_checked
from .bases import RIDGE
from .errors import ArtifactError
from .geometry import Geometry
from .names import RAP, RAP_BUDGETS, RAP_SCORES
from .rap_plan import RapPlan, Widths, check_pairs
from .untrusted import read_file, shown

if TYPE_CHECKING:
    from .artifact import Artifact

RAP_FILE, PAIRS = "rap.safetensors", ".pairs"
NOTHING = 1e-9  # of a head's largest eigenvalue: what is below is rounding
MAX_RAP_BYTES = 64 << 20  # 1024 layers of 64 KV heads of 64 pairs take 16 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class RapSection:
    """What section `rap` says: how the checkpoint was pruned, and the widths of every text layer."""

    keep_ratio: float  # asked for: share of Keys and Values, of attention parameters and of attention FLOPs
    score: str
    budget: str
    repair: bool
    recover: int  # steps of distillation; 0 for none
    layers: tuple[Widths, ...]

    @classmethod
    def of(cls, plan: RapPlan, *, keep_ratio: float, score: str, budget: str, repair: bool, recover: int) -> RapSection:
        """The section of a plan and the options that it was made with."""
        layers = tuple(layer.widths for layer in plan.layers.values())
        return cls(keep_ratio=keep_ratio, score=score, budget=budget, repair=repair, recover=recover, layers=layers)

    def to_json(self) -> dict[str, Any]:
        return {
            "keep_ratio": self.keep_ratio,
            "score": self.score,
            "budget": self.budget,
            "repair": self.repair,
            "recover": self.recover,
            "layers": [{"pairs": w.pairs, "value_width": w.value, "output_bias": w.output_bias} for w in self.layers],
        }

    @property
    def words(self) -> str:
        """Method and setting for people."""
        parts = [f"RAP, keep ratio {self.keep_ratio:g}", f"score {self.score}", f"budget {self.budget}"]
        parts += ["repaired"] if self.repair else ["no repair"]
        return ", ".join(parts + ([f"{self.recover} steps of recovery"] if self.recover else []))

    def method(self) -> Method:
        """What the rest of an artifact's readers are told: a method that is not ours, by its name."""
        return Method(rival=RAP, keep_ratio=self.keep_ratio)


def dense_channels(geometry: Geometry) -> tuple[int, ...]:
    """Channels of Keys and Values together that the dense model keeps of one token, by layer: Hkv·2D."""
    return tuple(2 * layer.kv_heads * layer.head_dim for layer in geometry.layers)


def kept_channels(geometry: Geometry, section: RapSection) -> tuple[int, ...]:
    """Of these the pruned model keeps Hkv·(2m + r)."""
    return tuple(layer.kv_heads * (2 * w.pairs + w.value) for layer, w in zip(geometry.layers, section.layers, strict=True))


def read_section(data: Any, where: str, geometry: Geometry) -> RapSection:
    """Section rap.

    Raises:
        ArtifactError: one sentence naming the key, the value seen and what to do.
    """
    where = f"{where}: section rap"
    if not isinstance(data, dict):
        raise ArtifactError(f"{where} is {shown(data)}, expected an object; {AGAIN}")
    ratio, recover = data.get("keep_ratio"), data.get("recover")
    checks = {
        "keep_ratio": isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and 0 < ratio <= 1,
        "score": data.get("score") in RAP_SCORES,
        "budget": data.get("budget") in RAP_BUDGETS,
        "repair": isinstance(data.get("repair"), bool),
        "recover": _whole(recover, 0, MAX_TOKENS),
    }
    for name, good in checks.items():
        if not good:
            raise ArtifactError(f"{where}: {name} is {shown(data.get(name))}, which this version cannot run; {AGAIN}")
    layers = data.get("layers")
    if not isinstance(layers, list) or len(layers) != len(geometry.layers):
        raise ArtifactError(f"{where}: layers is {shown(layers)}, expected a list of {len(geometry.layers)}; {AGAIN}")
    widths = []
    for i, (layer, shape) in enumerate(zip(layers, geometry.layers, strict=True)):
        if not isinstance(layer, dict):
            raise ArtifactError(f"{where}: layer {i} is {shown(layer)}, expected an object; {AGAIN}")
        for name, most in (("pairs", shape.head_dim // 2), ("value_width", shape.head_dim)):
            if not _whole(seen := layer.get(name), 1, min(most, MAX_HEAD_DIM)):
                raise ArtifactError(f"{where}: layer {i} has {name} {shown(seen)}, expected 1 to {most}; {AGAIN}")
        if not isinstance(bias := layer.get("output_bias"), bool):
            raise ArtifactError(f"{where}: layer {i} has output_bias {shown(bias)}, expected true or false; {AGAIN}")
        widths.append(Widths(layer["pairs"], layer["value_width"], bias))
    return RapSection(
        keep_ratio=float(data["keep_ratio"]),
        score=data["score"],
        budget=data["budget"],
        repair=data["repair"],
        recover=data["recover"],
        layers=tuple(widths),
    )


def pair_tensors(plan: RapPlan) -> dict[str, Tensor]:
    """What `rap.safetensors` holds."""
    return {f"layers.{i}.pairs": layer.pairs.to(torch.int32).contiguous().cpu() for i, layer in plan.layers.items()}


def pairs_of(artifact: Artifact) -> dict[int, Tensor]:
    """Kept pairs, int64 [Hkv, m] by layer."""
    return {i: artifact.tensors[f"layers.{i}.pairs"].to(torch.int64) for i in range(len(artifact.geometry.layers))}


def read_pairs(directory: Path, files: dict[str, Any], geometry: Geometry, section: RapSection) -> dict[str, Tensor]:
    """The tensors of `rap.safetensors`: checksum, header, then what the pairs are.

    Raises:
        ArtifactError: as `read_section`; also for a damaged or truncated file.
    """
    data, file = read_file(directory, RAP_FILE, MAX_RAP_BYTES), directory / RAP_FILE
    entry = files.get(RAP_FILE)
    recorded = entry.get("sha256") if isinstance(entry, dict) else None
    header = header_of(file, data)
    if recorded != (seen := hashlib.sha256(data).hexdigest()):
        raise ArtifactError(f"{file} was changed after it was written: sha256 {seen[:12]}…, recorded {shown(recorded)}; get it again")
    for i, (shape, widths) in enumerate(zip(geometry.layers, section.layers, strict=True)):
        name = f"layers.{i}.pairs"
        if (found := header.get(name)) is None:
            raise ArtifactError(f"{file}: tensor {name} is missing; {AGAIN}")
        wanted = [shape.kv_heads, widths.pairs]
        if found.get("shape") != wanted:
            raise ArtifactError(f"{file}: tensor {name} has shape {shown(found.get('shape'))}, section rap says {wanted}; {AGAIN}")
        if found.get("dtype") != "I32":
            raise ArtifactError(f"{file}: tensor {name} is {shown(found.get('dtype'))}, expected I32; {AGAIN}")
    tensors = load_checked(file, data)
    for i, shape in enumerate(geometry.layers):
        check_pairs(tensors[f"layers.{i}.pairs"], shape, f"{file}: layer {i}")
    return {f"layers.{i}.pairs": tensors[f"layers.{i}.pairs"] for i in range(len(geometry.layers))}


def pruned_part(artifact: Artifact) -> Artifact:
    """An artifact of `--method rap+rotatek` as one of `--method rap` alone, with the report on the pruning; any other as it is."""
    if artifact.rap is None or not artifact.coded:
        return artifact
    report = artifact.report.get("rap")
    report = report if isinstance(report, dict) else {}  # one that was edited, or is gone
    calibration = artifact.calibration | {name: report[name] for name in ("kept_aside",) if name in report}
    return replace(artifact, method=artifact.rap.method(), report=report, calibration=calibration)


def check_narrow(tensors: dict[str, Tensor], geometry: Geometry, section: RapSection, basis: str, where: str) -> None:
    """That what was calibrated for a pruned model is of heads as narrow as its own: no means and no energy beyond the kept channels.

    Args:
        tensors: of rotatek.safetensors, checked, in this basis; `where` names that file.

    Raises:
        ArtifactError: it was calibrated for wider heads.
    """
    for i in geometry.compressible:
        kept = {"key": 2 * section.layers[i].pairs, "value": section.layers[i].value}
        for name, tensor in tensors.items():
            _, layer, *rest = name.split(".")
            side, _, part = rest[-1].partition("_")
            if layer != str(i) or side not in kept or part not in ("mean", "spectrum"):
                continue
            beyond = tensor[:, kept[side] :].abs()
            least = 0.0
            if part == "spectrum":  # eigenvalues of zero are found up to rounding; the published basis adds to all of them
                ridge = 1.01 * RIDGE * float(tensor.mean(-1).max()) if basis == "paper" else 0.0
                least = NOTHING * float(tensor.max()) + ridge
            if bool((beyond > least).any()):
                words = f"{int((beyond > least).any(0).sum())} channels beyond the {kept[side]} that section rap keeps"
                raise ArtifactError(f"{where}: tensor {name} is not zero in {words}; {AGAIN}")


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high
