"""rotatek.safetensors: what it must hold for a geometry and a method, read once, checked, then used.

The order is that of the damage each step could do: the size the geometry calls for, the header (names, shapes, dtypes), the checksum,
the numbers. What the first format called otherwise gets its present name last.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .artifact_config import AGAIN, FORMAT_VERSION, Method
from .bases import MAX_CONDITION
from .errors import ArtifactError
from .geometry import Geometry
from .kernels.slabs import UNIT, Slabs, check_slabs
from .plan import SIDES
from .untrusted import parse_json, read_file, shown
from .usual import LARGEST_RATIO

TENSOR_FILE = "rotatek.safetensors"
MAX_HEADER = 4 << 20  # bytes; 128 layers with every tensor need 250 KB
MAX_BYTES = 2 << 30  # 128 layers of 64 KV heads of 128 channels, both spans
DTYPES = {"float32": ("F32",), "float16": ("F16", "F32"), "int32": ("I32", "I64")}  # ours -> safetensors' names that are accepted
WORDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
SAFE_SCALE = 1e30  # singular values beyond it, or below its inverse, leave float32


@dataclass(frozen=True, slots=True)
class Expected:
    """Shape and dtype (a key of DTYPES) of one tensor."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def bytes(self) -> int:
        count = 8 if self.dtype == "int32" else 4  # int32 may stand as int64, float16 as float32
        for size in self.shape:
            count *= size
        return count


OPTIONAL = ("knockout", "value_sensitivity", "tail_ratio", "code_ratio", "angle")
"""What a layer may lack, then in all layers: older artifacts have not measured it, nor have those of few documents (usual.py)."""


def expected_tensors(
    geometry: Geometry, method: Method, optional: tuple[str, ...] = OPTIONAL, version: int = FORMAT_VERSION
) -> dict[str, Expected]:
    """Every tensor of an artifact by name (described in artifact.py).

    Args:
        optional: which of `OPTIONAL` it holds.
        version: of the format; the first had ranks of the Keys and one sensitivity.
    """
    tensors: dict[str, Expected] = {}
    for i in geometry.compressible:
        heads, dim = geometry.layers[i].kv_heads, geometry.layers[i].head_dim
        if method.rival is None:
            kl = Expected((heads, len(method.levels)))
            if version == 1:
                tensors[f"layers.{i}.key_rank"], tensors[f"layers.{i}.sensitivity"] = Expected((heads,), "int32"), kl
            else:
                tensors |= {f"layers.{i}.{side}_plan": Expected((heads, 3), "int32") for side in SIDES}
                tensors[f"layers.{i}.key_sensitivity"] = kl
                if "value_sensitivity" in optional:
                    tensors[f"layers.{i}.value_sensitivity"] = kl
        if "knockout" in optional:
            tensors[f"layers.{i}.knockout"] = Expected((heads,))
        for kind in method.kinds if method.rival is None else ():
            for side in ("key", "value"):
                prefix = f"layers.{i}.{kind}.{side}"
                tensors[f"{prefix}_mean"] = tensors[f"{prefix}_spectrum"] = Expected((heads, dim))
                tensors[f"{prefix}_encode"] = Expected((heads, dim, dim), "float16")
                tensors |= {f"{prefix}_{name}": Expected((heads, dim)) for name in ("tail_ratio", "code_ratio") if name in optional}
                if "angle" in optional and (kind, side) == ("visual", "value"):
                    tensors[f"{prefix}_angle"] = Expected((heads, 2))
    return tensors


