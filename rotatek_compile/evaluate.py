"""rotatek-eval as a function: exact match, KL to the dense model and bytes, for the same documents and the same code path.

Two modes say when the question is asked (DESIGN.md §7). `after`: the prompt up to the last image token is prefilled and
compressed, then question and answer run on the compressed cache. `with`: the whole prompt is exact, only the answer runs on it.
A batch is prefilled once, whatever the number of methods: prefill is exact for all of them (runtime/recording.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicCache

from .batches import Chunk, Encoded, join, merge_media, pad, positions, refuse_gaps
from .outcomes import Outcome, Row, shares
from .placement import input_device
from .runtime.accounting import CacheBytes
from .runtime.cache import RotateKCache
from .runtime.enable import active
from .runtime.rap_load import bytes_of
from .runtime.recording import Recording, fill, record, stock_cache
from .scores import anls, exact_match, score


@dataclass(frozen=True, slots=True)
class Answered:
    """One batch through one method: fp64 log-probabilities [answer tokens, vocabulary] per sample, generated ids, bytes.

    tokens: real tokens each sample has in the cache with its reference answer, at which the bytes are counted (the last is never fed).
    """

    logprobs: list[Tensor]
    generated: list[list[int]]
    bytes: CacheBytes
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A batch after its exact part: what was read, what is left of each prompt, the last logits [B, 1, V], and the Keys and Values.

    `exact` is a recording that fills any cache, or a stock cache where the model is not inside `enable()`.
    """

    items: Sequence[Encoded]
    chunk: Chunk
    rest: list[list[int]]
    logits: Tensor
    exact: Recording | Cache


