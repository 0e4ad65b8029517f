"""Decode attention as a torch operator, `rotatek::decode_attention`: torch.compile takes it as one node instead of breaking the graph.

The operator writes the new tokens to the window and attends, by the Triton kernels where they serve the call and by the specification
elsewhere. Its fake implementation says what comes out without running anything. Uncompiled calls do not come here: at small batches the
host's time counts, and the dispatcher takes some of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .decode_classes import WidthClass
from .slabs import Slabs
from .table import CacheView, Launch, SplitPlan

PAIRS = ((False, False), (False, True), (True, False), (True, True))
"""Pairs (raw Keys, raw Values) by the number that an operator's argument can be."""


def decode(q: Tensor, view: CacheView, scaling: float, new_keys: Tensor, new_values: Tensor) -> Tensor:
    """`decode.decode_attention` with `new`, as an operator; falls back to `decode_torch` with a warning instead of raising.

    Args and result as there; `view` must have `splits`. Without a split plan `torch.compile` cannot take this call in one graph.
    """
    plan = view.splits
    assert plan is not None
    launches = [number for launch in plan.launches for number in numbers(launch)]
    out: Tensor = decode_attention(
        q, new_keys, new_values, scaling, view.table, view.codes, view.bases, view.own_bases, view.scales, view.means, view.own_means,
        view.window_keys, view.window_values, view.window_lengths, plan.records, plan.ranges, plan.max_splits,
        list(plan.key_widths), list(plan.value_widths), [number for number, pair in enumerate(PAIRS) if pair in plan.pairs],
        launches, plan.fine,
    )  # fmt: skip
    return out


def numbers(launch: Launch) -> list[int]:
    """A launch as numbers: its splits, whether some have two raw sides, its classes, and eight for each of them."""
    found = [len(launch.records), int(launch.raw), len(launch.classes)]
    for which in launch.classes:
        found += [*which.key, *which.value, int(which.raw_key), int(which.raw_value)]
    return found


def launches_of(records: Tensor, found: Sequence[int]) -> tuple[Launch, ...]:
    """The launches of `numbers`, one after the other."""
    left, launches, start = list(found), [], 0
    while left:
        count, raw, several = left[:3]
        each = (left[at : at + 8] for at in range(3, 3 + 8 * several, 8))
        classes = tuple(WidthClass(Slabs(*one[:3]), Slabs(*one[3:6]), bool(one[6]), bool(one[7])) for one in each)
        launches.append(Launch(records[start : start + count], classes, bool(raw)))
        left, start = left[3 + 8 * several :], start + count
    return tuple(launches)


@torch.library.custom_op("rotatek::decode_attention", mutates_args=("window_keys", "window_values"))
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
    window_keys: Tensor,
    window_values: Tensor,
    window_lengths: Tensor,
    records: Tensor,
    ranges: Tensor,
    max_splits: int,
    key_widths: Sequence[int],
    value_widths: Sequence[int],
    pairs: Sequence[int],
    launches: Sequence[int],
    fine: bool,
) -> Tensor:
    """The fields of a `CacheView` and of its `SplitPlan` one by one: operators take tensors and numbers. `pairs` are numbers of `PAIRS`,
    `launches` those of `numbers`."""
    from . import decode as kernels
    from .decode_torch import append_newest, finish, segment_partials

    held = frozenset(PAIRS[number] for number in pairs)
    split = launches_of(records, launches)
    plan = SplitPlan(records, ranges, max_splits, Slabs(*key_widths), Slabs(*value_widths), held, split, fine)
    view = CacheView(table, codes, bases, own_bases, scales, means, own_means, window_keys, window_values, window_lengths, plan)
    reason = kernels.supported(q, view)
    if reason is None:
        return kernels.decode_attention(q, view, scaling, new=(new_keys, new_values))
    warnings.warn(f"decoding with the torch backend instead of Triton: {reason}", stacklevel=2)
    append_newest(view, new_keys, new_values)
    return finish(segment_partials(q, view, scaling, True)).to(q.dtype).contiguous()


@decode_attention.register_fake
def _(q: Tensor, *args: object, **kwargs: object) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
