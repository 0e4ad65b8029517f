"""Attention of the newest tokens over Keys and Values of different width: the specification of the kernels in `narrow_kernels.py`."""

from __future__ import annotations

import torch
from torch import Tensor


def narrow_attention_torch(q: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Causal attention of T tokens that are the last of the S stored; in fp32, one sequence after another, so that little is held at once.

    Args:
        q: [B, Hq, T, K].
        keys, values: [B, Hkv, S, K] and [B, Hkv, S, V], Hq a multiple of Hkv, T of the S tokens the queries' own.
        scaling: factor of the logits.

    Returns:
        [B, T, Hq, V] in q's dtype, contiguous.
    """
    new, stored = q.shape[2], keys.shape[2]
    last = torch.arange(stored - new, stored, device=q.device)  # the last token each query sees
    hidden = torch.arange(stored, device=q.device) > last[:, None]  # [T, S]
    outputs = []
    for query, key, value in zip(q, keys, values, strict=True):
        grouped = query.float().unflatten(0, (key.shape[0], -1))  # [Hkv, G, T, K]
        logits = torch.einsum("hgtk,hsk->hgts", grouped, key.float()) * scaling
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hgts,hsv->thgv", weights, value.float()).flatten(1, 2))
    return torch.stack(outputs).to(q.dtype)
