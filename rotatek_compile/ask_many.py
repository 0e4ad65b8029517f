"""Compress the images of a prompt once, and find out where in it a question stands, so that many can be asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor, nn

from .batches import prompt_text, tokenized
from .errors import RotateKError, UsageError
from .placement import input_device
from .runtime.document import Document, Frame, enabled_on, text_ids

ASIDE = "What does it say?"  # stands for a question while the text around one is looked for
COLUMNS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # outputs of a processor with one entry per token


def compress(model: nn.Module, processor: Any, images: Sequence[Any] | Image.Image) -> Document:
    """Let a model read images once, so that many questions can be asked about them: `compress(...).ask("What is the total?")`.

    Args:
        model: with an artifact enabled on it (`load`, or inside `with enable(...)`).
        images: PIL images in order, or one; they are put before the question as `rotatek-run` puts them.

    Raises:
        RotateKError: the model is not enabled, or its prompt cannot be cut behind the images.
    """
    enabled = enabled_on(model)
    if isinstance(images, Image.Image):
        images = [images]
    if not images:
        raise UsageError("a document is at least one image; for text alone use Document.read(model, **inputs)")
    inputs = dict(tokenized(processor, prompt_text(processor, len(images), ASIDE), list(images)))
    ids = inputs["input_ids"][0].tolist()
    ends = [column + 1 for column, token in enumerate(ids) if token in enabled.artifact.geometry.visual_token_ids]
    if not ends:
        raise RotateKError("the processor turned the images into no image tokens; pass the model's own processor")
    place, dtype = input_device(enabled.model), enabled.model.dtype
    cut = {name: value[:, : ends[-1]] if name in COLUMNS else value for name, value in inputs.items() if isinstance(value, Tensor)}
    moved = {name: value.to(place, dtype if value.is_floating_point() else None) for name, value in cut.items()}
    document = Document.read(enabled.model, **moved)
    document.processor, document.frame = processor, _frame(processor, ids[ends[-1] :])
    return document


def _frame(processor: Any, ids: list[int]) -> Frame | None:
    """What stands around a question behind the images, from the ids of `ASIDE` there; None where its text does not give the same ids."""
    text = processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    before, aside, after = text.partition(ASIDE)
    return Frame(before, after) if aside and text_ids(processor, text) == ids else None
