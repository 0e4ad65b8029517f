"""The public functions behind `import rotatek_compile`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from .artifact import Artifact, read_artifact
from .errors import RotateKError
from .models import Source, choose_device, choose_dtype, identity, load_config, load_model, load_processor, resolve


def base_source(artifact: Artifact, model: str | None = None) -> Source:
    """Where the base weights of an artifact are: recorded id and commit, or `model` instead.

    Raises:
        RotateKError: the recorded local checkpoint is gone.
    """
    if model is not None:
        return resolve(model)
    name = str(artifact.base_model.get("id"))
    if artifact.base_model.get("fingerprint") and name.startswith("/") and not Path(name).is_dir():
        raise RotateKError(f"the artifact's base model was at {name}, which is gone; pass its new place with --model")
    return resolve(name, artifact.base_model.get("revision"))


def load_base(
    artifact: Artifact, *, model: str | None = None, dtype: str | None = None, device: str | None = None, strict: bool = False
) -> tuple[Any, Any]:
    """Base model and processor of an artifact, nothing enabled.

    Raises:
        RotateKError: geometry differs, or with `strict` the weights are not those the artifact was compiled for.
    """
    source = base_source(artifact, model)
    config = load_config(source)
    place = choose_device(device)
    from .geometry import geometry_of

    if reason := artifact.geometry.difference(geometry_of(config)):
        raise RotateKError(f"{source.name} does not fit artifact {artifact.path}: {reason}; compile an artifact for this model")
    seen = identity(source, config)
    for field in ("fingerprint", "revision"):
        recorded = artifact.base_model.get(field)
        if recorded and seen[field] != recorded:
            words = f"{source.name} has {field} {str(seen[field])[:12]}, the artifact was compiled for {str(recorded)[:12]}"
            if strict:
                raise RotateKError(f"{words}; compile again, or leave strict off to use it all the same")
            warnings.warn(f"{words}: same geometry, other weights; accuracy may differ", stacklevel=2)
    loaded = load_model(source, choose_dtype(dtype, config, place), place)
    return loaded, load_processor(source, artifact.path)


def load(
    artifact: str | Path | Artifact,
    *,
    model: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    backend: str = "auto",
    fallback: bool = True,
    strict: bool = False,
) -> tuple[Any, Any]:
    """Load an artifact with its base weights: `(model, processor)`, on which `model.generate(**inputs)` uses the compressed cache.

    Args:
        artifact: directory (or an `Artifact`) made by rotatek-compile.
        model: base weights other than the recorded ones (a fine-tune, a moved checkpoint).
        dtype, device: as the commands' options; the checkpoint's dtype on a GPU, float32 on a CPU.
        backend: `auto`, `triton`, `torch` or `reconstruct`.
        fallback: let heads keep more than planned where an image is unlike the calibration data.
        strict: refuse other weights of the same geometry instead of warning.

    Raises:
        RotateKError: see `read_artifact`, `load_base` and `runtime.enable.enable`.
    """
    from .runtime.enable import enable

    read = artifact if isinstance(artifact, Artifact) else read_artifact(artifact)
    loaded, processor = load_base(read, model=model, dtype=dtype, device=device, strict=strict)
    enable(loaded, read, backend=backend, fallback=fallback)
    return loaded, processor
