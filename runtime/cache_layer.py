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
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..errors import RotateKError, UsageError
from ..kernels.table import BLOCK
from .backends import Backend
from .before_rope import BeforeRope
from .coder import BeforeRopeCoder, Coder, real_queries
from .handle import Handle
from .kept_tokens import KeptSegment, KeptTokens
from .media import CallState
from .prepared import PreparedArtifact, PreparedLayer
from .residual import only
from .segment_coder import SegmentCoder
from .segments import Run, Step, columns, plain_step
from .spans import CodedSpans, SpansBackend
from .store import Store
from .text_blocks import TextBlocks
from .token_selection import Seen

QUERIES_HELD = 32  # what methods that look at queries look at (rivals/think.py, online.py)


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
        self.held_queries: dict[int, Tensor] = {}  # row -> newest queries [Hkv, G, T, D] of the calls that brought what it holds
        self.held_before: dict[int, BeforeRope] = {}  # row -> what it holds, before RoPE, for coders that ask
        self.segments: SegmentCoder = None  # type: ignore[assignment]
        self.spans: CodedSpans | None = None  # image segments of a rival method
        self.blocks: TextBlocks | None = None  # text that left the window, where it is coded
        self.kept: KeptTokens | None = None  # which tokens of images are left, where some are dropped
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
        if self.coder is not None:
            self.spans = CodedSpans(batch)
            self.backend = SpansBackend(self.spans)
        if self.state.selector is not None:
            self.kept = KeptTokens(batch)
        self.is_initialized = True

    @property
    def store(self) -> Store:
        """What is stored, nothing pending; None before the first call."""
        if self.segments is not None:
            self.settle()
            return self.segments.store
        return None  # type: ignore[return-value]

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
                self._finish([row for row in range(batch) if row not in step.going_on])
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
            self._commit_media(row, query[row], keys[row], values[row], step)
            left = self._commit_text(row, query[row], keys[row], values[row], step)
            # the window may also hold text from before what has left, which is not the newest
            tail = tail if left is None else min(tail, left)
        self.tail = tail
        if self.segments.begun:
            self.segments.look()
            self.state.later(self)
        else:
            self.segments.store.flush()

    def _commit_media(self, row: int, query: Tensor, keys: Tensor, values: Tensor, step: Step) -> None:
        """Code the images and clips of a row that are complete, hold the last one raw if it is not (DESIGN.md §6)."""
        store, media = self.segments.store, step.media(row)
        for number, runs in enumerate(media):
            own_keys, own_values, before = columns(keys, runs), columns(values, runs), self._before(row, runs)
            if row in step.unfinished and number == len(media) - 1:
                store.hold(row, own_keys, own_values)
                self._hold_queries(row, query, step)
                self._note_held(row)
                if before is not None:
                    self.held_before[row] = self.held_before[row].then(before) if row in self.held_before else before.own()
            else:
                queries, held = self._queries(row, query, step), 0
                if number == 0 and store.held[row]:
                    if row in self.held_queries and queries is not None:
                        queries = torch.cat([self.held_queries.pop(row), queries], 2)
                    held_keys, held_values = store.take_held(row)
                    held = held_keys.shape[1]
                    own_keys, own_values = torch.cat([held_keys, own_keys], 1), torch.cat([held_values, own_values], 1)
                    if before is not None:
                        before = self.held_before.pop(row).then(before)
                if (selector := self.state.selector) is not None:
                    seen = None
                    if selector.looks(self.index):
                        seen = self._seen(row, queries, columns(keys, step.rows[row]), own_keys[:, :held], step.rows[row], runs)
                    tokens = own_keys.shape[1]
                    kept = selector.keep(row, number, runs[0], tokens, seen, self.state.scaling, self.state.features)
                    own_keys, own_values, before = self._select(row, kept, own_keys, own_values, before)
                self._begin(row, "visual", own_keys, own_values, queries, before)

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
                self._begin(row, "text", text_keys[:, :old], text_values[:, :old], self._queries(row, query, step))
            else:
                store.add_dense(row, text_keys[:, :old], text_values[:, :old])
            text_keys, text_values = text_keys[:, old:], text_values[:, old:]
        store.window.append_row(row, text_keys, text_values)
        return left

    def _before(self, row: int, runs: Sequence[Run]) -> BeforeRope | None:
        """These runs of a row before RoPE, for coders that ask."""
        if not isinstance(self.coder, BeforeRopeCoder):
            return None
        if self.index not in (seen := self.state.before_rope or {}):
            words = f"method {self.coder.name} needs layer {self.index} before RoPE, which was not recorded"
            raise RotateKError(f"{words}; call enabled.show_before_rope() first")
        return seen[self.index].row(row).columns(runs)

    def _queries(self, row: int, query: Tensor, step: Step) -> Tensor | None:
        """Real queries [Hkv, G, T, D] of a row, for methods that look at them."""
        selector = self.state.selector
        if self.coder is None and self.prepared.method.basis != "paper" and not (selector is not None and selector.looks(self.index)):
            return None
        return real_queries(query, self.prepared.geometry.kv_heads, step.rows[row])

    def _hold_queries(self, row: int, query: Tensor, step: Step) -> None:
        queries = self._queries(row, query, step)
        if queries is not None:
            parts = [part for part in (self.held_queries.get(row), queries) if part is not None]
            self.held_queries[row] = torch.cat(parts, 2)[:, :, -QUERIES_HELD:].clone()

    def _seen(self, row: int, queries: Tensor | None, keys: Tensor, held: Tensor, real: Sequence[Run], runs: Sequence[Run]) -> Seen:
        """What the queries of this call see: `keys` [Hkv, N, D] of its real tokens `real`, and before them the held ones of an image, whose
        further tokens are `runs`."""
        assert queries is not None and self.state.selector is not None
        own, start = [slice(0, held.shape[1])] if held.shape[1] else [], held.shape[1]
        for run in real:
            if run in runs:
                own.append(slice(start, start + run.length))
            start += run.length
        newest = min(self.state.selector.queries, keys.shape[1])
        return Seen(queries[:, :, -newest:], torch.cat([held, keys], 1) if held.shape[1] else keys, own)

    def _note_held(self, row: int) -> None:
        """Ask which tokens of the image that a row holds would stay; the scoring layer alone is asked."""
        selector = self.state.selector
        if selector is not None and selector.scoring == self.index:
            self.segments.store.flush()
            keys, _ = self.segments.store.held_parts(row)
            selector.hold(row, keys.shape[1], self._of_held(row, keys), self.state.scaling)

    def _of_held(self, row: int, keys: Tensor) -> Seen:
        """What the newest queries of a held image see of it; text before it is left out."""
        selector = self.state.selector
        assert selector is not None
        return Seen(self.held_queries[row][:, :, -min(selector.queries, keys.shape[1]) :], keys, [slice(0, keys.shape[1])])

    def _select(
        self, row: int, kept: KeptSegment, keys: Tensor, values: Tensor, before: BeforeRope | None
    ) -> tuple[Tensor, Tensor, BeforeRope | None]:
        """The Keys and Values [Hkv, n, D] of the tokens that stay."""
        assert self.kept is not None
        self.kept.rows[row].append(kept)
        places = kept.indices().to(keys.device)
        if before is not None:
            if len(places) > 1:
                raise UsageError("heads that are coded jointly keep the same tokens; choose another --token-method or another --method")
            before = before.only(places[0])
        places = places.expand(keys.shape[0], -1)
        return only(keys, places), only(values, places), before

    def _finish(self, rows: list[int]) -> None:
        """Code what these rows hold: the image ended with the last call. Rows that share it (beams) go on sharing it."""
        done: dict[tuple[int, ...], tuple[int, int | None]] = {}
        for row in rows:
            if not (key := self.store.held_key(row)):
                continue
            if key in done:
                owner, place = done[key]
                self.store.drop_held(row)
                if place is not None:
                    self.store.share(row, owner, place)
                elif self.spans is not None:
                    self.spans.add(row, self.spans.rows[owner][-1])
                if self.kept is not None:
                    self.kept.rows[row].append(self.kept.rows[owner][-1])
            else:
                done[key] = row, self._code(row, *self.store.take_held(row), self.held_queries.get(row), self.held_before.get(row))
            self.held_queries.pop(row, None)
            self.held_before.pop(row, None)
        if done:
            self.store.flush()

    def _begin(self, row: int, kind: str, keys: Tensor, values: Tensor, queries: Tensor | None, before: BeforeRope | None = None) -> None:
        """Code one segment [Hkv, S, D] of a row; ours are settled later."""
        if self.spans is not None and isinstance(self.coder, BeforeRopeCoder):
            assert before is not None
            before.check(self.index, keys)
            self.spans.add(row, self.coder.code_before(self.index, before, values))
        elif self.spans is not None and self.coder is not None:
            assert queries is not None
            self.spans.add(row, self.coder.code(self.index, keys, values, queries))
        else:
            self.segments.begin(row, kind, keys, values, queries)

    def _code(self, row: int, keys: Tensor, values: Tensor, queries: Tensor | None, before: BeforeRope | None) -> int | None:
        """Code an image [Hkv, S, D] of a row at once; its place in the store's table, None for a rival's."""
        if (selector := self.state.selector) is not None:
            seen = self._of_held(row, keys) if selector.looks(self.index) else None
            kept = selector.keep(row, 0, None, keys.shape[1], seen, self.state.scaling, {})
            keys, values, before = self._select(row, kept, keys, values, before)
        self._begin(row, "visual", keys, values, queries, before)
        return next(iter(self.segments.settle()), None)

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
        self.held_queries = {new: self.held_queries[old] for new, old in enumerate(rows) if old in self.held_queries}
        self.held_before = {new: self.held_before[old] for new, old in enumerate(rows) if old in self.held_before}
        if self.blocks is not None:
            self.blocks.select_rows(rows)
        if self.spans is not None:
            self.spans.select_rows(rows)
        if self.kept is not None:
            self.kept.select_rows(rows)

    def tensors(self) -> list[Tensor]:
        """Every tensor this layer keeps alive for its sequences; a rival's work copy and the artifact's bases are not among them, nor are
        tables of kept tokens, which layers may share (`RotateKCache.kept_segments`)."""
        if not self.is_initialized:
            return []
        parts = [part.tensors() for part in (self.spans, self.blocks) if part is not None]
        parts += [before.tensors() for before in self.held_before.values()]
        return [*self.store.tensors().values(), *self.held_queries.values(), *(x for part in parts for x in part)]

    def reset(self) -> None:
        self.logical_length, self.tail, self.is_initialized = 0, 0, False
        self.held_queries, self.held_before = {}, {}
        if self.spans is not None:
            self.spans.select_rows(())  # the backend knows them too, until the next call makes another
        self.segments, self.spans, self.blocks, self.kept = None, None, None, None  # type: ignore[assignment]

    def offload(self) -> None:
        raise RotateKError("cache offloading is not supported by the compressed cache; turn offloading off")

    def activate_past_recording(self) -> None:
        """Speculative decoding announces itself; cropping works at any time here."""
