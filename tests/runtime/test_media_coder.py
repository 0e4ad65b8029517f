"""Images that a layer holds until they are complete: what is beside them, and who shares them."""

from types import SimpleNamespace

import torch

from rotatek_compile.runtime.coder import CodedSegment
from rotatek_compile.runtime.kept_tokens import KeptTokens
from rotatek_compile.runtime.media import CallState
from rotatek_compile.runtime.media_coder import QUERIES_HELD, MediaCoder
from rotatek_compile.runtime.segments import Run, Step
from rotatek_compile.runtime.spans import CodedSpans

HEADS, DIM = 2, 8


class Held:
    """Stands for a store whose rows hold raw Keys: `keys[row]`; equal ones are shared."""

    def __init__(self, *keys):
        self.keys, self.flushed, self.said = list(keys), 0, []
        self.held = [[0] if x is not None else [] for x in keys]

    def held_key(self, row):
        return (id(self.keys[row]),) if self.keys[row] is not None else ()

    def take_held(self, row):
        keys, self.keys[row], self.held[row] = self.keys[row], None, []
        return keys, keys + 1

    def drop_held(self, row):
        self.keys[row] = None
        self.said.append(("drop", row))

    def share(self, row, owner, place):
        self.said.append(("share", row, owner, place))

    def hold(self, row, keys, values):
        self.keys[row] = keys if self.keys[row] is None else torch.cat([self.keys[row], keys], 1)
        self.held[row] = [0]

    def flush(self):
        self.flushed += 1


class Segments(SimpleNamespace):
    """Stands for our coder of segments: every one settles at place 7."""

    def begin(self, *found):
        self.begun.append(found)

    def settle(self):
        return [7] if self.begun else []


def media_coder(store, coder=None, kept=False, basis="paper"):
    prepared = SimpleNamespace(method=SimpleNamespace(basis=basis), geometry=SimpleNamespace(kv_heads=HEADS))
    spans = CodedSpans(len(store.keys)) if coder is not None else None
    return MediaCoder(0, Segments(store=store, prepared=prepared, begun=[]), coder, spans, KeptTokens(len(store.keys)) if kept else None)


def numbers(tokens, start=0.0):
    return torch.arange(HEADS * tokens * DIM, dtype=torch.float32).reshape(HEADS, tokens, DIM) + start


def test_beams_go_on_sharing_what_they_held():
    """One segment is coded for both, at its place in the store; a row that holds nothing is left alone."""
    keys = numbers(3)
    coder = media_coder(store := Held(keys, keys, None, numbers(3, 9.0)))
    coder.queries = {row: torch.full((1,), float(row)) for row in (0, 1, 3)}
    coder.finish([0, 1, 2, 3], CallState())
    assert [(begun[0], begun[1]) for begun in coder.segments.begun] == [(0, "visual"), (3, "visual")]
    assert [float(begun[4]) for begun in coder.segments.begun] == [0.0, 3.0]  # each with its own queries
    assert store.said == [("drop", 1), ("share", 1, 0, 7)] and store.flushed == 1
    assert coder.queries == {}
    coder.finish([0, 1, 2, 3], CallState())
    assert store.flushed == 1  # nothing was held any more


def test_beams_share_the_segment_of_a_rival_and_its_kept_tokens():
    keys = numbers(4)
    segment = CodedSegment(4, {}, frozenset(), lambda parts, tokens: (keys, keys))
    rival = SimpleNamespace(code=lambda layer, keys, values, queries: segment)
    coder = media_coder(Held(keys, keys), rival, kept=True)
    kept = SimpleNamespace(indices=lambda: torch.tensor([[0, 2]]))
    selector = SimpleNamespace(looks=lambda layer: False, keep=lambda *found: kept)
    coder.queries = {0: torch.zeros(1), 1: torch.zeros(1)}
    coder.finish([0, 1], CallState(selector))
    assert [row == [segment] and row[0] is segment for row in coder.spans.rows] == [True, True]
    assert [row == [kept] for row in coder.kept.rows] == [True, True]


def test_the_newest_queries_stay_beside_a_held_image():
    """Of several calls, in order, and no more than methods look at."""
    coder, calls = media_coder(Held(None)), []
    for length in (QUERIES_HELD - 2, 5):
        query = torch.randn(2 * HEADS, length, DIM)
        calls.append(query.unflatten(0, (HEADS, -1)))
        step = Step(1, length, ((Run(0, length, 1, 0),),), unfinished=frozenset({0}))
        coder.commit(0, query, numbers(length), numbers(length), step, CallState())
    assert torch.equal(coder.queries[0], torch.cat(calls, 2)[:, :, -QUERIES_HELD:])
    last = torch.randn(2 * HEADS, 3, DIM)  # the image ends: its queries are all of them
    coder.commit(0, last, numbers(3), numbers(3), Step(1, 3, ((Run(0, 3, 1, 0),),), going_on=frozenset({0})), CallState())
    ((row, kind, keys, values, queries),) = coder.segments.begun
    assert (row, kind, keys.shape[1], values.shape[1]) == (0, "visual", QUERIES_HELD + 6, QUERIES_HELD + 6)
    expected = torch.cat([*calls, last.unflatten(0, (HEADS, -1))], 2)[:, :, -QUERIES_HELD - 3 :]
    assert torch.equal(queries, expected) and coder.queries == {}


def test_rows_are_selected_with_what_they_hold():
    coder = media_coder(Held(None, None, None))
    coder.queries, coder.before = {0: "a", 2: "c"}, {2: "before"}
    coder.select_rows([2, 1, 0, 2])
    assert coder.queries == {0: "c", 2: "a", 3: "c"} and coder.before == {0: "before", 3: "before"}


def test_queries_are_kept_only_for_those_who_look():
    step, query = Step(1, 2, ((Run(0, 2, 1, 0),),)), torch.zeros(2 * HEADS, 2, DIM)
    looking = CallState(SimpleNamespace(looks=lambda layer: True))
    assert media_coder(Held(None), basis="two-sided").real_queries(0, query, step, CallState()) is None
    for coder, state in (
        (media_coder(Held(None)), CallState()),
        (media_coder(Held(None), basis="two-sided"), looking),
        (media_coder(Held(None), SimpleNamespace(), basis="two-sided"), CallState()),
    ):
        assert coder.real_queries(0, query, step, state).shape == (HEADS, 2, 2, DIM)
