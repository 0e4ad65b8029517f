"""Classes of widths: which tiles a split goes through, so that a head pays for its own widths and not for those of its layer's widest.

A tile of 4-bit codes is a power of two of bytes and, where that leaves much unused, a rest: 8 bytes of a Key or up to 16 of a Value, whose
low and high halves make the sixteen rows or columns that a matrix instruction takes (`decode_codes.py`). 24 bytes of a Key are 16 and 8, 48
of a Value 32 and 16. Tiles of native numbers and of bytes are powers of two.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import NamedTuple

from .decode_tuning import Tuning
from .slabs import Slabs

KEY_REST, VALUE_REST = 8, 16  # bytes


class WidthClass(NamedTuple):
    """Widths that splits are compiled for together: the largest native, 8-bit and 4-bit slabs of either side, and which sides are raw."""

    key: Slabs
    value: Slabs
    raw_key: bool = False
    raw_value: bool = False

    def with_(self, other: WidthClass) -> WidthClass:
        """The class that serves both."""
        key, value = (Slabs(*map(max, mine, its)) for mine, its in zip(self[:2], other[:2], strict=True))
        return WidthClass(key, value, self.raw_key, self.raw_value)


class Tiles(NamedTuple):
    """Tiles of one side: native numbers, 8-bit codes, bytes of 4-bit codes, and of these the rest, 0 where there is none."""

    native: int = 0
    byte: int = 0
    nibble: int = 0
    rest: int = 0


def power_of_two(width: int) -> int:
    return 1 << max(width - 1, 0).bit_length()


def tiles(slabs: Slabs, rest: int = 0) -> Tiles:
    """Tiles of a side's slabs; with `rest` bytes (`KEY_REST` or `VALUE_REST`) at the end of the 4-bit slab where that is less than the next
    power of two."""
    native, byte, nibble = slabs
    plain = [max(16, power_of_two(width)) if width else 0 for width in (native, byte, nibble // 2)]  # tl.dot takes 16 and more
    least = 2 * rest
    width, main = nibble // 2, 0
    if rest and width > rest:
        main = power_of_two(width) // 2  # the largest power of two below
        if power_of_two(width) == width or main < least or width - main > rest:
            return Tiles(plain[0], plain[1], max(plain[2], least))
    if rest and width:
        return Tiles(plain[0], plain[1], main, rest)
    return Tiles(plain[0], plain[1], plain[2])


def token_cost(which: WidthClass, fine: bool, tuning: Tuning) -> float:
    """What a token of this class costs where instructions bound it, in bytes read in the same time: of scores and softmax, and of each tile
    of codes."""
    found = tuning.softmax
    for slabs, raw, rest in ((which.key, which.raw_key, KEY_REST), (which.value, which.raw_value, VALUE_REST)):
        of = tiles(slabs, rest if fine else 0)
        found += 0.0 if raw else tuning.byte * of.byte + tuning.nibble * of.nibble + tuning.rest * of.rest
    return found


def grouped(tokens: dict[WidthClass, int], most: int, fine: bool, tuning: Tuning) -> dict[WidthClass, WidthClass]:
    """For each class that occurs, with its tokens, the class that serves it, at most `most` for each pair of raw and coded sides. The two
    whose union costs least become one, again and again."""
    served = {which: which for which in tokens}
    for pair in {which[2:] for which in tokens}:
        while True:
            now: dict[WidthClass, int] = {}
            for which, by in served.items():
                if which[2:] == pair:
                    now[by] = now.get(by, 0) + tokens[which]
            costs = {which: token_cost(which, fine, tuning) for which in now}
            both = [(a, b, token_cost(a.with_(b), fine, tuning)) for a, b in combinations(sorted(now), 2)]
            unions = [(sum(now[x] * (cost - costs[x]) for x in (a, b)), a, b) for a, b, cost in both]
            if not unions or (len(now) <= most and min(unions)[0] > 0):
                break
            _, first, second = min(unions)
            served = {which: first.with_(second) if by in (first, second) else by for which, by in served.items()}
    return served


def largest(classes: Iterable[WidthClass]) -> tuple[Slabs, Slabs]:
    """The largest slabs of the rotated Keys and Values of some classes."""
    found = [Slabs(), Slabs()]
    for which in classes:
        for side, raw in enumerate(which[2:]):
            if not raw:
                found[side] = Slabs(*map(max, found[side], which[side]))
    return found[0], found[1]
