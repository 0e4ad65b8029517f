"""Asymmetric round-to-nearest codes and their packing: what the quantising rivals share.

A group of numbers is stored as `code * scale + zero` with codes of 8, 4 or 2 bits and fp16 scale and zero point. Zero is rounded
down and scale up, so that the whole range of the group is covered and no number is off by more than half a step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import RotateKError

SCALE_BYTES = 4  # fp16 scale and zero point of one group


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Code groups along the last axis: x [..., N] -> codes uint8 [..., N], scale and zero fp16 [..., 1].

    Raises:
        RotateKError: numbers beyond what fp16 scales can hold.
    """
    exact, levels = x.float(), 2**bits - 1
    zero = half_below(exact.amin(-1, keepdim=True))
    scale = -half_below((zero.float() - exact.amax(-1, keepdim=True)) / levels)
    if not bool((zero.isfinite() & scale.isfinite()).all()):
        raise RotateKError(
            f"Keys or Values up to {float(exact.abs().amax()):.3g} do not fit fp16 scales; this method cannot code this model"
        )
    step = scale.float()
    codes = ((exact - zero.float()) / torch.where(step > 0, step, 1.0)).round().clamp(0, levels)
    return codes.to(torch.uint8), scale, zero


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Inverse of `quantise` in fp32."""
    return codes.float() * scale.float() + zero.float()


def half_below(x: Tensor) -> Tensor:
    """The nearest fp16 number if that is not above x (fp32), else one that is below by at most two units in the last place."""
    nearest = x.half()
    lower = (x - x.abs() * 2.0**-10 - 2.0**-24).half()
    return torch.where(nearest.float() > x, lower, nearest)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., N] of 8, 4, 2 or 1 bits to uint8 [..., ceil(N * bits / 8)], first code in the lowest bits."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (padded.unflatten(-1, (-1, per_byte)) << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of `pack_bits`: uint8 [..., width]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)[..., :width]


def packed_bytes(width: int, bits: int) -> int:
    """Bytes of `width` packed codes."""
    return -(-width * bits // 8)


def code_tokens(name: str, x: Tensor, bits: int, group: int) -> dict[str, Tensor]:
    """Per-token codes of x [H, S, D] in groups of `group` channels.

    Returns:
        parts `{name}_codes` uint8 [H, S, ceil(D * bits / 8)], `{name}_scale` and `{name}_zero` fp16 [H, S, D / group].
    """
    codes, scale, zero = quantise(x.unflatten(-1, (-1, group)), bits)
    return {f"{name}_codes": pack_bits(codes.flatten(-2), bits), f"{name}_scale": scale.squeeze(-1), f"{name}_zero": zero.squeeze(-1)}


def rebuild_tokens(name: str, parts: Mapping[str, Tensor], bits: int, group: int) -> Tensor:
    """Inverse of `code_tokens`: fp32 [H, S, D]."""
    scale, zero = parts[f"{name}_scale"], parts[f"{name}_zero"]
    codes = unpack_bits(parts[f"{name}_codes"], bits, scale.shape[-1] * group).unflatten(-1, (-1, group))
    return dequantise(codes, scale.unsqueeze(-1), zero.unsqueeze(-1)).flatten(-2)


def token_code_bytes(tokens: int, dim: int, bits: int, group: int) -> int:
    """Bytes of `code_tokens` for one head."""
    return tokens * (packed_bytes(dim, bits) + dim // group * SCALE_BYTES)
