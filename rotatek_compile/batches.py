"""From samples to model inputs: one prompt per sample through the chat template, and batches padded the way each pass needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .calibration_data.sample import Sample
from .errors import RotateKError
from .families import family_of
from .geometry import Geometry, geometry_of, position_axes

READERS = 64  # newest tokens of a text-only prompt that count as the question


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as ids. `visual_end` is the column after the last image token; media are the processor's image tensors.

    A text-only prompt has no images: there the question is its newest `READERS` tokens, at most half of it, and `visual_end` is the column
    where it begins; what is before may be coded.

    `positions` are those of the prompt in a model with several position axes (M-RoPE), int64 [A, len(prompt)]; None is 0, 1, 2, ...
    `token_types` holds what the model wants to be told of each prompt token, by argument of `forward` (families.py).
    """

    sample: Sample
    prompt: list[int]
    answer: list[int]  # first reference answer and end-of-sequence
    visual_end: int
    media: dict[str, Tensor]
    positions: Tensor | None = None
    token_types: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A padded piece of a batch: ids and mask [B, T], mask 1 for real tokens."""

    ids: Tensor
    mask: Tensor


def template_hash(processor: Any) -> str:
    """Identifies the prompt template, for the artifact's record."""
    return hashlib.sha256(str(processor.chat_template).encode()).hexdigest()[:16]


def processor_hash(processor: Any) -> str:
    """Identifies how samples become inputs: template, and settings of the pictures (size, tiles, mean), which no weights tell."""
    described: Any = getattr(processor, "to_dict", dict)() if getattr(processor, "image_processor", None) is not None else {}
    text = json.dumps([template_hash(processor), described], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_text(processor: Any, images: int, question: str, videos: int = 0) -> str:
    """The prompt of one question about some images, then some clips, ready for the processor.

    Raises:
        RotateKError: the question holds a placeholder that stands for an image or a video, or the model reads none.
    """
    for medium in ("image", "video"):
        # some processors write another token into the prompt than the one the model sees
        names = {getattr(owner, f"{medium}_token", None) for owner in (processor, getattr(processor, "tokenizer", None))}
        if found := next((name for name in sorted(filter(None, names)) if name in question), None):
            article = "an" if medium == "image" else "a"
            raise RotateKError(f"the question holds {found}, which stands for {article} {medium}; leave it out: {question[:60]!r}")
    content: list[dict[str, str]] = [{"type": "image"} for _ in range(images)] + [{"type": "video"} for _ in range(videos)]
    content.append({"type": "text", "text": question})
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)


def tokenized(processor: Any, text: str, images: Sequence[Any], **media: Any) -> Any:
    """The processor's tensors for one prompt; `media` are further arguments of the call."""
    return processor(text=[text], images=list(images) or None, return_tensors="pt", **begun(processor, text), **media)


def begun(processor: Any, text: str) -> dict[str, Any]:
    """Arguments of a processor's call: a template that writes the begin-of-sequence token leaves none to be added."""
    bos = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    return {"add_special_tokens": False} if bos and text.startswith(bos) else {}


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
    inputs = dict(tokenized(processor, prompt_text(processor, len(sample.images), sample.question), sample.images))
    tensor = inputs.pop("input_ids")
    ids = tensor[0].tolist()
    wanted = family_of(geometry.model_type).token_types
    types = {wanted: inputs[wanted][0].tolist()} if wanted is not None and wanted in inputs else {}
    for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        inputs.pop(name, None)
    ends = [column + 1 for column, token in enumerate(ids) if token in geometry.visual_token_ids]
    if sample.images and not ends:
        raise RotateKError(f"sample {sample.id}: the processor turned {len(sample.images)} images into no image tokens; wrong processor?")
    end = ends[-1] if ends else 0 if geometry.visual_token_ids else len(ids) - min(READERS, len(ids) // 2)
    answer = processor.tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"]
    return Encoded(sample, ids, [*answer, eos], end, inputs, rope(tensor, inputs) if rope else None, types)


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


def refuse_gaps(config: Any, chunk: Chunk, before: Chunk | None) -> None:
    """Refuse padding between a row's tokens where layers slide over columns: they would see less than they should.

    Args:
        config: of the whole model.
        before: what is cached already; None for a first piece, which is padded on its left alone.

    Raises:
        RotateKError: such a batch; documents must be read one at a time.
    """
    if before is not None and not bool(chunk.mask.all()) and geometry_of(config).hybrid:
        raise RotateKError(f"{config.model_type} has sliding layers, and documents of different length leave gaps; use a batch size of 1")


def merge_media(items: Sequence[Encoded], device: torch.device, dtype: torch.dtype, chunk: Chunk | None = None) -> dict[str, Tensor]:
    """Image tensors of several samples as the model takes them: stacked over images, tiles and sizes padded with zeros.

    With `chunk`, a left-padded batch whose rows begin the samples' prompts, also what the model wants to be told of its tokens.
    """
    merged = {}
    for name in {key for item in items for key in item.media}:
        parts = [item.media[name] for item in items if name in item.media]
        if parts[0].dim() >= 4:  # [images, tiles, ...]: images may have different numbers of tiles
            parts = _same_size(parts)
        tensor = torch.cat(parts).to(device)
        merged[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if chunk is not None:
        for name in {key for item in items for key in item.token_types}:
            types = torch.zeros_like(chunk.ids)
            for row, item in enumerate(items):
                own = item.token_types.get(name, [])[: int(chunk.mask[row].sum())]
                first = chunk.ids.shape[1] - int(chunk.mask[row].sum())
                types[row, first : first + len(own)] = torch.tensor(own, dtype=types.dtype)
            merged[name] = types.to(device)
    return merged


def _same_size(parts: list[Tensor]) -> list[Tensor]:
    """Tensors that differ in any dimension but the first, padded with zeros behind to the largest."""
    sizes = [max(part.shape[d] for part in parts) for d in range(1, parts[0].dim())]
    padded = []
    for part in parts:
        missing = [size - have for size, have in zip(sizes, part.shape[1:], strict=True)]
        # functional.pad counts from the last dimension, a pair (before, behind) each
        padded.append(torch.nn.functional.pad(part, [n for size in reversed(missing) for n in (0, size)]))
    return padded


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
