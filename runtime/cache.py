"""The compressed KV cache: transformers cache layers that hand out handles instead of Keys.

Data flow of one layer in one forward call:

    attention module --k, v--> RotateKLayer.update() --Handle--> rotatek_attention() --> Handle.attend(q) --> Handle.commit(q)

`update` alone sees neither queries nor token kinds, so nothing is coded there. `attend` gives the attention output (exact for
tokens that arrive together, from the compact cache for all others), then `commit` codes what is complete and frees the raw
Keys and Values: at most one layer is alive at full width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, get_layer_types_and_kwargs

from ..errors import RotateKError, UsageError
from ..geometry import FULL_ATTENTION
from ..kernels.table import BLOCK
from .backends import Backend
from .coder import Coder, real_queries
from .online import code_segment, code_segment_as_published
from .prepared import PreparedArtifact, PreparedLayer
from .segments import VISUAL, Step, plain_step
from .spans import CodedSpans, SpansBackend
from .store import Store


class CallState:
    """Token kinds of the forward call under way, shared by all layers of one cache."""

    def __init__(self) -> None:
        self.step: Step | None = None

    def of(self, batch: int, length: int) -> Step:
        """The step of a call of this shape.

        Raises:
            RuntimeError: nobody announced the call; images cannot be told from text then.
        """
        if self.step is not None and (self.step.batch, self.step.length) == (batch, length):
            return self.step
        if length == 1:
            return plain_step(batch, length)
        raise RuntimeError(
            "a RotateKCache was used outside of rotatek_compile.enable(): token kinds are unknown; "
            "call the model inside `with enable(...)`, or use a model from rotatek_compile.load()"
        )


class Handle:
    """What `update` returns in place of Keys and Values; only the attention function `rotatek` understands it.

    Any other attention function fails on it at once (it is no tensor), rather than computing with rotated Keys.
    """

    def __init__(self, layer: RotateKLayer, step: Step, keys: Tensor, values: Tensor, appended: bool) -> None:
        self.layer, self.step, self.appended = layer, step, appended
        self.keys: Tensor | None = keys
        self.values: Tensor | None = values

    @property
    def first(self) -> bool:
        """Nothing was stored before this call: the stock kernel sees all there is."""
        return self.layer.logical_length == self.step.length

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attention over the stored tokens and this call's: query [B, Hq, T, D] -> [B, Hq, T, D]. Not for `first` calls."""
        backend = self.layer.backend
        if self.appended:
            return backend.decode(query, self.layer.store.view(splits=backend.needs_splits), scaling)
        return backend.extend(query, self.layer.store.view(splits=False), self.keys, self.values, mask, scaling)

    def commit(self, query: Tensor) -> None:
        """Code complete segments of this call, append its text to the window, and free the raw tensors."""
        if not self.appended:
            self.layer.commit(query, self.keys, self.values, self.step)
        self.keys = self.values = None


