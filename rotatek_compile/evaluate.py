"""rotatek-eval as a function: exact match, KL to the dense model and bytes, for the same documents and the same code path.

Two modes say when the question is asked (DESIGN.md §7). `after`: the prompt up to the last image token is prefilled and
compressed, then question and answer run on the compressed cache. `with`: the whole prompt is exact, only the answer runs on it.
"""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicCache

from .batches import Chunk, Encoded, join, merge_media, pad, position_ids
from .runtime.accounting import CacheBytes, cache_bytes

ASK = ("after", "with")


@dataclass(slots=True)
class Row:
    """Totals of one method over the documents."""

    method: str
    exact: int = 0
    anls: float = 0.0
    kl: float = 0.0
    answer_tokens: int = 0
    samples: int = 0
    bytes: CacheBytes = field(default_factory=CacheBytes)
    texts: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The row of DESIGN.md §7; bytes are means per sample."""
        n = max(self.samples, 1)
        mean = {name: value / n for name, value in asdict(self.bytes).items()}
        return {
            "method": self.method,
            "exact_match": self.exact / n,
            "anls": self.anls / n,
            "kl": self.kl / max(self.answer_tokens, 1),
            "kv_bytes": mean["total"],
            "kv_bytes_dense": mean["dense"],
            "kv_bytes_stored": mean["stored"],
            "span_bytes": mean["span"],
            "span_bytes_dense": mean["span_dense"],
            "window_bytes": mean["window"],
            "basis_bytes": mean["basis"],
            "slack_bytes": mean["slack"],
            "table_bytes": mean["tables"],
            "fallback_heads": self.bytes.fallback_heads,
        }


@dataclass(frozen=True, slots=True)
class Answered:
    """One batch through one method: log-probabilities at the answer tokens per sample, generated ids per sample, bytes."""

    logprobs: list[Tensor]
    generated: list[list[int]]
    bytes: CacheBytes


def normalise(text: str) -> str:
    """Unicode NFC, stripped, blanks collapsed, case kept."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Whether the text is one of the reference answers, after `normalise`."""
    return normalise(text) in {normalise(answer) for answer in answers}


def anls(text: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of DocVQA: best over answers, 0 below the threshold; case and blanks ignored."""
    best = 0.0
    for answer in answers:
        a, b = " ".join(text.lower().split()), " ".join(answer.lower().split())
        longest = max(len(text), len(answer))
        best = max(best, 1.0 - _edits(a, b) / longest if longest else 1.0)
    return best if best >= threshold else 0.0


def _edits(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


class Evaluator:
    """Runs batches of encoded samples through a model with a cache of the caller's choice."""

    def __init__(self, model: Any, processor: Any, ask: str, eos: tuple[int, ...], max_new_tokens: int) -> None:
        self.model, self.processor, self.ask, self.eos, self.max_new_tokens = model, processor, ask, eos, max_new_tokens
        self.device, self.dtype = next(model.parameters()).device, model.dtype
        self.pad_id = processor.tokenizer.pad_token_id or 0

    def dense_cache(self) -> Cache:
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    @torch.inference_mode()
    def answer(self, items: Sequence[Encoded], cache: Cache) -> Answered:
        """Prefill, teacher-force the reference answers on a copy of the cache, then answer greedily on the cache itself."""
        whole = self.ask == "with"
        cut = [len(item.prompt) if whole else item.visual_end for item in items]
        prefix = pad([item.prompt[:c] for item, c in zip(items, cut, strict=True)], self.pad_id)
        first = self._forward(prefix, None, cache, merge_media(items, self.device, self.dtype))
        rest = [item.prompt[c:] for item, c in zip(items, cut, strict=True)]
        longest = max(len(item.answer) for item in items)

        # left-padded, so a row's answer positions are its last ones; with `with` the first answer token comes from the prefill
        forced = [r + item.answer[:-1] for r, item in zip(rest, items, strict=True)]
        logits = first[:, :0]
        if any(forced):
            logits = self._forward(pad(forced, self.pad_id), prefix, copy.deepcopy(cache), {}, keep=longest)
        logprobs = []
        for row, item in enumerate(items):
            needed = len(item.answer) - whole
            own = logits[row, logits.shape[1] - needed :]
            parts = [first[row, -1:], own] if whole else [own]
            logprobs.append(torch.cat(parts).double().log_softmax(-1).cpu())
        generated = self._greedy(rest, prefix, cache, first)
        tokens = int(prefix.mask.sum()) + sum(map(len, rest)) + sum(max(len(g) - 1, 0) for g in generated)
        return Answered(logprobs, generated, cache_bytes(cache, tokens))

    def _greedy(self, rest: list[list[int]], prefix: Chunk, cache: Cache, first: Tensor) -> list[list[int]]:
        seen, logits = prefix, first
        if any(rest):
            question = pad(rest, self.pad_id)
            logits, seen = self._forward(question, prefix, cache, {}), join(prefix, question)
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
            logits, seen = self._forward(step, seen, cache, {}), join(seen, step)
        return out

    def _forward(self, chunk: Chunk, before: Chunk | None, cache: Cache, media: dict[str, Tensor], keep: int = 1) -> Tensor:
        mask = (join(before, chunk) if before else chunk).mask.to(self.device)
        return self.model(
            input_ids=chunk.ids.to(self.device),
            attention_mask=mask,
            position_ids=position_ids(mask)[:, -chunk.ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
            **media,
        ).logits

    def text(self, ids: Sequence[int]) -> str:
        """Generated ids as text, end-of-sequence left out."""
        return self.processor.tokenizer.decode([i for i in ids if i not in self.eos], skip_special_tokens=True)


def evaluate(
    evaluator: Evaluator, items: Sequence[Encoded], methods: dict[str, Callable[[], Cache]], batch_size: int, quiet: bool = True
) -> list[Row]:
    """Score methods (name to a maker of fresh caches); the first must be the dense one, which the others are compared with."""
    rows = [Row(name) for name in methods]
    bar = tqdm(total=len(items) * len(methods), desc=f"ask {evaluator.ask}", unit="doc", disable=None if not quiet else True, leave=False)
    with bar:
        for start in range(0, len(items), batch_size):
            batch = list(items[start : start + batch_size])
            reference: list[Tensor] = []
            for row, make_cache in zip(rows, methods.values(), strict=True):
                answered = evaluator.answer(batch, make_cache())
                reference = reference or answered.logprobs
                _score(row, evaluator, batch, answered, reference)
                bar.update(len(batch))
    return rows


def _score(row: Row, evaluator: Evaluator, batch: Sequence[Encoded], answered: Answered, reference: list[Tensor]) -> None:
    for item, got, dense, ids in zip(batch, answered.logprobs, reference, answered.generated, strict=True):
        row.kl += float((dense.exp() * (dense - got)).sum(-1).clamp_min(0).sum())
        row.answer_tokens += len(item.answer)
        text = evaluator.text(ids)
        row.texts.append(text)
        row.exact += exact_match(text, item.sample.answers)
        row.anls += anls(text, item.sample.answers)
    row.samples += len(batch)
    row.bytes += answered.bytes
