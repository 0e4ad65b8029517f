"""A batched forward of Qwen3-VL for square pages: the library's per-image loop and its packed sequences without either.

All documents of a batch have the same number of pages, so every shape is static and nothing is padded except the end of the text.
tests/tools/test_qwen3_vl.py shows that it equals the library's forward. The interface is that of forward.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from .forward import PackedForward, text_layer
from .qwen3_vl import FRAMES, GRID, MERGE, NEWLINE, PATCH, SIDE, TOKENS, UNKNOWN, USER, VISION_END, VISION_START

VISUAL = GRID * GRID  # tokens of a page
BEFORE, AFTER = 1, 2  # tokens around them: vision start; vision end and newline
PAGE_TOKENS = BEFORE + VISUAL + AFTER
PAGE_POSITIONS = BEFORE + GRID + AFTER  # an image advances the M-RoPE positions by the longer side of its grid only


def patch_pages(pages: Tensor) -> Tensor:
    """Grey uint8 [N, PAGE, PAGE] to the rows of the image processor, float32 [N * SIDE², 3 * FRAMES * PATCH²].

    Patches come in blocks of MERGE x MERGE, the order in which the merger concatenates them; colours and frames repeat the grey patch.
    """
    # A table of the 256 levels, rescaled in fp64 and normalised in fp32 as the processor does, so that not even the last bit differs.
    levels = ((torch.arange(256, dtype=torch.float64, device=pages.device) * (1 / 255)).float() - 0.5) / 0.5
    blocks = levels[pages.int()].unflatten(2, (GRID, MERGE, PATCH)).unflatten(1, (GRID, MERGE, PATCH))
    patches = blocks.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, PATCH * PATCH)  # page, block row and column, row and column in it, y, x
    return patches.repeat(1, 3 * FRAMES)


def _vision_layer(block: nn.Module, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """One vision block on pages [N, SIDE², C]; each page attends to itself only."""
    attention = block.attn
    query, key, value = attention.qkv(block.norm1(hidden)).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)  # [N, S, heads, D]
    query, key = apply_rotary_pos_emb_vision(query, key, cosine, sine)
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
    hidden = hidden + attention.proj(mixed.transpose(1, 2).flatten(2))
    return hidden + block.mlp(block.norm2(hidden))


class BatchedForward(PackedForward):
    """Vision, merger, DeepStack, language model and losses on whole batches."""

    vocabulary, unknown = TOKENS, UNKNOWN
    after_page = AFTER  # tokens between a page's last visual token and the text

    def __init__(self, model: Qwen3VLForConditionalGeneration, compile_layers: bool = False) -> None:
        self.model = model
        self.tower = model.model.visual
        self.language = model.model.language_model
        device = self.tower.pos_embed.weight.device
        grid = torch.tensor([[1, SIDE, SIDE]])
        index, weight = get_vision_interpolation_indices_and_weights(
            grid, self.tower.num_grid_per_side, mode="bilinear", align_corners=True, spatial_merge_size=MERGE
        )
        self.position_index, self.position_weight = index.to(device), weight.to(device)
        self.patch_places = get_vision_position_ids(grid, MERGE).to(device)
        self.vision_layer: Callable[..., Tensor] = _vision_layer
        self.text_layer: Callable[..., Tensor] = text_layer
        if compile_layers:
            # One layer at a time, for the reason given in forward.py.
            self.vision_layer = torch.compile(_vision_layer, dynamic=False)
            self.text_layer = torch.compile(text_layer, dynamic=False)

    def visual_tokens(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Rows [N * SIDE², 3 * FRAMES * PATCH²] to visual tokens [N, GRID², C], and the DeepStack features, each of that shape."""
        projection = self.tower.patch_embed.proj  # a convolution whose stride is its kernel is a matrix product
        hidden = F.linear(pixels, projection.weight.flatten(1), projection.bias).unflatten(0, (-1, SIDE * SIDE))
        places = (self.tower.pos_embed(self.position_index) * self.position_weight[:, :, None]).sum(1)
        hidden = hidden + places.to(hidden.dtype)
        cosine, sine = self.tower.rotary_pos_emb(hidden, self.patch_places)
        deepstack = []
        for number, block in enumerate(self.tower.blocks):
            hidden = self.vision_layer(block, hidden, cosine, sine)
            if number in self.tower.deepstack_visual_indexes:
                merger = self.tower.deepstack_merger_list[self.tower.deepstack_visual_indexes.index(number)]
                deepstack.append(merger(hidden).unflatten(0, (-1, VISUAL)))
        return self.tower.merger(hidden).unflatten(0, (-1, VISUAL)), deepstack

    def embed(self, visual: Tensor, pages: int, tokens: Tensor) -> Tensor:
        """Input embeddings [B, 1 + pages * PAGE_TOKENS + L, C] of <|user|>, pages in their brackets, and text `tokens` [B, L]."""
        batch, count = tokens.shape[0], visual.shape[0]
        words = self.language.embed_tokens
        start = words(tokens.new_full((count, 1), VISION_START)).to(visual.dtype)
        end = words(tokens.new_tensor([[VISION_END, NEWLINE]]).expand(count, -1)).to(visual.dtype)
        page = torch.cat((start, visual, end), dim=1).reshape(batch, pages * PAGE_TOKENS, -1)
        user, text = words(tokens.new_full((batch, 1), USER)), words(tokens)
        return torch.cat((user.to(page.dtype), page, text.to(page.dtype)), dim=1)

    def page_columns(self, pages: int) -> list[slice]:
        """Where the visual tokens of every page stand in the embedded sequence."""
        starts = [1 + number * PAGE_TOKENS + BEFORE for number in range(pages)]
        return [slice(start, start + VISUAL) for start in starts]

    def positions(self, pages: int, length: int, device: torch.device) -> Tensor:
        """M-RoPE positions (time, height, width) of `pages` pages and `length` text tokens, int64 [3, 1, T]; all documents share them."""
        cell = torch.arange(VISUAL, device=device)
        inside = torch.stack((torch.zeros_like(cell), cell // GRID, cell % GRID)) + BEFORE
        before, after = torch.arange(BEFORE, device=device), torch.arange(BEFORE + GRID, PAGE_POSITIONS, device=device)
        page = torch.cat((before.expand(3, -1), inside, after.expand(3, -1)), dim=1)
        shift = 1 + PAGE_POSITIONS * torch.arange(pages, device=device)
        text = 1 + PAGE_POSITIONS * pages + torch.arange(length, device=device)
        user = torch.zeros(3, 1, dtype=torch.int64, device=device)
        return torch.cat((user, (page[:, None] + shift[None, :, None]).flatten(1), text.expand(3, -1)), dim=1)[:, None]

    def text_states(
        self, embeddings: Tensor, deepstack: Sequence[Tensor], pages: int, reading: Sequence[dict[str, Tensor]] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Final hidden states [B, T, C] of the causal language model, and masses; `reading` has an entry per layer, or is empty."""
        batch, length = embeddings.shape[0], embeddings.shape[1] - 1 - pages * PAGE_TOKENS
        cosine, sine = self.language.rotary_emb(embeddings, position_ids=self.positions(pages, length, embeddings.device))
        hidden, masses = embeddings, []
        for number, layer in enumerate(self.language.layers):
            hidden, mass = self.text_layer(layer, hidden, cosine, sine, reading[number] if reading else {})
            masses += mass
            if number < len(deepstack):
                bracketed = F.pad(deepstack[number], (0, 0, BEFORE, AFTER)).reshape(batch, pages * PAGE_TOKENS, -1)
                hidden = hidden + F.pad(bracketed, (0, 0, 1, length)).to(hidden.dtype)
        return self.language.norm(hidden), masses

    def text_logits(
        self, pixels: Tensor, pages: int, tokens: Tensor, reading: Sequence[dict[str, Tensor]] = ()
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits that predict `tokens` [B, L, vocabulary], the page grids [B * pages, GRID, GRID, C], and masses."""
        visual, deepstack = self.visual_tokens(pixels)
        states, masses = self.text_states(self.embed(visual, pages, tokens), deepstack, pages, reading)
        return self.model.lm_head(states[:, -tokens.shape[1] - 1 : -1]), visual.unflatten(1, (GRID, GRID)), masses
