"""Token sequences that are read piece by piece: pages, and the long texts that follow them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from rotatek_compile.batches import Encoded, merge_media, positions
from rotatek_compile.placement import input_device


class Reader:
    """Reads one token sequence piece by piece into a cache."""

    def __init__(self, model: Any, whole: Encoded, cache: Cache) -> None:
        self.model, self.whole, self.cache, self.seen = model, whole, cache, 0
        self.device = input_device(model)

    def copy(self) -> Reader:
        """The same place with a cache of its own."""
        other = Reader(self.model, self.whole, copy.deepcopy(self.cache))
        other.seen = self.seen
        return other

    @torch.inference_mode()
    def read(self, count: int, page: Encoded | None = None) -> Tensor:
        """The next `count` tokens, which hold all of a page if one is given; fp64 log-probabilities [count, V] of what follows each."""
        first, self.seen = self.seen, self.seen + count
        ids = torch.tensor([self.whole.prompt[first : self.seen]], device=self.device)
        places = positions([self.whole], [first], torch.ones(1, count, dtype=torch.int64)).to(self.device)
        media = merge_media([page], self.device, self.model.dtype) if page is not None else {}
        mask = torch.ones(1, self.seen, dtype=torch.int64, device=self.device)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=self.cache, use_cache=True, **media)
        logprobs: Tensor = out.logits[0].double().log_softmax(-1)
        return logprobs


def joined(parts: Sequence[Encoded | list[int]]) -> Encoded:
    """Prompts up to the end of their pages, and text, as one sequence; positions go on where the part before ended."""
    ids: list[int] = []
    places: list[Tensor] = []
    axes = next((p.positions.shape[0] for p in parts if isinstance(p, Encoded) and p.positions is not None), 0)
    for part in parts:
        own = part.prompt[: part.visual_end] if isinstance(part, Encoded) else part
        ids = ids + list(own)
        if axes:
            start = int(places[-1].max()) + 1 if places else 0
            found = torch.arange(len(own)).expand(axes, -1)
            if isinstance(part, Encoded) and part.positions is not None:
                found = part.positions[:, : part.visual_end]
            places.append(found + start)
    first = next(part for part in parts if isinstance(part, Encoded))
    return replace(first, prompt=ids, visual_end=len(ids), positions=torch.cat(places, 1) if axes else None)


def question(item: Encoded) -> list[int]:
    """What follows the page in a prompt."""
    return item.prompt[item.visual_end :]


def words_of(items: Sequence[Encoded], tokens: int) -> list[int]:
    """Questions and answers of documents one after the other, as often as it takes."""
    words = [token for item in items for token in (*question(item), *item.answer[:-1])]
    return (words * (tokens // len(words) + 1))[:tokens]


def random_tokens(tokens: int, vocabulary: int, avoid: Iterable[int], seed: int) -> list[int]:
    """Tokens drawn at random."""
    allowed = np.setdiff1d(np.arange(vocabulary), list(avoid))
    drawn: list[int] = np.random.default_rng(seed).choice(allowed, tokens).tolist()
    return drawn


def generated(model: Any, page: Encoded, tokens: int, cache: Cache, avoid: Iterable[int], seed: int) -> list[int]:
    """The question about a page, and what the model writes after it, sampled; `tokens` in all."""
    draws, text, avoided = np.random.default_rng(seed), question(page), list(avoid)
    reader = Reader(model, joined([page, text]), cache)
    reader.read(page.visual_end, page)
    seen = reader.read(len(text))[-1]
    while len(text) < tokens:
        chances = seen.exp().cpu().numpy()
        chances[avoided] = 0
        text.append(int(np.searchsorted(chances.cumsum(), draws.random() * chances.sum(), side="right")))
        reader.whole = joined([page, text])
        seen = reader.read(1)[-1]
    return text[:tokens]
