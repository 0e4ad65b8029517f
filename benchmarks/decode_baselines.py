"""Dense baselines of bench_decode.py beside SDPA: FlexAttention, also with Keys as thin as ours, and FlashInfer.

FlexAttention is compiled as users compile it, without a search over its settings. Thin K is what it can do with Keys of 32 directions and
Values of 128 without a kernel of one's own: no rotation, no mean, no window. FlashInfer is a package of its own (`flashinfer-python`); on a
machine without a network carry its wheel and that of `apache-tvm-ffi`. Its kernels are compiled by nvcc at first use, fa2 in a minute and
fa3 in several. fa2 also reads a dense cache of fp8 numbers (e4m3, without scales) beside bf16 queries, in half the bytes; new Keys and
Values are rounded to it as they are appended. It is no row that ratios are taken to. Each baseline is checked against float64 before it
is timed, and what cannot run is named with its reason.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from decode_cases import DIM, SCALING, Case, Step, place
from torch import Tensor

THIN = 32
PAGE = 16  # tokens of a page of FlashInfer's cache
WORKSPACE = 256 << 20  # bytes
Steps = Callable[[Case, int, bool], list[Step]]


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, device=place(), dtype=torch.bfloat16)


@functools.cache
def compiled_flex() -> Any:
    """`flex_attention`, compiled for each shape on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if place() == "cuda" else flex_attention


def flex_steps(case: Case, layers: int, append: bool, width: int = DIM) -> list[Step]:
    """FlexAttention over Keys [B, Hkv, T, width] and Values [B, Hkv, T, D]."""
    attend = compiled_flex()

    def step(query: Tensor, key: Tensor, value: Tensor, new_key: Tensor, new_value: Tensor) -> Tensor:
        if append:
            key[:, :, -1].copy_(new_key)
            value[:, :, -1].copy_(new_value)
        out: Tensor = attend(query, key, value, scale=SCALING, enable_gqa=True)
        return out

    def layer() -> Step:
        kv = rand(case.batch, case.heads, case.tokens, width), rand(case.batch, case.heads, case.tokens, DIM)
        return partial(step, rand(case.batch, case.query_heads, 1, width), *kv, *(x[:, :, 0].clone() for x in kv))

    return [layer() for _ in range(layers)]


def flashinfer_steps(case: Case, layers: int, append: bool, backend: str, dtype: torch.dtype = torch.bfloat16) -> list[Step]:
    """FlashInfer's paged decode with tensor cores over a cache of `dtype`; pages of a sequence lie in order."""
    import flashinfer

    pages = -(-case.tokens // PAGE)
    indptr = torch.arange(case.batch + 1, dtype=torch.int32, device=place()) * pages
    indices = torch.arange(case.batch * pages, dtype=torch.int32, device=place())
    last = torch.full((case.batch,), case.tokens - (pages - 1) * PAGE, dtype=torch.int32, device=place())
    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=place())
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True, backend=backend)
    heads = {"num_qo_heads": case.query_heads, "num_kv_heads": case.heads, "head_dim": DIM, "page_size": PAGE}
    wrapper.plan(indptr, indices, last, **heads, sm_scale=SCALING, q_data_type=torch.bfloat16, kv_data_type=dtype)
    at = (case.tokens - 1) % PAGE

    def step(query: Tensor, cache: Tensor, new: Tensor) -> Tensor:
        if append:
            cache.view(case.batch, pages, 2, PAGE, case.heads, DIM)[:, -1, :, at].copy_(new)
        out: Tensor = wrapper.run(query, cache)
        return out.unsqueeze(2)

    def layer() -> Step:
        cache = rand(case.batch * pages, 2, PAGE, case.heads, DIM).to(dtype)
        return partial(step, rand(case.batch, case.query_heads, DIM), cache, rand(case.batch, 2, case.heads, DIM))

    return [layer() for _ in range(layers)]


FAMILIES: dict[str, dict[str, Steps]] = {
    "flex": {"FlexAttention": flex_steps, f"FlexAttention thin K {THIN}": partial(flex_steps, width=THIN)},
    **{f"flashinfer-{name}": {f"FlashInfer {name}": partial(flashinfer_steps, backend=name)} for name in ("fa2", "fa3")},
    "flashinfer-fp8": {"FlashInfer fa2 fp8": partial(flashinfer_steps, backend="fa2", dtype=torch.float8_e4m3fn)},
}


def read_bytes(name: str, case: Case) -> int:
    """Bytes of Keys and Values that a call of this baseline reads."""
    thin = case.batch * case.tokens * case.heads * (THIN + DIM) * 2
    return thin if "thin" in name else case.dense_bytes // 2 if "fp8" in name else case.dense_bytes


def missing(family: str, case: Case) -> str | None:
    """Why a family of baselines cannot run here, or None."""
    if family.startswith("flashinfer") and importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer-python is not installed"
    if family.startswith("flashinfer") and place() != "cuda":
        return "there is no CUDA GPU"
    if family == "flex" and case.query_heads // case.heads & (case.query_heads // case.heads - 1):
        return "FlexAttention decodes groups of a power of two only"
    return None


def step_error(step: Step, case: Case) -> float:
    """Largest error of a step's first sequence against float64, over the largest number there."""
    found = step()[0].double().reshape(case.heads, -1, DIM)  # type: ignore[index]
    query, *kv = step.args  # type: ignore[attr-defined]
    if kv[0].dim() == 5:
        pages = kv[0].view(case.batch, -1, 2, PAGE, case.heads, DIM)[0].float().double()
        key, value = (pages[:, side].reshape(-1, case.heads, DIM)[: case.tokens].transpose(0, 1) for side in (0, 1))
    else:
        key, value = kv[0][0].double(), kv[1][0].double()
    rows = query[0].double().reshape(case.heads, -1, query.shape[-1])
    expected = torch.softmax(SCALING * rows @ key.mT, -1) @ value
    return float((found - expected).abs().max() / expected.abs().max())
