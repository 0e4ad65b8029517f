"""The artifact: a directory of JSON and safetensors, read strictly (DESIGN.md §5).

Tensors of `rotatek.safetensors`, for each compressed layer i and token kind `visual` (and `text` with span `all`), D channels:

    layers.{i}.{kind}.key_mean      float32 [Hkv, D]        layers.{i}.{kind}.value_mean      likewise for Values
    layers.{i}.{kind}.key_encode    float16 [Hkv, D, D]     layers.{i}.{kind}.value_encode; float32 where float16 is too coarse
    layers.{i}.{kind}.key_spectrum  float32 [Hkv, D]        layers.{i}.{kind}.value_spectrum
    layers.{i}.{kind}.key_tail_ratio  float32 [Hkv, D]      energy beyond the first r directions over the calibrated one, the largest of
                                                            all segments of calibration documents, at least 1; value_tail_ratio
    layers.{i}.{kind}.key_code_ratio  float32 [Hkv, D]      likewise the error of 4-bit codes of these directions; value_code_ratio
    layers.{i}.visual.value_angle   float32 [Hkv, 2]        mean and deviation over images of the angle to the leading half of the
                                                            directions, degrees. These are in artifacts of 8 documents or more (usual.py)
    layers.{i}.key_plan             int32   [Hkv, 3]        the plan: native, 8-bit and 4-bit directions (kernels/slabs.py); value_plan
    layers.{i}.key_sensitivity      float32 [Hkv, levels]   measured KL (nats) when this head's Keys alone are cut to a level;
                                                            value_sensitivity, which plans by keep ratio can do without
    layers.{i}.knockout             float32 [Hkv]           the same when its image Keys and Values become their means (knockout.py);
                                                            artifacts of the first versions have none

An artifact compiled for a rival method (`Method.rival`) holds `knockout` alone. Format 1 had `key_rank` int32 [Hkv] (native Keys, raw
Values) and `sensitivity` of ranks; it is read as what it says in the present format.

An artifact of `--method rap` has a section `rap` in place of `rotatek`, and other tensors (rap_artifact.py); one of `rap+rotatek` has both
sections and both files of tensors, the second for the model that the first made: D channels, zeros behind the kept ones.

`encode` is stored in float16, not bf16: its condition reaches hundreds, and rounding it to 8 bits of mantissa moves its smallest
singular values by their own size. `packing.py` checks what rounding does and says when float32 stays. In memory it is float32.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._version import __version__
from .artifact_config import (
    AGAIN,
    FORMAT_VERSION,
    RANK_STEP,
    Method,
    check_base_model,
    check_sections,
    read_geometry,
    read_method,
)
from .artifact_tensors import TENSOR_FILE, read_tensors
from .bases import Basis
from .errors import ArtifactError, RotateKError
from .geometry import Geometry
from .hub import HubArtifact
from .names import ALLOCATIONS, RAP, SPANS
from .output import CONFIG_FILE
from .packing import compact
from .plan import Plan, plan_of
from .rap_artifact import PAIRS, RAP_FILE, RapSection, check_narrow, kept_channels, read_pairs, read_section
from .untrusted import printable, read_json, shown

__all__ = [
    "ALLOCATIONS",
    "CONFIG_FILE",
    "FORMAT_VERSION",
    "RANK_STEP",
    "SPANS",
    "TENSOR_FILE",
    "Artifact",
    "Method",
    "read_artifact",
    "write_artifact",
]

REPORT_FILE, CARD_FILE = "report.json", "README.md"
MAX_CONFIG, MAX_REPORT = 1 << 20, 8 << 20  # bytes; parsed JSON takes up to thirty times its text
IMAGE_TOKENS = 512  # the image over which a rival's bytes per token are reckoned


@dataclass(slots=True)
class Artifact:
    """An artifact in memory; `config` holds everything that is written to rotatek_config.json."""

    geometry: Geometry
    method: Method
    tensors: dict[str, Tensor]
    base_model: dict[str, Any]
    calibration: dict[str, Any]
    report: dict[str, Any] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    remote: HubArtifact | None = None  # where it was fetched from, for one named by a Hub id
    rap: RapSection | None = None  # of a smaller checkpoint, whose weights lie beside the artifact; `method` is but its name unless `coded`

    @property
    def coded(self) -> bool:
        """Whether there is a coded cache: not of a smaller checkpoint alone."""
        return self.method.rival != RAP

    def plan(self) -> Plan:
        """What every KV head keeps of its Keys and Values, by layer; empty for a rival, which keeps none of ours."""
        if self.method.rival is not None:
            return {}
        return plan_of(self.tensors, self.geometry.compressible)

    def sensitivity(self, side: str) -> dict[int, Tensor]:
        """Measured KL of `key` or `value` cut to `method.levels`, fp32 [Hkv, levels] by layer; empty where it was not measured."""
        found = {i: self.tensors.get(f"layers.{i}.{side}_sensitivity") for i in self.geometry.compressible}
        return {i: table for i, table in found.items() if table is not None}

    def basis(self, layer: int, kind: str, side: str) -> Basis:
        """Calibrated basis of `key` or `value` of a token kind, fp64; `decode` is made here, exactly the inverse of what is stored."""
        encode, spectrum = (self.tensors[f"layers.{layer}.{kind}.{side}_{name}"].double() for name in ("encode", "spectrum"))
        return Basis(encode, torch.linalg.inv(encode).mT, spectrum)

    def knockout(self) -> dict[int, Tensor]:
        """Measured knock-outs, fp32 [Hkv] by layer; empty for artifacts that have none."""
        return {i: t for i in self.geometry.compressible if (t := self.tensors.get(f"layers.{i}.knockout")) is not None}

    def bytes_per_token(self) -> float:
        """Bytes of one coded token over all compressed layers, native numbers at 2 bytes: codes and escape tokens, no per-image parts.

        For a rival a share of an image of `IMAGE_TOKENS` tokens, with everything that must be kept of it; for a pruned checkpoint Keys and
        Values of any token, in all layers. Where image tokens are dropped, of one that was read: a share of a kept one, and of its index.
        """
        method = self.method
        if method.token_method is None:
            return self._bytes_per_kept_token()
        from .token_budget import index_share

        index = index_share(self.geometry, method.token_method) * self.geometry.dense_bytes_per_token()
        return method.token_keep_ratio * (self._bytes_per_kept_token() + index)

    def _bytes_per_kept_token(self) -> float:
        if self.rap is not None and not self.coded:
            return 2.0 * sum(kept_channels(self.geometry, self.rap))
        if self.method.rival is not None:
            from .runtime.prepared import PreparedArtifact  # the runtime imports this module

            coder = PreparedArtifact(self).coder
            assert coder is not None
            return sum(coder.bytes_of(IMAGE_TOKENS, i) for i in self.geometry.compressible) / IMAGE_TOKENS
        codes, raw = sum(head.bytes_per_token for heads in self.plan().values() for head in heads), self.method.escape_ratio
        return (1 - raw) * codes + raw * self.geometry.dense_bytes_per_token()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that can change an artifact's numbers."""
    import safetensors
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "safetensors": safetensors.__version__}


