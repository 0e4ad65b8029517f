"""What a head matters: KL of the answer tokens when its Keys are cut to a few directions (DESIGN.md §4.4).

The cache is prefilled once per batch of documents with exact Keys; a cut replaces one head's image Keys by their rank-r rebuild
(a knock-out: Keys and Values by their means) and only the text after the images is run again. Energy says nothing across heads
(measured: the plan of least logit error was the worse one by far), so this is the currency in which heads are compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import DynamicCache

from .bases import Basis
from .batches import Chunk, Encoded, join, merge_media, pad, positions
from .geometry import Geometry

Plan = dict[int, list[int]]  # directions kept per KV head, by layer
Pair = tuple[int, int]  # layer, KV head


def levels_for(head_dim: int) -> tuple[int, ...]:
    """Ranks at which heads are cut: nothing, D/16, D/8, D/4 (whole steps of 8)."""
    return tuple(sorted({max(0, head_dim * part // 128) * 8 for part in (0, 1, 2, 4)}))


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


class Cutter:
    """Runs documents with cut Keys. Rows of a batch do not see each other: every figure is that of batch 1 up to rounding.

    Args:
        bases: calibrated visual basis per compressed layer; knock-outs need none.
        span_all: text before and between the images is cut too.
    """

    def __init__(self, model: Any, geometry: Geometry, bases: Mapping[int, Basis], span_all: bool) -> None:
        self.model, self.geometry, self.span_all = model, geometry, span_all
        self.device, self.dtype = next(model.parameters()).device, model.dtype
        self.encode = {i: b.encode.to(self.device, torch.float32) for i, b in bases.items()}
        self.decode = {i: b.decode.to(self.device, torch.float32) for i, b in bases.items()}

    @torch.inference_mode()
    def prefill(self, *items: Encoded) -> Prefilled:
        """Run the prompts up to their last image tokens, and the rest once for the dense reference."""
        prefix = pad([item.prompt[: item.visual_end] for item in items], 0)
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        visual = torch.zeros_like(prefix.ids, dtype=torch.bool)
        for token in self.geometry.visual_token_ids:
            visual |= prefix.ids == token
        real = prefix.mask.bool()
        images = _one_hot(visual & real).to(self.device)
        coded = _one_hot(real).to(self.device) if self.span_all else images
        scored = pad([item.answer for item in items], 0).mask.bool().to(self.device)
        doc = Prefilled(list(items), prefix, cache, coded, images, scored, torch.empty(0))
        self._forward(doc, prefix, None, 1, merge_media(items, self.device, self.dtype))
        doc.reference = self._answer(doc)
        return doc

    def kl(self, doc: Prefilled, plan: Mapping[int, Mapping[int, int]]) -> tuple[float, int]:
        """Sum of KL(dense || cut) over the answer tokens in nats, and their number; `plan[layer][head]` = directions kept."""
        return float(self.kl_rows(doc, plan).sum()), int(doc.scored.sum())

    @torch.inference_mode()
    def kl_rows(self, doc: Prefilled, plan: Mapping[int, Mapping[int, int]], dropped: Collection[Pair] = ()) -> Tensor:
        """KL(dense || cut) summed over each document's answer tokens: fp64 [B] on the CPU.

        Args:
            plan: `plan[layer][head]` = directions kept of the Keys.
            dropped: heads that are knocked out: image Keys and Values replaced by their means over each image.
        """
        with self.cut(doc, plan, dropped):
            got = self._answer(doc)
        kl = (doc.reference.exp() * (doc.reference - got)).sum(-1).clamp_min(0)
        return (kl * doc.scored).sum(1).cpu()

    @contextmanager
    def cut(self, doc: Prefilled, plan: Mapping[int, Mapping[int, int]], dropped: Collection[Pair] = ()) -> Iterator[None]:
        """The cache with cut Keys and knocked-out heads, and as it was afterwards."""
        before = [(layer.keys, layer.values) for layer in doc.cache.layers]
        touched = {*plan, *(layer for layer, _ in dropped)}
        for index in touched:
            layer = doc.cache.layers[index]
            keys, values = layer.keys.clone(), layer.values.clone()
            for head, rank in plan.get(index, {}).items():
                keys[:, head] = self._cut(doc.coded, layer.keys[:, head], index, head, rank)
            for head in (h for i, h in dropped if i == index):
                keys[:, head] = to_means(layer.keys[:, head], doc.images)
                values[:, head] = to_means(layer.values[:, head], doc.images)
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

    def _cut(self, coded: Tensor, keys: Tensor, layer: int, head: int, rank: int) -> Tensor:
        """Keys [B, T, D] with their coded columns rebuilt from `rank` directions and the segment's mean."""
        mean = segment_means(keys, coded)
        rebuilt = mean + ((keys.float() - mean) @ self.encode[layer][head, :, :rank]) @ self.decode[layer][head, :, :rank].mT
        return torch.where(coded.any(-1, keepdim=True), rebuilt.to(keys.dtype), keys)

    def _answer(self, doc: Prefilled) -> Tensor:
        """Log-probabilities [B, L, vocabulary] of the answer tokens, teacher-forced; the cache is left as it was."""
        before = [(layer.keys, layer.values) for layer in doc.cache.layers]
        rest = pad([item.prompt[item.visual_end :] + item.answer[:-1] for item in doc.items], 0)
        try:
            # left-padded, so that a row's answer positions are its last ones
            return self._forward(doc, rest, doc.prefix, doc.scored.shape[1]).double().log_softmax(-1)
        finally:
            self._restore(doc, before)

    def _forward(self, doc: Prefilled, chunk: Chunk, before: Chunk | None, keep: int, media: Mapping[str, Tensor] | None = None) -> Tensor:
        starts = before.mask.sum(1).tolist() if before else [0] * len(doc.items)
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


