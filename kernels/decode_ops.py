"""Decode attention as a torch operator, `rotatek::decode_attention`: torch.compile takes it as one node instead of breaking the graph.

The operator writes the new tokens to the window and attends, by the Triton kernels where they serve the call and by the specification
elsewhere. Its fake implementation says what comes out without running anything. Uncompiled calls do not come here: at small batches the
host's time counts, and the dispatcher takes some of it.

The windows of Keys and Values are one argument: inductor of torch 2.11 compiles wrongly what writes two that share their memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .slabs import Slabs
from .splits import SplitPlan
from .table import CacheView

PAIRS = ((False, False), (False, True), (True, False), (True, True))
"""Pairs (raw Keys, raw Values) by the number that an operator's argument can be."""


def decode(q: Tensor, view: CacheView, scaling: float, new_keys: Tensor, new_values: Tensor) -> Tensor:
    """`decode.decode_attention` with `new`, as an operator; falls back to `decode_torch` with a warning instead of raising.

    Args and result as there; `view` must have `splits`. Without a split plan `torch.compile` cannot take this call in one graph.
    """
    plan = view.splits
    assert plan is not None
    out: Tensor = decode_attention(
        q, new_keys, new_values, scaling, view.table, view.codes, view.bases, view.own_bases, view.scales, view.means, view.own_means,
        view.windows, view.window_lengths, plan.records, plan.ranges,
        [plan.slots, plan.unused, plan.max_splits],
        list(plan.key_widths), list(plan.value_widths), [number for number, pair in enumerate(PAIRS) if pair in plan.pairs],
    )  # fmt: skip
    return out


@torch.library.custom_op("rotatek::decode_attention", mutates_args=("windows",))
def decode_attention(
    q: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    scaling: float,
    table: Tensor,
    codes: Tensor,
    bases: Tensor,
    own_bases: Tensor,
    scales: Tensor,
    means: Tensor,
    own_means: Tensor,
    windows: Tensor,
    window_lengths: Tensor,
    records: Tensor,
    ranges: Tensor,
    counts: Sequence[int],
    key_widths: Sequence[int],
    value_widths: Sequence[int],
    pairs: Sequence[int],
) -> Tensor:
    """The fields of a `CacheView` and of its `SplitPlan` one by one: operators take tensors and numbers. `counts` are slots,
    unused and max_splits, `pairs` numbers of `PAIRS`."""
    from . import decode as kernels
    from .decode_torch import append_newest, finish, segment_partials

    held = frozenset(PAIRS[number] for number in pairs)
    slots, unused, most = counts
    plan = SplitPlan(records, ranges, slots, unused, most, 0, 0, Slabs(*key_widths), Slabs(*value_widths), held)
    view = CacheView(table, codes, bases, own_bases, scales, means, own_means, windows, window_lengths, plan)
    reason = kernels.supported(q, view)
    if reason is None:
        return kernels.decode_attention(q, view, scaling, new=(new_keys, new_values))
    warnings.warn(f"decoding with the torch backend instead of Triton: {reason}", stacklevel=2)
    append_newest(view, new_keys, new_values)
    return finish(segment_partials(q, view, scaling, True)).to(q.dtype).contiguous()


@decode_attention.register_fake
def _(q: Tensor, *args: object, **kwargs: object) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
