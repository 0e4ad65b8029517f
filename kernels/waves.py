"""How many splits a layer is cut into once its rows alone fill the GPU: as many as make whole waves of programs.

A multiprocessor holds a few programs at a time, by their registers. What does not fit waits, and a last wave with few programs takes nearly
as long as a full one: 1,024 splits are 2.6 waves of 396 and take longer than 768, which are 1.9 (docs/decode.md has the figures). Only
fewer splits than usual are looked at: more of them, in waves as full, took 5 to 11 % longer.
"""

from __future__ import annotations

import numpy as np

from .decode import Widths, config
from .decode_tuning import REGISTERS, Tuning
from .slabs import Slabs
from .table import BLOCK, TILE

CANDIDATES, FEWEST = 16, 0.3  # numbers of programs that are looked at for whole waves, from so much of the usual number to it
LEAST = 0.9  # of a wave: fewer programs leave multiprocessors without work
AS_GOOD = 0.02  # of a wave: fewer splits are taken where more would fill no more than this


def split_tokens(usual: np.ndarray, work: np.ndarray, programs: np.ndarray, min_tokens: int) -> np.ndarray:
    """Tokens of each piece's splits, for each number of programs: int64 [C, N] of `usual` tokens and their `work` [N]."""
    wanted = work.sum() / np.maximum(programs, 1)[:, None]
    count = (work / np.maximum(wanted, 1.0)).round().astype(np.int64)
    count = np.minimum(count.clip(min=1), (usual // min_tokens).clip(min=1))
    tokens = -(-usual // count)  # even, whole blocks, and whole tiles where that changes little
    step = np.where(tokens >= 4 * TILE, TILE, BLOCK)
    found: np.ndarray = -(-tokens // step) * step
    return found


def in_waves(usual: np.ndarray, work: np.ndarray, length: np.ndarray, stored: np.ndarray, most: int, min_tokens: int, at_once: int) -> int:
    """How many programs to aim for, so that splits of what is `stored` are n · `at_once` or little less; `most` if they are too few.

    Args:
        usual, work, length: tokens that splits are sized by, their cost, and all tokens, of each piece [N].
        stored: which pieces are not windows, bool [N].
        most: programs that are usual, at most; `min_tokens` of a split.
        at_once: programs that the GPU has room for.
    """
    programs = np.linspace(FEWEST * most, most, CANDIDATES).astype(np.int64)
    splits = -(-length[stored] // split_tokens(usual, work, programs, min_tokens)[:, stored])
    waves = splits.sum(1) / at_once
    filled = np.where(waves >= LEAST, waves / np.ceil(waves), 0.0)
    return int(programs[np.argmax(filled >= filled.max() - AS_GOOD)]) if filled.any() else most  # the first of these: the fewest


def programs_at_once(
    key_widths: Slabs, value_widths: Slabs, pairs: frozenset[tuple[bool, bool]], head_dim: int, itemsize: int, tuning: Tuning
) -> int:
    """Programs of codes that a multiprocessor has room for, by the registers that they are compiled for; 0 where that is not known."""
    tiles = config(Widths.of(key_widths, value_widths, pairs), head_dim, itemsize, tuning=tuning)
    return REGISTERS // (tiles.registers * 32 * tiles.warps) if tiles.apart and tiles.registers is not None else 0
