"""From samples to model inputs: one prompt per sample through the chat template, and batches padded the way each pass needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calibration_data.sample import Sample
from .errors import RotateKError
from .geometry import Geometry, position_axes


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as ids. `visual_end` is the column after the last image token; media are the processor's image tensors.

    `positions` are those of the prompt in a model with several position axes (M-RoPE), int64 [A, len(prompt)]; None is 0, 1, 2, ...
    """

    sample: Sample
    prompt: list[int]
    answer: list[int]  # first reference answer and end-of-sequence
    visual_end: int
    media: dict[str, Tensor]
    positions: Tensor | None = None


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
        RotateKError: the question holds a placeholder that stands for an image or a video.
    """
    for medium in ("image", "video"):
        placeholder = getattr(processor, f"{medium}_token", None)
        if placeholder and placeholder in question:
            article = "an" if medium == "image" else "a"
            raise RotateKError(f"the question holds {placeholder}, which stands for {article} {medium}; leave it out: {question[:60]!r}")
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


RopeIndex = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


def rope_index(model: Any) -> RopeIndex | None:
    """How a model with several position axes (M-RoPE: Qwen2-VL, Qwen2.5-VL, Qwen3-VL) numbers a prompt; None for ordinary RoPE.

    Whoever has a `get_rope_index` uses it, also where the config names no axes because the model has a default.

    The numbering is the model's own `get_rope_index`, which reads no state (`rope_deltas` is state, and is neither read nor written).

    Returns:
        a function from ids [1, T] and the processor's other outputs to positions int64 [A, T].

    Raises:
        RotateKError: the config names axes but the model does not say how it numbers them.
    """
    own = getattr(getattr(model, "model", model), "get_rope_index", None)
    if own is None and position_axes(model.config.get_text_config(decoder=True)) == 1:
        return None
    if own is None:
        raise RotateKError(f"{type(model).__name__} uses M-RoPE positions but has no get_rope_index to compute them; it is not supported")
    kinds = {"image_token_id": 1, "video_token_id": 2}  # as processors number them in mm_token_type_ids

    def compute(ids: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        types = torch.zeros_like(ids)
        for name, kind in kinds.items():
            if (token := getattr(model.config, name, None)) is not None:
                types[ids == token] = kind
        grids = {name: value for name, value in inputs.items() if name.endswith("_grid_thw") or name == "second_per_grid_ts"}
        try:
            found, _ = own(input_ids=ids, mm_token_type_ids=types, attention_mask=torch.ones_like(ids), **grids)
        except TypeError as error:
            name = type(model).__name__
            raise RotateKError(f"{name} numbers its tokens in a way this version does not know ({error}); it is not supported") from error
        return found[:, 0].to("cpu", torch.int64)

    return compute


def encode(processor: Any, sample: Sample, geometry: Geometry, eos: int, rope: RopeIndex | None = None) -> Encoded:
    """Tokenise one sample; `rope` is `rope_index(model)`.

    Raises:
        RotateKError: the processor made no image token of the images, or a model with several position axes came without `rope`.
    """
    if geometry.position_axes > 1 and rope is None:
        raise RotateKError(f"{geometry.model_type} numbers tokens along {geometry.position_axes} axes; pass rope_index(model) to encode")
    text = prompt_text(processor, len(sample.images), sample.question)
    inputs = dict(processor(text=[text], images=list(sample.images) or None, return_tensors="pt"))
    tensor = inputs.pop("input_ids")
    ids = tensor[0].tolist()
    for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        inputs.pop(name, None)
    ends = [column + 1 for column, token in enumerate(ids) if token in geometry.visual_token_ids]
    if sample.images and not ends:
        raise RotateKError(f"sample {sample.id}: the processor turned {len(sample.images)} images into no image tokens; wrong processor?")
    answer = processor.tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"]
    return Encoded(sample, ids, [*answer, eos], ends[-1] if ends else 0, inputs, rope(tensor, inputs) if rope else None)


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


def positions(items: Sequence[Encoded], starts: Sequence[int], mask: Tensor) -> Tensor:
    """Positions of a left-padded chunk whose row b holds the tokens of sample b from logical index `starts[b]` on.

    Prompt tokens have the prompt's own positions; answer or generated tokens go on by ones from the largest of them, on every axis,
    as `generate` numbers them. Padding gets some valid position; the mask hides it.

    Args:
        mask: int [B, T], 1 for real tokens.

    Returns:
        int64 [B, T], or [A, B, T] if the samples have positions along A axes, on the mask's device.
    """
    logical = position_ids(mask) + torch.as_tensor(list(starts), dtype=torch.int64, device=mask.device)[:, None]
    axes = max((len(item.positions) for item in items if item.positions is not None), default=0)
    if not axes:
        return logical
    out = logical.expand(axes, *logical.shape).clone()
    for row, item in enumerate(items):
        if item.positions is not None:
            prompt, index = item.positions.to(mask.device), logical[row]
            inside = prompt[:, index.clamp_max(prompt.shape[1] - 1)]
            out[:, row] = torch.where(index < prompt.shape[1], inside, index - prompt.shape[1] + prompt.max() + 1)
    return out
