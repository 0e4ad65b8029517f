"""A quick knock-out of every (layer, KV head) pair inside the trainer, to judge a training run before its checkpoint is measured properly.

Text tokens see a pair's page Keys and Values replaced by their mean over each page; page tokens see everything (prefill is exact).
benchmarks/knockout.py measures the same through the runtime's own path, on single questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .documents import Batch

NAME = "tiny_training_probe"
Pairs = set[tuple[int, int]]


def _probing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    columns: Sequence[slice] = (),
    gone: frozenset[tuple[int, int]] = frozenset(),
    **kwargs: Any,
) -> tuple[Tensor, None]:
    options = {"is_causal": True, "scale": scaling, "enable_gqa": query.shape[1] > key.shape[1]}
    out = scaled_dot_product_attention(query, key, value, **options)
    heads = [head for layer, head in gone if layer == module.layer_idx]
    if heads:
        key, value = key.clone(), value.clone()
        for page in columns:
            for tensor in (key, value):
                tensor[:, heads, page] = tensor[:, heads, page].mean(2, keepdim=True)
        text = columns[-1].stop
        out[:, :, text:] = scaled_dot_product_attention(query, key, value, **options)[:, :, text:]
    return out.transpose(1, 2).contiguous(), None


class Probe:
    """Answers packed batches with some pairs gone."""

    def __init__(self, model: Any, forward: Any, prepare: Any, renderer: Any, batches: Sequence[Batch]) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, _probing_attention)
        self.model, self.forward = model, forward
        text = model.config.get_text_config()
        text._attn_implementation = NAME
        self.pairs = [(layer, head) for layer in range(text.num_hidden_layers) for head in range(text.num_key_value_heads)]
        self.batches = [(batch, prepare(renderer.draw(batch.cells.flatten(0, 1)))) for batch in batches]
        self.dense = [self._logprobs(batch, pixels, set()) for batch, pixels in self.batches]

    @torch.inference_mode()
    def _logprobs(self, batch: Batch, pixels: Tensor, gone: Pairs) -> Tensor:
        pages = batch.cells.shape[1]
        reading = {"columns": self.forward.page_columns(pages), "gone": frozenset(gone)}
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.device.type == "cuda"):
            logits, _, _ = self.forward.text_logits(pixels, pages, batch.tokens, [reading] * len(self.model.model.language_model.layers))
        return logits[batch.answer].float().log_softmax(-1)

    def measure(self, gone: Pairs) -> tuple[float, float]:
        """KL to the dense model per answer token, and the fraction of answers with every token right."""
        kl, tokens, right, answers = 0.0, 0, 0, 0
        for (batch, pixels), dense in zip(self.batches, self.dense, strict=True):
            got = self._logprobs(batch, pixels, gone)
            kl += float((dense.exp() * (dense - got)).sum())
            tokens += len(got)
            wrong = torch.zeros_like(batch.answer)
            wrong[batch.answer] = got.argmax(-1) != batch.tokens[batch.answer]
            # An answer's number is how many answers began before it.
            begins = batch.answer & ~torch.nn.functional.pad(batch.answer, (1, 0))[:, :-1]
            number = begins.cumsum(1)
            count = int(number.max()) + 1
            bad = torch.zeros(len(number), count, device=number.device).scatter_add_(1, number, wrong.float())
            answers += int(begins.sum())
            right += int(begins.sum()) - int((bad[:, 1:] > 0).sum())
        return kl / max(tokens, 1), right / max(answers, 1)

    def report(self) -> dict[str, Any]:
        """KL of every pair alone, and what is left with the best quarter and half of the pairs only."""
        alone = {pair: self.measure({pair})[0] for pair in self.pairs}
        order = sorted(self.pairs, key=lambda pair: -alone[pair])
        share = sum(kl >= 0.02 for kl in alone.values()) / len(alone)
        result: dict[str, Any] = {"dense_exact": self.measure(set())[1], "share_above_0.02": share}
        for part in (8, 4, 2):
            kl, exact = self.measure(set(order[len(order) // part :]))
            result[f"keep_1_{part}"] = {"kl": kl, "exact": exact}
        result["alone"] = {f"{layer}.{head}": round(kl, 4) for (layer, head), kl in alone.items()}
        return result
