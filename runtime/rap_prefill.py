"""At which widths Keys and Values go to an attention implementation when several new tokens arrive.

Flash attention wants them equal, so the narrower side is padded. cuDNN takes each side at its own width, which needs no copies and is
faster where the sides differ much. It is asked only where torch would take cuDNN for these very tensors (`torch._fused_sdp_choice`: with
torch 2.11 and cuDNN 9.15.1 or newer on GPUs of compute capability 9 and 10): on other GPUs torch would take a slower kernel for two widths
than padded flash attention. So no other kernel than cuDNN's is ever run at two widths here.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend

from . import rap_kernels


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, causal: bool) -> Tensor | None:
    """What transformers' `sdpa` computes, by cuDNN at both widths; None where the narrower side is to be padded.

    No gradients, no compiler (`rap_kernels.usable`): backward through two widths is not tried. The first result of each pair of widths is
    compared with that of padded heads.

    Args:
        query: [B, Hq, S, K] after RoPE.
        keys, values: [B, Hkv, stored, K] and [B, Hkv, stored, V].
        mask: as `sdpa` takes it, [B or 1, Hq or 1, S, stored], bool or added to the logits.
        scaling: factor of the logits.
        causal: without a mask, query i sees Keys 0 to i; more Keys than queries are then the empty places of a static cache.

    Returns:
        [B, S, Hq, V] in the query's dtype.
    """
    new = query.shape[2]
    if new == 1 or keys.shape[-1] == values.shape[-1]:
        return None
    if not rap_kernels.usable(query, keys, values, *(() if mask is None else (mask,))):
        return None
    if causal:
        keys, values = keys[:, :, :new], values[:, :, :new]
    if not cudnn_is_next(query, keys, values, mask, causal):
        return None
    run = partial(
        nn.functional.scaled_dot_product_attention,
        attn_mask=mask,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )

    def compared(x: Tensor) -> list[Tensor]:
        """[B, S, Hq, V]. Queries that a mask lets see nothing (padding) have no right result, and may have NaN."""
        x = x[..., : values.shape[-1]].transpose(1, 2)
        return [x if mask is None else x.nan_to_num()]

    sign = ("attention by cuDNN at two widths", query.device, query.dtype, query.shape[1], keys.shape[1], keys.shape[-1], values.shape[-1])
    if not rap_kernels.proven(
        (*sign, mask is None, causal),
        lambda: compared(run(query, keys, values)),
        lambda: compared(run(*equal_widths(query, keys, values))),
        instead="padded heads are",
    ):
        return None
    return run(query, keys, values).transpose(1, 2)


def cudnn_is_next(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether `scaled_dot_product_attention` would compute this by cuDNN; args as `attend`.

    cuDNN itself is asked first: where the user has left only kernels that take one width, torch's choice would be an error.
    """
    if not query.is_cuda:
        return False
    grouped = query.shape[1] != keys.shape[1]
    if not can_use_cudnn_attention(SDPAParams(query, keys, values, mask, 0.0, causal, grouped)):
        return False
    return torch._fused_sdp_choice(query, keys, values, mask, 0.0, causal, enable_gqa=grouped) == SDPBackend.CUDNN_ATTENTION.value


def takes_different_widths(implementation: str, queries: int) -> bool:
    """Whether Keys and Values of different width go to an attention implementation as they are, or the narrower side is padded.

    `eager` multiplies matrices of any width. `sdpa` would fall back to a kernel that writes all S x S logits out, three times slower on a
    CPU at 2,048 tokens than with padding; but for a single query that costs nothing, and padding would copy the cache at each step.
    Flash and other kernels want equal widths.
    """
    return implementation == "eager" or (implementation == "sdpa" and queries == 1)


def equal_widths(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three with zeros behind the narrower channels: logits stay the same, and so do the first channels of the output."""
    missing = key.shape[-1] - value.shape[-1]
    if missing > 0:
        value = nn.functional.pad(value, (0, missing))
    elif missing < 0:
        query, key = nn.functional.pad(query, (0, -missing)), nn.functional.pad(key, (0, -missing))
    return query, key, value