def read_tensors(
    directory: Path, files: dict[str, Any], geometry: Geometry, method: Method, version: int = FORMAT_VERSION
) -> dict[str, Tensor]:
    """The checked tensors of an artifact, under their present names; tensors it has no use for are left out with a warning.

    Memory is at most about twice the file and the largest tensor in float64; the file at most twice what the geometry calls for.

    Args:
        files: section `files` of the config, with the recorded SHA-256.

    Raises:
        ArtifactError: one sentence naming the file, the tensor, the value seen and what to do.
    """
    file = directory / TENSOR_FILE
    everything = expected_tensors(geometry, method)
    most = sum(tensor.bytes for tensor in everything.values())
    if most > MAX_BYTES:
        raise ArtifactError(f"{directory}: the geometry calls for {most} bytes of tensors, at most {MAX_BYTES} are read; {AGAIN}")
    data = read_file(directory, TENSOR_FILE, 2 * most + MAX_HEADER)
    header = header_of(file, data)
    _check_sum(file, data, files)
    optional = tuple(part for part in OPTIONAL if any(name.endswith(part) and name in everything for name in header))
    if method.rival is not None:
        optional = ("knockout",)
    if method.usual_deviation is not None and "angle" not in optional:
        raise ArtifactError(f"{file}: usual_deviation is {method.usual_deviation:g}, but no tensor holds the angles it is of; {AGAIN}")
    expected = expected_tensors(geometry, method, optional, version)
    _check_header(file, header, expected)
    tensors = load_checked(file, data)
    for name in expected:
        _check_numbers(file, name, tensors[name])
    found = {name: tensors[name].float() if expected[name].dtype == "float16" else tensors[name] for name in expected}
    for i in geometry.compressible if method.rival is None else ():
        dim = geometry.layers[i].head_dim
        if version == 1:
            _check_rank(file, i, found[f"layers.{i}.key_rank"], dim)
            found |= _present(found, i, dim)
        for side in SIDES:
            _check_plan(file, f"layers.{i}.{side}_plan", found[f"layers.{i}.{side}_plan"], dim)
    return found


def _present(found: dict[str, Tensor], layer: int, dim: int) -> dict[str, Tensor]:
    """Plan and sensitivities of one layer of the first format, taken out of `found`, as they stand in this one.

    A rank was one of native Keys; Values were raw.
    """
    ranks = found.pop(f"layers.{layer}.key_rank").to(torch.int32)
    plans = torch.zeros(2, len(ranks), 3, dtype=torch.int32)
    plans[0, :, 0], plans[1, :, 0] = ranks, dim
    kl = found.pop(f"layers.{layer}.sensitivity")
    return {f"layers.{layer}.{side}_plan": plan for side, plan in zip(SIDES, plans, strict=True)} | {f"layers.{layer}.key_sensitivity": kl}


def header_of(file: Path, data: bytes) -> dict[str, Any]:
    """The header of a safetensors file: 8 bytes little-endian length, then JSON by tensor name."""
    damaged = f"{file} is damaged or truncated"
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else -1
    if not 0 < length <= min(MAX_HEADER, len(data) - 8):
        raise ArtifactError(f"{damaged} (header of {length} bytes in a file of {len(data)}); {AGAIN} or download it again")
    header = parse_json(data[8 : 8 + length], f"header of {file}")
    header.pop("__metadata__", None)
    end = 0
    for name, entry in header.items():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(x) is int for x in offsets):
            raise ArtifactError(f"{damaged} (tensor {shown(name)} is {shown(entry)}); {AGAIN} or download it again")
        end = max(end, *offsets)
    if end != len(data) - 8 - length:
        raise ArtifactError(f"{damaged} ({len(data) - 8 - length} bytes of tensors, the header names {end}); {AGAIN} or download it again")
    return header


def _check_sum(file: Path, data: bytes, files: dict[str, Any]) -> None:
    entry = files.get(TENSOR_FILE)
    recorded = entry.get("sha256") if isinstance(entry, dict) else None
    if recorded != (seen := hashlib.sha256(data).hexdigest()):
        raise ArtifactError(f"{file} was changed after it was written: sha256 {seen[:12]}…, recorded {shown(recorded)}; get it again")


