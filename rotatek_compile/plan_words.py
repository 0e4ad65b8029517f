"""Plans in words and figures for people: directions × bits, bits per channel, and the bytes of an image."""

from __future__ import annotations

from collections.abc import Iterable

from .kernels.slabs import Slabs

NATIVE_BITS = 16  # native numbers are compared at 2 bytes
SCALE_BYTES = 2  # bf16, of a direction of 8 or 4 bits, per segment
MEAN_BYTES = 2  # fp16, of a channel, per segment of coded numbers


def slab_words(slabs: Slabs, dim: int) -> str:
    """Such as `8×16 16×8 32×4`: directions × bits; `raw` for numbers that are stored as they are, `mean` where no direction is kept."""
    if dim and slabs == Slabs(dim):
        return "raw"
    parts = [f"{count}×{bits}" for count, bits in zip(slabs, (NATIVE_BITS, 8, 4), strict=True) if count]
    return " ".join(parts) or "mean"


def level_words(level: Slabs) -> str:
    """The same of a level of sensitivities, which stands for every D."""
    return slab_words(level, 0)


def channel_bits(slabs: Slabs, dim: int) -> float:
    """Bits of a token's codes over its D channels: 16 for raw numbers, 0 where only the mean is kept."""
    return 8 * slabs.bytes_per_token() / dim


def scale_bytes(slabs: Slabs) -> int:
    """Of one segment."""
    return SCALE_BYTES * slabs.scaled


def mean_bytes(slabs: Slabs, dim: int) -> int:
    """Of one segment; raw numbers have no mean."""
    return 0 if slabs == Slabs(dim) else MEAN_BYTES * dim


def segment_bytes(slabs: Slabs, dim: int, tokens: int) -> int:
    """One side of one head in a segment of so many tokens, with the scales and the mean it needs; an own basis would add to it."""
    return slabs.bytes_per_token() * tokens + scale_bytes(slabs) + mean_bytes(slabs, dim)


def promised_bytes(slabs: Slabs, dim: int, tokens: int, escape_ratio: float = 0.0) -> int:
    """`segment_bytes` with the token of padding that an odd number of tokens has: what a budget must have room for.

    Args:
        escape_ratio: share of the tokens that have no codes; what they take raw is not counted here, because it is the same for all slabs.
    """
    padding = 0 if slabs.native == dim else slabs.bytes_per_token()
    return segment_bytes(slabs, dim, tokens) + padding - int(escape_ratio * tokens * slabs.bytes_per_token())


def mean_bits(sides: Iterable[tuple[Slabs, int]]) -> float:
    """Bits per channel over many (slabs, D)."""
    every = list(sides)
    return 8 * sum(slabs.bytes_per_token() for slabs, _ in every) / max(sum(dim for _, dim in every), 1)
