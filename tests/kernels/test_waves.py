"""Splits in whole waves: as many programs as fit a GPU at once, or a multiple, where rows alone fill it."""

import pytest
import torch

from rotatek_compile.kernels import splits, table, waves
from rotatek_compile.kernels.decode_tuning import H100, Tuning
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.kernels.table import Kind

EIGHT, FOUR, NARROW = ((Slabs(0, 64), Slabs(0, 128)), (Slabs(0, 0, 32), Slabs(0, 0, 128)), (Slabs(0, 0, 32), Slabs(0, 0, 64)))
BOTH = frozenset({(False, False)})


def coded(lengths, key, value):
    """One row with one segment for each length."""
    rows = torch.zeros(len(lengths), 1, 1, table.FIELDS, dtype=torch.int64)
    rows[..., table.KIND], rows[..., 0, 0, table.LENGTH] = int(Kind.CODED), torch.tensor(lengths)
    for side, slabs in ((table.KEY, key), (table.VALUE, value)):
        rows[..., side + table.NATIVE : side + table.BASIS] = torch.tensor(slabs)
    return rows


def stored_splits(rows, **options):
    options = {"window_capacity": 128, "head_dim": 128, "num_programs": 1056, "multiprocessors": 132} | options
    found = splits.plan_splits(rows, **options)
    return int((found.records[:, table.SPLIT_KIND] == int(Kind.CODED)).sum())


@pytest.mark.parametrize(("slabs", "resident"), [(EIGHT, 3), (FOUR, 3), (NARROW, 4)])
def test_programs_of_a_multiprocessor(slabs, resident):
    """65,536 registers hold 128 threads with 168 three times, with 128 four times."""
    assert waves.programs_at_once(*slabs, BOTH, 128, 2, H100) == resident
    assert waves.programs_at_once(*slabs, BOTH, 128, 2, Tuning(few_registers=None, many_registers=None)) == 0
    assert waves.programs_at_once(*slabs, BOTH, 128, 4, H100) == 0  # fp32 has other bodies


@pytest.mark.parametrize(
    ("rows", "slabs", "expected"),
    [
        (256, EIGHT, 768),  # of 396: 512, 768 and 1,024 fill 0.65, 0.97 and 0.86 of their waves
        (256, FOUR, 768),
        (256, NARROW, 512),  # of 528: 0.97 of one wave
        (384, FOUR, 384),  # of 396, as well as 1,152 of 1,188, in fewer splits
        (512, FOUR, 1024),
    ],
)
def test_whole_waves(rows, slabs, expected):
    table_of = coded([16256] * rows, *slabs)
    assert stored_splits(table_of) == expected
    assert stored_splits(table_of, multiprocessors=None) == {256: 1024, 384: 1152, 512: 1024}[rows]  # as many as programs were wanted


def test_only_where_rows_fill_the_gpu():
    for rows, changes in ((131, False), (132, True)):
        table_of = coded([8000] * rows, *NARROW)
        assert (stored_splits(table_of) != stored_splits(table_of, multiprocessors=None)) is changes


def test_short_segments_are_cut_as_usual():
    """Where there are too few tokens for a wave, the number of programs stays."""
    table_of = coded([300] * 200, *FOUR)
    assert stored_splits(table_of) == stored_splits(table_of, multiprocessors=None) == 200
    table_of = coded([600] * 140, *NARROW)
    assert stored_splits(table_of) == stored_splits(table_of, multiprocessors=None) == 280


def test_ragged_rows_fill_their_waves_and_lose_no_token():
    lengths = torch.randint(500, 30000, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = coded(lengths, *FOUR)
    found = splits.plan_splits(rows, window_capacity=128, head_dim=128, num_programs=1056, multiprocessors=132)
    own = found.records[found.records[:, table.SPLIT_KIND] == int(Kind.CODED)]
    covered = torch.zeros(300, dtype=torch.int64).index_add(0, own[:, table.ROW], own[:, table.COUNT])
    assert covered.tolist() == lengths
    filled = len(own) / 396
    assert filled / -(-len(own) // 396) > 0.94
