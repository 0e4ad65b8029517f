"""Prefill once, fill many caches: what a cache was given during one forward call, kept, and handed to other caches.

Methods that are compared on the same documents share the dense prefill, which costs far more than coding does. A filled cache is
what it would be after that prefill, because it is filled by the same `commit()`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..errors import RotateKError
from .before_rope import BeforeRope
from .cache import RotateKCache, RotateKLayer
from .coder import Coder
from .enable import active
from .prepared import PreparedArtifact
from .segments import Step


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """One full-attention layer's call: query [B, Hq, T, D], keys and values [B, Hkv, T, D], after RoPE, padding columns included.

    before: the Keys before RoPE, if a coder asks (`enable.show_before_rope`).
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    before: BeforeRope | None = None


@dataclass(frozen=True, slots=True)
class Recording:
    """One prefill. `layers[i]` is a `LayerRecord`, or where attention is not full the stock cache layer as it was after the call."""

    step: Step
    layers: tuple[Any, ...]
    logits: Tensor
    scaling: float = 1.0  # of the attention logits
    features: Mapping[int, list[Tensor]] = field(default_factory=dict)  # what encoders made of the images (media.py), if anybody asks


class _RecordingLayer(RotateKLayer):
    """A layer that keeps what it is given instead of coding it."""

    record: LayerRecord | None = None

    def commit(self, query: Tensor, keys: Tensor, values: Tensor, step: Step) -> None:
        before = (self.state.before_rope or {}).get(self.index)
        self.record, self.step, self.shown = LayerRecord(query, keys, values, before), step, (self.state.scaling, self.state.features)


class _RecordingCache(RotateKCache):
    def _make_layer(self, index: int, artifact: PreparedArtifact, backend: Any, coder: Coder | None) -> RotateKLayer:
        return _RecordingLayer(index, artifact, self.state, backend, coder)


def record(model: nn.Module, **forward_kwargs: Any) -> Recording:
    """Run one prefill of a model that is inside `enable()` and keep what its cache was given.

    Args:
        forward_kwargs: arguments of `model.forward` but the cache: input_ids, attention_mask, position_ids, media, logits_to_keep.

    Raises:
        RotateKError: the model is not enabled, or a cache was passed.
    """
    enabled = active(model)
    if enabled is None:
        raise RotateKError("recording needs the model's token kinds: call record() inside `with enable(model, artifact)`")
    if forward_kwargs.get("past_key_values") is not None:
        raise RotateKError("record() prefills an empty cache of its own; leave past_key_values out")
    cache = _RecordingCache(model.config, enabled.prepared, enabled.backend)
    cache.state.keeps_features = bool(enabled.token_methods)
    cache.state.before_rope = {} if enabled.projections else None
    forward_kwargs |= {"past_key_values": cache, "use_cache": True}
    logits = model(**forward_kwargs).logits
    layers: list[Any] = []
    step: Step | None = None
    for layer in cache.layers:
        if not isinstance(layer, _RecordingLayer):
            layers.append(layer)
        elif layer.record is None:
            raise RotateKError(f"layer {layer.index} was given nothing; this model shares Keys between layers and cannot be recorded")
        else:
            layers.append(layer.record)
            step, (scaling, features) = layer.step, layer.shown
    if step is None:
        raise RotateKError("this model has no full-attention layer, so there is nothing to record")
    return Recording(step, tuple(layers), logits, scaling, features)


def fill(cache: RotateKCache, recording: Recording) -> RotateKCache:
    """Make a fresh cache what it would be after the recorded prefill; returns it. The recording can be used again.

    Raises:
        RotateKError: the cache holds tokens already, or belongs to another model.
    """
    if cache.get_seq_length() != 0:
        raise RotateKError(f"only an empty cache can be filled, this one holds {cache.get_seq_length()} tokens; make a new one")
    _check_layers(len(cache.layers), recording)
    cache.state.step, cache.state.features = recording.step, dict(recording.features)
    try:
        for index, recorded in enumerate(recording.layers):
            layer = cache.layers[index]
            if isinstance(recorded, LayerRecord) and isinstance(layer, RotateKLayer):
                if cache.state.before_rope is not None and recorded.before is not None:
                    cache.state.before_rope[index] = recorded.before
                handle, _ = layer.update(recorded.keys, recorded.values)
                handle.commit(recorded.query, recording.scaling)
            else:
                cache.layers[index] = copy.deepcopy(recorded)
    finally:
        cache.state.end()
    return cache


def stock_cache(config: Any, recording: Recording) -> DynamicCache:
    """A stock cache as the same prefill leaves it; `config` of the whole model.

    Raises:
        RotateKError: the recording is of another model.
    """
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    _check_layers(len(cache.layers), recording)
    for index, recorded in enumerate(recording.layers):
        if isinstance(recorded, LayerRecord):
            cache.update(recorded.keys, recorded.values, index)
        else:
            cache.layers[index] = copy.deepcopy(recorded)
    return cache


def _check_layers(layers: int, recording: Recording) -> None:
    if layers != len(recording.layers):
        raise RotateKError(f"the recording has {len(recording.layers)} layers, the cache {layers}; record this model's own prefill")
