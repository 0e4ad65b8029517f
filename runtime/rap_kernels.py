"""When pruned attention runs the Triton kernels `kernels/pairs.py` and `kernels/narrow.py`, and what is asked of them first.

Before a kernel is used for a shape on a GPU its result is compared with the readable torch version, on the very tensors of that call. Where
they differ, or where the kernel does not compile, a warning says so and torch does it from then on. A comparison waits for the GPU, so
none is made while a CUDA graph is captured: what is not proven by then is captured without the kernel. cuDNN at two widths
(`rap_prefill.py`) is asked in the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..kernels import narrow, pairs
from ..kernels.encode import has_triton
from ..kernels.narrow_torch import narrow_attention_torch
from ..kernels.pairs_torch import turned

LIMITS = {torch.bfloat16: 1e-2, torch.float16: 3e-3, torch.float32: 1e-4}
"""Largest difference of a row from the torch version's, both as 2-norms; those of the tests of the decode kernels."""
_proven: dict[Hashable, bool] = {}  # kernel, device, dtype and what it is compiled for: whether it may be used
_left_out = False


def turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, kept: Tensor) -> bool:
    """Turn Queries and Keys in place by `pairs.turn`, args as there; False, and nothing is changed, where torch has to do it."""
    if not usable(query, key) or pairs.supported(query, key, cos, sin, kept) is not None:
        return False

    def attempt() -> list[Tensor]:
        copies = query.clone(), key.clone()
        pairs.turn(*copies, cos, sin, kept)
        return list(copies)

    few = query.shape[1] <= pairs.FEW_TOKENS
    sign = ("the Triton kernel for kept pairs", query.device, query.dtype, query.shape[2], key.shape[2], kept.shape[0], few)
    if not proven(sign, attempt, lambda: [turned(x, cos, sin, kept) for x in (query, key)]):
        return False
    pairs.turn(query, key, cos, sin, kept)
    return True


def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor | None:
    """Attention of the newest tokens by `narrow.narrow_attention`, args and result as there; None where torch has to do it."""
    if not usable(query, keys, values) or narrow.supported(query, keys, values) is not None:
        return None
    sign = ("the Triton kernel for narrow attention", query.device, query.dtype, *narrow.launch(query, keys, values).compiled)
    if not proven(
        sign,
        lambda: [narrow.narrow_attention(query, keys, values, scaling)],
        lambda: [narrow_attention_torch(query, keys, values, scaling)],
    ):
        return None
    return narrow.narrow_attention(query, keys, values, scaling)


def proven(
    sign: tuple[Hashable, ...], kernel: Callable[[], Sequence[Tensor]], twin: Callable[[], Sequence[Tensor]], instead: str = "torch is"
) -> bool:
    """Whether a kernel may be used; tried out the first time that a `sign` is seen.

    A call whose right result is not finite, or too large for a comparison, proves nothing, and the next one is tried.
    """
    known = _proven.get(sign)
    if known is not None:
        return known
    if torch.cuda.is_current_stream_capturing():
        return False
    try:
        expected, reason = twin(), None
        if not all(bool(x.isfinite().all()) for x in expected):
            return False
        found = kernel()
        error = max(_difference(x, y) for x, y in zip(found, expected, strict=True))
        if not error <= LIMITS[expected[0].dtype]:
            reason = f"it is off by {error:.2g}"
    except torch.cuda.OutOfMemoryError:
        return False
    except Exception as error:  # whatever a compiler or a driver raises: torch computes the same
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if reason is not None:
        words = f"{sign[0]} is not used on {sign[1]} in {sign[2]}, {instead}: {reason}"
        warnings.warn(words, stacklevel=2)
    _proven[sign] = reason is None
    return reason is None


def _difference(found: Tensor, expected: Tensor) -> float:
    """Of the worst row of [B, S, ...], over its length; infinite where there is a NaN.

    A row that is shorter than those of the other tokens is compared with their root mean square: of the many rows of a prefill some are
    sums in which nearly all cancels, and rounding is large beside what is left.
    """
    length = expected.float().norm(dim=-1)
    length = torch.maximum(length, length.square().mean(1, keepdim=True).sqrt()).clamp(min=1e-30)
    lost = (found.float() - expected.float()).norm(dim=-1) / length
    return float(lost.nan_to_num(nan=float("inf")).max())


def plain(projection: nn.Module) -> bool:
    """Whether nobody else can hold what a projection has put out: a linear map itself, and no hook on it or on all modules."""
    everywhere = torch.nn.modules.module
    hooks = projection._forward_hooks, everywhere._global_forward_hooks, everywhere._global_forward_hooks_always_called
    return type(projection) is nn.Linear and not any(hooks)


def usable(*tensors: Tensor) -> bool:
    """Whether kernels may run on these: plain tensors on a GPU, no gradient to come, and no compiler or tracer that looks on."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    if _left_out or torch.compiler.is_compiling() or tracing or not runs_on(tensors[0].device):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    if torch.autograd.forward_ad._current_level >= 0:  # tangents, which no kernel carries
        return False
    return all(type(x) is Tensor for x in tensors)


def runs_on(device: torch.device) -> bool:
    """Whether Triton is there for a device."""
    return device.type == "cuda" and has_triton()


@contextmanager
def left_out() -> Iterator[None]:
    """Without the kernels, for a comparison."""
    global _left_out
    before, _left_out = _left_out, True
    try:
        yield
    finally:
        _left_out = before
