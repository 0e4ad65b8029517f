"""The attention function `rotatek`, registered with transformers: plain Keys go to the stock kernel, handles to the cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import RotateKError
from .cache import Handle

NAME = "rotatek"
DELEGATE = "sdpa"  # the stock kernel for tokens that arrive together
UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # they change the logits in ways a decode kernel must know


def register() -> None:
    """Register function and mask under `rotatek`; harmless to repeat.

    The mask matters: without an entry of the same name transformers passes no mask at all, and left-padded rows are wrong.
    """
    AttentionInterface.register(NAME, rotatek_attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[DELEGATE])


def rotatek_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Handle,
    value: Tensor | Handle,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; query [B, Hq, T, D] -> ([B, T, Hq, D], None), as transformers' attention interface has it.

    Raises:
        RotateKError: the layer asks for logit changes that the compressed cache does not compute.
    """
    delegate = ALL_ATTENTION_FUNCTIONS[DELEGATE]
    if not isinstance(key, Handle):
        return delegate(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise RotateKError(f"this model's attention uses {name}, which the compressed cache does not support")
    handle = key
    if handle.first:
        out, _ = delegate(module, query, handle.keys, handle.values, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    else:
        out = handle.attend(query, attention_mask, scaling if scaling is not None else query.shape[-1] ** -0.5)
        out = out.transpose(1, 2).contiguous()
    handle.commit(query)
    return out, None
