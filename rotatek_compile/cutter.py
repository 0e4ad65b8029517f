"""Documents prefilled once and read again with a cut cache: heads' Keys and Values as a plan would store them, or their means.

Only the text after the images is run again, many cuts at a time (rereading.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .bases import Basis
from .batches import Chunk, Encoded, join, merge_media, pad, positions, refuse_gaps
from .geometry import Geometry
from .kernels.slabs import Slabs
from .kernels.table import BLOCK
from .placement import input_device
from .plan import HeadPlan
from .recoding import CodingBasis, Run, recoded, runs_of, segments_of, to_means
from .rereading import Replaced, decoder_layers, noting_entries, rereading, starting_at

Pair = tuple[int, int]  # layer, KV head
Cut = Mapping[int, Mapping[int, HeadPlan]]  # `cut[layer][head]` = what is kept of its Keys and Values
TOGETHER = {"cpu": 2**24, "cuda": 2**27}  # attention logits that the cuts of one forward call may have in one layer


@dataclass(slots=True)
class Prefilled:
    """A left-padded batch of B documents with their image parts in a stock cache, and the dense answer distributions.

    `coded` and `images` say which of the T prefilled columns belong to which segment: float32 [B, T, S], one-hot or all zero.
    """

    items: list[Encoded]
    prefix: Chunk  # [B, T]
    cache: Any  # DynamicCache of stock layers
    coded: Tensor
    images: Tensor
    scored: Tensor  # bool [B, L]: which of the last L columns predict an answer token
    reference: Tensor  # dense log-probabilities [B, L, vocabulary], fp64
    entries: dict[int, Tensor]  # the text's hidden states [B, T', hidden] as they enter each layer without a cut
    runs: list[Run] = field(default_factory=list)  # the segments of `coded`
    homes: tuple[torch.device, ...] = ()  # where each layer's Keys and Values belong while they are parked

    def bytes(self) -> int:
        """Of the cached Keys and Values."""
        return sum(x.numel() * x.element_size() for layer in self.cache.layers for x in (layer.keys, layer.values))

    def kl_from(self, got: Tensor, temperature: float = 1.0) -> Tensor:
        """KL(dense || got) summed over each document's answer tokens, fp64 [B], of log-probabilities [B, L, vocabulary].

        Args:
            temperature: what logits of both are divided by first.
        """
        dense = self.reference
        if temperature != 1:
            dense, got = ((x / temperature).log_softmax(-1) for x in (dense, got))
        kl = (dense.exp() * (dense - got)).sum(-1).clamp_min(0)
        return (kl * self.scored).sum(1)

    def dense_right(self) -> int:
        """Documents of whose answer the dense model would choose every token, given those before it."""
        expected = pad([item.answer for item in self.items], 0).ids.to(self.reference.device)
        return int(((self.reference.argmax(-1) == expected) | ~self.scored).all(1).sum())

    def park(self) -> None:
        """Keep Keys and Values in main memory until they are read again."""
        self.homes = tuple(layer.keys.device for layer in self.cache.layers)
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys.cpu(), layer.values.cpu()

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Parked Keys and Values on their device; they are only read, so nothing goes back."""
        parked = [(layer.keys, layer.values) for layer in self.cache.layers] if self.homes else []
        for layer, home in zip(self.cache.layers, self.homes, strict=False):
            layer.keys, layer.values = layer.keys.to(home), layer.values.to(home)
        try:
            yield
        finally:
            for layer, (keys, values) in zip(self.cache.layers, parked, strict=False):
                layer.keys, layer.values = keys, values


