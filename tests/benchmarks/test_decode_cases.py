"""What the decode benchmark times: bytes, caches that mean what they say, calls that append."""

import math

import decode_baselines
import decode_cases
import decode_curves
import decode_timing
import print_decode
import pytest
import torch
from decode_cases import CONFIGURATIONS, DIM, RAW, SCALING, WINDOW, Case

from rotatek_compile.kernels import table
from rotatek_compile.kernels.decode_torch import decode_attention_torch
from rotatek_compile.kernels.slabs import Slabs


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    for module in (decode_cases, decode_timing):
        monkeypatch.setattr(module, "place", lambda: "cpu")


def test_bytes_by_hand():
    case = Case(2, 1128, query_heads=7, heads=1)
    window = 128 * 512
    assert case.dense_bytes == 2 * (1000 * 512 + window)
    assert case.read_bytes(Slabs(0, 32), Slabs(0, 128)) == 2 * (1000 * 160 + window)
    assert case.read_bytes(Slabs(0, 0, 32), Slabs(0, 0, 64)) == 2 * (1000 * 48 + window)
    assert case.read_bytes(Slabs(32), RAW) == 2 * (1000 * 320 + window)
    mean = Case(1, 1128).read_bytes(Slabs(0, 0, 32), Slabs(0, 0, 64))
    assert Case(1, 1128).read_bytes(*CONFIGURATIONS["mixed, mean K 32x4 V 64x4"]) == mean == 8 * (1000 * 48 + window)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_caches_are_what_their_plan_says(name):
    key, value = CONFIGURATIONS[name]
    layer = decode_cases.make_layer(Case(2, 200), key, value, seed=0)
    rows = layer.view.table[:, :, 0]
    for side, kept in ((table.KEY, key), (table.VALUE, value)):
        expected = torch.tensor(decode_cases.per_head(kept, 8)).expand(2, 8, 3)
        assert torch.equal(rows[..., side + table.NATIVE : side + table.NIBBLE + 1], expected)
        assert torch.equal(rows[..., side + table.BASIS] == table.NONE, torch.full((2, 8), kept is RAW))
    assert (rows[..., table.LENGTH] == 200 - WINDOW).all() and layer.view.window_lengths.tolist() == [WINDOW] * 2
    out = decode_cases.our_steps([layer], False)[0]()
    assert out.shape == (2, 32, 1, DIM) and 0.01 < out.float().std() < 3
    assert decode_cases.timed_shape_error(layer) < decode_cases.TIMED_LIMIT


def test_raw_caches_are_attended_to_as_sdpa_does():
    layer = decode_cases.make_layer(Case(1, 192, query_heads=4, heads=2), RAW, RAW, seed=1)
    stored = layer.view.codes.view(torch.bfloat16).view(2, 2, 64, DIM)  # Keys and Values, heads
    keys, values = (
        torch.cat([old, new[0]], 1) for old, new in zip(stored, (layer.view.window_keys, layer.view.window_values), strict=True)
    )
    args = (x.float()[None] for x in (layer.query[0], keys, values))
    expected = torch.nn.functional.scaled_dot_product_attention(*args, scale=SCALING, enable_gqa=True)
    assert torch.allclose(decode_cases.our_steps([layer], False)[0]().float(), expected, atol=1e-2)


def test_copies_lie_elsewhere_and_hold_the_same():
    layer = decode_cases.make_layer(Case(1, 256), Slabs(0, 32), Slabs(0, 128), seed=2).planned(8)
    copy = layer.copy()
    assert copy.view.splits is layer.view.splits
    for name in ("codes", "scales", "own_means", "windows"):
        mine, its = getattr(layer.view, name), getattr(copy.view, name)
        assert torch.equal(mine, its) and mine.data_ptr() != its.data_ptr()
    assert torch.equal(*(decode_attention_torch(x.query, x.view, SCALING) for x in (layer, copy)))


def test_our_step_appends_the_newest_token():
    layer = decode_cases.make_layer(Case(1, 256), Slabs(0, 32), Slabs(0, 128), seed=3)
    before = decode_cases.our_steps([layer], False)[0]()
    after = decode_cases.our_steps([layer], True)[0]()
    assert torch.equal(layer.view.window_keys[:, :, -1], layer.key) and torch.equal(layer.view.window_values[:, :, -1], layer.value)
    assert not torch.equal(before, after)
    layer.view.window_keys[:, :, -1] = 7  # what is checked is what the step wrote
    assert decode_cases.timed_shape_error(layer, append=True) < decode_cases.TIMED_LIMIT


def test_dense_steps_append_only_when_asked():
    for append in (False, True):
        steps = decode_cases.dense_steps(Case(2, 64, query_heads=7, heads=1), 3, append)
        query, key, value, new = steps[0].args
        last = key[:, :, -1].clone()
        assert steps[0]().shape == (2, 7, 1, DIM) and len(steps) == 3
        assert torch.equal(key[:, :, -1], new) is append and torch.equal(value[:, :, -1], new) is append
        assert torch.equal(key[:, :, -1], last) is not append


def test_layers_take_four_times_the_l2(monkeypatch):
    monkeypatch.setattr(decode_curves, "l2_bytes", lambda: 50_000_000)
    assert [decode_curves.layers_for(size) for size in (300_000_000, 200_000_000, 199_999_999, 20_000_000, 10_000)] == [1, 1, 2, 10, 320]
    for count in (1, 3, 8, 9):
        steps = decode_curves.repeated(list(range(count)))
        assert len(steps) == count * math.ceil(8 / count) and steps[:count] == list(range(count))


def test_bytes_of_the_baselines():
    """Thin Keys are 32 of 128 numbers; a cache of 8-bit floats has half of everything, and no ratio is taken to it."""
    case = Case(2, 1000)
    assert case.dense_bytes == 2 * 1000 * 8 * 512
    found = {name: decode_baselines.read_bytes(name, case) for family in decode_baselines.FAMILIES.values() for name in family}
    assert found == {
        "FlexAttention": 8_192_000,
        "FlexAttention thin K 32": 5_120_000,
        "FlashInfer fa2": 8_192_000,
        "FlashInfer fa3": 8_192_000,
        "FlashInfer fa2 fp8": 4_096_000,
    }
    assert [name for name in found if print_decode.is_dense({"method": name})] == ["FlexAttention", "FlashInfer fa2", "FlashInfer fa3"]


def test_percentiles_of_replays():
    assert decode_timing.percentiles([float(n) for n in range(100, -1, -1)]) == (10, 50, 90)
    assert decode_timing.percentiles([7.0]) == (7, 7, 7)
