"""How many directions of a segment are kept at which precision."""

from __future__ import annotations

from typing import NamedTuple

UNIT = 8
"""Directions of a native or 8-bit slab come in steps of 8, those of a 4-bit slab in steps of `NIBBLE_UNIT`."""
NIBBLE_UNIT = 16
NATIVE_BYTES = 2  # native numbers are compared at 2 bytes, whatever the compute dtype (DESIGN.md §3)


class Slabs(NamedTuple):
    """Directions in order of importance: the first `native` in the compute dtype, then `byte` at 8 bits, then `nibble` at 4 bits.

    All D native stands for raw numbers: nothing is rotated, and no mean is kept.
    """

    native: int = 0
    byte: int = 0
    nibble: int = 0

    @property
    def rank(self) -> int:
        """Directions kept."""
        return self.native + self.byte + self.nibble

    @property
    def scaled(self) -> int:
        """Directions that have a scale."""
        return self.byte + self.nibble

    def bytes_per_token(self, itemsize: int = NATIVE_BYTES) -> int:
        """Of one token's codes."""
        return self.native * itemsize + self.byte + self.nibble // 2


def check_slabs(slabs: Slabs, dim: int) -> None:
    """Refuse what cannot be stored.

    Raises:
        ValueError: a negative number, one that is off its step, or more than D directions.
    """
    native, byte, nibble = slabs
    off = native % UNIT or byte % UNIT or nibble % NIBBLE_UNIT
    if min(slabs) < 0 or off or slabs.rank > dim:
        steps = f"multiples of {UNIT}, {UNIT} and {NIBBLE_UNIT}"
        raise ValueError(
            f"slabs {tuple(slabs)} (native, 8 bit, 4 bit) must be {steps}, zero included, of at most {dim} directions together"
        )