class Cutter:
    """Runs documents with a cut cache. Rows of a batch do not see each other: every figure is that of batch 1 up to rounding.

    Args:
        bases: calibrated basis of the Keys per compressed layer; knock-outs need none, nor do cuts to no direction at all.
        span_all: text before and between the images is cut too.
        values: likewise of the Values.
        window: tokens of text at a prompt's end that a cache keeps raw, what is older being coded in blocks; None: all text is cut, as if
            it were old.

    Attributes:
        watch: called with every batch that is prefilled (usual.py).
    """

    def __init__(
        self,
        model: Any,
        geometry: Geometry,
        bases: Mapping[int, Basis],
        span_all: bool,
        values: Mapping[int, Basis] | None = None,
        window: int | None = None,
    ) -> None:
        self.model, self.geometry, self.span_all, self.window = model, geometry, span_all, window
        self.device, self.dtype = input_device(model), model.dtype
        sides = {"key": bases, "value": values or {}}
        self.spectra = {side: {i: b.spectrum for i, b in found.items()} for side, found in sides.items()}
        self.bases = {side: {i: CodingBasis.of(b, self.device) for i, b in found.items()} for side, found in sides.items()}
        self.layers = decoder_layers(model, len(geometry.layers))
        self.errors = self.temperature = 1.0
        self.watch: Callable[[Prefilled], None] = lambda doc: None

    @torch.inference_mode()
    def prefill(self, *items: Encoded) -> Prefilled:
        """Run the prompts up to their last image tokens, and the rest once for the dense reference."""
        prefix = pad([item.prompt[: item.visual_end] for item in items], 0)
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        visual = torch.zeros_like(prefix.ids, dtype=torch.bool)
        for token in self.geometry.visual_token_ids:
            visual |= prefix.ids == token
        real = prefix.mask.bool()
        images = segments_of(visual & real).to(self.device)
        coded = images
        if self.span_all:
            coded = torch.cat([images, segments_of(self._old_text(real & ~visual, items)).to(self.device)], -1)
        scored = pad([item.answer for item in items], 0).mask.bool().to(self.device)
        doc = Prefilled(list(items), prefix, cache, coded, images, scored, torch.empty(0), {}, runs_of(coded))
        self._forward(doc, prefix, None, 1, merge_media(items, self.device, self.dtype, prefix))
        with noting_entries(self.layers, doc.entries):
            (doc.reference,) = self._answers(doc, [({}, ())])
        self.watch(doc)
        return doc

    def kl(self, doc: Prefilled, plan: Cut) -> tuple[float, int]:
        """Sum of KL(dense || cut) over the answer tokens in nats, and their number."""
        return float(self.kl_rows(doc, plan).sum()), int(doc.scored.sum())

    @torch.inference_mode()
    def kl_rows(self, doc: Prefilled, plan: Cut, dropped: Collection[Pair] = ()) -> Tensor:
        """KL(dense || cut) summed over each document's answer tokens: fp64 [B] on the CPU.

        Args:
            dropped: heads that are knocked out: image Keys and Values replaced by their means over each image.
        """
        return self.kl_each(doc, [(plan, dropped)])[0]

    @torch.inference_mode()
    def kl_each(self, doc: Prefilled, cuts: Sequence[tuple[Cut, Collection[Pair]]]) -> Tensor:
        """`kl_rows` of several cuts, as many at a time as memory allows: fp64 [N, B] on the CPU."""
        queries = max(layer.query_heads for layer in self.geometry.layers) * doc.prefix.ids.numel() * self.rest(doc).ids.shape[1]
        step = max(1, TOGETHER[self.device.type] // queries)
        cuts = [(self._changing(plan), dropped) for plan, dropped in cuts]
        changing = [number for number, (plan, dropped) in enumerate(cuts) if plan or dropped]
        found = torch.zeros(len(cuts), len(doc.items), dtype=torch.float64)  # what changes nothing costs nothing, without rounding
        for start in range(0, len(changing), step):
            numbers = changing[start : start + step]
            for number, got in zip(numbers, self._answers(doc, [cuts[n] for n in numbers]), strict=True):
                found[number] = doc.kl_from(got, self.temperature)
        return found

    def stressed(self, errors: float) -> AbstractContextManager[None]:
        """Cuts whose errors are so many times as large as coding makes them."""
        return self._for_now("errors", errors)

    def tempered(self, temperature: float) -> AbstractContextManager[None]:
        """KL of distributions whose logits are divided by this (`Prefilled.kl_from`)."""
        return self._for_now("temperature", temperature)

    @contextmanager
    def _for_now(self, name: str, value: float) -> Iterator[None]:
        setattr(self, name, value)
        try:
            yield
        finally:
            setattr(self, name, 1.0)

    @contextmanager
    def cut(self, doc: Prefilled, plan: Cut, dropped: Collection[Pair] = ()) -> Iterator[None]:
        """The cache with cut Keys and Values and knocked-out heads, and as it was afterwards."""
        before = [(layer.keys, layer.values) for layer in doc.cache.layers]
        for index, parts in self._replaced(doc, [(self._changing(plan), dropped)]).items():
            layer = doc.cache.layers[index]
            keys, values = layer.keys.clone(), layer.values.clone()
            for part in parts:
                keys[:, part.head] = part.keys
                if part.values is not None:
                    values[:, part.head] = part.values
            layer.keys, layer.values = keys, values
        try:
            yield
        finally:
            self._restore(doc, before)

    @torch.inference_mode()
    def greedy(self, doc: Prefilled, eos: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        """Greedy answers on the cache as it stands (`cut` around it cuts it): new ids per row, the end included."""
        before = [(layer.keys, layer.values) for layer in doc.cache.layers]
        step, seen = pad([item.prompt[item.visual_end :] for item in doc.items], 0), doc.prefix
        out: list[list[int]] = [[] for _ in doc.items]
        try:
            for _ in range(max_new_tokens):
                chosen = self._forward(doc, step, seen, 1)[:, -1].argmax(-1).tolist()
                for row, token in zip(out, chosen, strict=True):
                    if not row or row[-1] not in eos:
                        row.append(token)
                if all(row[-1] in eos for row in out):
                    break
                seen, step = join(seen, step), pad([[token] for token in chosen], 0)
        finally:
            self._restore(doc, before)
        return out

    def _old_text(self, text: Tensor, items: Sequence[Encoded]) -> Tensor:
        """Of the text before the last image, bool [B, T], what a cache has coded once the prompt is read."""
        if self.window is None:
            return text
        count, after = text.sum(1), torch.tensor([len(item.prompt) - item.visual_end for item in items])
        old = (count + after - self.window).clamp_min(0) // BLOCK * BLOCK
        return text & (text.cumsum(1) <= old[:, None])

    def _changing(self, plan: Cut) -> dict[int, dict[int, HeadPlan]]:
        """A cut without the heads that it leaves raw."""
        raw = {i: Slabs(self.geometry.layers[i].head_dim) for i in plan}
        found = {i: {h: head for h, head in heads.items() if head != (raw[i], raw[i])} for i, heads in plan.items()}
        return {i: heads for i, heads in found.items() if heads}

    def _answers(self, doc: Prefilled, cuts: Sequence[tuple[Cut, Collection[Pair]]]) -> Iterator[Tensor]:
        """Log-probabilities [B, L, vocabulary] of the answer tokens under each cut, teacher-forced; the cache is left as it was."""
        rest, count = self.rest(doc), len(cuts)
        replaced = self._replaced(doc, cuts)
        where = positions(doc.items, doc.prefix.mask.sum(1).tolist(), rest.mask)
        with (
            rereading(self.model, doc.cache, count, replaced) as cache,
            starting_at(self.layers, doc.entries, min(replaced, default=0), count),
        ):
            logits = self.model(
                input_ids=rest.ids.repeat(count, 1).to(self.device),
                attention_mask=join(doc.prefix, rest).mask.repeat(count, 1).to(self.device),
                position_ids=where.repeat(*(1,) * (where.dim() - 2), count, 1).to(self.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=doc.scored.shape[1],  # left-padded, so that a row's answer positions are its last ones
            ).logits
        for part in logits.to(self.device).chunk(count):
            yield part.double().log_softmax(-1)

    def rest(self, doc: Prefilled) -> Chunk:
        """The text after the images and the answer but its last token: what is read again."""
        return pad([item.prompt[item.visual_end :] + item.answer[:-1] for item in doc.items], 0)

    def _replaced(self, doc: Prefilled, cuts: Sequence[tuple[Cut, Collection[Pair]]]) -> dict[int, list[Replaced]]:
        """What each cut puts in place of the prefilled Keys and Values."""
        found: dict[int, list[Replaced]] = {}
        for index in {i for plan, dropped in cuts for i in (*plan, *(layer for layer, _ in dropped))}:
            layer, raw = doc.cache.layers[index], Slabs(self.geometry.layers[index].head_dim)
            stored = {"key": layer.keys, "value": layer.values}
            heads = [(head, kept) for plan, _ in cuts for head, kept in plan.get(index, {}).items()]
            coded = {
                side: recoded(
                    x,
                    doc.runs,
                    self.bases[side].get(index),
                    {(head, slabs) for head, kept in heads if (slabs := getattr(kept, side)) != raw},
                    self.errors,
                )
                for side, x in stored.items()
            }
            for number, (plan, dropped) in enumerate(cuts):
                out = {h for i, h in dropped if i == index}
                for head in {*plan.get(index, {}), *out}:
                    if head in out:
                        images = doc.images.to(layer.keys.device)
                        part = Replaced(number, head, to_means(layer.keys[:, head], images), to_means(layer.values[:, head], images))
                    else:
                        kept = plan[index][head]
                        keys = coded["key"].get((head, kept.key), layer.keys[:, head])
                        part = Replaced(number, head, keys, coded["value"].get((head, kept.value)))
                    found.setdefault(index, []).append(part)
        return found

    def _forward(self, doc: Prefilled, chunk: Chunk, before: Chunk | None, keep: int, media: Mapping[str, Tensor] | None = None) -> Tensor:
        starts = before.mask.sum(1).tolist() if before else [0] * len(doc.items)
        refuse_gaps(self.model.config, chunk, before)
        return self.model(
            input_ids=chunk.ids.to(self.device),
            attention_mask=(join(before, chunk) if before else chunk).mask.to(self.device),
            position_ids=positions(doc.items, starts, chunk.mask).to(self.device),
            past_key_values=doc.cache,
            use_cache=True,
            logits_to_keep=keep,
            **(media or {}),
        ).logits

    def _restore(self, doc: Prefilled, before: list[tuple[Tensor, Tensor]]) -> None:
        for layer, (keys, values) in zip(doc.cache.layers, before, strict=True):
            layer.keys, layer.values = keys, values
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = doc.prefix.ids.shape[1]
