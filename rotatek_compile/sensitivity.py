"""What a head matters: KL of the answer tokens when its Keys are cut to a few directions (DESIGN.md §4.4).

The cache is prefilled once per document with exact Keys; a cut replaces one head's image Keys by their rank-r rebuild and only
the text after the images is run again. Energy says nothing across heads (measured: the plan of least logit error was the worse
one by far), so this is the currency in which heads are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import DynamicCache

from .bases import Basis
from .batches import Encoded, merge_media
from .geometry import Geometry

Plan = dict[int, list[int]]  # directions kept per KV head, by layer


def levels_for(head_dim: int) -> tuple[int, ...]:
    """Ranks at which heads are cut: nothing, D/16, D/8, D/4 (whole steps of 8)."""
    return tuple(sorted({max(0, head_dim * part // 128) * 8 for part in (0, 1, 2, 4)}))


@dataclass(slots=True)
class Prefilled:
    """One document with its image part in a stock cache, and the dense answer distribution."""

    item: Encoded
    cache: Any  # DynamicCache of stock layers
    visual: Tensor  # columns of image tokens
    segments: list[slice]
    reference: Tensor  # dense log-probabilities [answer tokens, vocabulary], fp64


class Cutter:
    """Runs documents with cut Keys. All methods work on one document at a time, batch 1.

    Args:
        bases: calibrated visual basis per compressed layer.
        span_all: text before and between the images is cut too.
    """

    def __init__(self, model: Any, geometry: Geometry, bases: dict[int, Basis], span_all: bool) -> None:
        self.model, self.geometry, self.span_all = model, geometry, span_all
        self.device, self.dtype = next(model.parameters()).device, model.dtype
        self.encode = {i: b.encode.to(self.device, torch.float32) for i, b in bases.items()}
        self.decode = {i: b.decode.to(self.device, torch.float32) for i, b in bases.items()}

    @torch.inference_mode()
    def prefill(self, item: Encoded) -> Prefilled:
        """Run the prompt up to the last image token, and the rest once for the dense reference."""
        ids = torch.tensor([item.prompt[: item.visual_end]], device=self.device)
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        media = merge_media([item], self.device, self.dtype)
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **media)
        visual = torch.zeros(ids.shape[1], dtype=torch.bool)
        for token in self.geometry.visual_token_ids:
            visual |= ids[0].cpu() == token
        if self.span_all:
            visual[:] = True
        columns = visual.nonzero().flatten()
        breaks = (columns.diff() > 1).nonzero().flatten().tolist()
        bounds = [0, *(b + 1 for b in breaks), len(columns)]
        segments = [slice(int(columns[a]), int(columns[b - 1]) + 1) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        doc = Prefilled(item, cache, columns, segments, torch.empty(0))
        doc.reference = self._answer(doc)
        return doc

    @torch.inference_mode()
    def kl(self, doc: Prefilled, plan: dict[int, dict[int, int]]) -> tuple[float, int]:
        """Sum of KL(dense || cut) over the answer tokens in nats, and their number; `plan[layer][head]` = directions kept."""
        saved = {}
        for layer, heads in plan.items():
            keys = doc.cache.layers[layer].keys
            saved[layer] = keys
            cut = keys.clone()
            for head, rank in heads.items():
                for segment in doc.segments:
                    cut[0, head, segment] = self._cut(layer, head, keys[0, head, segment].float(), rank).to(keys.dtype)
            doc.cache.layers[layer].keys = cut
        try:
            got = self._answer(doc)
        finally:
            for layer, keys in saved.items():
                doc.cache.layers[layer].keys = keys
        kl = (doc.reference.exp() * (doc.reference - got)).sum(-1).clamp_min(0)
        return float(kl.sum()), kl.numel()

    def _cut(self, layer: int, head: int, keys: Tensor, rank: int) -> Tensor:
        mean = keys.mean(0)
        return mean + ((keys - mean) @ self.encode[layer][head, :, :rank]) @ self.decode[layer][head, :, :rank].mT

    def _answer(self, doc: Prefilled) -> Tensor:
        """Log-probabilities of the answer tokens, teacher-forced; the cache is left as it was."""
        item, layers = doc.item, doc.cache.layers
        before = [(layer.keys, layer.values) for layer in layers]
        rest = item.prompt[item.visual_end :] + item.answer[:-1]
        ids = torch.tensor([rest], device=self.device)
        start = item.visual_end
        positions = torch.arange(start, start + len(rest), device=self.device)[None]
        out = self.model(
            input_ids=ids, past_key_values=doc.cache, position_ids=positions, use_cache=True, logits_to_keep=len(item.answer)
        )
        for layer, (keys, values) in zip(layers, before, strict=True):
            layer.keys, layer.values = keys, values
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = start
        return out.logits[0].double().log_softmax(-1)


def measure(cutter: Cutter, items: Sequence[Encoded], levels: Sequence[int], quiet: bool) -> dict[int, Tensor]:
    """KL per answer token when one head alone is cut: by layer, fp32 [Hkv, levels]."""
    geometry = cutter.geometry
    total = {i: torch.zeros(geometry.layers[i].kv_heads, len(levels), dtype=torch.float64) for i in geometry.compressible}
    cuts = [(i, h, n) for i in geometry.compressible for h in range(geometry.layers[i].kv_heads) for n in range(len(levels))]
    tokens = 0
    with tqdm(total=len(items) * len(cuts), desc="sensitivities", unit="cut", disable=None if not quiet else True, leave=False) as bar:
        for item in items:
            doc = cutter.prefill(item)
            for layer, head, level in cuts:
                kl, _ = cutter.kl(doc, {layer: {head: levels[level]}})
                total[layer][head, level] += kl
                bar.update()
            tokens += len(item.answer)
    return {i: (t / max(tokens, 1)).float() for i, t in total.items()}


def joint_kl(cutter: Cutter, docs: Sequence[Prefilled], plan: Plan) -> float:
    """KL per answer token of a whole plan."""
    cuts = {i: dict(enumerate(ranks)) for i, ranks in plan.items()}
    parts = [cutter.kl(doc, cuts) for doc in docs]
    return sum(kl for kl, _ in parts) / max(sum(n for _, n in parts), 1)
