"""The artifact: a directory of JSON and safetensors, read strictly (DESIGN.md §5).

Tensors of `rotatek.safetensors`, for each compressed layer i and token kind `visual` (and `text` with span `all`), D channels:

    layers.{i}.{kind}.key_mean      float32 [Hkv, D]        layers.{i}.{kind}.value_mean      likewise for Values
    layers.{i}.{kind}.key_encode    float32 [Hkv, D, D]     layers.{i}.{kind}.value_encode
    layers.{i}.{kind}.key_spectrum  float32 [Hkv, D]        layers.{i}.{kind}.value_spectrum
    layers.{i}.key_rank             int32   [Hkv]           the plan: directions kept, a multiple of 8, zero allowed
    layers.{i}.sensitivity          float32 [Hkv, levels]   measured KL (nats) when this head alone is cut to a level
    layers.{i}.knockout             float32 [Hkv]           the same when its image Keys and Values become their means (knockout.py);
                                                            artifacts of the first versions have none

An artifact compiled for a rival method (`Method.rival`) holds `knockout` alone.

`encode` is stored in float32, not bf16: its condition reaches hundreds, and rounding it to 8 bits of mantissa moves its smallest
singular values by their own size.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._version import __version__
from .bases import BASES, MAX_CONDITION
from .errors import ArtifactError
from .geometry import Geometry
from .output import CONFIG_FILE

FORMAT_VERSION = 1
TENSOR_FILE, REPORT_FILE, CARD_FILE = "rotatek.safetensors", "report.json", "README.md"
SPANS = ("visual", "all")
ALLOCATIONS = ("allocated", "uniform")
OURS = "rotatek"  # the method that is no rival
RANK_STEP = 8
IMAGE_TOKENS = 512  # the image over which a rival's bytes per token are reckoned


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What the runtime must know beyond tensors; the section `rotatek` of the config."""

    basis: str = "two-sided"
    span: str = "visual"
    window: int = 128  # newest text tokens kept raw
    keep_ratio: float = 0.25  # fraction of Key directions kept, mean over heads
    allocation: str = "allocated"
    key_bits: str = "native"
    value_bits: str = "native"
    prior_tokens: int = 256  # n0 of DESIGN.md §4.6: how many tokens the calibrated covariance is worth
    fallback_factor: float = 8.0  # a head whose discarded energy exceeds this many times the expected one keeps more; 0 turns it off
    levels: tuple[int, ...] = ()  # ranks at which sensitivities were measured
    rival: str | None = None  # another method than ours, by its name in runtime/rivals/registry.py
    kv_budget: float | None = None  # a rival's share of the dense bytes, where it was set by bytes and not by keep_ratio

    @property
    def kinds(self) -> tuple[str, ...]:
        """Token kinds that are coded."""
        return ("visual",) if self.span == "visual" else ("visual", "text")

    @property
    def words(self) -> str:
        """Method and setting for people."""
        if self.rival is None:
            return f"basis {self.basis}, {self.allocation} ranks, keep ratio {self.keep_ratio}"
        if self.kv_budget is not None:
            return f"rival method {self.rival}, KV budget {self.kv_budget}"
        return f"rival method {self.rival}" + (f", keep ratio {self.keep_ratio}" if self.keep_ratio < 1 else "")


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

    def ranks(self) -> dict[int, list[int]]:
        """Directions kept per KV head, by layer; empty for a rival, which keeps none of ours."""
        if self.method.rival is not None:
            return {}
        return {i: self.tensors[f"layers.{i}.key_rank"].tolist() for i in self.geometry.compressible}

    def knockout(self) -> dict[int, Tensor]:
        """Measured knock-outs, fp32 [Hkv] by layer; empty for artifacts that have none."""
        return {i: t for i in self.geometry.compressible if (t := self.tensors.get(f"layers.{i}.knockout")) is not None}

    def bytes_per_token(self) -> float:
        """Bytes of one coded token over all compressed layers: codes and raw Values at 2 bytes a number, no per-image parts.

        For a rival a share of an image of `IMAGE_TOKENS` tokens, with everything that must be kept of it.
        """
        if self.method.rival is not None:
            from .runtime.prepared import PreparedArtifact  # the runtime imports this module

            coder = PreparedArtifact(self).coder
            assert coder is not None
            return sum(coder.bytes_of(IMAGE_TOKENS, i) for i in self.geometry.compressible) / IMAGE_TOKENS
        layers = self.geometry.layers
        return float(sum(2 * sum(ranks) + 2 * layers[i].kv_heads * layers[i].head_dim for i, ranks in self.ranks().items()))


def library_versions() -> dict[str, str]:
    """Versions of the libraries that can change an artifact's numbers."""
    import safetensors
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "safetensors": safetensors.__version__}


