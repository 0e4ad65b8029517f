"""enable(): make an already loaded model decode from the compressed cache, and undo everything after."""

from __future__ import annotations

import functools
import inspect
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from ..artifact import Artifact, read_artifact
from ..errors import RotateKError
from ..geometry import geometry_of
from ..text_attention import set_text_attention
from .attention import NAME, register
from .backends import Backend, choose_backend
from .cache import RotateKCache
from .coder import Coder
from .prepared import PreparedArtifact
from .segments import read_step

_ACTIVE = "_rotatek_enabled"
MEDIA = ("pixel_values", "image_embeds", "video_embeds")  # how arguments of `forward` that carry images begin


class enable:  # noqa: N801 - used like a function: `with enable(model, artifact): ...`
    """Let `model.generate` (and plain forward calls with a cache of `new_cache()`) use the compressed cache.

    Works as a context manager, or for good until `disable()`. Three things change, all undone: the attention implementation of
    the text sub-config, the instance's `forward` (to see token kinds) and the instance's `_prepare_cache_for_generation` (to put
    in a fresh compressed cache when the caller gives none).

    Args:
        model: a transformers model whose geometry the artifact was compiled for.
        artifact: an `Artifact` or the path of one.
        backend: `auto`, `triton`, `torch` or `reconstruct`.
        fallback: let heads keep more than planned where a segment is unlike the calibration data.

    Raises:
        RotateKError: wrong geometry, an architecture that cannot be plugged into, or a backend that cannot run here.
    """

    def __init__(self, model: nn.Module, artifact: Artifact | str | Path, backend: str = "auto", fallback: bool = True) -> None:
        self.model = model
        self.artifact = artifact if isinstance(artifact, Artifact) else read_artifact(artifact)
        check_model(model, self.artifact)
        self.backend: Backend = choose_backend(backend, next(model.parameters()).device)
        if not fallback:
            self.artifact = _without_fallback(self.artifact)
        self.prepared = PreparedArtifact(self.artifact)
        if active(model) is not None:
            raise RotateKError("the compressed cache is already enabled on this model; disable() it first")
        self._install()

    def new_cache(self, coder: Coder | None = None) -> RotateKCache:
        """A fresh compressed cache, to be passed as `past_key_values`; `coder` puts a rival method in place of the artifact's."""
        return RotateKCache(self.model.config, self.prepared, self.backend, coder)

    def _install(self) -> None:
        model = self.model
        register()
        self._text = model.config.get_text_config(decoder=True)
        self._saved_implementation = self._text._attn_implementation
        set_text_attention(model, NAME)
        self._saved_attributes = {k: model.__dict__.get(k) for k in ("forward", "_prepare_cache_for_generation")}
        # instance attributes shadow the class's methods, and deleting them brings those back
        model.forward = self._wrap_forward(model.forward)  # type: ignore[method-assign]
        if hasattr(model, "_prepare_cache_for_generation"):
            model._prepare_cache_for_generation = self._wrap_prepare(model._prepare_cache_for_generation)
        setattr(model, _ACTIVE, self)

    def disable(self) -> None:
        """Undo everything; harmless when done already."""
        model = self.model
        if active(model) is not self:
            return
        for name, value in self._saved_attributes.items():
            if value is None:
                model.__dict__.pop(name, None)
            else:
                setattr(model, name, value)
        set_text_attention(model, self._saved_implementation)
        delattr(model, _ACTIVE)

    def __enter__(self) -> enable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.disable()

    def _wrap_forward(self, forward: Any) -> Any:
        visual = self.artifact.geometry.visual_token_ids
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def with_token_kinds(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind_partial(*args, **kwargs).arguments
            extra = bound.get("kwargs", {})
            cache = bound.get("past_key_values")
            if not isinstance(cache, RotateKCache):
                return forward(*args, **kwargs)
            ids, embeds = bound.get("input_ids"), bound.get("inputs_embeds")
            shape = tuple(ids.shape) if ids is not None else tuple(embeds.shape[:2])
            types = bound.get("mm_token_type_ids", extra.get("mm_token_type_ids"))
            # a continuation without media embeds placeholders as text: prompt lookup proposes such tokens, and crops them again
            media = any(name.startswith(MEDIA) and value is not None for name, value in {**extra, **bound}.items())
            marked = visual if media or cache.get_seq_length() == 0 else ()
            cache.state.step = read_step(ids, bound.get("attention_mask"), types, marked, shape)
            try:
                return forward(*args, **kwargs)
            finally:
                cache.state.step = None

        return with_token_kinds

    def _wrap_prepare(self, prepare: Any) -> Any:
        @functools.wraps(prepare)
        def with_compressed_cache(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            ours = generation_config.use_cache is not False and generation_config.cache_implementation is None
            if ours and model_kwargs.get("past_key_values") is None:
                model_kwargs["past_key_values"] = self.new_cache()
            return prepare(generation_config, model_kwargs, *args, **kwargs)

        return with_compressed_cache


def active(model: nn.Module) -> enable | None:
    """The `enable` that is in force on this model, if any."""
    found = getattr(model, _ACTIVE, None)
    return found if isinstance(found, enable) else None


def check_model(model: nn.Module, artifact: Artifact) -> None:
    """Refuse a model that this artifact cannot serve.

    Raises:
        RotateKError: another geometry, or attention that is not pluggable.
    """
    geometry = geometry_of(model.config)
    if reason := artifact.geometry.difference(geometry):
        where = f"artifact {artifact.path}" if artifact.path else "the artifact"
        raise RotateKError(f"{where} does not fit this model: {reason}; compile an artifact for this model")
    if not getattr(model, "_supports_attention_backend", False):
        raise RotateKError(f"{type(model).__name__} does not use transformers' attention interface and cannot be compressed")
    seen, expected = geometry.model_type, artifact.geometry.model_type
    if seen != expected:
        warnings.warn(f"the artifact was compiled for model type {expected}, this is {seen} of the same geometry", stacklevel=3)


def _without_fallback(artifact: Artifact) -> Artifact:
    from dataclasses import replace

    return replace(artifact, method=replace(artifact.method, fallback_factor=0.0))