def segment_means(x: Tensor, segments: Tensor) -> Tensor:
    """Each column's segment mean, fp32 [B, T, D], of x [B, T, D] and one-hot segments float32 [B, T, S]; 0 outside segments."""
    counts = segments.sum(1).clamp_min(1)[:, :, None]
    return segments @ ((segments.mT @ x.float()) / counts)


def to_means(x: Tensor, segments: Tensor) -> Tensor:
    """x [B, T, D] with the columns of every segment replaced by the segment's mean."""
    return torch.where(segments.any(-1, keepdim=True), segment_means(x, segments).to(x.dtype), x)


def _one_hot(columns: Tensor) -> Tensor:
    """Runs of true columns of bool [B, T] as segments: float32 [B, T, S]."""
    starts = columns & ~torch.nn.functional.pad(columns, (1, 0))[:, :-1]
    index = starts.long().cumsum(1) * columns  # 0 outside, then 1, 2, ...
    return torch.nn.functional.one_hot(index)[..., 1:].float()


def measure(cutter: Cutter, items: Sequence[Encoded], levels: Sequence[int], quiet: bool, batch_size: int = 1) -> dict[int, Tensor]:
    """KL per answer token when one head alone is cut: by layer, fp32 [Hkv, levels]."""
    geometry = cutter.geometry
    total = {i: torch.zeros(geometry.layers[i].kv_heads, len(levels), dtype=torch.float64) for i in geometry.compressible}
    cuts = [(i, h, n) for i in geometry.compressible for h in range(geometry.layers[i].kv_heads) for n in range(len(levels))]
    tokens = 0
    with tqdm(total=len(items) * len(cuts), desc="sensitivities", unit="cut", disable=None if not quiet else True, leave=False) as bar:
        for start in range(0, len(items), batch_size):
            doc = cutter.prefill(*items[start : start + batch_size])
            for layer, head, level in cuts:
                kl, _ = cutter.kl(doc, {layer: {head: levels[level]}})
                total[layer][head, level] += kl
                bar.update(len(doc.items))
            tokens += int(doc.scored.sum())
    return {i: (t / max(tokens, 1)).float() for i, t in total.items()}


def joint_kl(cutter: Cutter, docs: Sequence[Prefilled], plan: Plan) -> float:
    """KL per answer token of a whole plan."""
    cuts = {i: dict(enumerate(ranks)) for i, ranks in plan.items()}
    parts = [cutter.kl(doc, cuts) for doc in docs]
    return sum(kl for kl, _ in parts) / max(sum(n for _, n in parts), 1)
