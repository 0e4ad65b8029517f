"""Cutting segments into splits: every token once, about equal bytes, what the kernel is compiled for, refusals."""

import numpy as np
import pytest
import torch

from rotatek_compile.kernels import decode, splits, table
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.kernels.splits import plan_splits, programs_for
from rotatek_compile.kernels.table import BLOCK, NONE, Kind

RAW = None


def entry(length, key=RAW, value=RAW, *, kind=None, dim=128, **fields):
    """A row of the table; `key_offset=5` and the like set a field of a side."""
    row = [0] * table.FIELDS
    coded = key is not RAW or value is not RAW
    row[table.KIND], row[table.LENGTH] = int(kind or (Kind.CODED if coded else Kind.DENSE)), length
    for start, slabs in ((table.KEY, key), (table.VALUE, value)):
        row[start + table.NATIVE : start + table.NIBBLE + 1] = slabs or Slabs(dim)
        row[start + table.BASIS] = NONE if slabs is RAW else 0
        row[start + table.STRIDE] = 8
    for name, number in fields.items():
        side, field = name.split("_", 1)
        row[getattr(table, side.upper()) + getattr(table, field.upper())] = number
    return row


def empty(length=9):
    row = [0] * table.FIELDS
    row[table.LENGTH] = length
    return row


def plan(rows, **options):
    return plan_splits(torch.tensor(rows), **{"window_capacity": 0, "head_dim": 128} | options)


def test_every_token_once():
    rows = [
        [[entry(5000, Slabs(96), RAW), entry(100)], [entry(777, Slabs(), Slabs(0, 8, 16)), empty()]],
        [[entry(1, Slabs(16), RAW), entry(0, Slabs(16), RAW)], [empty(0), empty(0)]],
    ]
    found = plan(rows, window_capacity=600, num_programs=20)
    covered, slots = {}, set()
    for record in found.records.tolist():
        row, slot, start, count = (record[i] for i in (table.ROW, table.SLOT, table.START, table.COUNT))
        assert found.ranges[row] <= slot < found.ranges[row + 1] and slot not in slots
        slots.add(slot)
        assert start % BLOCK == 0 and count > 0
        covered.setdefault((row, record[table.SPLIT_KIND], record[table.ENTRY]), []).append((start, count))
    window, coded, dense = int(Kind.WINDOW), int(Kind.CODED), int(Kind.DENSE)
    expected = {(0, coded, 0): 5000, (0, dense, 1): 100, (1, coded, 2): 777, (2, coded, 4): 1}
    expected |= {(row, window, NONE): 600 for row in range(4)}
    assert {key: sum(count for _, count in spans) for key, spans in covered.items()} == expected
    for spans in covered.values():
        spans.sort()
        assert spans[0][0] == 0 and all(a + n == b for (a, n), (b, _) in zip(spans, spans[1:], strict=False))
    assert slots == set(range(found.num_splits)) and found.max_splits == int(found.ranges.diff().max())
    assert len(covered[0, coded, 0]) > 10


def test_splits_of_numbers_are_balanced_by_bytes():
    """Heads whose tokens take 384 and 288 bytes are cut so that their splits read nearly the same number of bytes."""
    found = plan([[[entry(32768, key, RAW)] for key in (Slabs(64), Slabs(16)) * 2]], num_programs=96)
    per_token = torch.tensor([384, 288] * 2)[found.records[:, table.ROW]]
    bytes_read = found.records[:, table.COUNT] * per_token
    assert 90 <= found.num_splits <= 104
    assert bytes_read.double().quantile(0.9) / bytes_read.double().median() < 1.15
    assert bool((bytes_read.diff() <= 0).all())


