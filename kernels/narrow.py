"""Decode attention over stock caches with Keys and Values of different width: two Triton launches, fit for CUDA graphs.

The specification is `narrow_torch.narrow_attention_torch`. The number of splits follows from shapes and the GPU's multiprocessors, so the
host waits for nothing and no table is uploaded.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .decode import DTYPES, MAX_ROWS, Config, _power_of_two, _starts_early
from .decode_tuning import tuning_of

MOST_NEW = 4
WIDEST = {2: 256, 4: 128}  # Keys and Values, by bytes of a number: tiles must fit a multiprocessor's shared memory
LEAST_TOKENS = 256  # of a split, as `splits.plan_splits`
UNIT = 8  # numbers; rows that start on multiples of it are read 16 bytes at a time


def supported(q: Tensor, keys: Tensor, values: Tensor) -> str | None:
    """Why `narrow_attention` cannot serve this call, or None if it can; whether Triton runs on the tensors' device is not looked at."""
    batch, query_heads, new, width = q.shape
    heads, stored = keys.shape[1:3]
    if keys.shape[0] != batch or keys.shape[3] != width or values.shape[:3] != keys.shape[:3] or query_heads % heads or stored < new:
        return f"Queries {tuple(q.shape)}, Keys {tuple(keys.shape)} and Values {tuple(values.shape)} do not fit together"
    if not 1 <= new <= MOST_NEW or new * (query_heads // heads) > MAX_ROWS:
        return f"{new} new tokens exceed {MOST_NEW}, or {MAX_ROWS} rows with {query_heads // heads} heads per group"
    if q.dtype not in DTYPES or not (q.dtype == keys.dtype == values.dtype):
        return f"dtypes {q.dtype}, {keys.dtype} and {values.dtype} are not one of {DTYPES}"
    if max(width, values.shape[3]) > WIDEST[q.element_size()]:
        return f"widths {width} and {values.shape[3]} exceed {WIDEST[q.element_size()]}"
    if not batch or not (q.device == keys.device == values.device):
        return f"there are no sequences, or tensors are on {q.device}, {keys.device} and {values.device}"
    if any(x.stride(3) != 1 or (stored > 1 and x.stride(2) != x.shape[3]) for x in (keys, values)) or q.stride(3) != 1:
        return f"the tokens of a head do not lie one behind the other: strides {keys.stride()} and {values.stride()}"
    return None


def narrow_attention(q: Tensor, keys: Tensor, values: Tensor, scaling: float, *, splits: int | None = None) -> Tensor:
    """Causal attention of T new tokens, which are the last T of the S stored.

    Args:
        q: [B, Hq, T, K] after RoPE, T at most 4, any strides with the last 1.
        keys, values: [B, Hkv, S, K] and [B, Hkv, S, V] in q's dtype; any strides of sequences and heads, tokens one behind the other, as
            transformers' dynamic and static caches have them.
        scaling: factor of the logits.
        splits: most of a row, instead of those for this GPU.

    Returns:
        [B, T, Hq, V] in q's dtype, contiguous.

    Raises:
        ValueError: with `supported`'s reason.
    """
    reason = supported(q, keys, values)
    if reason is not None:
        raise ValueError(f"no Triton attention over narrow Keys and Values: {reason}; use narrow_torch.narrow_attention_torch")
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return narrow_attention(q, keys, values, scaling, splits=splits)
    from .narrow_kernels import narrow_merge_kernel, narrow_split_kernel

    plan = launch(q, keys, values)
    batch, query_heads, new, width = q.shape
    heads, stored, value = keys.shape[1], keys.shape[2], values.shape[3]
    group, rows, sequences = query_heads // heads, new * query_heads // heads, batch * heads
    tiles, (count, per_split) = plan.tiles, (plan.splits, plan.per_split) if splits is None else cut(stored, splits, plan.tiles.block_n)
    early = q.is_cuda and _starts_early(q.device.index)
    out = torch.empty((batch, new, query_heads, value), dtype=q.dtype, device=q.device)
    part_rows = -(-sequences * count * rows // 4) * 4  # whole 16 bytes each, for Triton would compile anew otherwise
    parts = torch.empty(part_rows * (value + 2), dtype=torch.float32, device=q.device)
    part_acc, part_m, part_l = parts.split((part_rows * value, part_rows, part_rows))
    narrow_split_kernel[(sequences * count,)](
        q, keys, values, part_m, part_l, part_acc, scaling * math.log2(math.e), stored, per_split, count,
        *q.stride()[:3], *(step // plan.unit for step in (*keys.stride()[:2], *values.stride()[:2])),
        HEADS=heads, G=group, T=new, K=width, V=value, KN=tile(width), VN=tile(value), M=max(16, _power_of_two(rows)), UNIT=plan.unit,
        BLOCK_N=tiles.dense_block_n, STAGES=tiles.dense_stages, EARLY=early, UPCAST=not q.is_cuda,
        PRECISION="tf32x3" if q.dtype is torch.float32 else "tf32", num_warps=tiles.warps,
    )  # fmt: skip
    narrow_merge_kernel[(sequences * rows, -(-value // plan.block_d))](
        part_m, part_l, part_acc, out, count, out.stride(0), out.stride(2), out.stride(1),
        HEADS=heads, G=group, T=new, V=value, BLOCK_S=plan.block_s, BLOCK_D=plan.block_d, EARLY=early,
        num_warps=4 if plan.block_s * plan.block_d > 1024 else 1, launch_pdl=early,
    )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class Launch:
    """How a call is launched.

    Attributes:
        splits, per_split: of a row, and the tokens of one.
        unit: numbers that all strides of the caches are multiples of.
        block_s, block_d: partials and channels that a program of the merge takes at once.
        compiled: all that Triton compiles anew for, as far as tensors' shapes and strides decide it.
    """

    tiles: Config
    splits: int
    per_split: int
    unit: int
    block_s: int
    block_d: int
    compiled: tuple[int, ...]


def launch(q: Tensor, keys: Tensor, values: Tensor) -> Launch:
    """How `narrow_attention` would launch this call, which it supports."""
    aligned = all(step % UNIT == 0 for x in (keys, values) for step in x.stride()[:2])
    return _launch(tuple(q.shape), tuple(keys.shape[1:3]), values.shape[3], q.element_size(), aligned, q.device)


@functools.lru_cache(maxsize=256)
def _launch(queries: tuple[int, ...], stored: tuple[int, ...], value: int, itemsize: int, aligned: bool, device: torch.device) -> Launch:
    """Kept, because at batch 1 the host's time for a call counts, and all layers of a step have the same."""
    batch, query_heads, new, width = queries
    heads, tokens = stored
    rows, sequences = new * query_heads // heads, batch * heads
    tiles = config(width, value, rows, itemsize)
    splits, per_split = cut(tokens, splits_for(sequences, device), tiles.block_n)
    unit = UNIT if aligned else 1
    block_s = 16 if splits <= 16 else 64
    # Few rows: cut the channels too, so that enough programs read the partials.
    block_d = 32 if sequences * rows < 512 else _power_of_two(value)
    compiled = (itemsize, query_heads, heads, new, width, value, unit, block_s, block_d)
    return Launch(tiles, splits, per_split, unit, block_s, block_d, compiled)


def config(width: int, value: int, rows: int, itemsize: int) -> Config:
    """Tile sizes for Keys and Values of these widths with T·G query rows: those of raw numbers in `decode.config`."""
    widest = max(tile(width), tile(value))
    block_n = 32 if widest * itemsize > 256 else 64
    warps = 8 if itemsize == 4 or max(16, _power_of_two(rows)) * widest > 8192 else 4  # with 4, the sums of these would spill
    return Config(block_n, 2, block_n, 2, warps)


def cut(stored: int, splits: int, block_n: int) -> tuple[int, int]:
    """How many splits `stored` tokens are cut into, at most `splits`, and the tokens of each: whole tiles."""
    wanted = max(1, min(splits, stored // LEAST_TOKENS))
    per_split = -(-stored // (wanted * block_n)) * block_n
    return -(-stored // per_split), per_split


def splits_for(sequences: int, device: torch.device) -> int:
    """Splits of each of so many rows (batch, KV head) that fill a GPU, as `splits.programs_for` has it for raw numbers."""
    tuning = tuning_of(device)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    programs = tuning.filled_programs if sequences >= multiprocessors else tuning.programs
    return max(1, round(programs * multiprocessors / sequences))


def tile(width: int) -> int:
    """The power of two that holds a width; a product takes 16 and more."""
    return max(16, _power_of_two(width))
