"""Choosing the attention function of a model's text part, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .errors import RotateKError


@contextmanager
def attended_by(model: Any, name: str, attention: Callable[..., Any]) -> Iterator[None]:
    """Let an attention function of ours, registered as `name`, attend for the text part, and the model's own one afterwards again.

    It gets the masks that sdpa would get.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config.get_text_config(decoder=True)._attn_implementation
    set_text_attention(model, name)
    try:
        yield
    finally:
        set_text_attention(model, before)


def set_text_attention(model: Any, implementation: str) -> None:
    """Set the attention implementation of the text sub-config only; the vision tower keeps its own."""
    text = model.config.get_text_config(decoder=True)
    if text is model.config:
        model.set_attn_implementation(implementation)
    else:
        key = next((k for k in model.config.sub_configs if getattr(model.config, k, None) is text), None)
        if key is None:
            raise RotateKError(f"model type {model.config.model_type!r} hides its text config; it is not supported")
        model.set_attn_implementation({key: implementation})
    if text._attn_implementation != implementation:
        raise RotateKError(f"{type(model).__name__} did not accept the attention function {implementation!r}; it is not supported")
