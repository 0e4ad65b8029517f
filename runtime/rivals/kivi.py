"""KIVI (arXiv 2402.02750): Keys quantised per channel, Values per token, asymmetric, groups of 32.

Formula: Keys: each channel in groups of 32 tokens, x̂ = scale · code + zero; Values: each token in groups of 32 channels; fp16 scale
and zero point per group. The last S mod 32 Keys of a segment fill no group and stay native, as published (the residual); they count.
Limits: the published 32 to 128 newest tokens at full precision are here the raw text window, which every method has; a segment
is one image, so its residual is at most 31 tokens. Attention reads rebuilt Keys, so speed says nothing about KIVI's kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..coder import NATIVE_BYTES, CodedSegment
from .base import RivalCoder
from .rounding import SCALE_BYTES, code_tokens, dequantise, pack_bits, packed_bytes, quantise, rebuild_tokens, token_code_bytes, unpack_bits

GROUP = 32


@dataclass(frozen=True, kw_only=True)
class KiviCoder(RivalCoder):
    """KIVI with codes of `bits` bits (published: 2 and 4)."""

    bits: int

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        whole = keys.shape[1] // GROUP * GROUP
        blocks = keys[:, :whole].unflatten(1, (whole // GROUP, GROUP)).mT  # [H, S / 32, D, 32]
        codes, scale, zero = quantise(blocks, self.bits)
        parts = {
            "key_codes": pack_bits(codes, self.bits),
            "key_scale": scale.squeeze(-1),
            "key_zero": zero.squeeze(-1),
            "key_residual": keys[:, whole:],
            **code_tokens("value", values, self.bits, GROUP),
        }
        return CodedSegment(keys.shape[1], parts, frozenset({"key_residual"}), partial(_rebuild, bits=self.bits))

    def bytes_of(self, tokens: int, layer: int) -> int:
        shape = self.shape(layer)
        blocks, residual = divmod(tokens, GROUP)
        keys = blocks * shape.head_dim * (packed_bytes(GROUP, self.bits) + SCALE_BYTES) + residual * shape.head_dim * NATIVE_BYTES
        return shape.kv_heads * (keys + token_code_bytes(tokens, shape.head_dim, self.bits, GROUP))


def _rebuild(parts: Mapping[str, Tensor], tokens: int, bits: int) -> tuple[Tensor, Tensor]:
    codes = unpack_bits(parts["key_codes"], bits, GROUP)
    coded = dequantise(codes, parts["key_scale"].unsqueeze(-1), parts["key_zero"].unsqueeze(-1)).mT.flatten(1, 2)
    return torch.cat([coded, parts["key_residual"].float()], dim=1), rebuild_tokens("value", parts, bits, GROUP)
