"""A batched forward of LLaVA-NeXT for square pages: the library's per-image loop without the loop.

All documents of a batch have the same number of pages, so every shape is static and nothing is padded except the end of the text.
tests/tools/test_batched_forward.py shows that it equals the library's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaNextForConditionalGeneration

from .bundled import page
from .documents import Vocabulary
from .llava_next import NEWLINE, PATCH, TILE, TOKENS, UNKNOWN, USER

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


def text_layer(layer: nn.Module, hidden: Tensor, cosine: Tensor, sine: Tensor, reading: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One text layer; `reading` goes to the attention function, and what that says of its reading comes back (routing.py)."""
    masses: list[Tensor] = []
    if reading:
        reading = {**reading, "masses": masses}
    # Without a mask the attention function falls back to plain causal attention, which is what end-padded rows need.
    return layer.forward(hidden, attention_mask=None, position_embeddings=(cosine, sine), **reading), masses


@dataclass(slots=True)
class Losses:
    """Scalars `answer` and `auxiliary`: cross-entropies in nats; `hit` bool [B, L]: which tokens were predicted right;
    `masses`: per layer, the attention [B, T, Hq] that heads pay to pages, where asked for.
    """

    answer: Tensor
    auxiliary: Tensor
    hit: Tensor
    masses: list[Tensor]


class PackedForward:
    """What families share. `vocabulary` and `unknown` are their token ids; `language` is the text model, `text_logits` their forward."""

    vocabulary: Vocabulary
    unknown: int
    language: nn.Module
    text_logits: Callable[..., tuple[Tensor, Tensor, list[Tensor]]]

    def losses(
        self, pixels: Tensor, pages: int, tokens: Tensor, answer: Tensor, cells: Tensor, reading: Sequence[dict[str, Tensor]] = ()
    ) -> Losses:
        """Losses of a packed batch; `cells` are codes [B, pages, rows, columns]."""
        logits, grid, masses = self.text_logits(pixels, pages, tokens, reading)
        loss, hit = masked_cross_entropy(logits, tokens, answer.float())
        embeddings, first_character = self.language.embed_tokens.weight, self.vocabulary.first_character
        return Losses(loss, character_loss(grid, embeddings, cells, first_character, self.unknown), hit, masses)


class BatchedForward(PackedForward):
    """Vision, projector, merge, language model and losses on whole batches."""

    vocabulary, unknown = TOKENS, UNKNOWN
    after_page = 1  # tokens between a page's last visual token and the text: its newline

    def __init__(self, model: LlavaNextForConditionalGeneration, compile_layers: bool = False) -> None:
        self.model = model
        self.tower = model.model.vision_tower
        self.language = model.model.language_model
        self.vision_layer: Callable[..., Tensor] = _vision_layer
        self.text_layer: Callable[..., Tensor] = text_layer
        if compile_layers:
            # One layer at a time: all layers of a tower share one compiled graph, which costs seconds where the whole model costs a minute
            # for each page count.
            self.vision_layer = torch.compile(_vision_layer, dynamic=False)
            self.text_layer = torch.compile(text_layer, dynamic=False)

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

    def page_columns(self, pages: int) -> list[slice]:
        """Where the visual tokens of every page stand in the embedded sequence."""
        length = 5 * GRID * GRID + 2 * GRID
        return [slice(1 + number * (length + 1), (number + 1) * (length + 1)) for number in range(pages)]

    def text_states(self, embeddings: Tensor, reading: Sequence[dict[str, Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """Final hidden states [B, T, C] of the causal language model, and masses; `reading` has an entry per layer, or is empty."""
        positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
        cosine, sine = self.language.rotary_emb(embeddings, position_ids=positions)
        hidden, masses = embeddings, []
        for number, layer in enumerate(self.language.layers):
            hidden, mass = self.text_layer(layer, hidden, cosine, sine, reading[number] if reading else {})
            masses += mass
        return self.language.norm(hidden), masses

    def text_logits(
        self, pixels: Tensor, pages: int, tokens: Tensor, reading: Sequence[dict[str, Tensor]] = ()
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits that predict `tokens` [B, L, vocabulary], the page grids, and masses."""
        base, grid = self.visual_tokens(pixels)
        states, masses = self.text_states(self.embed(base, grid, pages, tokens), reading)
        return self.model.lm_head(states[:, -tokens.shape[1] - 1 : -1]), grid, masses


def character_loss(grid: Tensor, embeddings: Tensor, cells: Tensor, first_character: int, unknown: int) -> Tensor:
    """Cross-entropy of reading each cell's character off its visual token by the text embeddings; bars are the unknown token.

    grid [N, rows, columns, C], embeddings [vocabulary, C], cells [B, pages, rows, columns] with B * pages = N. It puts visual tokens and
    text embeddings into one space, without which nothing is learned for minutes.
    """
    characters = AUXILIARY_SCALE * (grid.flatten(1, 2) @ embeddings.T)
    cells = cells.reshape(characters.shape[:2]).long()
    target = torch.where(cells == page.BAR, unknown, cells + first_character)
    loss, _ = masked_cross_entropy(characters, target, torch.where(cells == 0, BLANK_WEIGHT, 1.0))
    return loss


def masked_cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy of [..., vocabulary] logits, and where their largest is the target, bool like `targets`."""
    logits = logits.float()
    each = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(weight)
    return (each * weight).sum() / weight.sum().clamp_min(1.0), logits.detach().argmax(-1) == targets