class Evaluator:
    """Runs batches of encoded samples through a model with a cache of the caller's choice."""

    def __init__(self, model: Any, processor: Any, ask: str, eos: tuple[int, ...], max_new_tokens: int) -> None:
        self.model, self.processor, self.ask, self.eos, self.max_new_tokens = model, processor, ask, eos, max_new_tokens
        self.device, self.dtype = input_device(model), model.dtype
        self.pad_id = processor.tokenizer.pad_token_id or 0
        self.drift_said = False

    def dense_cache(self) -> Cache:
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    @torch.inference_mode()
    def prefill(self, items: Sequence[Encoded]) -> Prefilled:
        """Run the exact part of the prompts, once for all methods."""
        chunk, rest = self._exact_part(items)
        media = merge_media(items, self.device, self.dtype, chunk)
        if active(self.model) is not None:
            recording = record(self.model, **self._inputs(items, chunk, None), logits_to_keep=1, **media)
            return Prefilled(items, chunk, rest, recording.logits, recording)
        cache = self.dense_cache()
        return Prefilled(items, chunk, rest, self._forward(items, chunk, None, cache, media), cache)

    @torch.inference_mode()
    def finish(self, prefilled: Prefilled, cache: Cache) -> Answered:
        """Teacher-force the reference answers and answer greedily, after a shared prefill.

        Args:
            cache: a fresh cache of the method; anything but a `RotateKCache` stands for the dense model.
        """
        exact = prefilled.exact
        if isinstance(exact, Cache):
            if isinstance(cache, RotateKCache):
                raise RuntimeError("a compressed cache needs the model inside rotatek_compile.enable()")
            return self._answer(prefilled, copy.deepcopy(exact))
        if not isinstance(cache, RotateKCache):
            return self._answer(prefilled, stock_cache(self.model.config, exact))
        fill(cache, exact)
        if not self.drift_said:  # once for all documents and methods
            cache.check_drift()
            self.drift_said = cache.drift_said
        return self._answer(prefilled, cache)

    @torch.inference_mode()
    def answer(self, items: Sequence[Encoded], cache: Cache) -> Answered:
        """Prefill into this cache, then as `finish`: the path that `prefill` and `finish` must equal."""
        chunk, rest = self._exact_part(items)
        logits = self._forward(items, chunk, None, cache, merge_media(items, self.device, self.dtype, chunk))
        return self._answer(Prefilled(items, chunk, rest, logits, cache), cache)

    def text(self, ids: Sequence[int]) -> str:
        """Generated ids as text, end-of-sequence left out."""
        return self.processor.tokenizer.decode([i for i in ids if i not in self.eos], skip_special_tokens=True)

    def _exact_part(self, items: Sequence[Encoded]) -> tuple[Chunk, list[list[int]]]:
        cut = [len(item.prompt) if self.ask == "with" else item.visual_end for item in items]
        prefix = pad([item.prompt[:c] for item, c in zip(items, cut, strict=True)], self.pad_id)
        return prefix, [item.prompt[c:] for item, c in zip(items, cut, strict=True)]

    def _answer(self, prefilled: Prefilled, cache: Cache) -> Answered:
        """Teacher-forced, then generated where that does not tell already what would be.

        A greedy answer equals the reference exactly if, given the reference, the likeliest token is its next one at each place, its end
        included. Not so where text is coded in between: read at once, all of it was seen raw. All methods are counted with the same tokens
        in the cache: those of the reference answers.
        """
        items, prefix, rest = prefilled.items, prefilled.chunk, prefilled.rest
        read = copy.deepcopy(cache)
        logprobs = self._forced(prefilled, read)
        tokens = [n + len(r) + len(item.answer) - 1 for n, r, item in zip(prefix.mask.sum(1).tolist(), rest, items, strict=True)]
        sizes = bytes_of(self.model, read, sum(tokens))
        del read
        generated = [self._to_end(item.answer[: self.max_new_tokens]) for item in items]
        more = [len(r) + len(item.answer) for r, item in zip(rest, items, strict=True)]
        coded = cache.codes_text(more) if isinstance(cache, RotateKCache) else [False] * len(items)
        open_rows = [row for row, own in enumerate(logprobs) if coded[row] or own.argmax(-1).tolist() != items[row].answer]
        if open_rows:
            cache = copy.deepcopy(cache)  # what was said of the whole batch stays with the caller's
            if len(open_rows) < len(items):
                cache.batch_select_indices(torch.tensor(open_rows, device=prefilled.logits.device))
            some = Chunk(prefix.ids[open_rows], prefix.mask[open_rows])
            asked, first = [items[row] for row in open_rows], prefilled.logits[open_rows]
            for row, own in zip(open_rows, self._greedy(asked, [rest[row] for row in open_rows], some, cache, first), strict=True):
                generated[row] = own
        return Answered(logprobs, generated, sizes, tokens)

    def _to_end(self, ids: list[int]) -> list[int]:
        """Up to the first token that ends an answer."""
        end = next((n for n, token in enumerate(ids) if token in self.eos), len(ids))
        return ids[: end + 1]

    def _forced(self, prefilled: Prefilled, cache: Cache) -> list[Tensor]:
        """Log-probabilities of every reference answer, its end included; the cache takes the question and the answers."""
        items, prefix, rest, first = prefilled.items, prefilled.chunk, prefilled.rest, prefilled.logits
        # left-padded, so a row's answer positions are its last ones; where nothing of the prompt is left (with `with`, or a chat template
        # that ends on the image) the first answer token comes from the prefill
        forced = [r + item.answer[:-1] for r, item in zip(rest, items, strict=True)]
        logits = first[:, :0]
        if any(forced):
            longest = max(len(item.answer) for item in items)
            logits = self._forward(items, pad(forced, self.pad_id), prefix, cache, {}, keep=longest)
        logprobs = []
        for row, item in enumerate(items):
            needed = len(item.answer) - (not rest[row])
            own = logits[row, logits.shape[1] - needed :]
            parts = [own] if rest[row] else [first[row, -1:], own]
            logprobs.append(torch.cat(parts).double().log_softmax(-1))
        return logprobs

    def _greedy(self, items: Sequence[Encoded], rest: list[list[int]], prefix: Chunk, cache: Cache, first: Tensor) -> list[list[int]]:
        seen, logits = prefix, first
        if any(rest):
            question = pad(rest, self.pad_id)
            logits, seen = self._forward(items, question, prefix, cache, {}), join(prefix, question)
            for row, left in enumerate(rest):
                if not left:
                    logits[row, -1] = first[row, -1]
        out: list[list[int]] = [[] for _ in rest]
        done = [False] * len(rest)
        for number in range(self.max_new_tokens):
            chosen = logits[:, -1].argmax(-1).tolist()
            for row, token in enumerate(chosen):
                if not done[row]:
                    out[row].append(token)
                    done[row] = token in self.eos
            if all(done) or number == self.max_new_tokens - 1:
                break  # the last token is never fed back
            step = pad([[token] for token in chosen], self.pad_id)
            logits, seen = self._forward(items, step, seen, cache, {}), join(seen, step)
        return out

    def _inputs(self, items: Sequence[Encoded], chunk: Chunk, before: Chunk | None) -> dict[str, Tensor]:
        starts = before.mask.sum(1).tolist() if before else [0] * len(items)
        refuse_gaps(self.model.config, chunk, before)
        return {
            "input_ids": chunk.ids.to(self.device),
            "attention_mask": (join(before, chunk) if before else chunk).mask.to(self.device),
            "position_ids": positions(items, starts, chunk.mask).to(self.device),
        }

    def _forward(
        self, items: Sequence[Encoded], chunk: Chunk, before: Chunk | None, cache: Cache, media: dict[str, Tensor], keep: int = 1
    ) -> Tensor:
        inputs = self._inputs(items, chunk, before)
        return self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep, **media).logits


