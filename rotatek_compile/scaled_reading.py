"""Reading the text after the images again with scaled Keys of image tokens, so that a loss has a gradient for the scales.

A batch is prefilled once, by the dense model and without a gradient; then every step runs the tokens after the last image alone. They see
Keys of image tokens, each channel times a scale of its layer and KV head, and everything else as it is. Of a logit that is

    scaling · Σ_d s_d q_d k_d = scaling · (s ∘ q)ᵀ k ,

so the queries are scaled and no Key is copied. Image tokens among themselves see Keys as they are: a coded cache too is coded after
prefill.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .batches import Chunk, Encoded, join, positions
from .cutter import Cutter, Prefilled
from .errors import RotateKError
from .geometry import Geometry
from .rereading import SharedLayer, reading_from

LEAST_FREE = 1 / 4  # of a GPU's memory: where less is free, what further batches keep waits in main memory


@dataclass(slots=True)
class Page:
    """A prefilled batch of B documents, and what is read again of it.

    rest: ids and mask [B, R] after the last image token, left-padded; images: bool [B, P], the prefilled columns that are image tokens;
    scored: bool [B, L], which of the last L columns predict an answer token; dense: what the output projection is given there without
    scales, [B, L, hidden].
    """

    doc: Prefilled
    rest: Chunk
    images: Tensor
    scored: Tensor
    dense: Tensor


class _ScaledLayer(SharedLayer):
    """A prefix whose image columns, bool [B, P], are seen through scales [Hkv, D]; None: as they are."""

    def __init__(self, keys: Tensor, values: Tensor, masks: dict[torch.device, Tensor], images: Tensor, scale: Tensor | None) -> None:
        super().__init__(keys, values, (), 1, masks)
        self.images, self.scale = images, scale

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attention of query [B, Hq, T, D] over prefix and new tokens [B, Hkv, T, D]; -> [B, T, Hq, D]."""
        heads, past = self.prefix_keys.shape[1:3]
        rows = query.unflatten(1, (heads, -1)).flatten(2, 3)  # [B, Hkv, G·T, D]
        logits = rows @ self.prefix_keys.mT
        if self.scale is not None:
            scaled = (rows * self.scale.to(rows)[:, None]) @ self.prefix_keys.mT
            logits = torch.where(self.images.to(rows.device)[:, None, None], scaled, logits)
        logits = torch.cat([logits, rows @ keys.mT], -1) * scaling
        seen = self.seen(mask, query.shape[1] // heads, query.shape[2], query.device)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weights = exact.masked_fill(~seen, -torch.inf).softmax(-1).to(query.dtype)
        out = weights[..., :past] @ self.prefix_values + weights[..., past:] @ values
        return out.unflatten(2, (-1, query.shape[2])).flatten(1, 2).transpose(1, 2).contiguous()


class ScaledReader:
    """Reads documents with a frozen model.

    Raises:
        RotateKError: the model has no output projection to take hidden states from.
    """

    def __init__(self, model: Any, geometry: Geometry) -> None:
        self.model, self.geometry = model, geometry
        self.cutter = Cutter(model, geometry, {}, span_all=False)
        self.head: nn.Module | None = model.get_output_embeddings()
        if self.head is None:
            raise RotateKError(f"{type(model).__name__} names no output projection, whose inputs the loss is of; it is not supported")

    def prefill(self, items: Sequence[Encoded]) -> Page:
        """Run the prompts up to their last image tokens, and the rest once for the dense hidden states."""
        doc, device = self.cutter.prefill(*items), self.cutter.device
        rest = self.cutter.rest(doc)
        for layer in doc.cache.layers:  # a gradient goes through no tensor that was made in inference mode
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        images, wanted = doc.images.any(-1).clone(), min(doc.scored.shape[1], rest.ids.shape[1])
        scored = doc.scored[:, doc.scored.shape[1] - wanted :].clone() & rest.mask[:, rest.ids.shape[1] - wanted :].bool().to(device)
        doc.reference, doc.entries = torch.empty(0), {}  # of another loss
        page = Page(doc, rest, images, scored, torch.empty(0))
        with torch.no_grad():
            page.dense = self.hidden(page)
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            if free < LEAST_FREE * total:
                doc.park()
        return page

    def hidden(self, page: Page, scales: Mapping[int, Tensor] | None = None) -> Tensor:
        """What the output projection is given, [B, L, hidden] of the last L columns, where layers see image Keys through `scales`.

        Args:
            scales: by layer, [Hkv, D]; a gradient reaches them.
        """
        doc, rest, device = page.doc, page.rest, self.cutter.device
        masks: dict[torch.device, Tensor] = {}
        with doc.at_home(), _input_of(self.head) as seen:
            layers: list[Any] = []
            for index, layer in enumerate(doc.cache.layers):
                own = (scales or {}).get(index)
                full = not layer.is_sliding
                layers.append(_ScaledLayer(layer.keys, layer.values, masks, page.images, own) if full else copy.copy(layer))
            with reading_from(self.model, Cache(layers=layers)) as cache:
                self.model(
                    input_ids=rest.ids.to(device),
                    attention_mask=join(doc.prefix, rest).mask.to(device),
                    position_ids=positions(doc.items, doc.prefix.mask.sum(1).tolist(), rest.mask).to(device),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=page.scored.shape[1],
                )
        return seen[0]

    def error(self, page: Page, scales: Mapping[int, Tensor]) -> Tensor:
        """Mean squared error of the hidden states against the dense ones: mean over channels, then over the batch's answer tokens."""
        found = (self.hidden(page, scales) - page.dense).float().square().mean(-1)
        return (found * page.scored.to(found.device)).sum() / page.scored.sum().clamp_min(1)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model's weights without gradients, and as they were afterwards."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)


@contextmanager
def _input_of(module: Any) -> Iterator[list[Tensor]]:
    """What a module is called with, its first argument, in a list that is filled by then."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()