class RotateKLayer(CacheLayerMixin):
    """Cache layer of one full-attention layer. Lengths it reports are logical: tokens seen, not numbers stored."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, index: int, artifact: PreparedArtifact, state: CallState, backend: Backend, coder: Coder | None = None) -> None:
        super().__init__()
        self.index, self.artifact, self.state, self.backend, self.coder = index, artifact, state, backend, coder
        self.logical_length = 0
        self.tail = 0  # newest columns that are text in every row: those a caller may crop while they are raw
        self.store: Store = None  # type: ignore[assignment]
        self.spans: CodedSpans | None = None  # image segments of a rival method
        self.prepared: PreparedLayer = None  # type: ignore[assignment]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        if self.coder is None:
            self.prepared = self.artifact.layer(self.index, key_states.device, key_states.dtype)
        else:
            self.prepared = self.artifact.plain_layer(self.index)
        expected = self.prepared.geometry
        if (heads, dim) != (expected.kv_heads, expected.head_dim) or value_states.shape[-1] != dim:
            raise RotateKError(
                f"layer {self.index} has {heads} KV heads of {dim} (Values {value_states.shape[-1]}), the artifact was compiled for "
                f"{expected.kv_heads} of {expected.head_dim}; compile an artifact for this model"
            )
        self.store = Store(batch, heads, dim, key_states.dtype, key_states.device)
        if self.coder is not None:
            self.spans = CodedSpans(batch)
            self.backend = SpansBackend(self.spans)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Handle, Handle]:  # type: ignore[override]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, length, _ = key_states.shape
        step = self.state.of(batch, length)
        # Short text continues the window and is attended there; anything else is attended raw and coded by commit().
        appended = self.logical_length > 0 and step.plain_text and length <= self.backend.most_queries(self.prepared.geometry.group)
        if self.logical_length > 0:
            self._retire()
        self.logical_length += length
        if appended:
            self.store.window.append(key_states, value_states)
            self.tail += length
        handle = Handle(self, step, key_states, value_states, appended)
        return handle, handle

    # -- storing ----------------------------------------------------------------------------------------------------------------

    def commit(self, query: Tensor, keys: Tensor, values: Tensor, step: Step) -> None:
        """Store a call's tokens: query [B, Hq, T, D], keys and values [B, Hkv, T, D]."""
        method = self.prepared.method
        for row, runs in enumerate(step.rows):
            for run in runs:
                if run.kind == VISUAL:
                    self._code(row, "visual", keys[row, :, run.start : run.end], values[row, :, run.start : run.end], query[row], step)
            columns = torch.from_numpy(step.text_columns(row)).to(keys.device)
            if not columns.numel():
                continue
            text_keys, text_values = keys[row].index_select(1, columns), values[row].index_select(1, columns)
            old = columns.numel() - method.window
            if old >= BLOCK:  # older than the window: whole blocks leave it at once
                old -= old % BLOCK
                if method.span == "all":
                    self._code(row, "text", text_keys[:, :old], text_values[:, :old], query[row], step)
                else:
                    self.store.add_dense(row, text_keys[:, :old], text_values[:, :old])
                text_keys, text_values = text_keys[:, old:], text_values[:, old:]
            self.store.window.append_row(row, text_keys, text_values)
        self.store.flush()
        self.tail = self.tail + step.length if step.plain_text else step.text_tail()

    def _code(self, row: int, kind: str, keys: Tensor, values: Tensor, query: Tensor, step: Step) -> None:
        prepared, method = self.prepared, self.prepared.method
        if self.spans is not None and self.coder is not None:
            queries = real_queries(query, prepared.geometry.kv_heads, step.rows[row])
            self.spans.add(row, self.coder.code(self.index, keys, values, queries))
            return
        basis, exact = prepared.kinds[kind], keys.float()
        if method.basis == "paper":
            queries = real_queries(query, prepared.geometry.kv_heads, step.rows[row])
            mean, codes = code_segment_as_published(exact, queries.float(), prepared.ranks)
        else:
            mean, codes = code_segment(exact, basis, prepared.ranks, method.prior_tokens, method.fallback_factor)
        self.store.add_coded(row, exact, values, mean, codes, basis)

    def _retire(self) -> None:
        """Move the oldest text out of windows that are a block over their size; the newest `window` tokens always stay raw.

        Runs before a call's tokens are appended, so what a caller may still crop (at most the window) is never coded.
        """
        window, store = self.prepared.method.window, self.store
        over = [(row, int(n - window) // BLOCK * BLOCK) for row, n in enumerate(store.window.host) if n - window >= BLOCK]
        if not over:
            return
        for row, old in over:
            keys, values = store.window.keys[row, :, :old], store.window.values[row, :, :old]
            if self.prepared.method.span == "all":
                basis = self.prepared.kinds["text"]
                store.add_shared(row, keys.float(), values, basis, self.prepared.ranks)
            else:
                store.add_dense(row, keys, values)
            store.window.drop_oldest(row, old)
        store.flush()

    # -- what transformers asks -------------------------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return self.logical_length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        length = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return self.logical_length + length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, max_length: int) -> None:
        """Forget the newest tokens: `-n` removes n, a positive value keeps that many. Only raw window tokens can go.

        Raises:
            RotateKError: the cut reaches into coded tokens.
        """
        max_length = int(max_length)  # transformers 5.17 passes a tensor
        remove = -max_length if max_length <= 0 else max(self.logical_length - max_length, 0)
        if remove == 0 or not self.is_initialized:
            return
        # the window alone does not tell: it also holds text from before an image, which is not the newest
        raw = min(self.tail, int(self.store.window.host.min()))
        if remove > raw:
            raise RotateKError(
                f"cannot remove {remove} tokens: only the newest {raw} are still raw text; "
                "start a new cache, or compile with a larger --window"
            )
        self.store.window.trim(remove)
        self.logical_length -= remove
        self.tail -= remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self._select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select_rows([row for row in range(self.store.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._select_rows(indices.tolist())

    def _select_rows(self, rows: list[int]) -> None:
        self.store.select_rows(rows)
        if self.spans is not None:
            self.spans.select_rows(rows)

    def tensors(self) -> list[Tensor]:
        """Every tensor this layer keeps alive for its sequences; a rival's work copy and the artifact's bases are not among them."""
        if not self.is_initialized:
            return []
        return [*self.store.tensors().values(), *(self.spans.tensors() if self.spans is not None else ())]

    def reset(self) -> None:
        self.logical_length, self.tail, self.is_initialized = 0, 0, False
        if self.spans is not None:
            self.spans.select_rows(())  # the backend knows them too, until the next call makes another
        self.store, self.spans = None, None  # type: ignore[assignment]

    def offload(self) -> None:
        raise RotateKError("cache offloading is not supported by the compressed cache; turn offloading off")

    def activate_past_recording(self) -> None:
        """Speculative decoding announces itself; cropping works at any time here."""


class RotateKCache(Cache):
    """A cache for one batch of sequences. Full-attention layers are compressed, others keep their stock layer.

    Args:
        config: of the whole model.
        artifact: method, window and bases.
        backend: who computes attention over our own codes; a rival's segments are always read in torch.
        coder: a rival method that codes the images in place of ours; by default the one the artifact was compiled for, if any.

    Raises:
        UsageError: a rival with an artifact whose text is coded too (rivals code images only).
    """

    def __init__(self, config: Any, artifact: PreparedArtifact, backend: Backend, coder: Coder | None = None) -> None:
        coder = coder if coder is not None else artifact.coder
        if coder is not None and (span := artifact.artifact.method.span) != "visual":
            raise UsageError(f"method {coder.name} codes images only, but the artifact has span {span!r}; compile one with --span visual")
        text = config.get_text_config(decoder=True)
        types, kwargs = get_layer_types_and_kwargs(text)
        self.state = CallState()
        self.artifact = artifact
        layers: list[CacheLayerMixin] = []
        # transformers 5.17 returns one dict for all layers, 5.23 one for each
        per_layer = [kwargs] * len(types) if isinstance(kwargs, dict) else kwargs
        for index, (kind, options) in enumerate(zip(types, per_layer, strict=True)):
            if kind == FULL_ATTENTION:
                layers.append(self._make_layer(index, artifact, backend, coder))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**options))
        super().__init__(layers=layers)

    def _make_layer(self, index: int, artifact: PreparedArtifact, backend: Backend, coder: Coder | None) -> RotateKLayer:
        return RotateKLayer(index, artifact, self.state, backend, coder)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer in self.layers:
            layer.reorder_cache(beam_idx)