def evaluate(
    evaluator: Evaluator,
    items: Sequence[Encoded],
    methods: dict[str, Callable[[], Cache]],
    batch_size: int,
    quiet: bool = True,
    finished: Mapping[int, list[list[Outcome]]] | None = None,
    keep: Callable[[int, list[list[Outcome]]], None] = lambda number, batch: None,
    numbers: Sequence[int] | None = None,
) -> list[Row]:
    """Score methods (name to a maker of fresh caches); the first must be the dense one, which the others are compared with.

    Args:
        finished: what earlier runs found, by number of the batch: per method, per document. These batches are not run again.
        keep: called after each batch with its number and what was found, also in an earlier run.
        numbers: of the batches to measure, ascending; by default all.
    """
    rows = [Row(name) for name in methods]
    batches = range(-(-len(items) // batch_size)) if numbers is None else numbers
    documents = sum(min(batch_size, len(items) - number * batch_size) for number in batches)
    bar = tqdm(total=documents * len(methods), desc=f"ask {evaluator.ask}", unit="doc", disable=None if not quiet else True, leave=False)
    with bar:
        for number in batches:
            if finished and number in finished:
                found = finished[number]
                bar.update(sum(map(len, found)))
            else:
                found = _batch(evaluator, list(items[number * batch_size : (number + 1) * batch_size]), methods, bar)
            keep(number, found)
            for row, outcomes in zip(rows, found, strict=True):
                row.outcomes += outcomes
    return rows


def _batch(evaluator: Evaluator, batch: list[Encoded], methods: dict[str, Callable[[], Cache]], bar: Any) -> list[list[Outcome]]:
    prefilled = evaluator.prefill(batch)
    found: list[list[Outcome]] = []
    reference: list[Tensor] = []
    for name, make_cache in methods.items():
        answered = evaluator.finish(prefilled, make_cache())
        reference = reference or answered.logprobs
        found.append(_score(name, evaluator, batch, answered, reference))
        bar.update(len(batch))
    return found


def _score(name: str, evaluator: Evaluator, batch: list[Encoded], answered: Answered, reference: list[Tensor]) -> list[Outcome]:
    outcomes = []
    parts = zip(batch, answered.logprobs, reference, answered.generated, shares(answered.bytes, answered.tokens), strict=True)
    for item, got, dense, ids, own in parts:
        text = evaluator.text(ids)
        outcomes.append(
            Outcome(
                id=item.sample.id,
                skill=getattr(item.sample, "skill", ""),
                method=name,
                exact=exact_match(text, item.sample.answers),
                anls=anls(text.strip(), item.sample.answers),  # as `score` does: blanks at the ends would count in the length
                kl=float((dense.exp() * (dense - got)).sum(-1).clamp_min(0).sum()),
                answer_tokens=len(item.answer),
                text=text,
                bytes=own,
                score=score(item.sample.metric, text, item.sample.answers, item.sample.details),
                metric=item.sample.metric,
            )
        )
    return outcomes
