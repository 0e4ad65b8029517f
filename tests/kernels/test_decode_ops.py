"""The torch operator around decode attention: what torch asks of one, and the same numbers as a plain call."""

import dataclasses
import shutil

import pytest
import torch

from kernel_caches import EMPTY, Coded, Segment, random_cache
from rotatek_compile.kernels import decode_ops, decode_torch
from rotatek_compile.kernels.decode_torch import decode_attention_torch

pytestmark = pytest.mark.filterwarnings("ignore:decoding with the torch backend")
LAYOUT = [[[Segment(40, Coded(8, 16, 16), Coded(0, 0, 32)), Segment(9, Coded(16), None)]], [[Segment(13), EMPTY]]]


def case(new=1, poison=False, **options):
    """A cache, a query with strides as a model has them, and the newest tokens, which are not in the window yet."""
    cache = random_cache(LAYOUT, [5, 1 + new], 64, 16, torch.float32, poison=poison, **options)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, new, 4, 64, generator=generator).transpose(1, 2)
    return cache.view, q, *(torch.randn(2, 1, new, 64, generator=generator) for _ in "kv")


def arguments(view, q, keys, values):
    """Those of the operator itself."""
    found = []
    operator = decode_ops.decode_attention
    try:
        decode_ops.decode_attention = lambda *args: found.extend(args)
        decode_ops.decode(q, view, 0.125, keys, values)
    finally:
        decode_ops.decode_attention = operator
    return tuple(found)


@pytest.mark.parametrize("new", [1, 3])
def test_the_operator_is_the_plain_call(new):
    """New tokens are written, then attended; the plan that the operator rebuilds is the view's."""
    view, q, keys, values = case(new, poison=True)
    expected_view = dataclasses.replace(view, windows=view.windows.clone())
    for row, length in enumerate(view.window_lengths.tolist()):
        expected_view.window_keys[row, :, length - new : length] = keys[row]
        expected_view.window_values[row, :, length - new : length] = values[row]
    found = decode_ops.decode(q, view, 0.125, keys, values)
    assert torch.equal(view.windows.nan_to_num(9), expected_view.windows.nan_to_num(9))
    assert torch.allclose(found, decode_attention_torch(q, expected_view, 0.125), atol=1e-6) and found.is_contiguous()


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_by_inductor(monkeypatch):
    """The same numbers as the plain call, with the windows written where they lie: a compiled copy of them was wrong once (torch 2.11)."""
    view, q, keys, values = case(poison=True)
    before = view.windows.clone()
    expected, after = decode_ops.decode(q, view, 0.125, keys, values), view.windows.clone()
    view.windows.copy_(before)
    at, append = [], decode_torch.append_newest
    monkeypatch.setattr(decode_torch, "append_newest", lambda view, *new: (at.append(view.windows.data_ptr()), append(view, *new)))
    step = torch.compile(lambda q: decode_ops.decode(2 * q, view, 0.125, keys, values) + 1, fullgraph=True)
    assert torch.allclose(step(q / 2), expected + 1, atol=1e-6)
    assert torch.equal(view.windows.nan_to_num(9), after.nan_to_num(9)) and at == [view.windows.data_ptr()]


def test_what_a_plan_becomes():
    args = arguments(*case(grows_to=1000))
    view = case(grows_to=1000)[0]
    plan = view.splits
    assert plan.slots > plan.num_splits and plan.unused == 3  # of windows of 256 tokens up to 1,000, three are still to come
    assert args[15:] == ([plan.slots, plan.unused, plan.max_splits], [16, 16, 16], [0, 0, 32], [0, 1, 3])
    assert {decode_ops.PAIRS[number] for number in args[18]} == view.splits.pairs
    assert decode_ops.PAIRS[1] == (False, True)  # coded Keys, raw Values


def test_opcheck():
    """Schema, what it changes, fake tensors and dispatch, by torch's own checks."""
    torch.library.opcheck(torch.ops.rotatek.decode_attention.default, arguments(*case()))


def test_the_fake_says_what_comes_out():
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = arguments(*case(3))
    real = decode_ops.decode_attention(*given)
    with FakeTensorMode() as mode:
        faked = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in given]
        fake = decode_ops.decode_attention(*faked)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
