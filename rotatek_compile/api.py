"""The public functions behind `import rotatek_compile`."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .artifact import Artifact
from .carried_files import check_carried_files
from .errors import RotateKError, UsageError
from .hub import fetch_weights, open_artifact
from .models import BUNDLED, Source, choose_device, choose_dtype, identity, load_config, load_model, load_processor, resolve
from .placement import AUTO
from .weights import checkpoint_files, has_weights

CACHE_OPTIONS = ("kv_budget", "token_method", "token_keep_ratio", "backend")  # a keep ratio would be one of weights, too


def base_source(artifact: Artifact, model: str | None = None) -> Source:
    """Where the base weights of an artifact are: `model` if given, else those beside the artifact, else the recorded id and commit.

    Raises:
        RotateKError: the recorded local checkpoint is gone, or weights on the Hub cannot be fetched.
    """
    if model is not None:
        return resolve(model)
    name = str(artifact.base_model.get("id"))
    if artifact.remote is not None and artifact.remote.weights and artifact.rap is None:
        return own_weights(name, fetch_weights(artifact.remote))
    if artifact.path is not None and has_weights(artifact.path) and artifact.rap is None:  # those of RAP are other weights
        return own_weights(name, artifact.path)
    # a pushed artifact names a local base by the last part of its path alone, which must not be looked for in the working directory
    if artifact.base_model.get("fingerprint") and name not in BUNDLED and not (name.startswith("/") and Path(name).is_dir()):
        raise RotateKError(f"the artifact's base model was at {name}, which is gone; pass its new place with --model")
    return resolve(name, artifact.base_model.get("revision"))


def own_weights(name: str, directory: Path) -> Source:
    """The weights that an artifact carries itself, called by the name of the base model.

    Raises:
        RotateKError: they are not whole.
    """
    checkpoint_files(directory)
    check_carried_files(directory)
    return Source(name=name, location=str(directory), revision=None, is_local=True)


def load_base(
    artifact: Artifact,
    *,
    model: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    strict: bool = False,
    tensor_parallel: bool = False,
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
    carried = artifact.path is not None and Path(source.location) == artifact.path
    for field in ("fingerprint",) if carried else ("fingerprint", "revision"):  # weights beside the artifact have its revision
        recorded = artifact.base_model.get(field)
        if recorded and seen[field] != recorded:
            words = f"{source.name} has {field} {str(seen[field])[:12]}, the artifact was compiled for {str(recorded)[:12]}"
            if strict:
                raise RotateKError(f"{words}; compile again, or leave strict off to use it all the same")
            warnings.warn(f"{words}: same geometry, other weights; accuracy may differ", stacklevel=2)
    loaded = load_model(source, choose_dtype(dtype, config, place), place, device == AUTO, tensor_parallel)
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
    revision: str | None = None,
    keep_ratio: float | None = None,
    kv_budget: float | None = None,
    attn_implementation: str | None = None,
    adapter: str | Path | None = None,
    tensor_parallel: bool = False,
    graphs: bool = True,
    token_method: str | None = None,
    token_keep_ratio: float | None = None,
) -> tuple[Any, Any]:
    """Load an artifact with its base weights: `(model, processor)`, on which `model.generate(**inputs)` uses the compressed cache.

    An artifact of `--method rap` has weights of its own: they are loaded, with the stock cache, and options that speak of another cache
    are refused. One of `--method rap+rotatek` has both: its weights are loaded, with the compressed cache.

    Args:
        artifact: directory made by rotatek-compile, `org/name` (or `org/name@revision`) of the Hub, or an `Artifact`.
        model: base weights other than the recorded ones (a fine-tune, a moved checkpoint).
        dtype, device: as the commands' options; the checkpoint's dtype on a GPU, float32 on a CPU.
        backend: `auto`, `triton`, `torch` or `reconstruct`.
        fallback: let heads keep more than planned where an image is unlike the calibration data.
        strict: refuse other weights of the same geometry instead of warning.
        revision: branch, tag or commit of an artifact on the Hub.
        keep_ratio, kv_budget: another budget than the artifact's plan, as for `enable`.
        attn_implementation: what attends tokens that arrive together: `sdpa`, `flash_attention_2`, `eager`, ...; by default the model's.
        adapter: a peft adapter (directory or Hub id) to put on the base weights.
        tensor_parallel: share the model's heads between the processes of a torchrun; all of them call this, and `generate`.
        graphs: capture decoding steps in CUDA graphs where the model allows it, as for `enable`.
        token_method, token_keep_ratio: keep a share of each image's tokens, as for `enable`.

    Raises:
        RotateKError: see `hub.open_artifact`, `read_artifact`, `load_base` and `runtime.enable.enable`.
    """
    from .runtime.enable import enable

    read = artifact if isinstance(artifact, Artifact) else open_artifact(artifact, revision)
    if read.rap is not None:
        asked = {"model": model, "keep_ratio": keep_ratio, "kv_budget": kv_budget, "tensor_parallel": tensor_parallel or None}
        asked |= {"token_method": token_method, "token_keep_ratio": token_keep_ratio, "backend": None if backend == "auto" else backend}
        refuse_for_pruned(asked, read)
        loaded, processor = load_smaller(read, dtype=dtype, device=device)
        if not read.coded:
            return dressed(loaded, attn_implementation, adapter), processor
    else:
        loaded, processor = load_base(read, model=model, dtype=dtype, device=device, strict=strict, tensor_parallel=tensor_parallel)
    loaded = dressed(loaded, attn_implementation, adapter)
    enable(
        loaded,
        read,
        keep_ratio=keep_ratio,
        kv_budget=kv_budget,
        backend=backend,
        fallback=fallback,
        graphs=graphs,
        token_method=token_method,
        token_keep_ratio=token_keep_ratio,
    )
    return loaded, processor


def load_smaller(artifact: Artifact, *, dtype: str | None = None, device: str | None = None) -> tuple[Any, Any]:
    """The pruned model of an artifact of `--method rap` or `rap+rotatek`, nothing enabled, and its processor.

    Raises:
        RotateKError: see `runtime.rap_load.load_pruned`; or its weights cannot be fetched.
    """
    from .rap_checkpoint import read_config
    from .runtime.rap_load import load_pruned

    directory = fetch_weights(artifact.remote) if artifact.remote is not None else artifact.path
    assert directory is not None
    checkpoint_files(directory)
    config, place = read_config(directory), choose_device(device)
    model = load_pruned(artifact, directory, choose_dtype(dtype, config, place), place, device == AUTO)
    source = Source(name=str(directory), location=str(directory), revision=None, is_local=True)
    return model, load_processor(source, directory, config)


def refuse_for_pruned(options: Mapping[str, Any], artifact: Artifact) -> None:
    """Refuse options that speak of other weights, or of another cache than a smaller checkpoint has; those not given are None.

    Raises:
        UsageError: naming the first.
    """
    for name, value in options.items():
        if artifact.coded and name.lstrip("-").replace("-", "_") in CACHE_OPTIONS:
            continue
        if value is not None:
            where = f"{artifact.path} is a smaller checkpoint (RAP){'' if artifact.coded else ' with the stock cache'}"
            raise UsageError(f"{name} {value} cannot be chosen: {where}; leave it out")


def enabled(model: Any) -> Any:
    """The `enable` in force on a model (what `load` left on it, say), or None: its `new_cache()` makes a cache for several turns."""
    from .runtime.enable import active, unwrapped

    return active(unwrapped(model))


def disable(model: Any) -> None:
    """Undo `enable`, or what `load` enabled; the model is then as transformers loaded it. Harmless where nothing is enabled."""
    if (found := enabled(model)) is not None:
        found.disable()


def dressed(model: Any, attn_implementation: str | None = None, adapter: str | Path | None = None) -> Any:
    """The model with another attention implementation for its text, and with an adapter on it.

    Raises:
        RotateKError: the implementation cannot run here, peft is not installed, or the adapter does not fit.
    """
    if attn_implementation is not None:
        from .text_attention import set_text_attention

        try:
            set_text_attention(model, attn_implementation)
        except (ImportError, ValueError) as error:
            words = str(error).strip().splitlines()[0]
            raise RotateKError(f"attention implementation {attn_implementation!r} cannot be used: {words}") from error
    if adapter is not None:
        if importlib.util.find_spec("peft") is None:
            raise RotateKError(f"adapter {adapter} needs the package peft: pip install peft")
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, str(adapter)).eval()
        except Exception as error:  # peft raises whatever the first thing is that does not fit
            raise RotateKError(f"adapter {adapter} could not be loaded: {str(error).strip().splitlines()[0]}") from error
    return model
