"""How far positions and tokens are apart in a conversation, for models with M-RoPE (Qwen-VL).

A picture takes fewer positions than tokens, so the next token's position is its column and `rope_deltas` int64 [B, 1]. transformers keeps
that number on the model, by whichever part computes positions, where the next prompt overwrites it. A cache that is to outlive its prompt
(documents, files) has its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def keepers(model: nn.Module) -> list[Any]:
    """The parts of a model that keep the number; none without M-RoPE."""
    return [module for module in model.modules() if hasattr(module, "rope_deltas")]


def deltas_of(model: nn.Module) -> Tensor | None:
    """What the model keeps, int64 [B, 1], a copy; None before its first prompt."""
    for keeper in keepers(model):
        if isinstance(keeper.rope_deltas, Tensor):
            return keeper.rope_deltas.detach().to(torch.int64).view(-1, 1).clone()
    return None


def set_deltas(parts: list[Any], deltas: Tensor | None) -> None:
    """Give `keepers` a number."""
    for keeper in parts:
        keeper.rope_deltas = deltas


def after_pictures(places: Tensor, length: int) -> Tensor:
    """The number after a call whose positions were `places` [3 or 4, B, T] (the last three are of M-RoPE); `length`: columns with it."""
    return (places[-3:].amax((0, 2)).to(torch.int64) + 1 - length).view(-1, 1)


@contextmanager
def positions(model: nn.Module, deltas: Tensor | None) -> Iterator[None]:
    """A conversation's own number on the model; what another one has there is put back."""
    before = [(keeper, keeper.rope_deltas) for keeper in keepers(model)]
    set_deltas([keeper for keeper, _ in before], deltas)
    try:
        yield
    finally:
        for keeper, old in before:
            keeper.rope_deltas = old
