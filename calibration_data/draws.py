"""Random choices that are the same on every machine, with every numpy version and in every order of access."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_BLOCK = 64  # words fetched at a time; one at a time costs ten times as much


class Draws:
    """A stream of random integers that depends on nothing but `name`.

    The words are those of numpy's Philox counter generator, keyed by a SHA-256 of the name; only integer arithmetic follows.
    """

    def __init__(self, name: str) -> None:
        digest = hashlib.sha256(name.encode("utf-8")).digest()
        self._generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
        self._words: list[int] = []

    def below(self, bound: int) -> int:
        """An integer in [0, bound); the bias of the multiplication is below bound / 2**64."""
        if not self._words:
            self._words = self._generator.random_raw(_BLOCK).tolist()
        return (self._words.pop() * bound) >> 64

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + self.below(high - low + 1)

    def one_of(self, choices: Sequence[T]) -> T:
        """One of `choices`."""
        return choices[self.below(len(choices))]

    def distinct(self, count: int, bound: int) -> list[int]:
        """`count` different integers in [0, bound), in random order."""
        pool = list(range(bound))
        return [pool.pop(self.below(len(pool))) for _ in range(count)]

    def raw_bytes(self, count: int) -> np.ndarray:
        """`count` random bytes, uint8 [count]; `count` is a multiple of 8."""
        return self._generator.random_raw(count // 8).astype("<u8").view(np.uint8)