def test_splits_of_few_codes_are_balanced_by_instructions():
    """Tokens of 24 and of 72 bytes go through the same tiles in the same time, so their splits have as many tokens; 8-bit ones of 192
    bytes are read for longer than they are worked on."""
    narrow, wide = (Slabs(0, 0, 16), Slabs(0, 0, 32)), (Slabs(0, 0, 48), Slabs(0, 0, 96))
    found = plan([[[entry(16384, *narrow)], [entry(16384, *wide)]]], num_programs=32)
    assert found.ranges.tolist() == [0, 16, 32] and set(found.records[:, table.COUNT].tolist()) == {1024}
    eight = plan([[[entry(16384, Slabs(0, 64), Slabs(0, 128))], [entry(16384, RAW, RAW)]]], num_programs=44)  # 192 and 512 bytes
    assert eight.ranges.diff().tolist() == [12, 32]


def test_programs_follow_what_is_stored():
    """Fewer splits of codes, which have more to do before and after; more once the rows alone fill the GPU."""
    native, coded = torch.tensor([[[entry(9, Slabs(8), RAW)]]]), torch.tensor([[[entry(9, Slabs(8), Slabs(8, 0, 16))]]])
    assert [programs_for(x, 132) for x in (native, coded)] == [396, 264]
    assert programs_for(coded.expand(17, 8, -1, -1), 132) == 1056


def test_widths_and_pairs():
    rows = [[[entry(9, Slabs(8, 0, 48), Slabs(0, 64)), entry(9, Slabs(0, 24), RAW)], [entry(9), entry(9, Slabs(), Slabs(0, 8, 16))]]]
    found = plan(rows)
    assert found.key_widths == (8, 24, 48) and found.value_widths == (0, 64, 16)  # raw sides do not count
    assert found.pairs == {(False, False), (False, True), (True, True)}
    assert plan([[[entry(9, RAW, Slabs(0, 0, 16))]]], window_capacity=8).pairs == {(True, False)}
    assert plan([[[entry(9)]]], window_capacity=8).key_widths == (0, 0, 0)


def test_what_the_kernel_is_compiled_for():
    constants = decode.Widths.of(Slabs(8, 24, 48), Slabs(0, 0, 128), frozenset({(False, False), (True, True)})).constants()
    assert constants == {
        "KN": 16, "K8": 32, "K4": 32, "VN": 0, "V8": 0, "V4": 64, "CODED_KEYS": False, "CODED_VALUES": False, "CODED_BOTH": True,
    }  # fmt: skip


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match="multiples of 8, 8 and 16"):
        plan([[[entry(5, Slabs(72), RAW, dim=64)]]], head_dim=64)
    with pytest.raises(ValueError, match="OFFSET must be a multiple of 16, got 24"):
        plan([[[entry(5, Slabs(8), RAW, key_offset=24)]]])
    with pytest.raises(ValueError, match="OFFSET must be a multiple of 16, got 8"):
        plan([[[entry(5, value_offset=8)]]])  # raw numbers too
    with pytest.raises(ValueError, match="BASIS must be a multiple of 8, got 4"):
        plan([[[entry(5, Slabs(8), Slabs(8), value_basis=4)]]])
    with pytest.raises(ValueError, match="BASIS must be a multiple of 8, got -12"):
        plan([[[entry(5, Slabs(8), Slabs(8), value_basis=-12)]]])
    with pytest.raises(ValueError, match="STRIDE must be a multiple of 8, got 12"):
        plan([[[entry(5, Slabs(8), Slabs(8), key_stride=12)]]])
    with pytest.raises(ValueError, match="head_dim 20 is not a multiple of 8"):
        plan([[[empty()]]], head_dim=20)


def test_an_empty_cache():
    found = plan_splits(torch.zeros(2, 3, 0, table.FIELDS, dtype=torch.int64), window_capacity=128, head_dim=64)
    assert found.num_splits == 6 and not found.pairs and found.key_widths == found.value_widths == (0, 0, 0)


ROWS = [[[entry(900, Slabs(0, 16), RAW)], [entry(300)]], [[entry(40, Slabs(8), RAW)], [empty()]]]


def spans_of(found, row):
    """What the splits of a row's window cover, and all its slots."""
    own = found.records[found.records[:, table.ROW] == row]
    window = own[own[:, table.SPLIT_KIND] == int(Kind.WINDOW)]
    return sorted(zip(window[:, table.START].tolist(), window[:, table.COUNT].tolist(), strict=True)), sorted(own[:, table.SLOT].tolist())


