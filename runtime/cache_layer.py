"""One layer of the compressed cache.

Data flow of one layer in one forward call:

    attention module --k, v--> RotateKLayer.update() --Handle--> rotatek_attention() --> Handle.attend(q) --> Handle.commit(q)

`update` alone sees neither queries nor token kinds, so nothing is coded there. `attend` gives the attention output (exact for
tokens that arrive together, from the compact cache for all others), then `commit` begins to code what is complete. What that needs to
know from the device is there when the next layer commits; then the codes are written and the raw Keys and Values freed: at most two
layers are alive at full width. Whoever reads `store` finds everything settled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..errors import RotateKError
from ..kernels.table import BLOCK
from .backends import Backend
from .coder import Coder
from .handle import Handle
from .kept_tokens import KeptTokens
from .media import CallState
from .media_coder import MediaCoder
from .prepared import PreparedArtifact, PreparedLayer
from .segment_coder import SegmentCoder
from .segments import Step, columns, plain_step
from .spans import CodedSpans, SpansBackend
from .store import Store
from .text_blocks import TextBlocks


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
        self.real = np.zeros(0, dtype=np.int64)  # [B] tokens of each row, padding left out
        self.tail = 0  # newest columns that are text in every row: those a caller may crop while they are raw
        self.segments: SegmentCoder = None  # type: ignore[assignment]
        self.media: MediaCoder = None  # type: ignore[assignment]
        self.blocks: TextBlocks | None = None  # text that left the window, where it is coded
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
        self.segments = SegmentCoder(Store(batch, heads, dim, key_states.dtype, key_states.device, self.prepared), self.prepared)
        self.real = np.zeros(batch, dtype=np.int64)
        if "text" in self.prepared.kinds:
            self.blocks = TextBlocks(self.store, self.prepared.kinds["text"], self.segments.rules(own_parts=True))
        spans = CodedSpans(batch) if self.coder is not None else None
        kept = KeptTokens(batch) if self.state.selector is not None else None
        self.media = MediaCoder(self.index, self.segments, self.coder, spans, kept)
        if spans is not None:
            self.backend = SpansBackend(spans)
        self.is_initialized = True

    @property
    def spans(self) -> CodedSpans | None:
        """Image segments of a rival method."""
        return self.media.spans if self.media is not None else None

    @property
    def kept(self) -> KeptTokens | None:
        """Which tokens of images are left, where some are dropped."""
        return self.media.kept if self.media is not None else None

    @property
    def store(self) -> Store:
        """What is stored, nothing pending; None before the first call."""
        if self.segments is not None:
            self.settle()
            return self.segments.store
        return None

    def settle(self) -> None:
        """Store the segments that were begun."""
        if self.segments.begun:
            self.segments.settle()
            self.segments.store.flush()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Handle, Handle]:  # type: ignore[override]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, length, _ = key_states.shape
        if self.state.capturing:
            handle = Handle(self, plain_step(batch, length), key_states, value_states, appended=True)
            return handle, handle
        if batch != self.store.batch:
            raise RotateKError(
                f"the cache holds {self.store.batch} sequences, this call has {batch}; start a new cache, or select its rows"
            )
        step = self.state.of(batch, length)
        # Short text continues the window and is attended there; anything else is attended raw and coded by commit().
        appended = self.logical_length > 0 and step.plain_text and length <= self.backend.most_queries(self.prepared.geometry.group)
        if self.logical_length > 0:
            if any(self.store.held):
                self.finish([row for row in range(batch) if row not in step.going_on])
            if not self.state.keeps_text and not (appended and self.text_stays()):
                self._retire()
        self.logical_length += length
        self.real += length if appended else [step.tokens(row) for row in range(batch)]
        if appended:
            self.store.window.grow(length)
            self.tail += length
        handle = Handle(self, step, key_states, value_states, appended)
        return handle, handle

    def advance(self, tokens: int) -> None:
        """Count tokens of text that a captured step has appended to every row; on the device they are counted."""
        self.logical_length += tokens
        self.real += tokens
        self.tail += tokens
        self.segments.store.window.host += tokens

    def text_stays(self) -> bool:
        """Whether text that is appended to every row alike stays in the windows, however much it becomes.

        Raw text takes the same bytes there as outside, and moving it takes the host as long as many steps. Text that is to be coded
        leaves.
        """
        return self.blocks is None

    def share_text(self) -> None:
        """Move raw text out before windows are copied (beams, forks, files): copies share what is outside."""
        if self.is_initialized and self.text_stays():
            self._retire()

    def finish(self, rows: Sequence[int]) -> None:
        """Code the images that these rows hold: they ended with the last call."""
        self.settle()
        self.media.finish(rows, self.state)

    # -- storing ----------------------------------------------------------------------------------------------------------------

    def commit(self, query: Tensor, keys: Tensor, values: Tensor, step: Step) -> None:
        """Store a call's tokens: query [B, Hq, T, D], keys and values [B, Hkv, T, D]."""
        selector = self.state.selector
        images = selector is not None and any(step.media(row) for row in range(step.batch))
        if images and selector is not None and selector.postpone(self.index, self._commit, (query, keys, values, step)):
            return
        self._commit(query, keys, values, step)
        if images and selector is not None:
            selector.decided(self.index)

    def _commit(self, query: Tensor, keys: Tensor, values: Tensor, step: Step) -> None:
        tail = self.tail + step.length if step.plain_text else step.text_tail()
        for row in range(step.batch):
            self.media.commit(row, query[row], keys[row], values[row], step, self.state)
            left = self._commit_text(row, query[row], keys[row], values[row], step)
            # the window may also hold text from before what has left, which is not the newest
            tail = tail if left is None else min(tail, left)
        self.tail = tail
        if self.segments.begun:
            self.segments.look()
            self.state.later(self)
        else:
            self.segments.store.flush()

    def _commit_text(self, row: int, query: Tensor, keys: Tensor, values: Tensor, step: Step) -> int | None:
        """Text goes to the window; what is older than the window leaves it at once, in whole blocks.

        Returns:
            how many of the call's text tokens are in the window if some left it, else None.
        """
        method, store = self.prepared.method, self.segments.store
        text_keys, text_values = columns(keys, step.text(row)), columns(values, step.text(row))
        if not (length := text_keys.shape[1]):
            return None
        old, left = length - method.window, None
        if old >= BLOCK:
            old -= old % BLOCK
            left = length - old
            if method.span == "all":
                queries = self.media.real_queries(row, query, step, self.state)
                self.segments.begin(row, "text", text_keys[:, :old], text_values[:, :old], queries)
            else:
                store.add_dense(row, text_keys[:, :old], text_values[:, :old])
            text_keys, text_values = text_keys[:, old:], text_values[:, old:]
        store.window.append_row(row, text_keys, text_values)
        return left

    def _retire(self) -> None:
        """Move the oldest text out of windows that are a block over their size; the newest `window` tokens always stay raw.

        Runs before a call's tokens are appended, so what a caller may still crop (at most the window) is never coded. Calls that append
        text to every row alike may leave it out (`text_stays`); before others it must run, or rows' windows would differ ever more.
        """
        store = self.store
        blocks = np.maximum(store.window.host - self.prepared.method.window, 0) // BLOCK * BLOCK
        if not blocks.any():
            return
        for old in np.unique(blocks[blocks > 0]).tolist():  # rows that grow together also leave together
            rows = np.flatnonzero(blocks == old).tolist()
            keys, values = store.window.oldest(rows, old)
            if self.blocks is not None:
                self.blocks.write(rows, keys, values)
            else:
                store.add_dense_rows(rows, keys, values)
            store.window.drop_oldest(rows, old)
        store.flush()

    # -- what transformers asks -------------------------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return self.logical_length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        length = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        # transformers makes a mask of it in a captured step too, where nobody reads one
        return length if self.state.capturing else self.logical_length + length, 0

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
        self.real -= remove
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
        self.share_text()
        self.store.select_rows(rows)
        self.real = self.real[rows]
        self.media.select_rows(rows)
        if self.blocks is not None:
            self.blocks.select_rows(rows)

    def tensors(self) -> list[Tensor]:
        """Every tensor this layer keeps alive for its sequences; a rival's work copy and the artifact's bases are not among them, nor are
        tables of kept tokens, which layers may share (`RotateKCache.kept_segments`)."""
        if not self.is_initialized:
            return []
        blocks = self.blocks.tensors() if self.blocks is not None else []
        return [*self.store.tensors().values(), *self.media.tensors(), *blocks]

    def reset(self) -> None:
        self.logical_length, self.tail, self.is_initialized = 0, 0, False
        if self.spans is not None:
            self.spans.select_rows(())  # the backend knows them too, until the next call makes another
        self.segments, self.media, self.blocks = None, None, None  # type: ignore[assignment]

    def offload(self) -> None:
        raise RotateKError("cache offloading is not supported by the compressed cache; turn offloading off")

    def activate_past_recording(self) -> None:
        """Speculative decoding announces itself; cropping works at any time here."""
