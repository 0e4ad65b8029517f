"""enable(): make an already loaded model decode from the compressed cache, and undo everything after."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from ..artifact import Artifact
from ..errors import RotateKError
from ..geometry import geometry_of
from ..hub import open_artifact
from ..placement import input_device
from ..text_attention import set_text_attention
from .attention import register, release
from .backends import Backend, choose_backend
from .before_rope import key_projections, watching
from .cache import RotateKCache
from .coder import BeforeRopeCoder, Coder
from .graphs import DecodeGraphs
from .media import ENCODERS, CallState, at_text_positions, encoded_features, encoded_lengths, features_of, lengths_of
from .prepared import PreparedArtifact
from .rap_load import pruned_artifact, same_pruning
from .rope_deltas import after_pictures, keepers, set_deltas
from .segments import hides_past, read_kinds
from .tensor_parallel import shard_of
from .vision_attention import note, watched

_ACTIVE = "_rotatek_enabled"
MEDIA = ("pixel_values", "image_embeds", "video_embeds", "mm_encoder_outputs")  # how arguments of `forward` that carry images begin
_call: ContextVar[CallState | None] = ContextVar("rotatek_call", default=None)  # of the forward call this thread is in
_encoding: ContextVar[bool] = ContextVar("rotatek_encoding", default=False)  # whether this thread is in an encoder


class enable:  # noqa: N801 - used like a function: `with enable(model, artifact): ...`
    """Let `model.generate` (and plain forward calls with a cache of `new_cache()`) use the compressed cache.

    Works as a context manager, or for good until `disable()`. Four things change, all undone: the attention implementation of
    the text sub-config, and of the instance `forward` (to see token kinds), `get_image_features` and `get_video_features` (to see
    where one image ends) and `_prepare_cache_for_generation` (to put in a fresh compressed cache when the caller gives none).

    Tokens that arrive together are attended by the implementation that the model had (sdpa, flash_attention_2, eager, ...).

    Args:
        model: a transformers model whose geometry the artifact was compiled for, quantised or not; a peft model with its adapter too.
        artifact: an `Artifact`, the directory of one, or `org/name` (`org/name@revision`) of the Hub.
        backend: `auto`, `triton`, `torch` or `reconstruct`.
        fallback: let heads keep more than planned where a segment is unlike the calibration data.
        keep_ratio, kv_budget: another budget than the artifact's plan, at most one of them: bases nest, so any can be cut from them
            (`rotatek_compile.replan`).
        graphs: on a GPU with Triton, capture decoding steps in CUDA graphs where the model allows it (graphs.py).
        token_method, token_keep_ratio: keep this share of each image's tokens, chosen by this score (token_selection.py); a KV budget then
            holds for all tokens that were read (`rotatek_compile.token_budget`).

    Raises:
        RotateKError: wrong geometry, an architecture that cannot be plugged into, or a backend that cannot run here.
        UsageError: a budget that cannot be met.
    """

    def __init__(
        self,
        model: nn.Module,
        artifact: Artifact | str | Path,
        backend: str = "auto",
        fallback: bool = True,
        *,
        keep_ratio: float | None = None,
        kv_budget: float | None = None,
        graphs: bool = True,
        token_method: str | None = None,
        token_keep_ratio: float | None = None,
    ) -> None:
        self.model = unwrapped(model)
        self.artifact = artifact if isinstance(artifact, Artifact) else open_artifact(artifact)
        check_model(self.model, self.artifact)
        if any(given is not None for given in (keep_ratio, kv_budget, token_method, token_keep_ratio)):
            from ..token_budget import selecting

            self.artifact = selecting(self.artifact, token_method, token_keep_ratio, keep_ratio=keep_ratio, kv_budget=kv_budget)
        # selections that caches of this model make, whose scores may need more of an encoder than it returns
        self.token_methods = {self.artifact.method.token_method} - {None}
        self.position_keepers = keepers(self.model)  # parts with `rope_deltas`, which a cache that has its own sets
        self.projections: dict[int, Any] = {}  # attention modules by layer, once a coder asks for Keys before RoPE
        self.backend: Backend = choose_backend(backend, input_device(self.model))
        if not fallback:
            self.artifact = _without_fallback(self.artifact)
        self.prepared = PreparedArtifact(self.artifact, shard_of(self.model, self.artifact.geometry))
        # the heads of several processes meet in every layer
        self.graphs = DecodeGraphs() if graphs and self.backend.captures and self.prepared.shard.size == 1 else None
        if active(self.model) is not None:
            raise RotateKError("the compressed cache is already enabled on this model; rotatek_compile.disable(model) first")
        if adapter := _adapter(model, self.model):
            words = f"the model carries the adapter {adapter}, which the artifact was not compiled with"
            warnings.warn(f"{words}: same geometry, other weights; accuracy may differ", stacklevel=2)
        self._install()

    def new_cache(self, coder: Coder | None = None) -> RotateKCache:
        """A fresh compressed cache, to be passed as `past_key_values`; `coder` puts a rival method in place of the artifact's."""
        if isinstance(coder, BeforeRopeCoder):
            self.show_before_rope()
        return RotateKCache(self.model.config, self.prepared, self.backend, coder)

    def show_before_rope(self) -> None:
        """Let coders of this model's caches see Keys before RoPE, and recordings hold them.

        Raises:
            UsageError: a model whose Keys are made in a way that cannot be followed (before_rope.py).
        """
        if not self.projections:
            self.projections = key_projections(self.model, self.artifact.geometry)

    def _install(self) -> None:
        model = self.model
        implementation = model.config.get_text_config(decoder=True)._attn_implementation
        self._implementations = [(config, config._attn_implementation_internal) for config in _configs(model)]
        self._saved: list[tuple[nn.Module, str, Any]] = []
        self._name = register(implementation)
        try:
            set_text_attention(model, self._name)
        except BaseException:
            self._restore()
            raise
        text = model.config.get_text_config(decoder=True)
        for config, saved in self._implementations:
            if config is not text:  # transformers settles open choices of other parts in passing
                config._attn_implementation_internal = saved
        self._shadow(model, "forward", self._wrap_forward)
        if hasattr(model, "_prepare_cache_for_generation"):
            self._shadow(model, "_prepare_cache_for_generation", self._wrap_prepare)
        if self.position_keepers and hasattr(model, "_prepare_position_ids_for_generation"):
            self._shadow(model, "_prepare_position_ids_for_generation", self._wrap_positions)
        inner = getattr(model, "base_model", model)
        for method, kind in ENCODERS.items():
            if hasattr(inner, method):
                self._shadow(inner, method, functools.partial(self._wrap_encoder, inner=inner, kind=kind))
        setattr(model, _ACTIVE, self)

    def _shadow(self, owner: nn.Module, name: str, wrap: Any) -> None:
        """Put a wrapped method on the instance: it shadows the class's, and deleting it brings that back."""
        self._saved.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, wrap(getattr(owner, name)))

    def _restore(self) -> None:
        for owner, name, value in reversed(self._saved):
            if value is None:
                owner.__dict__.pop(name, None)
            else:
                setattr(owner, name, value)
        for config, saved in self._implementations:
            config._attn_implementation_internal = saved
        release(self._name)

    def disable(self) -> None:
        """Undo everything; harmless when done already."""
        if active(self.model) is not self:
            return
        delattr(self.model, _ACTIVE)
        self._restore()

    def __deepcopy__(self, memo: dict[int, object]) -> enable:
        # what is shadowed on the model's instance is bound to it, so a copy would compute with the weights of the original
        raise RotateKError("a model cannot be copied while the compressed cache is enabled on it; rotatek_compile.disable(model) first")

    def __enter__(self) -> enable:
        if active(self.model) is not self:
            raise RotateKError("this enable() was undone already, so nothing would be compressed; make a new one")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.disable()

    def _wrap_forward(self, forward: Any) -> Any:
        visual, video = self.artifact.geometry.visual_token_ids, getattr(self.model.config, "video_token_id", None)
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def with_token_kinds(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind_partial(*args, **kwargs).arguments
            extra = bound.get("kwargs", {})
            cache = bound.get("past_key_values")
            if not isinstance(cache, RotateKCache):
                return forward(*args, **kwargs)
            ids, embeds = bound.get("input_ids"), bound.get("inputs_embeds")
            given: Any = ids if ids is not None else embeds
            shape = (int(given.shape[0]), int(given.shape[1]))
            types = bound.get("mm_token_type_ids", extra.get("mm_token_type_ids"))
            # a continuation without media embeds placeholders as text: prompt lookup proposes such tokens, and crops them again
            media = any(name.startswith(MEDIA) and _given(value) for name, value in {**extra, **bound}.items())
            marked = visual if media or cache.get_seq_length() == 0 else ()
            state, mask = cache.state, bound.get("attention_mask")
            if hides_past(mask, shape[1], cache.tokens()):
                raise RotateKError("the attention mask hides tokens that the compressed cache holds, which it cannot leave out")
            kinds = read_kinds(ids, mask, types, marked, shape, video)
            places = bound.get("position_ids", extra.get("position_ids"))
            late = media and self.artifact.geometry.position_axes > 1 and cache.get_seq_length() > 0
            if late and kinds is not None and at_text_positions(places, kinds):
                warnings.warn(
                    "a picture that joins a conversation stands at positions of text and may be read wrong, with a stock cache too: this "
                    "model numbers pictures in its first prompt only; pass position_ids (docs/generation.md)",
                    stacklevel=2,
                )
            own = cache.rope_deltas
            if own is not None and not media and places is None:
                set_deltas(self.position_keepers, own)
            encoded = bound.get("mm_encoder_outputs", extra.get("mm_encoder_outputs"))
            state.begin(shape, kinds, lengths_of(encoded))
            state.show(features_of(encoded))
            watch: Any = nullcontext()
            if kinds is not None and (before := state.before_rope) is not None:
                self.show_before_rope()
                watch = watching(self.projections, before, lambda: _call.get() is state)
            token = _call.set(state)
            try:
                out = None
                if self.graphs is not None and shape[1] == 1 and kinds is None and not media:
                    out = self.graphs.step(cache, forward, {**{name: x for name, x in bound.items() if name != "kwargs"}, **extra})
                elif self.graphs is not None:
                    self.graphs.forget(cache)
                if out is None:
                    with watch:
                        out = forward(*args, **kwargs)
            finally:
                _call.reset(token)
                state.end()
            if own is not None and late and places is not None and places.dim() == 3:
                cache.rope_deltas = after_pictures(places, cache.get_seq_length()).to(own.device)
            if marked:  # images may have been coded
                cache.check_drift()
            return out

        return with_token_kinds

    def _wrap_prepare(self, prepare: Any) -> Any:
        @functools.wraps(prepare)
        def with_compressed_cache(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
                asked = generation_config.cache_implementation
                if asked is not None and asked != self.model.generation_config.cache_implementation:
                    raise RotateKError(
                        f"cache_implementation={asked!r} asks for a stock cache, so nothing would be compressed; leave it out, or "
                        "rotatek_compile.disable(model) first"
                    )
                generation_config.cache_implementation = None  # some checkpoints name a stock cache of their own, Gemma among them
                model_kwargs["past_key_values"] = self.new_cache()
            cache = model_kwargs.get("past_key_values")
            if isinstance(cache, RotateKCache):
                if self.graphs is not None:
                    self.graphs.forget(cache)
                raw = any(name.startswith("pixel_values") and _given(value) for name, value in model_kwargs.items())
                if raw and generation_config.prefill_chunk_size is not None:
                    # transformers 5.17 leaves pictures out of a chunked prefill without a word; 5.23 encodes them before
                    raise RotateKError(
                        "this version of transformers reads no pictures in chunks; leave prefill_chunk_size out, or upgrade it"
                    )
                cache.expect(lengths_of(model_kwargs.get("mm_encoder_outputs")), chunked=generation_config.prefill_chunk_size is not None)
            return prepare(generation_config, model_kwargs, *args, **kwargs)

        return with_compressed_cache

    def _wrap_positions(self, prepare: Any) -> Any:
        @functools.wraps(prepare)
        def with_own_deltas(inputs_tensor: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            cache = model_kwargs.get("past_key_values")
            if isinstance(cache, RotateKCache) and cache.rope_deltas is not None:
                set_deltas(self.position_keepers, cache.rope_deltas)
            return prepare(inputs_tensor, model_kwargs, *args, **kwargs)

        return with_own_deltas

    def _wrap_encoder(self, encode: Any, inner: Any, kind: int) -> Any:
        @functools.wraps(encode)
        def announced(*args: Any, **kwargs: Any) -> Any:
            if _encoding.get():
                return encode(*args, **kwargs)  # an encoder that calls another one speaks for it
            token = _encoding.set(True)
            try:
                if "visionzip" in self.token_methods:
                    with watched(inner) as watch:
                        out = encode(*args, **kwargs)
                    note(inner, out, watch)
                else:
                    out = encode(*args, **kwargs)
            finally:
                _encoding.reset(token)
            if (state := _call.get()) is not None:
                if lengths := encoded_lengths(out, kind):
                    state.announce(kind, lengths)
                state.show({kind: encoded_features(out)})
            return out

        return announced


def _given(value: Any) -> bool:
    """Whether an argument carries anything: `generate` passes an empty mapping for prompts without media."""
    return value is not None and (not isinstance(value, dict) or any(part is not None for part in value.values()))


def unwrapped(model: Any) -> Any:
    """The transformers model inside wrappers that keep it as it is: peft's, and torch.compile's."""
    while True:
        if "_orig_mod" in getattr(model, "_modules", {}):
            model = model._orig_mod
        elif callable(getattr(type(model), "get_base_model", None)):
            model = model.get_base_model()
        else:
            return model


def _adapter(model: Any, inner: Any) -> str | None:
    """Name of the adapter in force on a model, if peft put one there."""
    for one in (model, inner):
        if getattr(one, "peft_config", None):
            active_one = getattr(one, "active_adapter", None)
            return active_one if isinstance(active_one, str) else ", ".join(one.peft_config)
    return None


def _configs(model: nn.Module) -> Iterator[Any]:
    """Every config of a model once: its own, nested ones, and those its parts hold."""
    waiting = [model.config, *(part.config for part in model.modules() if hasattr(part, "_can_set_attn_implementation"))]
    seen: set[int] = set()
    while waiting:
        config: Any = waiting.pop(0)
        if id(config) in seen or not hasattr(config, "_attn_implementation_internal"):
            continue
        seen.add(id(config))
        yield config
        waiting += [part for key in config.sub_configs if (part := getattr(config, key, None)) is not None]


def active(model: nn.Module) -> enable | None:
    """The `enable` that is in force on this model, if any."""
    found = getattr(model, _ACTIVE, None)
    return found if isinstance(found, enable) else None


def check_model(model: nn.Module, artifact: Artifact) -> None:
    """Refuse a model that this artifact cannot serve.

    Raises:
        RotateKError: another geometry, or attention that is not pluggable.
    """
    check_pruning(model, artifact)
    geometry = geometry_of(model.config)
    if reason := artifact.geometry.difference(geometry):
        where = f"artifact {artifact.path}" if artifact.path else "the artifact"
        raise RotateKError(f"{where} does not fit this model: {reason}; compile an artifact for this model")
    if not getattr(model, "_supports_attention_backend", False):
        raise RotateKError(f"{type(model).__name__} does not use transformers' attention interface and cannot be compressed")
    seen, expected = geometry.model_type, artifact.geometry.model_type
    if seen != expected:
        warnings.warn(f"the artifact was compiled for model type {expected}, this is {seen} of the same geometry", stacklevel=3)


def check_pruning(model: nn.Module, artifact: Artifact) -> None:
    """Refuse an artifact of a smaller checkpoint on any other model, and any other artifact on a pruned model.

    Raises:
        RotateKError: saying which of the two.
    """
    where, loaded = f"artifact {artifact.path}" if artifact.path else "the artifact", pruned_artifact(model)
    if artifact.rap is not None and not artifact.coded:
        raise RotateKError(f"{where} is a smaller checkpoint (RAP), nothing to enable on another model; use rotatek_compile.load on it")
    if artifact.rap is not None and (loaded is None or not same_pruning(artifact, loaded)):
        raise RotateKError(f"{where} was compiled for the smaller checkpoint beside it, not for this model; use rotatek_compile.load on it")
    if artifact.rap is None and loaded is not None:
        raise RotateKError(f"the model is a pruned one (RAP), and {where} was compiled for a whole one; load the base model for it")


def _without_fallback(artifact: Artifact) -> Artifact:
    from dataclasses import replace

    return replace(artifact, method=replace(artifact.method, fallback_factor=0.0))
