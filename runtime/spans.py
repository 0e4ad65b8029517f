"""Image segments of one cache layer that a rival method coded, and attention over what they rebuild to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..kernels.decode_torch import Partials, merge_partials, partials_of, segment_partials
from ..kernels.table import CacheView
from .backends import TorchBackend
from .coder import CodedSegment, padded


class CodedSpans:
    """Coded segments of B sequences, in order; sequences (beams) may share segments.

    Between steps the rebuilt Keys and Values stay in a work copy, so that decoding is one batched product: fp32
    [B, Hkv, Smax, D], made when first needed, dropped on any change. It is a convenience of measuring, not a part of the
    cache: no byte count holds it.
    """

    def __init__(self, batch: int) -> None:
        self.rows: list[list[CodedSegment]] = [[] for _ in range(batch)]
        self._work: tuple[Tensor, Tensor, Tensor | None] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> CodedSpans:
        twin = CodedSpans(0)
        twin.rows, twin._work = [list(row) for row in self.rows], self._work  # neither is ever changed in place
        return twin

    def add(self, row: int, segment: CodedSegment) -> None:
        """Append a segment to one row."""
        self.rows[row].append(segment)
        self.drop_work()

    def select_rows(self, rows: Iterable[int]) -> None:
        """Keep these rows, in this order, repeats allowed: segments are shared."""
        self.rows = [list(self.rows[row]) for row in rows]
        self.drop_work()

    def drop_work(self) -> None:
        """Free the work copy; the next attention makes it anew."""
        self._work = None

    def _distinct(self) -> Iterator[CodedSegment]:
        yield from {id(segment): segment for row in self.rows for segment in row}.values()

    def bytes(self) -> int:
        """Bytes of all segments, shared ones once."""
        return sum(segment.bytes() for segment in self._distinct())

    def tokens(self) -> int:
        """Coded tokens over all rows, shared ones once."""
        return sum(segment.tokens for segment in self._distinct())

    def tensors(self) -> list[Tensor]:
        """Every tensor the segments keep alive."""
        return [part for segment in self._distinct() for part in segment.parts.values()]

    def partials(self, query: Tensor, scaling: float) -> Partials | None:
        """Unfinished attention of every query [B, Hq, T, D] over all coded tokens of its row; None when there are none.

        Shapes as in `kernels.decode_torch.segment_partials`.
        """
        if not any(self.rows):
            return None
        keys, values, hidden = self._rebuilt()
        batch, query_heads, new, dim = query.shape
        rows = query.float().reshape(batch, keys.shape[1], -1, dim)  # [B, Hkv, G*T, D]
        logits = scaling * rows @ keys.mT
        if hidden is not None:
            logits = logits.masked_fill(hidden, -torch.inf)
        m, mass, acc = partials_of(logits, values)
        return m.reshape(batch, query_heads, new), mass.reshape(batch, query_heads, new), acc.reshape(query.shape)

    def _rebuilt(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The work copy: Keys, Values [B, Hkv, Smax, D] and which columns are padding [B, 1, 1, Smax], None when none are."""
        if self._work is None:
            done = {id(segment): segment.rebuild() for segment in self._distinct()}
            lengths = [sum(segment.tokens for segment in row) for row in self.rows]
            example = next(iter(done.values()))[0]
            empty = example[:, :0]
            stacked = [padded([(empty, empty), *(done[id(segment)] for segment in row)], max(lengths)) for row in self.rows]
            keys, values = (torch.stack(parts) for parts in zip(*stacked, strict=True))
            hidden = None
            if min(lengths) < max(lengths):
                ends = torch.tensor(lengths, device=keys.device)
                hidden = (torch.arange(max(lengths), device=keys.device) >= ends[:, None])[:, None, None]
            self._work = keys, values, hidden
        return self._work


class SpansBackend(TorchBackend):
    """Attention over a rival's coded images, raw text and window, in torch on any device.

    One layer's own: it reads that layer's segments beside the view it is given.
    """

    name = "rival"

    def __init__(self, spans: CodedSpans) -> None:
        self.spans = spans

    def stored(self, query: Tensor, view: CacheView, scaling: float, causal_window: bool) -> Partials:
        text = segment_partials(query, view, scaling, causal_window)
        images = self.spans.partials(query, scaling)
        return text if images is None else merge_partials([text, images])
