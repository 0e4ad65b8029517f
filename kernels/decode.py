"""Decode attention over the compact cache with Triton: two launches, no wait for the device, fit for CUDA graphs.

The specification is `decode_torch.decode_attention_torch`. Splits come from `view.splits` (`splits.plan_splits`). Splits with 8- or 4-bit
codes run in `decode_codes.py` where they can (`Config.apart`), all others in `decode_attend.py`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .decode_tuning import H100, Tuning, tuning_of
from .slabs import Slabs
from .table import CacheView

HEAD_DIMS = (64, 96, 128, 256)
MAX_ROWS = 64
MAX_CODED_ROWS = 32  # with 64, Triton 3.6 multiplies by groups of warps, which gave wrong results on Hopper (`decode_columns.product`)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Config:
    """Tile sizes of the split kernel.

    Attributes:
        block_n, stages: tokens per tile and pipeline stages of coded splits. dense_block_n, dense_stages: of raw ones and the window.
        apart: the warps of a coded split go their own ways (`decode_codes.py`).
        registers: most per thread, so that more programs fit on a multiprocessor; None leaves it to the compiler.
    """

    block_n: int
    stages: int
    dense_block_n: int
    dense_stages: int
    warps: int = 4
    apart: bool = False
    registers: int | None = None


@dataclass(frozen=True, slots=True)
class Widths:
    """Widths that the split kernel is compiled for: a layer's widest slabs as powers of two, 0 where a slab does not occur.

    Of 4-bit slabs the bytes count. `pairs` are those of `SplitPlan`.
    """

    key: tuple[int, int, int]
    value: tuple[int, int, int]
    pairs: frozenset[tuple[bool, bool]]

    @classmethod
    def of(cls, key_widths: Slabs, value_widths: Slabs, pairs: frozenset[tuple[bool, bool]]) -> Widths:
        """Those of a layer, from its `SplitPlan`."""
        return cls(_tile(key_widths), _tile(value_widths), pairs)

    def value_tile(self, head_dim: int) -> int:
        """Directions of the Values that a coded split sums over, all slabs together; raw Values have all."""
        native, byte, nibble = self.value
        coded = any(not raw for _, raw in self.pairs)
        return max((native + byte + 2 * nibble) * coded, _power_of_two(head_dim) * ((False, True) in self.pairs))

    def token_bytes(self, head_dim: int, itemsize: int) -> int:
        """Bytes that a tile of a coded split takes per token, in shared memory."""
        raw = _power_of_two(head_dim) * itemsize
        coded = [native * itemsize + byte + nibble for native, byte, nibble in (self.key, self.value)]
        sides = ([raw if is_raw else size for is_raw, size in zip(pair, coded, strict=True)] for pair in self.pairs)
        return max((sum(side) for side in sides), default=0)

    def constants(self) -> dict[str, int | bool]:
        """The split kernel's arguments."""
        widths = dict(zip(("KN", "K8", "K4", "VN", "V8", "V4"), self.key + self.value, strict=True))
        pairs = {"CODED_KEYS": (False, True), "CODED_VALUES": (True, False), "CODED_BOTH": (False, False)}
        return {**widths, **{name: pair in self.pairs for name, pair in pairs.items()}}


