"""Token sequences that are read piece by piece, several at once: pages, and the long texts that follow them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from rotatek_compile.batches import Chunk, Encoded, join, merge_media, pad, positions, refuse_gaps
from rotatek_compile.placement import input_device


class Reader:
    """Reads B token sequences piece by piece into one cache; where they read different numbers of tokens the shorter are left-padded."""

    def __init__(self, model: Any, wholes: Sequence[Encoded], cache: Cache) -> None:
        self.model, self.wholes, self.cache, self.seen = model, list(wholes), cache, [0] * len(wholes)
        self.device = input_device(model)
        self.before: Chunk | None = None

    def copy(self) -> Reader:
        """The same place with a cache of its own."""
        other = Reader(self.model, self.wholes, copy.deepcopy(self.cache))
        other.seen, other.before = list(self.seen), self.before
        return other

    @torch.inference_mode()
    def read(self, counts: int | Sequence[int], pages: Sequence[Encoded] = (), last: int | None = None) -> list[Tensor]:
        """The next `counts` tokens of each sequence, which hold all of its page if pages are given.

        Returns:
            by sequence, fp64 log-probabilities [its count, V] of what follows each token, or of the `last` tokens alone.
        """
        counts = [counts] * len(self.wholes) if isinstance(counts, int) else list(counts)
        chunk = pad([whole.prompt[at : at + n] for whole, at, n in zip(self.wholes, self.seen, counts, strict=True)], 0)
        refuse_gaps(self.model.config, chunk, self.before)
        seen = join(self.before, chunk) if self.before is not None else chunk
        logits = self.model(
            input_ids=chunk.ids.to(self.device),
            attention_mask=seen.mask.to(self.device),
            position_ids=positions(self.wholes, self.seen, chunk.mask).to(self.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last or 0,
            **(merge_media(pages, self.device, self.model.dtype, chunk) if pages else {}),
        ).logits
        self.before, self.seen = seen, [at + n for at, n in zip(self.seen, counts, strict=True)]
        return [own[-min(n, last or n) :].double().log_softmax(-1) for own, n in zip(logits, counts, strict=True)]


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


def words_of(texts: Sequence[list[int]], tokens: int, first: int = 0) -> list[int]:
    """Texts one after the other, from the `first` on, as often as it takes."""
    words = [token for n in range(len(texts)) for token in texts[(first + n) % len(texts)]]
    return (words * (tokens // len(words) + 1))[:tokens]


def random_tokens(tokens: int, vocabulary: int, avoid: Iterable[int], seed: Sequence[int] | int) -> list[int]:
    """Tokens drawn at random."""
    allowed = np.setdiff1d(np.arange(vocabulary), list(avoid))
    drawn: list[int] = np.random.default_rng(seed).choice(allowed, tokens).tolist()
    return drawn


@torch.inference_mode()
def generated(
    model: Any, pages: Sequence[Encoded], tokens: int, cache: Cache, avoid: Iterable[int], seeds: Sequence[Sequence[int] | int]
) -> list[list[int]]:
    """By page, the question about it and what the model writes after it, sampled at temperature 1; `tokens` in all."""
    texts = [question(page) for page in pages]
    reader = Reader(model, [joined([page, text]) for page, text in zip(pages, texts, strict=True)], cache)
    reader.read([page.visual_end for page in pages], pages, last=1)
    seen = torch.stack([own[-1] for own in reader.read([len(text) for text in texts], last=1)])
    more = max(tokens - min(map(len, texts)), 0)
    draws = torch.from_numpy(np.stack([np.random.default_rng(seed).random(more) for seed in seeds])).to(seen.device)
    allowed = torch.ones_like(seen[0]).index_fill_(0, torch.tensor(list(avoid), dtype=torch.int64, device=seen.device), 0)
    assert reader.before is not None
    one = torch.ones(len(pages), 1, dtype=reader.before.mask.dtype)
    places, mask, one = (
        positions(reader.wholes, reader.seen, one).to(reader.device),
        reader.before.mask.to(reader.device),
        one.to(reader.device),
    )
    written: list[Tensor] = []
    for n in range(more):  # nothing is read on the host, which would wait for every step
        sums = (seen.exp() * allowed).cumsum(1)
        written.append(torch.searchsorted(sums, draws[:, n : n + 1] * sums[:, -1:], right=True).clamp_max(sums.shape[1] - 1))
        mask = torch.cat([mask, one], 1)
        given = {"attention_mask": mask, "position_ids": places + n, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        seen = model(input_ids=written[-1].to(reader.device), **given).logits[:, -1].double().log_softmax(-1)
    found = torch.cat(written, 1).tolist() if written else [[] for _ in pages]
    return [[*text, *own][:tokens] for text, own in zip(texts, found, strict=True)]
