"""RoPE on kept pairs (RAP, arXiv 2602.02599), the readable version: the specification of the Triton kernel in `pairs_kernels.py`."""

from __future__ import annotations

import torch
from torch import Tensor


def of_pairs(angles: Tensor, pairs: Tensor) -> Tensor:
    """Cosines or sines [B, S, D] at the pairs int64 [Hkv, m] of every KV head: [B, Hkv, S, m]."""
    return angles[..., pairs].transpose(1, 2)  # pair p turns channels p and p + D/2 alike, so the first half says all


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on kept pairs.

    Args:
        x: [B, H, S, 2m], H a multiple of Hkv; channels j and j + m are a pair.
        cos, sin: [B or 1, Hkv, S, m].

    Returns:
        [B, H, S, 2m]: each pair turned by its angle, in the order of operations of transformers' `apply_rotary_pos_emb`.
    """
    first, second = x.unflatten(1, (cos.shape[1], -1)).chunk(2, dim=-1)  # [B, Hkv, G, S, m] each
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(1, 2)


def turned(x: Tensor, cos: Tensor, sin: Tensor, pairs: Tensor) -> Tensor:
    """Queries or Keys as a projection puts them out, turned: [B, S, H·2m] to [B, S, H·2m], contiguous.

    Args:
        cos, sin: [B or 1, S, D], as the model passes them.
        pairs: int64 [Hkv, m].
    """
    heads = x.unflatten(-1, (-1, 2 * pairs.shape[1])).transpose(1, 2)
    return rotate(heads, of_pairs(cos, pairs), of_pairs(sin, pairs)).transpose(1, 2).flatten(2)