def _tile(slabs: Slabs) -> tuple[int, int, int]:
    native, byte, nibble = slabs
    widths = [max(16, _power_of_two(width)) if width else 0 for width in (native, byte, nibble // 2)]  # tl.dot takes 16 and more
    return widths[0], widths[1], widths[2]


def config(widths: Widths, head_dim: int, itemsize: int, rows: int = 8, tuning: Tuning = H100) -> Config:
    """Tile sizes for a layer of these widths, with `rows` packed query rows, a power of two from 8 on.

    All bodies live in one kernel, whose shared memory is that of the largest; so where the only raw tokens are those of
    the window, its tiles are small and leave room for more programs per multiprocessor.
    """
    wide = head_dim * itemsize > 256  # fp32, or D = 256: half the tokens per tile
    block_n = 32 if wide else 64
    dense_block_n = 32 if widths.pairs and (True, True) not in widths.pairs else block_n
    values = widths.value_tile(head_dim)
    if itemsize == 2 and any(widths.key[1:] + widths.value[1:]) and rows <= 16 and rows * values <= 2048:  # 64 registers of sums
        block_n = 128 if widths.token_bytes(head_dim, itemsize) <= tuning.large_tile else 64
        slabs = sum(width > 0 for width in (*widths.key, *widths.value))
        # on an H100 for four or three programs
        registers = None if rows > 8 else tuning.few_registers if values <= 64 and slabs <= 2 else tuning.many_registers
        return Config(block_n, tuning.stages, dense_block_n, 2, 4, apart=True, registers=registers)
    all_coded = (False, False) in widths.pairs
    # with 4, the accumulators of these would spill
    warps = 8 if itemsize == 4 or max(16, rows) * head_dim > (4096 if all_coded else 8192) else 4
    # Codes are small: a second tile under way keeps as many bytes in flight as one of raw numbers.
    stages = tuning.stages if all_coded and itemsize == 2 and widths.value[0] <= 64 else 2
    return Config(block_n, stages, dense_block_n, 2, warps)


@functools.lru_cache(maxsize=1024)
def _choice(
    key_widths: Slabs,
    value_widths: Slabs,
    pairs: frozenset[tuple[bool, bool]],
    head_dim: int,
    itemsize: int,
    rows: int,
    device: torch.device,
) -> tuple[Config, dict[str, int | bool]]:
    """Kept, because at batch 1 the host's time for a call counts."""
    widths = Widths.of(key_widths, value_widths, pairs)
    return config(widths, head_dim, itemsize, rows, tuning_of(device)), widths.constants()


def supported(q: Tensor, view: CacheView) -> str | None:
    """Why `decode_attention` cannot serve this call, or None if it can."""
    _, query_heads, new, dim = q.shape
    heads = view.num_kv_heads
    if view.splits is None:
        return "the view has no split plan"
    if dim not in HEAD_DIMS:
        return f"head_dim {dim} is not one of {HEAD_DIMS}"
    if query_heads % heads:
        return f"{query_heads} query heads are no multiple of {heads} KV heads"
    if new * (query_heads // heads) > MAX_ROWS:
        return f"{new} new tokens times {query_heads // heads} heads per group exceed {MAX_ROWS} rows"
    coded = view.splits.key_widths.scaled + view.splits.value_widths.scaled
    if coded and new * (query_heads // heads) > MAX_CODED_ROWS:
        return f"{new} new tokens times {query_heads // heads} heads per group exceed {MAX_CODED_ROWS} rows over 8- and 4-bit codes"
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype} is not one of {DTYPES}"
    if any(x.dtype != q.dtype for x in (view.bases, view.own_bases, view.windows)):
        return f"queries are {q.dtype}, the cache is {view.dtype}"
    if q.dtype is torch.float32 and dim > 128:
        return f"head_dim {dim} in float32 needs more shared memory than a multiprocessor has"
    if view.table.device != q.device or not view.table.is_contiguous():
        return f"the table must be contiguous on {q.device}"
    if view.windows.stride()[3:] != (dim, 1):
        return f"the windows' strides {view.windows.stride()} are not contiguous in the last two dimensions"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    if q.device.type != "cuda" and not _interpreted():
        return f"tensors are on {q.device.type}, Triton needs cuda"
    return None


def decode_attention(
    q: Tensor,
    view: CacheView,
    scaling: float,
    *,
    new: tuple[Tensor, Tensor] | None = None,
    tiles: Config | None = None,
    two_part_query: bool = True,
) -> Tensor:
    """Attention of the T newest tokens over everything stored.

    Args:
        q: `[B, Hq, T, D]` after RoPE, not rotated, any strides with the last 1; its tokens count in `window_lengths` already.
        view: the layer's cache, with `splits`; `windows` are contiguous in the last two dimensions.
        scaling: factor of the logits.
        new: Keys and Values `[B, Hkv, T, D]` of q's tokens, which the kernel writes to the end of the window; without them
            they are there already. They cost no launch of their own.
        tiles: overrides `config`.
        two_part_query: keep the query that meets native Keys as the sum of two numbers of the cache's dtype, which removes
            its rounding at the price of a second small matrix product per tile. Codes are met by fp16, which is fine enough.

    Returns:
        `[B, Hq, T, D]` in q's dtype, contiguous.

    Raises:
        ValueError: the shape is not supported, with `supported`'s reason, or `new` does not have its shape and dtype.
    """
    reason, plan = supported(q, view), view.splits
    if reason is not None or plan is None:  # without a plan there is a reason
        raise ValueError(f"no Triton decode attention: {reason}; use decode_torch.decode_attention_torch")
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return decode_attention(q, view, scaling, new=new, tiles=tiles, two_part_query=two_part_query)
    from . import decode_kernels as kernels

    batch, query_heads, count, dim = q.shape
    heads = view.num_kv_heads
    group = query_heads // heads
    rows = count * group
    apart_rows = max(8, _power_of_two(rows))
    q, *appended = (x if x.stride(3) == 1 else x.contiguous() for x in (q, *(new or ())))
    new_keys, new_values = appended or (q, q)
    if new is not None and any(x.shape != (batch, heads, count, dim) or x.dtype != q.dtype or x.device != q.device for x in appended):
        found = [(tuple(x.shape), x.dtype) for x in appended]
        raise ValueError(f"new Keys and Values must be {(batch, heads, count, dim)} {q.dtype} on {q.device}, got {found}")
    chosen, constants = _choice(plan.key_widths, plan.value_widths, plan.pairs, dim, q.element_size(), apart_rows, q.device)
    tiles = tiles or chosen
    precision = "tf32x3" if q.dtype is torch.float32 else "tf32"  # read for fp32 operands only
    out = torch.empty((batch, query_heads, count, dim), dtype=q.dtype, device=q.device)
    splits = plan.num_splits
    early = q.is_cuda and _starts_early(q.device.index)
    # Whole 16 bytes each: Triton would compile anew for pointers aligned otherwise.
    part_rows = -(-plan.slots * rows // 4) * 4
    parts = torch.empty(part_rows * (dim + 2), dtype=torch.float32, device=q.device)
    part_acc, part_m, part_l = parts.split((part_rows * dim, part_rows, part_rows))
    if splits:
        kernels.split_kernel[(splits,)](
            q, plan.records, view.table, view.codes, view.bases, view.own_bases, view.scales, view.means, view.own_means,
            *view.windows.unbind(), view.window_lengths, new_keys, new_values,
            part_m, part_l, part_acc,
            scaling * math.log2(math.e),
            q.stride(0), q.stride(1), q.stride(2), *view.windows.stride()[1:3],
            *new_keys.stride()[:3], *new_values.stride()[:3],
            HEADS=heads, G=group, T=count, D=dim, DP=_power_of_two(dim), M=max(16, apart_rows), APART_M=apart_rows, **constants,
            BLOCK_N=tiles.block_n, STAGES=tiles.stages, DENSE_BLOCK_N=tiles.dense_block_n, DENSE_STAGES=tiles.dense_stages,
            APART=tiles.warps * tiles.apart, APPEND=new is not None, EARLY=early,
            TWO_PART=two_part_query, UPCAST=not q.is_cuda, PRECISION=precision, num_warps=tiles.warps, maxnreg=tiles.registers,
        )  # fmt: skip
    block_s = min(64, max(2, _power_of_two(plan.max_splits)))
    # Few rows: cut the channels too, so that enough programs read the partials.
    block_d = 32 if batch * heads * rows < 512 else _power_of_two(dim)
    kernels.merge_kernel[(batch * heads * rows, -(-dim // block_d))](
        part_m, part_l, part_acc, plan.ranges, plan.unused, out, out.stride(0), out.stride(1), out.stride(2),
        HEADS=heads, G=group, T=count, D=dim, BLOCK_S=block_s, BLOCK_D=block_d, EARLY=early and splits > 0,
        num_warps=4 if block_s * block_d > 1024 else 1, launch_pdl=early and splits > 0,
    )  # fmt: skip
    return out


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.lru_cache(maxsize=64)
def _starts_early(device: int) -> bool:
    """Whether a kernel may be launched before the one it depends on has ended, and wait for it itself (Hopper and later)."""
    return torch.cuda.get_device_capability(device)[0] >= 9


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python on the CPU (TRITON_INTERPRET=1, read by Triton at import)."""
    from triton.runtime.interpreter import InterpretedFunction

    from . import decode_kernels

    return isinstance(decode_kernels.split_kernel, InterpretedFunction)
