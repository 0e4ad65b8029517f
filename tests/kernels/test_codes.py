"""The pool layout: round trips at every rank, padding, refusals; and the cutting of segments into splits."""

import pytest
import torch

from rotatek_compile.kernels import codes, table
from rotatek_compile.kernels.table import BLOCK, Kind

LENGTHS = (0, 1, 63, 64, 65, 111, 200)


@pytest.mark.parametrize("rank", range(0, 136, 8))
def test_round_trip(rank):
    for length in LENGTHS:
        x = torch.randn(length, rank)
        flat = codes.pack(x)
        assert flat.numel() == codes.pool_elements(length, rank)
        assert flat.numel() % (BLOCK * 8) == 0 or rank == 0
        assert torch.equal(codes.unpack(flat, length, rank), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_segments_do_not_touch_each_other(dtype):
    segments = [(65, 24), (1, 8), (64, 0), (130, 40), (63, 128)]
    pool, offsets = codes.new_pool(segments, dtype, "cpu")
    pool.fill_(float("nan"))
    written = [torch.randn(length, rank).to(dtype) for length, rank in segments]
    ends = [codes.pack_into(pool, offset, x) for offset, x in zip(offsets, written, strict=True)]
    assert ends == [*offsets[1:], pool.numel()]
    for (length, rank), offset, x in zip(segments, offsets, written, strict=True):
        assert torch.equal(codes.unpack_from(pool, offset, length, rank), x)
    assert int(pool.isnan().sum()) == pool.numel() - sum(x.numel() for x in written)


def test_blocks_stand_alone():
    """A later block is where the plan of splits expects it, so that a split may start there."""
    x = torch.randn(150, 24)
    flat = codes.pack(x)
    assert torch.equal(codes.unpack(flat[codes.pool_elements(128, 24) :], 22, 24), x[128:])


def test_refusals():
    with pytest.raises(ValueError, match="multiple of 8"):
        codes.pack(torch.zeros(3, 12))
    with pytest.raises(ValueError, match="takes 1536 numbers, the slice has 100"):
        codes.unpack(torch.zeros(100), 3, 24)
    with pytest.raises(ValueError, match="no room for 65 tokens"):
        codes.pack_into(torch.zeros(64 * 8), 0, torch.zeros(65, 8))


def entry(kind, length, rank, key_offset=0):
    row = [0] * table.FIELDS
    row[table.KIND], row[table.LENGTH], row[table.RANK], row[table.KEY_OFFSET] = int(kind), length, rank, key_offset
    row[table.BASIS_STRIDE] = rank
    return row


def test_plan_covers_every_token_once():
    rows = torch.tensor(
        [
            [[entry(Kind.CODED, 5000, 96, 512), entry(Kind.DENSE, 100, 0)], [entry(Kind.CODED, 777, 0), entry(Kind.EMPTY, 9, 8)]],
            [[entry(Kind.CODED, 1, 16), entry(Kind.CODED, 0, 16)], [entry(Kind.EMPTY, 0, 0), entry(Kind.EMPTY, 0, 0)]],
        ]
    )
    plan = table.plan_splits(rows, window_capacity=600, head_dim=128, num_programs=20)
    assert (plan.max_rank, plan.has_coded, plan.has_dense) == (96, True, True)
    covered = {}
    slots = set()
    for record in plan.records.tolist():
        row, slot, start, count = (record[i] for i in (table.ROW, table.SLOT, table.START, table.COUNT))
        assert plan.ranges[row] <= slot < plan.ranges[row + 1]
        assert slot not in slots
        slots.add(slot)
        assert start % BLOCK == 0 and count > 0
        key = (row, record[table.SPLIT_KIND], record[table.RANK_UNITS] * 8)
        covered.setdefault(key, []).append((start, count))
        if key == (0, int(Kind.CODED), 96):
            assert record[table.KEY_UNITS] * 8 == 512 + start * 96 and record[table.VALUE_UNITS] * 8 == start * 128
            assert start == 0 or count >= 64
    window = int(Kind.WINDOW)
    expected = {(0, 2, 96): 5000, (0, 1, 0): 100, (1, 2, 0): 777, (2, 2, 16): 1, **{(row, window, 0): 600 for row in range(4)}}
    assert {key: sum(count for _, count in spans) for key, spans in covered.items()} == expected
    for spans in covered.values():
        spans.sort()
        assert all(a + n == b for (a, n), (b, _) in zip(spans, spans[1:], strict=False))
    assert slots == set(range(plan.num_splits)) and plan.max_splits == int(plan.ranges.diff().max())


def test_plan_balances_bytes():
    """Heads of rank 96 and 16 are cut so that their splits read nearly the same number of bytes."""
    rows = torch.tensor([[[entry(Kind.CODED, 32768, rank)] for rank in (96, 16, 96, 16)]])
    plan = table.plan_splits(rows, window_capacity=0, head_dim=128, num_programs=128)
    bytes_read = plan.records[:, table.COUNT] * (plan.records[:, table.RANK_UNITS] * 8 + 128)
    assert 120 <= plan.num_splits <= 136
    assert bytes_read.double().quantile(0.9) / bytes_read.double().median() < 1.1
    assert bool((bytes_read.diff() <= 0).all())


def test_plan_refuses_misaligned_tables():
    with pytest.raises(ValueError, match="ranks must be multiples of 8 from 0 to 64"):
        table.plan_splits(torch.tensor([[[entry(Kind.CODED, 5, 72)]]]), window_capacity=8, head_dim=64)
    with pytest.raises(ValueError, match="KEY_OFFSET must be a multiple of 8"):
        table.plan_splits(torch.tensor([[[entry(Kind.DENSE, 5, 0, 4)]]]), window_capacity=8, head_dim=64)


def test_plan_of_an_empty_cache():
    plan = table.plan_splits(torch.zeros(2, 3, 0, table.FIELDS, dtype=torch.int64), window_capacity=128, head_dim=64)
    assert plan.num_splits == 6 and not plan.has_coded and plan.max_rank == 0