def write_artifact(artifact: Artifact, directory: Path, card: str) -> None:
    """Write the artifact's own four files into an existing (staging) directory, and read them back.

    Raises:
        OSError: the file system refused (also safetensors' own error, turned into OSError).
        RotateKError: what was written does not pass the reader's checks (a number that is not finite).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored = {name: compact(name, tensor).contiguous().cpu() for name, tensor in artifact.tensors.items()}
    pairs = {name: stored.pop(name) for name in list(stored) if artifact.rap is not None and name.endswith(PAIRS)}
    files = ({RAP_FILE: pairs} if artifact.rap is not None else {}) | ({TENSOR_FILE: stored} if artifact.coded else {})
    for file, tensors in files.items():
        try:
            save_file(tensors, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        (directory / file).chmod(0o644)
    config = {
        "format_version": FORMAT_VERSION,
        "tool": f"rotatek-compile {__version__}",
        "base_model": artifact.base_model,
        "geometry": artifact.geometry.to_json(),
        **({"rap": artifact.rap.to_json()} if artifact.rap is not None else {}),
        **({"rotatek": asdict(artifact.method)} if artifact.coded else {}),
        "calibration": {k: printable(v) if isinstance(v, str) else v for k, v in artifact.calibration.items()},
        "libraries": artifact.libraries or library_versions(),
        "files": {file: {"sha256": _sha256(directory / file)} for file in files},
    }
    (directory / REPORT_FILE).write_text(json.dumps(artifact.report, indent=2) + "\n", encoding="utf-8")
    (directory / CARD_FILE).write_text(card, encoding="utf-8")
    # last, because it is what makes the directory an artifact
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    try:
        read_artifact(directory)
    except ArtifactError as error:
        words = str(error).replace(f"{directory}{os.sep}", "")
        raise RotateKError(f"the artifact does not pass its own checks and was not written: {words}") from error


def read_artifact(path: str | Path) -> Artifact:
    """Read and check an artifact directory; nothing is used before it is checked, and nothing outside the directory is opened.

    Raises:
        ArtifactError: one sentence naming the file, the key or tensor, the value seen and what to do.
    """
    path = Path(path)
    config, where = read_json(path, CONFIG_FILE, MAX_CONFIG, "is no artifact"), str(path / CONFIG_FILE)
    check_sections(config, where)
    check_base_model(config["base_model"], where)
    geometry = read_geometry(config.get("geometry"), where)
    if "rap" in config and "rotatek" not in config:
        return _read_rap(path, config, geometry, where)
    method = read_method(config.get("rotatek"), where, config["format_version"])
    if method.rival == RAP:
        raise ArtifactError(f"{where}: rival is {shown(RAP)}, which has a section of its own; {AGAIN}")
    if method.text_only != geometry.text_only and method.rival is None:
        ids = list(geometry.visual_token_ids)
        raise ArtifactError(f"{where}: text_only is {method.text_only} but visual_token_ids are {ids}; compile the artifact again")
    if "rap" not in config and RAP_FILE in config["files"]:  # else codes for a pruned model would be used on the base model
        raise ArtifactError(f"{where} has no section rap, but files names {RAP_FILE}; {AGAIN}")
    tensors = read_tensors(path, config["files"], geometry, method, config["format_version"])
    section = None
    if "rap" in config:
        section = read_section(config["rap"], where, geometry)
        if method.rival is not None:
            raise ArtifactError(f"{where}: rival is {shown(method.rival)} beside section rap, and only our own goes with it; {AGAIN}")
        check_narrow(tensors, geometry, section, method.basis, str(path / TENSOR_FILE))
        tensors = tensors | read_pairs(path, config["files"], geometry, section)
    report = read_json(path, REPORT_FILE, MAX_REPORT) if os.path.lexists(path / REPORT_FILE) else {}
    about = (config["base_model"], config["calibration"], report, config.get("libraries", {}), path)
    return Artifact(geometry, method, tensors, *about, rap=section)


def _read_rap(path: Path, config: dict[str, Any], geometry: Geometry, where: str) -> Artifact:
    if TENSOR_FILE in config["files"]:
        raise ArtifactError(f"{where} has a section rap and no section rotatek, but files names {TENSOR_FILE}; {AGAIN}")
    section = read_section(config["rap"], where, geometry)
    tensors = read_pairs(path, config["files"], geometry, section)
    report = read_json(path, REPORT_FILE, MAX_REPORT) if os.path.lexists(path / REPORT_FILE) else {}
    about = (config["base_model"], config["calibration"], report, config.get("libraries", {}), path)
    return Artifact(geometry, section.method(), tensors, *about, rap=section)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
