"""The attention weights of a checkpoint, found by name and shape in the headers of its safetensors files; no weight is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import ArtifactError, RotateKError
from .geometry import Geometry, LayerGeometry
from .rap_plan import Widths
from .weights import INDEX, WEIGHTS, checkpoint_files

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NAME = re.compile(r"(?P<prefix>.*?)layers\.(?P<layer>\d+)\.self_attn\.(?P<projection>[qkvo]_proj)\.(?P<part>weight|bias)")
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}  # bytes by safetensors dtype


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint by its header: dtype as safetensors names it, shape, and the file that holds it."""

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def bytes(self) -> int:
        return SIZES[self.dtype] * math.prod(self.shape)


def stored_tensors(directory: Path, name: str) -> dict[str, Stored]:
    """Every tensor of a checkpoint, from the headers of its files.

    Args:
        name: what to call the checkpoint in an error.

    Raises:
        RotateKError: no safetensors weights, a damaged file, a dtype that is no plain number (quantised weights).
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Stored] = {}
    for file in checkpoint_files(directory, name):
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - a safe_open is no mapping
                    part = opened.get_slice(key)
                    found[key] = Stored(str(part.get_dtype()), tuple(part.get_shape()), file)
        except (SafetensorError, OSError) as error:
            raise RotateKError(f"{file} is damaged or truncated ({str(error)[:200]}); get the checkpoint again") from error
    for key, tensor in found.items():
        if tensor.dtype not in SIZES:
            raise RotateKError(
                f"{name}: tensor {key} is {tensor.dtype}, a quantised checkpoint cannot be pruned; pass the one it was made from"
            )
    return found


def attention_tensors(
    names: Mapping[str, Stored], geometry: Geometry, widths: Sequence[Widths] | None = None
) -> dict[str, tuple[int, str]]:
    """Which tensors are the text layers' attention projections: name to (layer, "q_proj.weight" and the like).

    Checkpoints name them `...layers.N.self_attn.q_proj.weight`, whatever stands before; parts for pictures may too, but have no `o_proj`
    of every text layer's shape.

    Args:
        widths: of a pruned checkpoint; None for a dense one.

    Raises:
        ArtifactError: there is none, or more than one set of the right shapes.
    """
    sets: dict[str, dict[str, tuple[int, str]]] = {}
    for name in names:
        if match := _NAME.fullmatch(name):
            sets.setdefault(match["prefix"], {})[name] = (int(match["layer"]), f"{match['projection']}.{match['part']}")
    reasons = [_misfit(found, names, geometry, widths) for found in sets.values()]
    fitting = [found for found, reason in zip(sets.values(), reasons, strict=True) if reason is None]
    if len(fitting) != 1:
        seen = f"{len(fitting)} sets of attention weights fit" if fitting else (reasons or ["no tensor is named like self_attn.q_proj"])[-1]
        raise ArtifactError(f"the checkpoint's attention weights were not found: {seen}; a RAP checkpoint cannot be made or read of it")
    return fitting[0]


def _misfit(
    found: Mapping[str, tuple[int, str]], names: Mapping[str, Stored], geometry: Geometry, widths: Sequence[Widths] | None
) -> str | None:
    """Why a set of tensors is not that of the text layers, in words; None if it is."""
    shapes = {own: names[name].shape for name, own in found.items()}
    for i, layer in enumerate(geometry.layers):
        wide = widths[i] if widths is not None else Widths(layer.head_dim // 2, layer.head_dim)
        for projection in PROJECTIONS:
            shape = shapes.get((i, f"{projection}.weight"))
            if shape is None:
                return f"layer {i} has no {projection}.weight"
            heads, channels = _heads_of(projection, layer), wide.value if projection in ("v_proj", "o_proj") else 2 * wide.pairs
            side = shape[-1] if projection == "o_proj" else shape[0]
            if len(shape) != 2 or side != heads * channels:
                return f"{projection}.weight of layer {i} has shape {list(shape)}, expected {heads} heads of {channels} channels"
    if widths is not None:
        for i, wide in enumerate(widths):
            if wide.output_bias and (i, "o_proj.bias") not in shapes:
                return f"layer {i} has no o_proj.bias"
    return None if all(i < len(geometry.layers) for i, _ in found.values()) else "it has more layers than the model"


def _heads_of(projection: str, layer: LayerGeometry) -> int:
    return layer.query_heads if projection in ("q_proj", "o_proj") else layer.kv_heads


def check_checkpoint(directory: Path, geometry: Geometry, widths: Sequence[Widths]) -> None:
    """That the weights beside an artifact are those of its widths, from their headers.

    Raises:
        ArtifactError: another shape, a missing tensor or shard, a damaged or truncated file.
    """
    try:
        stored = stored_tensors(directory, str(directory))
    except ArtifactError:
        raise
    except RotateKError as error:
        raise ArtifactError(str(error)) from error
    try:
        attention_tensors(stored, geometry, widths)
    except ArtifactError as error:
        place = directory / (INDEX if (directory / INDEX).is_file() else WEIGHTS)
        raise ArtifactError(f"{place} does not fit section rap of the artifact: {error}") from error
