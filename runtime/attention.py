"""The attention functions `rotatek...`, registered with transformers: plain Keys go to the stock kernel, handles to the cache.

There is one for each stock implementation that a model may have had, because tokens that arrive together are attended by that one,
with the mask that it expects. Its name goes into the text config while `enable()` is in force, and nowhere else.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import RotateKError
from .handle import Handle

NAME = "rotatek"
DEFAULT = "sdpa"
UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # they change the logits in ways a decode kernel must know
RESERVED = {"flash_attention": "fa", "flash": "fa", "sdpa": "sd", "flex": "fx"}  # words in a name that transformers acts upon

_lock = threading.Lock()
_users: Counter[str] = Counter()


def name_for(delegate: str | None) -> str:
    """Name of the attention function that delegates to this stock implementation."""
    if delegate in (None, DEFAULT):
        return NAME
    name = str(delegate)
    for word, short in RESERVED.items():
        name = name.replace(word, short)
    return NAME + "_" + "".join(c if c.isalnum() else "_" for c in name)


def register(delegate: str | None) -> str:
    """Register function and mask for a model whose attention implementation is `delegate`; returns their name. Undone by `release`."""
    name, stock = name_for(delegate), delegate or DEFAULT
    take(name, functools.partial(rotatek_attention, stock), stock)
    return name


def take(name: str, attention: Callable[..., Any], stock: str) -> None:
    """Register an attention function with the mask of a stock one, once for all who use it at a time; undone by as many `release`.

    The mask matters: without an entry of the same name transformers passes no mask at all, and left-padded rows are wrong.
    """
    with _lock:
        _users[name] += 1
        if _users[name] == 1:
            AttentionInterface.register(name, attention)
            known = stock in ALL_MASK_ATTENTION_FUNCTIONS
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[stock if known else DEFAULT])


def release(name: str) -> None:
    """Take function and mask back when the last model that used them is done."""
    with _lock:
        _users[name] -= 1
        if _users[name] <= 0:
            del _users[name]
            for interface in (AttentionInterface, AttentionMaskInterface):
                interface._global_mapping.pop(name, None)


def rotatek_attention(
    stock: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor | Handle,
    value: Tensor | Handle,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer; query [B, Hq, T, D] -> ([B, T, Hq, D], None), as transformers' attention interface has it.

    Args:
        stock: the implementation that tokens which arrive together are given to.

    Raises:
        RotateKError: the layer asks for logit changes that the compressed cache does not compute.
    """
    delegate, seen = stock_attention(stock, module)
    if not isinstance(key, Handle):
        return delegate(seen, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise RotateKError(f"this model's attention uses {name}, which the compressed cache does not support")
    handle = key
    if handle.first:
        assert handle.keys is not None and handle.values is not None, "the handle was used after its commit"
        used = getattr(module, "used_width", None)  # behind it a pruned module hands over zeros (rap_attention.py)
        raw = (x[..., :used] for x in (query, handle.keys, handle.values))
        out, _ = delegate(seen, *raw, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    else:
        out = handle.attend(query, attention_mask, scaling if scaling is not None else query.shape[-1] ** -0.5)
        out = out.transpose(1, 2).contiguous()
    handle.commit(query, scaling)
    return out, None


def stock_attention(stock: str, module: nn.Module) -> tuple[Callable[..., Any], Any]:
    """The stock function, and the attention module as that function must see it."""
    if stock == "eager":  # every modelling file has its own
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return (own or ALL_ATTENTION_FUNCTIONS[DEFAULT]), module
    if "flash" in stock:  # reads from the config which package it is to use
        return ALL_ATTENTION_FUNCTIONS[stock], _Seen(module, config=_Seen(module.config, _attn_implementation=stock))
    return ALL_ATTENTION_FUNCTIONS[stock], module


class _Seen:
    """An object with some of its attributes replaced, for one reader; the object itself stays as other threads know it."""

    def __init__(self, real: Any, **changes: Any) -> None:
        self.__dict__.update(changes)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)
