"""RoPE on kept pairs with Triton: Queries and Keys together in one launch, where the projections left them.

The specification is `pairs_torch.turned`, to the bit: a·cos and b·sin are rounded to the dtype before they are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decode import DTYPES

FEW_TOKENS = 4  # up to these every head and token has a program of its own: latency counts, and there is little to share
BLOCK_NUMBERS = 2048  # of one head in the blocks of a prefill


def supported(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, pairs: Tensor) -> str | None:
    """Why `turn` cannot serve this call, or None if it can; whether Triton runs on the tensors' device is not looked at."""
    if q.dim() != 3 or k.dim() != 3 or cos.dim() != 3 or cos.shape != sin.shape:
        return f"Queries, Keys, cosines and sines are {[tuple(x.shape) for x in (q, k, cos, sin)]}, not [B, S, channels]"
    if not (q.dtype == k.dtype == cos.dtype == sin.dtype) or q.dtype not in DTYPES:
        return f"dtypes {[x.dtype for x in (q, k, cos, sin)]} are not one of {DTYPES}"
    heads, count = pairs.shape
    if k.shape[2] != heads * 2 * count or q.shape[2] % k.shape[2] or q.shape[:2] != k.shape[:2]:
        return f"{tuple(q.shape)} and {tuple(k.shape)} are not heads of {2 * count} channels, {heads} of them of Keys"
    if cos.shape[1] != q.shape[1] or cos.shape[0] not in (1, q.shape[0]):
        return f"cosines {tuple(cos.shape)} are not of the tokens of {tuple(q.shape)}"
    if q.stride(2) != 1 or k.stride(2) != 1 or not pairs.is_contiguous() or pairs.dtype != torch.int64:
        return "channels or pairs are not contiguous, or pairs are not int64"
    if len({x.device for x in (q, k, cos, sin, pairs)}) > 1:
        return f"tensors are on {sorted({str(x.device) for x in (q, k, cos, sin, pairs)})}"
    return "there are no tokens" if not q.numel() else None


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, pairs: Tensor) -> None:
    """Turn Queries and Keys in place.

    Args:
        q, k: [B, S, Hq·2m] and [B, S, Hkv·2m], channels j and j + m of a head a pair; any strides with the last 1.
        cos, sin: [B or 1, S, D] of their dtype, any strides, the second half of the channels repeating the first.
        pairs: int64 [Hkv, m], contiguous, all below D/2: which of the pairs each KV head keeps.

    Raises:
        ValueError: with `supported`'s reason.
    """
    reason = supported(q, k, cos, sin, pairs)
    if reason is not None:
        raise ValueError(f"no Triton kernel for kept pairs: {reason}; use pairs_torch.turned")
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            turn(q, k, cos, sin, pairs)
        return
    from .pairs_kernels import pairs_kernel

    batch, tokens, _ = q.shape
    heads, count = pairs.shape
    group = q.shape[2] // k.shape[2]
    power = 1 << (count - 1).bit_length()
    few = tokens <= FEW_TOKENS
    block = 1 if few else block_of(count)
    blocks = -(-tokens // block)
    cos, sin = (x.expand(batch, -1, -1) for x in (cos, sin))
    pairs_kernel[(batch * blocks, heads, group + 1 if few else 1)](
        q, k, cos, sin, pairs, tokens, blocks, q.stride(0), q.stride(1), k.stride(0), k.stride(1), *cos.stride(), *sin.stride(),
        G=group, PAIRS=count, MP=power, BLOCK_T=block, SPREAD=few, **options(few),
    )  # fmt: skip


def block_of(count: int) -> int:
    """Tokens of a block of a prefill, with `count` pairs a head; a power of two."""
    return max(1, BLOCK_NUMBERS // (1 << (count - 1).bit_length()))


def options(few: bool) -> dict[str, int | bool]:
    """How the kernel is compiled. A product and a sum must not be fused: that would leave out the rounding between them."""
    return {"num_warps": 1 if few else 4, "enable_fp_fusion": False}
