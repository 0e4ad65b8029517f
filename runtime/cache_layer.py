"""One layer of the compressed cache.

Data flow of one layer in one forward call:

    attention module --k, v--> RotateKLayer.update() --Handle--> rotatek_attention() --> Handle.attend(q) --> Handle.commit(q)

`update` alone sees neither queries nor token kinds, so nothing is coded there. `attend` gives the attention output (exact for
tokens that arrive together, from the compact cache for all others), then `commit` codes what is complete and frees the raw
Keys and Values: at most one layer is alive at full width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..errors import RotateKError
from ..kernels.table import BLOCK, Kind
from .backends import Backend
from .coder import Coder, real_queries
from .encode import Observed, Rules, as_published, choose, write
from .handle import Handle
from .media import CallState
from .prepared import PreparedArtifact, PreparedLayer
from .residual import only, without, worst_tokens
from .segments import Step
from .spans import CodedSpans, SpansBackend
from .store import Store
from .text_blocks import TextBlocks

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
        self.store: Store = None  # type: ignore[assignment]
        self.spans: CodedSpans | None = None  # image segments of a rival method
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
        self.store = Store(batch, heads, dim, key_states.dtype, key_states.device, self.prepared)
        self.real = np.zeros(batch, dtype=np.int64)
        if "text" in self.prepared.kinds:
            self.blocks = TextBlocks(self.store, self.prepared.kinds["text"], self._rules(own_parts=True))
        if self.coder is not None:
            self.spans = CodedSpans(batch)
            self.backend = SpansBackend(self.spans)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Handle, Handle]:  # type: ignore[override]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, length, _ = key_states.shape
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
            self._retire()
        self.logical_length += length
        self.real += length if appended else [step.tokens(row) for row in range(batch)]
        if appended:
            self.store.window.append(key_states, value_states)
            self.tail += length
        handle = Handle(self, step, key_states, value_states, appended)
        return handle, handle

    # -- storing ----------------------------------------------------------------------------------------------------------------

    def commit(self, query: Tensor, keys: Tensor, values: Tensor, step: Step) -> None:
        """Store a call's tokens: query [B, Hq, T, D], keys and values [B, Hkv, T, D]."""
        tail = self.tail + step.length if step.plain_text else step.text_tail()
        for row in range(step.batch):
            self._commit_media(row, query[row], keys[row], values[row], step)
            left = self._commit_text(row, query[row], keys[row], values[row], step)
            # the window may also hold text from before what has left, which is not the newest
            tail = tail if left is None else min(tail, left)
        self.store.flush()
        self.tail = tail

    def _commit_media(self, row: int, query: Tensor, keys: Tensor, values: Tensor, step: Step) -> None:
        """Code the images and clips of a row that are complete, hold the last one raw if it is not (DESIGN.md §6)."""
        media = step.media(row)
        for number, columns in enumerate(media):
            index = torch.from_numpy(columns).to(keys.device)
            contiguous = len(columns) == columns[-1] - columns[0] + 1
            place = slice(int(columns[0]), int(columns[-1]) + 1)
            own_keys, own_values = (side[:, place] if contiguous else side.index_select(1, index) for side in (keys, values))
            if row in step.unfinished and number == len(media) - 1:
                self.store.hold(row, own_keys, own_values)
                self._hold_queries(row, query, step)
            else:
                queries = self._queries(row, query, step)
                if number == 0 and self.store.held[row]:
                    if row in self.held_queries and queries is not None:
                        queries = torch.cat([self.held_queries.pop(row), queries], 2)
                    held_keys, held_values = self.store.take_held(row)
                    own_keys, own_values = torch.cat([held_keys, own_keys], 1), torch.cat([held_values, own_values], 1)
                self._code(row, "visual", own_keys, own_values, queries)

    def _commit_text(self, row: int, query: Tensor, keys: Tensor, values: Tensor, step: Step) -> int | None:
        """Text goes to the window; what is older than the window leaves it at once, in whole blocks.

        Returns:
            how many of the call's text tokens are in the window if some left it, else None.
        """
        method = self.prepared.method
        columns = torch.from_numpy(step.text_columns(row)).to(keys.device)
        if not columns.numel():
            return None
        text_keys, text_values = keys.index_select(1, columns), values.index_select(1, columns)
        old, left = columns.numel() - method.window, None
        if old >= BLOCK:
            old -= old % BLOCK
            left = columns.numel() - old
            if method.span == "all":
                self._code(row, "text", text_keys[:, :old], text_values[:, :old], self._queries(row, query, step))
            else:
                self.store.add_dense(row, text_keys[:, :old], text_values[:, :old])
            text_keys, text_values = text_keys[:, old:], text_values[:, old:]
        self.store.window.append_row(row, text_keys, text_values)
        return left

    def _queries(self, row: int, query: Tensor, step: Step) -> Tensor | None:
        """Real queries [Hkv, G, T, D] of a row, for methods that look at them."""
        if self.coder is None and self.prepared.method.basis != "paper":
            return None
        return real_queries(query, self.prepared.geometry.kv_heads, step.rows[row])

    def _hold_queries(self, row: int, query: Tensor, step: Step) -> None:
        queries = self._queries(row, query, step)
        if queries is not None:
            parts = [part for part in (self.held_queries.get(row), queries) if part is not None]
            self.held_queries[row] = torch.cat(parts, 2)[:, :, -QUERIES_HELD:].clone()

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
            else:
                done[key] = row, self._code(row, "visual", *self.store.take_held(row), self.held_queries.get(row))
            self.held_queries.pop(row, None)
        if done:
            self.store.flush()

    def _code(self, row: int, kind: str, keys: Tensor, values: Tensor, queries: Tensor | None) -> int | None:
        """Code one segment [Hkv, S, D] of a row; its place in the store's table, None for a rival's."""
        prepared, method = self.prepared, self.prepared.method
        if self.spans is not None and self.coder is not None:
            assert queries is not None
            self.spans.add(row, self.coder.code(self.index, keys, values, queries))
            return None
        basis, sides = prepared.kinds[kind], [keys, values]
        rules = self._rules(self.store.own_parts(row, keys.shape[1]))
        if (escaping := int(keys.shape[1] * method.escape_ratio)) and rules.own_parts:
            tokens = worst_tokens(sides, basis.sides, escaping)
            self.store.add_dense(row, only(keys, tokens), only(values, tokens), Kind.CODED)
            sides = [without(x, tokens) for x in sides]
        given = [None, None] if rules.own_parts else self.store.given(row, kind, [side.slabs for side in basis.sides])
        seen = [Observed(x, side, rules, like) for x, side, like in zip(sides, basis.sides, given, strict=True)]
        where = choose(seen)
        coded = [one.coded(at, self.store.dtype) for one, at in zip(seen, where, strict=True)]
        if method.basis == "paper":
            assert queries is not None
            where[0] = as_published(sides[0], queries.float(), basis.key)
            coded[0] = write(sides[0], where[0], self.store.dtype)
        self.store.monitor.see(row, where, keys.shape[1])
        placed = [(self.store.place(at, side, scales), codes) for at, side, (codes, scales) in zip(where, basis.sides, coded, strict=True)]
        if method.kv_budget is not None:
            self.store.first.setdefault((row, kind), [fields for fields, _ in placed])
        return self.store.add_coded(row, sides[0].shape[1], placed)

    def _rules(self, own_parts: bool) -> Rules:
        method = self.prepared.method
        return Rules(method.prior_tokens, method.fallback_factor, own_parts, same_bytes=method.kv_budget is not None)

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
            if self.blocks is not None:
                self.blocks.write(row, keys, values)
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
        self.store.select_rows(rows)
        self.real = self.real[rows]
        self.held_queries = {new: self.held_queries[old] for new, old in enumerate(rows) if old in self.held_queries}
        if self.blocks is not None:
            self.blocks.select_rows(rows)
        if self.spans is not None:
            self.spans.select_rows(rows)

    def tensors(self) -> list[Tensor]:
        """Every tensor this layer keeps alive for its sequences; a rival's work copy and the artifact's bases are not among them."""
        if not self.is_initialized:
            return []
        parts = [part.tensors() for part in (self.spans, self.blocks) if part is not None]
        return [*self.store.tensors().values(), *self.held_queries.values(), *(x for part in parts for x in part)]

    def reset(self) -> None:
        self.logical_length, self.tail, self.is_initialized = 0, 0, False
        self.held_queries = {}
        if self.spans is not None:
            self.spans.select_rows(())  # the backend knows them too, until the next call makes another
        self.store, self.spans, self.blocks = None, None, None  # type: ignore[assignment]

    def offload(self) -> None:
        raise RotateKError("cache offloading is not supported by the compressed cache; turn offloading off")

    def activate_past_recording(self) -> None:
        """Speculative decoding announces itself; cropping works at any time here."""