def write_artifact(artifact: Artifact, directory: Path, card: str) -> None:
    """Write the artifact's own four files into an existing (staging) directory.

    Raises:
        OSError: the file system refused (also safetensors' own error, turned into OSError).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({k: v.contiguous().cpu() for k, v in artifact.tensors.items()}, directory / TENSOR_FILE, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    (directory / TENSOR_FILE).chmod(0o644)
    config = {
        "format_version": FORMAT_VERSION,
        "tool": f"rotatek-compile {__version__}",
        "base_model": artifact.base_model,
        "geometry": artifact.geometry.to_json(),
        "rotatek": asdict(artifact.method),
        "calibration": artifact.calibration,
        "libraries": artifact.libraries or library_versions(),
        "files": {TENSOR_FILE: {"sha256": _sha256(directory / TENSOR_FILE)}},
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / REPORT_FILE).write_text(json.dumps(artifact.report, indent=2) + "\n", encoding="utf-8")
    (directory / CARD_FILE).write_text(card, encoding="utf-8")


def read_artifact(path: str | Path) -> Artifact:
    """Read and check an artifact directory; nothing is used before it is checked.

    Raises:
        ArtifactError: one sentence naming the file, the key or tensor, the value seen and what to do.
    """
    path = Path(path)
    config = _read_json(path, CONFIG_FILE)
    version = config.get("format_version")
    if not isinstance(version, int):
        raise ArtifactError(f"{path / CONFIG_FILE}: format_version is {version!r}, not a whole number; compile the artifact again")
    if version < 1:
        raise ArtifactError(f"{path / CONFIG_FILE}: format_version is {version}, the first one is 1; compile the artifact again")
    if version > FORMAT_VERSION:
        raise ArtifactError(f"{path / CONFIG_FILE}: format_version {version} is newer than {FORMAT_VERSION}; upgrade rotatek-compile")
    known = {"format_version", "tool", "base_model", "geometry", "rotatek", "calibration", "libraries", "files"}
    if unknown := sorted(set(config) - known):
        warnings.warn(f"{path / CONFIG_FILE}: ignoring unknown keys {', '.join(unknown)}", stacklevel=2)
    geometry = _read_geometry(path, config.get("geometry"))
    method = _read_method(path, config.get("rotatek"))
    for section in ("base_model", "calibration", "files"):
        if not isinstance(config.get(section), dict):
            raise ArtifactError(f"{path / CONFIG_FILE}: section {section} is missing; compile the artifact again")
    for key, kinds in (("id", str), ("revision", (str, type(None))), ("fingerprint", (str, type(None)))):
        if not isinstance(seen := config["base_model"].get(key), kinds):
            raise ArtifactError(f"{path / CONFIG_FILE}: base_model.{key} is {seen!r}, expected text; compile the artifact again")
    tensors = _read_tensors(path, config["files"])
    _check_tensors(path / TENSOR_FILE, tensors, geometry, method)
    report = _read_json(path, REPORT_FILE) if (path / REPORT_FILE).is_file() else {}
    libraries: Any = config.get("libraries")
    libraries = libraries if isinstance(libraries, dict) else {}
    return Artifact(geometry, method, tensors, config["base_model"], config["calibration"], report, libraries, path)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_old(stream)


def _sha256_old(stream: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _read_json(path: Path, name: str) -> dict[str, Any]:
    if not path.exists():
        raise ArtifactError(f"artifact {path} does not exist; make one with rotatek-compile")
    if not (path / name).is_file():
        raise ArtifactError(f"{path} is no artifact: it has no {name}; make one with rotatek-compile")
    try:
        data = json.loads((path / name).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ArtifactError(f"{path / name} is not readable JSON ({error}); compile the artifact again") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path / name} holds a {type(data).__name__}, expected an object; compile the artifact again")
    return data


def _read_geometry(path: Path, data: Any) -> Geometry:
    where, again = f"{path / CONFIG_FILE}: section geometry", "compile the artifact again"
    if not isinstance(data, dict):
        raise ArtifactError(f"{where} is missing; {again}")
    try:
        geometry = Geometry.from_json(data)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArtifactError(f"{where} is damaged ({error!r}); {again}") from error
    if geometry.position_axes < 1:
        raise ArtifactError(f"{where}: position_axes is {geometry.position_axes}, the smallest is 1; {again}")
    if not geometry.compressible:
        raise ArtifactError(f"{where} lists no full_attention layer; {again}")
    for index, layer in enumerate(geometry.layers):
        least = min(layer.query_heads, layer.kv_heads, layer.head_dim)
        if least < 1 or layer.query_heads % layer.kv_heads or (index in geometry.compressible and layer.head_dim % RANK_STEP):
            sizes = f"{layer.query_heads} query heads, {layer.kv_heads} KV heads and head_dim {layer.head_dim}"
            raise ArtifactError(f"{where}: layer {index} has {sizes}, which no model has; {again}")
    return geometry


def _read_method(path: Path, data: Any) -> Method:
    where = f"{path / CONFIG_FILE}: section rotatek"
    if not isinstance(data, dict):
        raise ArtifactError(f"{where} is missing; compile the artifact again")
    names = {f.name for f in fields(Method)}
    if unknown := sorted(set(data) - names):
        warnings.warn(f"{where}: ignoring unknown keys {', '.join(unknown)}", stacklevel=3)
    try:
        values = {k: v for k, v in data.items() if k in names}
        values["levels"] = tuple(int(i) for i in values.get("levels", ()))
        method = Method(**values)
        checks = (
            ("basis", method.basis in BASES),
            ("span", method.span in SPANS),
            ("allocation", method.allocation in ALLOCATIONS),
            ("key_bits", method.key_bits == "native"),
            ("value_bits", method.value_bits == "native"),
            ("window", isinstance(method.window, int) and method.window >= 1),
            ("keep_ratio", isinstance(method.keep_ratio, (int, float)) and 0 <= method.keep_ratio <= 1),
            ("prior_tokens", isinstance(method.prior_tokens, int) and method.prior_tokens >= 0),
            ("rival", method.rival is None or isinstance(method.rival, str)),
            ("kv_budget", method.kv_budget is None or (_is_number(method.kv_budget) and 0 < method.kv_budget <= 1)),
            ("fallback_factor", isinstance(method.fallback_factor, (int, float)) and method.fallback_factor >= 0),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise ArtifactError(f"{where} is damaged ({error}); compile the artifact again") from error
    for name, good in checks:
        if not good:
            raise ArtifactError(f"{where}: {name} is {getattr(method, name)!r}, which this version cannot run; compile the artifact again")
    return method


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_tensors(path: Path, files: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / TENSOR_FILE
    if not file.is_file():
        raise ArtifactError(f"{path} is incomplete: it has no {TENSOR_FILE}; compile the artifact again or download it again")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{file} is damaged or truncated ({error}); compile the artifact again or download it again") from error
    entry = files.get(TENSOR_FILE)
    expected = entry.get("sha256") if isinstance(entry, dict) else None
    if expected != (seen := _sha256(file)):
        raise ArtifactError(f"{file} was changed after it was written: sha256 {seen[:12]}…, recorded {str(expected)[:12]}…; get it again")
    return tensors


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tensors(file: Path, tensors: dict[str, Tensor], geometry: Geometry, method: Method) -> None:
    again = "compile the artifact again"
    has_knockouts = method.rival is not None or any(name.endswith(".knockout") for name in tensors)
    for i in geometry.compressible:
        heads, dim = geometry.layers[i].kv_heads, geometry.layers[i].head_dim
        expected: dict[str, tuple[int, ...]] = {}
        if method.rival is None:
            expected |= {f"layers.{i}.key_rank": (heads,), f"layers.{i}.sensitivity": (heads, len(method.levels))}
        if has_knockouts:
            expected[f"layers.{i}.knockout"] = (heads,)
        for kind in method.kinds if method.rival is None else ():
            for side in ("key", "value"):
                prefix = f"layers.{i}.{kind}.{side}"
                expected |= {f"{prefix}_mean": (heads, dim), f"{prefix}_encode": (heads, dim, dim), f"{prefix}_spectrum": (heads, dim)}
        for name, shape in expected.items():
            tensor = tensors.get(name)
            if tensor is None:
                raise ArtifactError(f"{file}: tensor {name} is missing; {again}")
            if tuple(tensor.shape) != shape:
                raise ArtifactError(f"{file}: tensor {name} has shape {list(tensor.shape)}, the geometry wants {list(shape)}; {again}")
            wanted = (torch.int32, torch.int64) if name.endswith("key_rank") else (torch.float32,)
            if tensor.dtype not in wanted:
                raise ArtifactError(f"{file}: tensor {name} is {_short(tensor.dtype)}, expected {_short(wanted[0])}; {again}")
            if not bool(torch.isfinite(tensor).all()):
                raise ArtifactError(f"{file}: tensor {name} holds NaN or infinity; {again}")
            if name.endswith(("_spectrum", ".knockout")) and bool((tensor < 0).any()):
                raise ArtifactError(f"{file}: tensor {name} has a negative entry ({float(tensor.min()):.3g}); {again}")
            if name.endswith("_encode"):
                singular = torch.linalg.svdvals(tensor.double())
                condition = float((singular[..., 0] / singular[..., -1]).nan_to_num(torch.inf, torch.inf).max())  # 0 / 0 for all zeros
                # one part in a thousand for the rounding to float32
                if not condition <= MAX_CONDITION * 1.001:
                    raise ArtifactError(f"{file}: tensor {name} is not safely invertible (condition {condition:.3g} > 1e4); {again}")
        if method.rival is not None:
            continue
        rank = tensors[f"layers.{i}.key_rank"]
        if bool(((rank < 0) | (rank > dim) | (rank % RANK_STEP != 0)).any()):
            raise ArtifactError(f"{file}: plan layers.{i}.key_rank is {rank.tolist()}, allowed are multiples of 8 from 0 to {dim}; {again}")
