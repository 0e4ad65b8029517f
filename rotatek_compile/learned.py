"""What a rival learned by training, in a file of its own: `rotatek-eval --learned FILE` gives it to the rival's maker.

One safetensors file. Its metadata has one entry, `rotatek_learned`, a JSON object:

    name         the rival it is for, one of `names.LEARNED`
    base_model   id, revision and fingerprint of the weights it was trained on, as in an artifact
    geometry     of that model, as in an artifact
    calibration  at least data, num_samples and seed
    training     options and results of the training, as the rival's own reader wants them

Which tensors there are, and of which shapes, says the rival's module (`_kind`). Names, shapes, dtypes and numbers are checked before
anything is used, and no number may be NaN or infinite.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .artifact import Artifact
from .artifact_config import check_base_model, read_geometry
from .artifact_tensors import MAX_HEADER, header_of, load_checked
from .errors import ArtifactError, RotateKError, UsageError
from .geometry import Geometry
from .names import LEARNED
from .untrusted import parse_json, printable, read_file, shown

KEY = "rotatek_learned"
MAX_BYTES = 2 << 30
FLOATS = ("F32", "F16")  # dtypes that are accepted; both are float32 in memory
ANEW = "train it again, or name another file"
SECTIONS = ("base_model", "geometry", "calibration", "training")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a rival knows of its own file: `shapes` of all tensors for a geometry and the section training (UsageError for one that cannot
    be), and `state`, what its maker in the registry is given, of tensors, geometry and training."""

    shapes: Callable[[Geometry, Mapping[str, Any]], Shapes]
    state: Callable[[Mapping[str, Tensor], Geometry, Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Learned:
    """A learned file in memory: `tensors` are fp32 and checked; `file` is where it was read."""

    name: str
    tensors: dict[str, Tensor] = field(repr=False)
    geometry: Geometry
    base_model: dict[str, Any]
    calibration: dict[str, Any]
    training: dict[str, Any]
    file: Path

    def state(self) -> Any:
        """What makers of the registry are given as `state[name]`."""
        return _kind(self.name).state(self.tensors, self.geometry, self.training)

    def check_fits(self, artifact: Artifact) -> None:
        """Refuse an artifact of another model.

        Raises:
            UsageError: the geometry differs, or the weights do.
        """
        if reason := artifact.geometry.difference(self.geometry):
            raise UsageError(f"--learned {self.file} does not belong to the artifact's model: {reason}; train it on that model")
        for part in ("fingerprint", "revision"):
            seen, wanted = self.base_model.get(part), artifact.base_model.get(part)
            if seen and wanted and seen != wanted:
                raise UsageError(
                    f"--learned {self.file} was trained on weights of {part} {shown(seen)}, the artifact's have {shown(wanted)}; "
                    "train it on the artifact's base model"
                )


def save_learned(file: Path, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a learned file whole or not at all; an existing one is replaced.

    Args:
        name: of the rival, one of `LEARNED`.
        tensors: float32, as the rival's `shapes` names them.
        facts: the sections `SECTIONS`; JSON values only.

    Raises:
        UsageError: what would be written does not pass the reader's checks.
        RotateKError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save

    calibration = {k: printable(v) if isinstance(v, str) else v for k, v in facts.get("calibration", {}).items()}
    about = {"name": name} | {section: facts.get(section) for section in SECTIONS} | {"calibration": calibration}
    stored = {key: tensor.detach().float().contiguous().cpu() for key, tensor in tensors.items()}
    staged: str | None = None
    try:
        data = save(stored, {KEY: json.dumps(about, sort_keys=True)})
        _parsed(data, file)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, staged = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(staged).chmod(0o644)
        Path(staged).replace(file)
    except (OSError, SafetensorError) as error:
        if staged is not None:
            Path(staged).unlink(missing_ok=True)
        raise RotateKError(
            f"could not write {file}: {getattr(error, 'strerror', None) or error}; free space or choose another file"
        ) from error


def load_learned(file: Path) -> Learned:
    """Read and check a learned file.

    Raises:
        UsageError: one sentence naming the file, the key or tensor, the value seen and what to do.
    """
    if not file.is_file():
        raise UsageError(f"--learned {file} is no file; name one that a training script wrote")
    try:
        return _parsed(read_file(file.parent, file.name, MAX_BYTES), file)
    except ArtifactError as error:
        raise UsageError(f"--learned: {error}") from error


def load_all(files: tuple[Path, ...], artifact: Artifact) -> dict[str, Learned]:
    """Learned files by the rival they are for, all of the artifact's model.

    Raises:
        UsageError: as `load_learned` and `check_fits`; or two are for one rival.
    """
    found: dict[str, Learned] = {}
    for file in files:
        read = load_learned(file)
        if read.name in found:
            raise UsageError(f"--learned {file} and {found[read.name].file} are both for {read.name}; name one of them")
        read.check_fits(artifact)
        found[read.name] = read
    return found


def _parsed(data: bytes, file: Path) -> Learned:
    where = str(file)
    try:
        header = header_of(file, data)
        text = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], f"header of {file}").get("__metadata__")
        if not isinstance(text, dict) or not isinstance(text.get(KEY), str) or len(text[KEY]) > MAX_HEADER:
            raise UsageError(f"{where} is no learned file: its metadata has no {KEY}; {ANEW}")
        about = parse_json(text[KEY].encode(), f"{KEY} of {file}")
        name = about.get("name")
        if name not in LEARNED:
            raise UsageError(f"{where} is for {shown(name)}, which learns nothing; it must be one of {', '.join(LEARNED)}")
        for section in SECTIONS:
            if not isinstance(about.get(section), dict):
                raise UsageError(f"{where}: section {section} is {shown(about.get(section))}, expected an object; {ANEW}")
        check_base_model(about["base_model"], where)
        geometry, kind, training = read_geometry(about["geometry"], where), _kind(name), about["training"]
        _check_calibration(about["calibration"], where)
        try:
            shapes = kind.shapes(geometry, training)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
        _check_header(header, shapes, where)
        tensors = {key: tensor.float() for key, tensor in load_checked(file, data).items()}
    except ArtifactError as error:
        raise UsageError(str(error).replace("compile the artifact again", ANEW)) from error
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UsageError(f"{where}: tensor {key} holds NaN or infinity; {ANEW}")
    return Learned(name, tensors, geometry, about["base_model"], about["calibration"], training, file)


def _check_calibration(found: Mapping[str, Any], where: str) -> None:
    if not isinstance(found.get("data"), str):
        raise UsageError(f"{where}: calibration.data is {shown(found.get('data'))}, expected a name; {ANEW}")
    for key, least in (("num_samples", 1), ("seed", 0)):
        if type(seen := found.get(key)) is not int or seen < least:
            raise UsageError(f"{where}: calibration.{key} is {shown(seen)}, expected a whole number from {least} on; {ANEW}")


def _check_header(header: Mapping[str, Any], shapes: Shapes, where: str) -> None:
    for key, shape in shapes.items():
        if (entry := header.get(key)) is None:
            raise UsageError(f"{where}: tensor {key} is missing; {ANEW}")
        if entry.get("shape") != list(shape):
            raise UsageError(f"{where}: tensor {key} has shape {shown(entry.get('shape'))}, the model wants {list(shape)}; {ANEW}")
        if entry.get("dtype") not in FLOATS:
            raise UsageError(f"{where}: tensor {key} is {shown(entry.get('dtype'))}, expected float32; {ANEW}")
    if unknown := [key for key in header if key not in shapes]:
        raise UsageError(f"{where} holds tensor {shown(unknown[0])}, which the rival does not know; {ANEW}")


def _kind(name: str) -> Kind:
    """Of a name of `LEARNED`."""
    from .runtime.rivals import leank_learned, palu

    known = {"leank-learned": leank_learned, "palu": palu}
    return Kind(known[name].shapes_of, known[name].state_of)
