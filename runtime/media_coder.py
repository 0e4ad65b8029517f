"""The images and clips of one cache layer: coded as soon as they are complete, held raw until then (DESIGN.md §6).

    commit: columns of an image --> those a row held before, in front --> the tokens that stay --> coded
    hold:   columns of an image that may go on in the next call --> the store, raw; queries and Keys before RoPE beside them

Coded is by our segments (`SegmentCoder`, settled when the next layer has work) or at once by a rival's coder, into `spans`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import RotateKError, UsageError
from .before_rope import BeforeRope
from .coder import BeforeRopeCoder, Coder, real_queries
from .kept_tokens import KeptSegment, KeptTokens
from .media import CallState
from .residual import only
from .segment_coder import SegmentCoder
from .segments import Run, Step, columns
from .spans import CodedSpans
from .token_selection import Seen

QUERIES_HELD = 32  # what methods that look at queries look at (rivals/think.py, online.py)


class MediaCoder:
    """Codes the images of one layer.

    queries: row -> newest queries [Hkv, G, T, D] of the calls that brought what it holds. before: row -> what it holds, before RoPE, for
    coders that ask. spans: image segments of a rival method. kept: which tokens of images are left, where some are dropped.
    """

    def __init__(self, index: int, segments: SegmentCoder, coder: Coder | None, spans: CodedSpans | None, kept: KeptTokens | None) -> None:
        self.index, self.segments, self.coder, self.spans, self.kept = index, segments, coder, spans, kept
        self.queries: dict[int, Tensor] = {}
        self.before: dict[int, BeforeRope] = {}

    def commit(self, row: int, query: Tensor, keys: Tensor, values: Tensor, step: Step, state: CallState) -> None:
        """Code the images of a row that are complete, hold the last one raw if it is not: query [Hq, T, D], keys and values [Hkv, T, D]."""
        media = step.media(row)
        for number, runs in enumerate(media):
            if row in step.unfinished and number == len(media) - 1:
                self._hold(row, runs, query, keys, values, step, state)
            else:
                self._complete(row, number, runs, query, keys, values, step, state)

    def finish(self, rows: Sequence[int], state: CallState) -> None:
        """Code what these rows hold: the image ended with the last call. Rows that share it (beams) go on sharing it."""
        store = self.segments.store
        done: dict[tuple[int, ...], tuple[int, int | None]] = {}
        for row in rows:
            if not (key := store.held_key(row)):
                continue
            if key in done:
                owner, place = done[key]
                store.drop_held(row)
                if place is not None:
                    store.share(row, owner, place)
                elif self.spans is not None:
                    self.spans.add(row, self.spans.rows[owner][-1])
                if self.kept is not None:
                    self.kept.rows[row].append(self.kept.rows[owner][-1])
            else:
                done[key] = row, self._code(row, *store.take_held(row), state)
            self.queries.pop(row, None)
            self.before.pop(row, None)
        if done:
            store.flush()

    def real_queries(self, row: int, query: Tensor, step: Step, state: CallState) -> Tensor | None:
        """Real queries [Hkv, G, T, D] of a row [Hq, T, D], for methods that look at them."""
        prepared = self.segments.prepared
        selects = state.selector is not None and state.selector.looks(self.index)
        if self.coder is None and prepared.method.basis != "paper" and not selects:
            return None
        return real_queries(query, prepared.geometry.kv_heads, step.rows[row])

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may come several times."""
        self.queries = {new: self.queries[old] for new, old in enumerate(rows) if old in self.queries}
        self.before = {new: self.before[old] for new, old in enumerate(rows) if old in self.before}
        if self.spans is not None:
            self.spans.select_rows(rows)
        if self.kept is not None:
            self.kept.select_rows(rows)

    def tensors(self) -> list[Tensor]:
        """Every tensor kept alive here; tables of kept tokens, which layers may share, are not among them."""
        spans = self.spans.tensors() if self.spans is not None else []
        return [*self.queries.values(), *spans, *(tensor for before in self.before.values() for tensor in before.tensors())]

    # -- one image --------------------------------------------------------------------------------------------------------------

    def _hold(self, row: int, runs: Sequence[Run], query: Tensor, keys: Tensor, values: Tensor, step: Step, state: CallState) -> None:
        store, before = self.segments.store, self._before(row, runs, state)
        store.hold(row, columns(keys, runs), columns(values, runs))
        if (queries := self.real_queries(row, query, step, state)) is not None:
            parts = [part for part in (self.queries.get(row), queries) if part is not None]
            self.queries[row] = torch.cat(parts, 2)[:, :, -QUERIES_HELD:].clone()
        selector = state.selector
        if selector is not None and selector.scoring == self.index:  # asked now which of the held tokens would stay
            store.flush()
            held, _ = store.held_parts(row)
            selector.hold(row, held.shape[1], self._of_held(row, held, state), state.scaling)
        if before is not None:
            self.before[row] = self.before[row].then(before) if row in self.before else before.own()

    def _complete(
        self, row: int, number: int, runs: Sequence[Run], query: Tensor, keys: Tensor, values: Tensor, step: Step, state: CallState
    ) -> None:
        """Code the image that `runs` are, or the end of: the first of a call goes on with what the row holds."""
        store, queries, before = self.segments.store, self.real_queries(row, query, step, state), self._before(row, runs, state)
        own_keys, own_values, held = columns(keys, runs), columns(values, runs), 0
        if number == 0 and store.held[row]:
            if row in self.queries and queries is not None:
                queries = torch.cat([self.queries.pop(row), queries], 2)
            held_keys, held_values = store.take_held(row)
            held = held_keys.shape[1]
            own_keys, own_values = torch.cat([held_keys, own_keys], 1), torch.cat([held_values, own_values], 1)
            if before is not None:
                before = self.before.pop(row).then(before)
        if (selector := state.selector) is not None:
            seen = None
            if selector.looks(self.index):
                seen = self._seen(queries, columns(keys, step.rows[row]), own_keys[:, :held], step.rows[row], runs, selector.queries)
            kept = selector.keep(row, number, runs[0], own_keys.shape[1], seen, state.scaling, state.features)
            own_keys, own_values, before = self._select(row, kept, own_keys, own_values, before)
        self._begin(row, own_keys, own_values, queries, before)

    def _code(self, row: int, keys: Tensor, values: Tensor, state: CallState) -> int | None:
        """Code a held image [Hkv, S, D] of a row at once; its place in the store's table, None for a rival's."""
        queries, before = self.queries.get(row), self.before.get(row)
        if (selector := state.selector) is not None:
            seen = self._of_held(row, keys, state) if selector.looks(self.index) else None
            kept = selector.keep(row, 0, None, keys.shape[1], seen, state.scaling, {})
            keys, values, before = self._select(row, kept, keys, values, before)
        self._begin(row, keys, values, queries, before)
        return next(iter(self.segments.settle()), None)

    def _begin(self, row: int, keys: Tensor, values: Tensor, queries: Tensor | None, before: BeforeRope | None) -> None:
        """Code an image [Hkv, S, D] of a row; ours are settled later."""
        if self.spans is not None and isinstance(self.coder, BeforeRopeCoder):
            assert before is not None
            before.check(self.index, keys)
            self.spans.add(row, self.coder.code_before(self.index, before, values))
        elif self.spans is not None and self.coder is not None:
            assert queries is not None
            self.spans.add(row, self.coder.code(self.index, keys, values, queries))
        else:
            self.segments.begin(row, "visual", keys, values, queries)

    # -- what methods look at ---------------------------------------------------------------------------------------------------

    def _before(self, row: int, runs: Sequence[Run], state: CallState) -> BeforeRope | None:
        """These runs of a row before RoPE, for coders that ask."""
        if not isinstance(self.coder, BeforeRopeCoder):
            return None
        if self.index not in (seen := state.before_rope or {}):
            words = f"method {self.coder.name} needs layer {self.index} before RoPE, which was not recorded"
            raise RotateKError(f"{words}; call enabled.show_before_rope() first")
        return seen[self.index].row(row).columns(runs)

    def _seen(self, queries: Tensor | None, keys: Tensor, held: Tensor, real: Sequence[Run], runs: Sequence[Run], newest: int) -> Seen:
        """What the `newest` queries of a call see: `keys` [Hkv, N, D] of its real tokens `real`, and before them the held ones of an image,
        whose further tokens are `runs`."""
        assert queries is not None
        own, start = [slice(0, held.shape[1])] if held.shape[1] else [], held.shape[1]
        for run in real:
            if run in runs:
                own.append(slice(start, start + run.length))
            start += run.length
        newest = min(newest, keys.shape[1])
        return Seen(queries[:, :, -newest:], torch.cat([held, keys], 1) if held.shape[1] else keys, own)

    def _of_held(self, row: int, keys: Tensor, state: CallState) -> Seen:
        """What the newest queries of a held image see of it; text before it is left out."""
        assert state.selector is not None
        return Seen(self.queries[row][:, :, -min(state.selector.queries, keys.shape[1]) :], keys, [slice(0, keys.shape[1])])

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
