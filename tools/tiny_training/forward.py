"""A batched forward of LLaVA-NeXT for square pages: the library's per-image loop without the loop.

All documents of a batch have the same number of pages, so every shape is static and nothing is padded except the end of the text.
tests/tools/test_batched_forward.py shows that it equals the library's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaNextForConditionalGeneration

from .llava_next import FIRST_CHARACTER, NEWLINE, PATCH, TILE, USER

GRID = TILE // PATCH
AUXILIARY_SCALE = 4.0
BLANK_WEIGHT = 0.1  # nine cells of ten are blank; at full weight they would drown the characters


def tile_pages(pages: Tensor) -> Tensor:
    """Grey uint8 [N, 2 * TILE, 2 * TILE] to pixel values as the processor's, float32 [N, 5, 3, TILE, TILE]: reduced page, quarters."""
    exact = pages[:, None].float()
    base = exact
    for size in ((2 * TILE, TILE), (TILE, TILE)):  # PIL reduces the width, rounds to whole grey levels, then does the same to the height
        base = F.interpolate(base, size=size, mode="bicubic", antialias=True).round_().clamp_(0, 255)
    quarters = exact.unflatten(-1, (2, TILE)).unflatten(-3, (2, TILE)).permute(0, 1, 2, 4, 3, 5).flatten(1, 3)
    return (torch.cat((base, quarters), dim=1) / 127.5 - 1.0)[:, :, None].expand(-1, -1, 3, -1, -1)


def _vision_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    return layer.forward(hidden, attention_mask=None)


def _text_layer(layer: nn.Module, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    # Without a mask the attention function falls back to plain causal attention, which is what end-padded rows need.
    return layer.forward(hidden, attention_mask=None, position_embeddings=(cosine, sine))


@dataclass(slots=True)
class Losses:
    """Scalars: `answer` and `auxiliary` cross-entropies in nats, `accuracy` the fraction of answer tokens predicted right."""

    answer: Tensor
    auxiliary: Tensor
    accuracy: Tensor


class BatchedForward:
    """Vision, projector, merge, language model and losses on whole batches."""

    def __init__(self, model: LlavaNextForConditionalGeneration, compile_layers: bool = False) -> None:
        self.model = model
        self.tower = model.model.vision_tower
        self.language = model.model.language_model
        self.vision_layer: Callable[..., Tensor] = _vision_layer
        self.text_layer: Callable[..., Tensor] = _text_layer
        if compile_layers:
            # One layer at a time: all layers of a tower share one compiled graph, which costs seconds where the whole model costs a minute
            # for each page count.
            self.vision_layer = torch.compile(_vision_layer, dynamic=False)
            self.text_layer = torch.compile(_text_layer, dynamic=False)

    def visual_tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixel values [N, 5, 3, TILE, TILE] to projected base tokens [N, GRID², C] and page grids [N, 2 GRID, 2 GRID, C]."""
        hidden = self.tower.pre_layrnorm(self.tower.embeddings(pixels.flatten(0, 1)))
        for layer in self.tower.encoder.layers:
            hidden = self.vision_layer(layer, hidden)
        projected = self.model.model.multi_modal_projector(hidden[:, 1:]).unflatten(0, (-1, 5))
        grid = projected[:, 1:].unflatten(1, (2, 2)).unflatten(3, (GRID, GRID))  # [N, tile row, tile column, row, column, C]
        return projected[:, 0], grid.permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2, 3)

    def embed(self, base: Tensor, grid: Tensor, pages: int, tokens: Tensor) -> Tensor:
        """Input embeddings [B, 1 + pages * 521 + L, C] of <|user|>, pages with their newlines, and text `tokens` [B, L]."""
        batch = tokens.shape[0]
        words = self.language.embed_tokens
        row_end = self.model.model.image_newline.to(grid.dtype).expand(*grid.shape[:2], 1, -1)
        page_end = words(tokens.new_full((grid.shape[0], 1), NEWLINE)).to(grid.dtype)
        page = torch.cat((base, torch.cat((grid, row_end), dim=2).flatten(1, 2), page_end), dim=1)
        page = page.reshape(batch, -1, page.shape[-1])
        user, text = words(tokens.new_full((batch, 1), USER)), words(tokens)
        return torch.cat((user.to(page.dtype), page, text.to(page.dtype)), dim=1)

    def text_states(self, embeddings: Tensor) -> Tensor:
        """Final hidden states [B, T, C] of the causal language model."""
        positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
        cosine, sine = self.language.rotary_emb(embeddings, position_ids=positions)
        hidden = embeddings
        for layer in self.language.layers:
            hidden = self.text_layer(layer, hidden, cosine, sine)
        return self.language.norm(hidden)

    def text_logits(self, pixels: Tensor, pages: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits that predict `tokens` [B, L, vocabulary], and the page grids."""
        base, grid = self.visual_tokens(pixels)
        states = self.text_states(self.embed(base, grid, pages, tokens))
        return self.model.lm_head(states[:, -tokens.shape[1] - 1 : -1]), grid

    def losses(self, pixels: Tensor, pages: int, tokens: Tensor, answer: Tensor, cells: Tensor) -> Losses:
        """Losses of a packed batch; `cells` are atlas codes [B, pages, rows, columns]."""
        logits, grid = self.text_logits(pixels, pages, tokens)
        loss, accuracy = masked_cross_entropy(logits, tokens, answer.float())
        characters = AUXILIARY_SCALE * (grid.flatten(1, 2) @ self.language.embed_tokens.weight.T)
        cells = cells.reshape(characters.shape[:2])
        weight = torch.where(cells == 0, BLANK_WEIGHT, 1.0)
        auxiliary, _ = masked_cross_entropy(characters, cells + FIRST_CHARACTER, weight)
        return Losses(loss, auxiliary, accuracy)


def masked_cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy and weighted accuracy of [..., vocabulary] logits."""
    logits = logits.float()
    each = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(weight)
    total = weight.sum().clamp_min(1.0)
    hit = (logits.detach().argmax(-1) == targets).float()
    return (each * weight).sum() / total, (hit * weight).sum() / total