@pytest.mark.parametrize("programs", [4, 40])
def test_a_plan_serves_smaller_windows_of_its_class(programs):
    """Every token up to the capacity once, by the first slots of every row, whatever else the plan is for."""
    whole = plan(ROWS, window_capacity=2048, window_least=1025, num_programs=programs)
    for capacity in (1025, 1100, 1279, 1280, 1281, 1500, 1792, 2000, 2048):
        found = whole.of_windows(capacity)
        for row in range(4):
            spans, slots = spans_of(found, row)
            assert spans[0][0] == 0 and all(a + n == b for (a, n), (b, _) in zip(spans, spans[1:], strict=False))
            assert spans[-1][0] < capacity <= sum(spans[-1])
            assert slots == list(range(int(found.ranges[row]), int(found.ranges[row + 1]) - found.unused))
        assert found.max_splits == int(found.ranges.diff().max()) - found.unused
        assert found.slots == whole.num_splits == int(found.ranges[-1]) and found.window_capacity == capacity
        assert found.records.untyped_storage().data_ptr() == whole.records.untyped_storage().data_ptr()
    once, twice = whole.of_windows(1100), whole.of_windows(1600).of_windows(1100)
    assert torch.equal(once.records, twice.records) and once.unused == twice.unused > 0
    assert whole.of_windows(1025).num_splits < whole.num_splits


def test_what_is_still_to_come_does_not_make_splits_longer():
    """Coded splits are those of a plan for the least windows, and the most costly come first among what is there."""
    few, many = (plan(ROWS, window_capacity=most, window_least=1, num_programs=40) for most in (256, 4096))
    there = many.of_windows(256)
    names = [table.ROW, table.SPLIT_KIND, table.COUNT, table.START, table.ENTRY]
    assert torch.equal(there.records[:, names], few.records[:, names])
    assert many.records[: many.num_splits - there.num_splits, table.SPLIT_KIND].eq(int(Kind.WINDOW)).all()
    starts = many.records[: many.num_splits - there.num_splits, table.START].tolist()
    assert starts == sorted(starts, reverse=True) and set(starts) == set(range(256, 4096, 256)) and len(starts) == 15 * 4


def test_without_windows_there_is_nothing_to_leave_out():
    found = plan(ROWS)
    assert found.of_windows(0) is found and found.window_tokens == 0 and found.unused == 0


@pytest.mark.parametrize(
    ("rows", "step"),
    [(1, 4096), (8, 4096), (64, 4096), (100, 2560), (256, 1024), (300, 768), (512, 512), (4000, 512)],
)
def test_classes_of_windows(rows, step):
    """Sizes from a multiple of the step to the next; a size alone says its class."""
    assert splits.window_class(0, rows) == (0, 0)
    for capacity, most in ((1, step), (128, step), (step, step), (step + 1, 2 * step), (7 * step, 7 * step)):
        assert splits.window_class(capacity, rows) == (most - step + 1, most)


def test_a_plan_is_kept_within_its_class():
    rows = np.array(ROWS)
    at = {"head_dim": 128, "itemsize": 2, "device": torch.device("cpu")}
    first = splits.plan_growing(rows, 130, **at)
    assert (first.window_capacity, first.window_tokens) == (4096, 256)
    assert splits.plan_growing(rows, 4096, **at, before=first) is first
    second = splits.plan_growing(rows, 4097, **at, before=first)
    assert second.window_capacity == 8192
    assert splits.plan_growing(rows, 4096, **at, before=second).window_capacity == 4096  # after a crop
    other = np.concatenate([rows, rows])  # whoever passes a plan of another table gets one of this
    assert splits.plan_growing(other, 130, **at, before=first).ranges.shape == (2 * len(first.ranges) - 1,)
    assert torch.equal(splits.plan_growing(rows, 5000, **at).records, second.records)  # whatever came before