def _check_header(file: Path, header: dict[str, Any], expected: dict[str, Expected]) -> None:
    for name, wanted in expected.items():
        entry = header.get(name)
        if entry is None:
            raise ArtifactError(f"{file}: tensor {name} is missing; {AGAIN}")
        if (seen := entry.get("shape")) != (shape := list(wanted.shape)):
            raise ArtifactError(f"{file}: tensor {name} has shape {shown(seen)}, the geometry wants {shape}; {AGAIN}")
        if (dtype := entry.get("dtype")) not in DTYPES[wanted.dtype]:
            words = WORDS.get(dtype, shown(dtype)) if isinstance(dtype, str) else shown(dtype)
            raise ArtifactError(f"{file}: tensor {name} is {words}, expected {wanted.dtype}; {AGAIN}")
    if unknown := [name for name in header if name not in expected]:
        few = ", ".join(name[:60] for name in unknown[:8])
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        warnings.warn(f"{file}: ignoring unknown tensors {few}{more}", stacklevel=4)


def load_checked(file: Path, data: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        # overlapping offsets are the library's to see; torch refuses shapes that no memory can hold
        raise ArtifactError(f"{file} is damaged or truncated ({str(error)[:200]!r}); {AGAIN} or download it again") from error


def _check_numbers(file: Path, name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ArtifactError(f"{file}: tensor {name} holds NaN or infinity; {AGAIN}")
    if name.endswith(("_spectrum", ".knockout")) and bool((tensor < 0).any()):
        raise ArtifactError(f"{file}: tensor {name} has a negative entry ({float(tensor.min()):.3g}); {AGAIN}")
    if name.endswith("_ratio") and bool(((tensor < 1) | (tensor > LARGEST_RATIO)).any()):
        worst = float(tensor.min()) if bool((tensor < 1).any()) else float(tensor.max())
        raise ArtifactError(f"{file}: tensor {name} holds {worst:.3g}, allowed are 1 to {LARGEST_RATIO:g}; {AGAIN}")
    if name.endswith("_angle"):
        mean, spread = tensor.double().unbind(-1)
        if bool(((mean < 0) | (mean > 90)).any()) or bool(((spread <= 0) | (spread > 90)).any()):
            seen = " and ".join(f"{float(x.min()):.3g} to {float(x.max()):.3g}" for x in (mean, spread))
            raise ArtifactError(f"{file}: tensor {name} holds {seen}, expected degrees up to 90 and their deviations, above 0; {AGAIN}")
    if name.endswith("_encode"):
        singular = torch.linalg.svdvals(tensor.double())
        largest, smallest = singular[..., 0], singular[..., -1]
        condition = float((largest / smallest).nan_to_num(torch.inf, torch.inf).max())  # 0 / 0 for all zeros
        # one part in a thousand for the rounding to float32
        if not condition <= MAX_CONDITION * 1.001:
            raise ArtifactError(f"{file}: tensor {name} is not safely invertible (condition {condition:.3g} > 1e4); {AGAIN}")
        if float(largest.max()) > SAFE_SCALE or float(smallest.min()) < 1 / SAFE_SCALE:
            worst = max(float(largest.max()), 1 / float(smallest.min()))
            raise ArtifactError(f"{file}: tensor {name} is not safely invertible (singular values up to {worst:.3g}); {AGAIN}")


def _check_rank(file: Path, layer: int, rank: Tensor, dim: int) -> None:
    """The plan of the first format."""
    if bool(((rank < 0) | (rank > dim) | (rank % UNIT != 0)).any()):
        seen = shown(rank.tolist())
        raise ArtifactError(f"{file}: plan layers.{layer}.key_rank is {seen}, allowed are multiples of 8 from 0 to {dim}; {AGAIN}")


def _check_plan(file: Path, name: str, plan: Tensor, dim: int) -> None:
    for slabs in plan.tolist():
        try:
            check_slabs(Slabs(*slabs), dim)
        except ValueError as error:
            raise ArtifactError(f"{file}: tensor {name}: {error}; {AGAIN}") from error
