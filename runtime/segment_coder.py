"""Coding the segments of one layer, in two halves, so that the host never waits for a device that waits for the host.

`look` measures segments on the device and sends for the figures; `settle` decides with them and writes the codes. Between the two the
device has the next layer to compute: the decisions about one layer are made while it does (cache_layer.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.table import Kind
from ..plan import escape_tokens
from .encode import as_published, decide, look, write, write_observed
from .observed import Figures, Observed, Rules, observe
from .prepared import PreparedLayer
from .residual import energies, only, without, worst_tokens
from .store import Store


@dataclass(slots=True)
class _Begun:
    """A segment that was begun: Keys and Values [H, S, D] without escape tokens; `tokens` counts these, too.

    queries: [H, G, T, D], where the basis is made of them. rules.own_parts: else mean and scales are those of a segment before.
    whole: energies [H, D] of Keys and Values with their escape tokens, where there are some.
    """

    row: int
    kind: str
    tokens: int
    sides: list[Tensor]
    queries: Tensor | None
    rules: Rules
    whole: Figures | None = None


class SegmentCoder:
    """Codes segments of one layer into its store: `begin` each, `look` at all of them, `settle`."""

    def __init__(self, store: Store, prepared: PreparedLayer) -> None:
        self.store, self.prepared = store, prepared
        self.begun: list[_Begun] = []
        self._seen: list[Observed] = []  # two for each in `begun` with parts of its own, in order
        self._figures: Figures | None = None  # of all in `_seen`

    def begin(self, row: int, kind: str, keys: Tensor, values: Tensor, queries: Tensor | None) -> None:
        """Begin to code a segment [H, S, D] of a row."""
        sides, tokens = [keys, values], keys.shape[1]
        rules, whole = self.rules(self.store.own_parts(row, tokens)), None
        if (escaping := escape_tokens(tokens, self.prepared.method.escape_ratio)) and rules.own_parts:
            worst = worst_tokens(sides, self.prepared.kinds[kind].sides, escaping)
            self.store.add_dense(row, only(keys, worst), only(values, worst), Kind.CODED)
            whole = Figures([energies(x, side) for x, side in zip(sides, self.prepared.kinds[kind].sides, strict=True)])
            sides = [without(x, worst) for x in sides]
        self.begun.append(_Begun(row, kind, tokens, sides, queries, rules, whole))

    def look(self) -> None:
        """Measure what was begun, all at once, and send for the figures."""
        own = [one for one in self.begun if one.rules.own_parts]
        sides = [pair for one in own for pair in zip(one.sides, self.prepared.kinds[one.kind].sides, strict=True)]
        if sides:
            self._seen = observe(sides, own[0].rules)
            self._figures = look(self._seen)

    def settle(self) -> list[int]:
        """Decide about all that was begun and store it; places in the store's table. The store still has to be flushed.

        Segments without parts of their own come last, because they use those of the first.
        """
        if self._figures is None:
            self.look()
        begun, seen, figures = self.begun, self._seen, self._figures
        self.begun, self._seen, self._figures = [], [], None
        places = self._store([one for one in begun if one.rules.own_parts], seen, figures)
        for one in begun:
            if not one.rules.own_parts:
                sides = self.prepared.kinds[one.kind].sides
                given = self.store.given(one.row, one.kind, [side.slabs for side in sides])
                seen = observe(list(zip(one.sides, sides, strict=True)), one.rules, given)
                places += self._store([one], seen, look(seen))
        return places

    def rules(self, own_parts: bool) -> Rules:
        """How far a segment may depart from the plan."""
        method = self.prepared.method
        return Rules(method.prior_tokens, method.fallback_factor, own_parts, same_bytes=method.kv_budget is not None)

    def _store(self, begun: list[_Begun], seen: list[Observed], figures: Figures | None) -> list[int]:
        """Decide and write; `seen` has two sides for each in `begun`."""
        if figures is None:
            return []
        store, tables = self.store, figures.arrive()
        where = decide(seen, tables)
        coded, places = write_observed(seen, where, store.dtype), []
        for n, one in enumerate(begun):
            basis, at, codes = self.prepared.kinds[one.kind], where[2 * n : 2 * n + 2], coded[2 * n : 2 * n + 2]
            if self.prepared.method.basis == "paper":
                assert one.queries is not None
                at[0] = as_published(one.sides[0], one.queries.float(), basis.key)
                codes[0] = write(one.sides[0], at[0], store.dtype)
            store.monitor.see(one.row, at, one.tokens)
            if one.rules.own_parts and self.prepared.method.token_method is None:  # some of an image's tokens are unlike all of them
                shown = one.whole.arrive() if one.whole is not None else [table[:, : store.dim] for table in tables[2 * n : 2 * n + 2]]
                store.monitor.compare(one.row, basis.sides, shown, one.tokens)
            placed = [(store.place(w, side, scales), part) for w, side, (part, scales) in zip(at, basis.sides, codes, strict=True)]
            if self.prepared.method.kv_budget is not None:
                store.first.setdefault((one.row, one.kind), [fields for fields, _ in placed])
            places.append(store.add_coded(one.row, one.sides[0].shape[1], placed))
        return places
