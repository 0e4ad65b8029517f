"""What the decode kernels are tuned by, for each class of GPU. Rows are measured (benchmarks/tune_decode.py prints them); nothing is tried
out at run time. A GPU without a row gets that of the H100, adapted by what its driver says of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Tuning:
    """Settings of one class of GPU.

    Attributes:
        programs, coded_programs, filled_programs: splits to aim for per multiprocessor: of raw and native numbers; where a segment has 8-
            or 4-bit codes, whose splits have more to do before and after; once the rows (batch, head) alone fill the GPU, where codes may
            get fewer (`waves.in_waves`).
        softmax, byte, nibble: what a token costs where instructions bound it, in bytes that are read in the same time: scores and
            softmax, and each byte of a tile of 8-bit and of 4-bit codes (`splits.plan_splits`).
        stages: tiles of codes under way at once. large_tile: bytes per token up to which a tile has 128 tokens instead of 64.
        few_registers, many_registers: most per thread for narrow and for wide tiles of codes, so that more programs fit; None: no limit.
    """

    programs: int = 3
    coded_programs: int = 2
    filled_programs: int = 8
    softmax: float = 28.0
    byte: float = 0.52
    nibble: float = 0.9
    stages: int = 3
    large_tile: int = 256
    few_registers: int | None = 128
    many_registers: int | None = 168


H100 = Tuning()
"""Best or within 3 % of it, of 8 settings per shape for codes and of 20 to 48 where Values are raw (NVIDIA H100 80GB HBM3, Triton 3.6)."""
ROWS = {"NVIDIA H100": H100, "NVIDIA H200": H100}
"""By how a GPU's name begins; the longest beginning counts. An H200 has an H100's multiprocessors, but was not tuned for its memory."""

RATE, CYCLES = 3.35e12, 132 * 1.755e9  # of the H100: bytes per second (data sheet), cycles per second of all multiprocessors
SHARED, REGISTERS = 228 << 10, 1 << 16  # per multiprocessor


@functools.lru_cache(maxsize=64)
def tuning_of(device: torch.device) -> Tuning:
    """The row of a device, or a guess; that of the H100 for a CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return H100
    properties = torch.cuda.get_device_properties(device)
    found = [name for name in ROWS if properties.name.startswith(name)]
    return ROWS[max(found, key=len)] if found else guessed(properties)


def guessed(properties: Any) -> Tuning:
    """Settings for a GPU without a row, from what torch knows of it; what it does not say is taken to be as on an H100.

    Where memory is faster for each cycle of a multiprocessor, instructions count for more bytes. With less shared memory fewer tiles are
    under way, and limits of registers are for multiprocessors that have as many as an H100's.
    """
    rate = 2e3 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0) / 8  # kHz, both edges; bits
    cycles = 1e3 * getattr(properties, "clock_rate", 0) * properties.multi_processor_count
    scale = rate / RATE * CYCLES / cycles if rate and cycles else 1.0
    costs = {name: round(getattr(H100, name) * scale, 3) for name in ("softmax", "byte", "nibble")}
    shared = getattr(properties, "shared_memory_per_multiprocessor", SHARED)
    changed: dict[str, Any] = {"stages": 2, "coded_programs": 1, "programs": 2} if shared < SHARED * 2 // 3 else {}
    if getattr(properties, "regs_per_multiprocessor", REGISTERS) != REGISTERS:
        changed |= {"few_registers": None, "many_registers": None}
    return replace(H100, **costs, **changed)
