"""An evaluator that generates only where the answer is not known already: what takes most of the time of an evaluation.

A greedy answer equals the reference exactly if, with the reference given, the likeliest token is the next one of the reference at each
place, its end included. That is known after the teacher-forced pass which KL needs anyway. Documents that fail it are generated as ever.
"""

from __future__ import annotations

import copy

from transformers.cache_utils import Cache

from rotatek_compile.batches import Chunk
from rotatek_compile.evaluate import Answered, Evaluator, Prefilled
from rotatek_compile.runtime.accounting import cache_bytes


class SureEvaluator(Evaluator):
    """As `Evaluator`, but that bytes are those of the cache at the end of the reference answers, not of the generated ones."""

    def _answer(self, prefilled: Prefilled, cache: Cache) -> Answered:
        items, prefix, rest = prefilled.items, prefilled.chunk, prefilled.rest
        read = copy.deepcopy(cache)
        logprobs = self._forced(prefilled, read)
        tokens = [n + len(r) + len(item.answer) - 1 for n, r, item in zip(prefix.mask.sum(1).tolist(), rest, items, strict=True)]
        sizes = cache_bytes(read, sum(tokens))
        del read
        generated = [item.answer[: self.max_new_tokens] for item in items]
        open_rows = [row for row, own in enumerate(logprobs) if own.argmax(-1).tolist() != items[row].answer]
        if open_rows:
            cache = copy.deepcopy(cache)  # what was said of the whole batch stays with the caller's
            if len(open_rows) < len(items):
                cache.batch_select_indices(prefilled.logits.new_tensor(open_rows).long())
            some = Chunk(prefix.ids[open_rows], prefix.mask[open_rows])
            asked, first = [items[row] for row in open_rows], prefilled.logits[open_rows]
            for row, own in zip(open_rows, self._greedy(asked, [rest[row] for row in open_rows], some, cache, first), strict=True):
                generated[row] = own
        return Answered(logprobs, generated, sizes, tokens)
