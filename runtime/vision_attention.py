"""Attention inside a vision tower, as VisionZip (arXiv 2412.04467) scores patches by it, taken while the tower encodes.

In the tower's last layer but one: attention from the class token, mean over heads, where the language model drops that token from the
features; else what a patch receives from all patches, mean over heads (the published rule for towers without one). Patches become tokens as
their features do: LLaVA's packing of tiles is run on the scores, tokens that stand for the end of a line get 0 (published: those models'
lines are not kept); Qwen-VL's tokens take the mean of the patches that are merged into them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RotateKError
from .attention import DEFAULT, name_for, release, stock_attention, take

NAME = "rotatek_vision"
ATTENTION = "rotatek_attention"  # attribute of an encoder's output for one image: scores fp32 [tokens]
AT_ONCE = 256  # queries whose attention is made at a time


@dataclass(slots=True)
class _Watch:
    stock: str
    target: nn.Module
    class_token: bool
    found: list[Tensor] = field(default_factory=list)  # [N, P] of each attention call
    packed: list[Tensor] | None = None


_watch: ContextVar[_Watch | None] = ContextVar("rotatek_vision", default=None)
_turn = threading.RLock()  # a tower that is watched looks different to every thread, so they take turns


def received(query: Tensor, key: Tensor, scaling: float, class_token: bool) -> Tensor:
    """Scores fp32 [N, P] of the patches of N images or tiles from query and key [N, H, T, d]; T = P + 1 with a class token, the first."""
    if class_token:
        return (scaling * query[:, :, :1].float() @ key.float().mT).softmax(-1).mean(1)[:, 0, 1:]
    total = query.new_zeros(query.shape[0], key.shape[2], dtype=torch.float32)
    for start in range(0, query.shape[2], AT_ONCE):
        total += (scaling * query[:, :, start : start + AT_ONCE].float() @ key.float().mT).softmax(-1).sum((1, 2))
    return total / (query.shape[1] * query.shape[2])


def vision_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The stock attention of the tower; the watched layer is looked at in passing."""
    watch = _watch.get()
    assert watch is not None, "only registered while an encoder is watched"
    if module is watch.target:
        watch.found.append(received(query, key, scaling if scaling is not None else query.shape[-1] ** -0.5, watch.class_token))
    delegate, seen = stock_attention(watch.stock, module)
    return delegate(seen, query, key, value, attention_mask, scaling=scaling, **kwargs)


@contextmanager
def watched(inner: Any) -> Iterator[_Watch]:
    """Watch the vision tower of a model's inner part during one call of its encoder; threads take turns.

    Raises:
        RotateKError: a tower whose patches cannot be followed to tokens.
    """
    with _turn, _watched(inner) as watch:
        yield watch


@contextmanager
def _watched(inner: Any) -> Iterator[_Watch]:
    target = _target(_tower(inner))
    config = target.config
    stock: Any = config._attn_implementation
    strategy = getattr(inner.config, "vision_feature_select_strategy", None)
    watch = _Watch(stock or DEFAULT, target, strategy == "default")
    pack = getattr(inner, "pack_image_features", None)
    before, shadowed = config._attn_implementation_internal, inner.__dict__.get("pack_image_features")
    name = f"{NAME}_{name_for(watch.stock)}"
    take(name, vision_attention, watch.stock)
    token = _watch.set(watch)
    try:
        config._attn_implementation_internal = name
        if pack is not None:
            inner.pack_image_features = _packing(pack, watch)
        yield watch
    finally:
        config._attn_implementation_internal = before
        if pack is not None and shadowed is None:
            inner.__dict__.pop("pack_image_features", None)
        elif pack is not None:
            inner.pack_image_features = shadowed
        _watch.reset(token)
        release(name)


def note(inner: Any, output: Any, watch: _Watch) -> None:
    """Put the scores on the encoder's output, one tensor per image.

    Raises:
        RotateKError: as `watched`.
    """
    features = getattr(output, "pooler_output", None)
    if not isinstance(features, (list, tuple)):
        raise RotateKError(_unknown(inner, "its images come in one tensor"))
    lengths = [f.numel() // f.shape[-1] for f in features]
    if watch.packed is not None:
        scores = [one.reshape(-1) for one in watch.packed]
    else:
        flat, merged = torch.cat([one.reshape(-1) for one in watch.found]), int(getattr(_tower(inner), "spatial_merge_size", 1)) ** 2
        if hasattr(_tower(inner), "get_window_index") or flat.numel() != sum(lengths) * merged:
            raise RotateKError(_unknown(inner, "its patches do not become tokens in their order"))
        scores = list(flat.view(-1, merged).mean(1).split(lengths))
    if [one.numel() for one in scores] != lengths:
        raise RotateKError(_unknown(inner, f"{[one.numel() for one in scores]} scores are no {lengths} tokens"))
    for feature, one in zip(features, scores, strict=True):
        setattr(feature, ATTENTION, one)


def _packing(pack: Any, watch: _Watch) -> Any:
    """`pack_image_features` that packs the scores in the same way beside the features."""

    def both(image_features: Any, *args: Any, **kwargs: Any) -> Any:
        tiles = torch.cat(watch.found).unsqueeze(-1).split([len(one) for one in image_features])
        line = {"image_newline": tiles[0].new_zeros(1)} if kwargs.get("image_newline") is not None else {}
        watch.packed = list(pack(tiles, *args, **{**kwargs, **line})[0])
        return pack(image_features, *args, **kwargs)

    return both


def _tower(inner: Any) -> Any:
    for name in ("vision_tower", "visual", "vision_model"):
        if (tower := getattr(inner, name, None)) is not None:
            return tower
    raise RotateKError(_unknown(inner, "it has no vision tower that is known"))


def _target(tower: nn.Module) -> Any:
    """The attention module of the last layer but one."""
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    blocks = [[one for one in block.modules() if hasattr(one, "is_causal") and hasattr(one, "config")] for part in lists for block in part]
    found = [inside[0] for inside in blocks if inside]
    if not found:
        raise RotateKError(_unknown(tower, "its attention does not use transformers' interface"))
    return found[max(len(found) - 2, 0)]


def _unknown(module: Any, why: str) -> str:
    return f"visionzip cannot follow the patches of {type(module).__name__} to tokens: {why}; use another --token-method"
