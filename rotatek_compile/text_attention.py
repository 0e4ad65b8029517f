"""Choosing the attention function of a model's text part, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import RotateKError


@dataclass(frozen=True, slots=True)
class Attending:
    """One layer's call of an attention function: query [B, Hq, T, D], key and value [B, Hkv, S, D]; `options` are what else transformers
    passes."""

    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    options: dict[str, Any]

    def by_sdpa(self) -> tuple[Tensor, Tensor | None]:
        """What the stock function makes of it."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        found: tuple[Tensor, Tensor | None] = stock(
            self.module, self.query, self.key, self.value, self.mask, scaling=self.scaling, **self.options
        )
        return found


@contextmanager
def attended_by(model: Any, name: str, attend: Callable[[Attending], tuple[Tensor, Tensor | None]], masked: bool = True) -> Iterator[None]:
    """Let a function of ours, registered as `name`, attend for the text part, and the model's own one afterwards again.

    Args:
        masked: it gets the masks that sdpa would get; else none are made.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
        return attend(Attending(module, query, key, value, attention_mask, scaling, options))

    AttentionInterface.register(name, attention)
    if masked:
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
