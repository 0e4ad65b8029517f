"""From samples to model inputs: one prompt per sample through the chat template, and batches padded the way each pass needs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calibration_data.sample import Sample
from .errors import RotateKError
from .geometry import Geometry


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as ids. `visual_end` is the column after the last image token; media are the processor's image tensors."""

    sample: Sample
    prompt: list[int]
    answer: list[int]  # first reference answer and end-of-sequence
    visual_end: int
    media: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A padded piece of a batch: ids and mask [B, T], mask 1 for real tokens."""

    ids: Tensor
    mask: Tensor


def template_hash(processor: Any) -> str:
    """Identifies the prompt template, for the artifact's record."""
    return hashlib.sha256(str(processor.chat_template).encode()).hexdigest()[:16]


def prompt_text(processor: Any, images: int, question: str) -> str:
    """The prompt of one question about some images, ready for the processor.

    Raises:
        RotateKError: the question holds the placeholder that stands for an image.
    """
    placeholder = getattr(processor, "image_token", None)
    if placeholder and placeholder in question:
        raise RotateKError(f"the question holds {placeholder}, which stands for an image; leave it out: {question[:60]!r}")
    content: list[dict[str, str]] = [{"type": "image"} for _ in range(images)]
    content.append({"type": "text", "text": question})
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)


def end_ids(model: Any) -> tuple[int, ...]:
    """End-of-sequence ids of a model; the first closes reference answers."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = model.config.get_text_config(decoder=True).eos_token_id
    if ids is None:
        raise RotateKError("the model names no end-of-sequence token; add eos_token_id to its generation_config.json")
    return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)


def encode(processor: Any, sample: Sample, geometry: Geometry, eos: int) -> Encoded:
    """Tokenise one sample.

    Raises:
        RotateKError: the processor made no image token of the images.
    """
    text = prompt_text(processor, len(sample.images), sample.question)
    inputs = dict(processor(text=[text], images=list(sample.images) or None, return_tensors="pt"))
    ids = inputs.pop("input_ids")[0].tolist()
    for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        inputs.pop(name, None)
    ends = [column + 1 for column, token in enumerate(ids) if token in geometry.visual_token_ids]
    if sample.images and not ends:
        raise RotateKError(f"sample {sample.id}: the processor turned {len(sample.images)} images into no image tokens; wrong processor?")
    answer = processor.tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"]
    return Encoded(sample, ids, [*answer, eos], ends[-1] if ends else 0, inputs)


def pad(rows: Sequence[Sequence[int]], fill: int, left: bool = True) -> Chunk:
    """Pad id lists to one [B, T] chunk; `left` puts padding first."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), fill, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.int64)
        mask[index, place] = 1
    return Chunk(ids, mask)


def join(first: Chunk, second: Chunk) -> Chunk:
    """Two chunks side by side."""
    return Chunk(torch.cat([first.ids, second.ids], 1), torch.cat([first.mask, second.mask], 1))


def merge_media(items: Sequence[Encoded], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Image tensors of several samples as the model takes them: stacked over images, tiles padded with zeros."""
    merged = {}
    for name in {key for item in items for key in item.media}:
        parts = [item.media[name] for item in items if name in item.media]
        if parts[0].dim() >= 4:  # [images, tiles, ...]: images may have different numbers of tiles
            tiles = max(part.shape[1] for part in parts)
            parts = [torch.cat([p, p.new_zeros(p.shape[0], tiles - p.shape[1], *p.shape[2:])], 1) for p in parts]
        tensor = torch.cat(parts).to(device)
        merged[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return merged


def position_ids(mask: Tensor) -> Tensor:
    """Positions [B, T] that skip padding, as `generate` computes them."""
    return (mask.cumsum(-1) - 1).clamp_min(0)
