"""What a layer stores: bytes against numbers worked out by hand, places and ids, sharing, joining and compacting of mixed slabs."""

import numpy as np
import pytest
import torch

from rotatek_compile.kernels.decode_torch import decode_attention_reconstruct, decode_attention_torch, reconstruct
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.kernels.table import (
    BASIS,
    BYTE,
    KEY,
    KIND,
    LENGTH,
    MEAN,
    NATIVE,
    NIBBLE,
    NONE,
    OFFSET,
    OWN_MEAN,
    SCALES,
    STRIDE,
    VALUE,
    Kind,
    own_basis,
)
from rotatek_compile.plan import HeadPlan
from rotatek_compile.runtime import merging
from rotatek_compile.runtime.encode import calibrated, choose, write_observed
from rotatek_compile.runtime.observed import Rules, observe
from rotatek_compile.runtime.prepared import PreparedArtifact
from rotatek_compile.runtime.store import Store
from rotatek_compile.runtime.text_blocks import TextBlocks

DIM, HEADS, LAYERS = 32, 2, 3
RAW = Slabs(DIM)
PLAN = [HeadPlan(Slabs(8, 8, 16), Slabs(0, 16)), HeadPlan(RAW, Slabs(8))]
CALIBRATED = (32 + 0, 16 + 8)  # scales of a kind's Keys and Values: one for each direction of the plan


@pytest.fixture
def store_of(make_artifact):
    def make(plan=PLAN, batch=1, dtype=torch.float32, **options):
        artifact = make_artifact(plan={i: list(plan) for i in range(LAYERS)}, span="all", **options)
        return Store(batch, HEADS, DIM, dtype, torch.device("cpu"), PreparedArtifact(artifact).layer(0, torch.device("cpu"), dtype))

    return make


def tokens(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(HEADS, length, DIM, generator=generator) + 1 for _ in range(2))


def add(store, row, length, seed=0, prior=0, own_parts=True, kind="visual"):
    """One coded segment, as a cache layer codes it; its place and its Keys and Values."""
    sides, exact = store.prepared.kinds[kind].sides, tokens(length, seed)
    seen = observe(list(zip(exact, sides, strict=True)), Rules(prior, 0, own_parts))
    where = choose(seen)
    coded = write_observed(seen, where, store.dtype)
    placed = [(store.place(at, side, scales), codes) for at, side, (codes, scales) in zip(where, sides, coded, strict=True)]
    return store.add_coded(row, length, placed), exact


def attended(store, seed=9, new=1):
    """Attention of random queries [B, 4, new, D] over everything stored, a window with slack included."""
    if not store.window.host.any():
        for row in range(store.batch):
            store.window.append_row(row, *tokens(3 + row + new, seed=row + 50))
    q = torch.randn(1, 4, new, DIM, generator=torch.Generator().manual_seed(seed)).expand(store.batch, -1, -1, -1)
    view = store.view(splits=False)
    out = decode_attention_torch(q, view, 0.3)
    assert (out - decode_attention_reconstruct(q, view, 0.3)).abs().max() < 1e-5
    return out


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_by_hand(store_of, dtype, size):
    """One segment of 5 tokens, stored as 6: 8 native, 8 8-bit and 16 4-bit directions beside raw Keys, 16 8-bit beside 8 native Values."""
    store = store_of(dtype=dtype)
    add(store, 0, 5)
    store.flush()
    keys, values = [8 * size + 8 + 8, 32 * size], [16, 8 * size]
    assert store.codes.numel() == 6 * sum(keys + values)
    assert store.code_bytes(Kind.CODED) == (6 * (32 + 64 + 16 + 16), 32 + 64 + 16 + 16)  # native numbers at 2 bytes; one token is padding
    assert store.code_bytes(Kind.DENSE) == (0, 0)
    assert store.scales.numel() == 8 + 16 + 16
    assert store.own_means.numel() == 3 * 32  # raw Keys have none
    assert store.own_bases.numel() == 0
    assert store.coded_tokens() == 5
    store.add_dense(0, *tokens(7))
    store.flush()
    assert store.code_bytes(Kind.DENSE) == (8 * HEADS * 2 * DIM * 2, HEADS * 2 * DIM * 2)
    assert store.codes.numel() == 6 * sum(keys + values) + 8 * HEADS * 2 * DIM * size
    assert store.coded_tokens() == 5


def test_the_table_by_hand(store_of):
    store = store_of()
    place, _ = add(store, 0, 5)
    store.flush()
    one, two = store.table[0, :, place]
    assert [one[KIND], one[LENGTH], two[KIND], two[LENGTH]] == [Kind.CODED, 5, Kind.CODED, 5]
    assert one[KEY + NATIVE : KEY + NIBBLE + 1].tolist() == [8, 8, 16]
    assert two[VALUE + NATIVE : VALUE + NIBBLE + 1].tolist() == [8, 0, 0]
    # Keys' codes of both heads, then the Values': 6 · 48 bytes, 6 · 128, 6 · 16
    assert [one[KEY + OFFSET], two[KEY + OFFSET], one[VALUE + OFFSET], two[VALUE + OFFSET]] == [0, 288, 1056, 1152]
    assert two[[KEY + BASIS, KEY + MEAN, KEY + OWN_MEAN]].tolist() == [NONE] * 3
    # matrices of the layer: visual Keys, visual Values, then text's; two heads of 32 x 32 each
    assert [one[KEY + BASIS], one[VALUE + BASIS], two[VALUE + BASIS]] == [0, 2 * 1024, 3 * 1024]
    assert [one[KEY + MEAN], one[VALUE + MEAN], two[VALUE + MEAN]] == [0, 64, 96]
    assert [one[KEY + STRIDE], two[VALUE + STRIDE]] == [32, 32]
    assert one[KEY + BYTE] == 8


def test_own_bases_have_a_pool_of_their_own(store_of):
    store = store_of([HeadPlan(Slabs(8), RAW), HeadPlan(Slabs(0, 16), RAW)])
    place, (keys, _) = add(store, 0, 2000, prior=1)
    store.flush()
    entries = store.table[0, :, place]
    assert store.own_bases.numel() == 32 * 8 + 32 * 16
    assert [own_basis(int(e[KEY + BASIS])) for e in entries] == [0, 32 * 8]
    assert entries[:, KEY + STRIDE].tolist() == [8, 16]
    assert (entries[:, VALUE + BASIS] == NONE).all()
    plain = store_of([HeadPlan(Slabs(8), RAW), HeadPlan(Slabs(0, 16), RAW)])
    add(plain, 0, 2000)
    plain.flush()
    whiten = store.prepared.kinds["visual"].key
    for h in range(HEADS):  # closer in the metric that the basis is made for
        errors = []
        for one in (store, plain):
            rebuilt = reconstruct(one.view(splits=False))[0][h][0]
            errors.append((((rebuilt - keys[h]) @ whiten.encode[h]) / whiten.balance[h]).square().sum())
        assert errors[0] < 0.95 * errors[1]


def test_calibrated_scales_are_stored_once(store_of):
    store = store_of()
    for seed in range(3):
        add(store, 0, 20, seed, own_parts=False)
    store.flush()
    assert store.own_means.numel() == 0
    assert store.scales.numel() == sum(CALIBRATED)
    add(store, 0, 20, 4, own_parts=True)
    store.flush()
    assert (store.scales.numel(), store.own_means.numel()) == (sum(CALIBRATED) + 40, 96)


def test_who_may_have_own_parts(store_of):
    """One set in so many tokens as the budget pays, the first at once; rows apart, and copies go on counting."""
    store = store_of(batch=2)
    store.prepared = type("Prepared", (), {"tokens_per_own": 200.0})()
    assert [store.own_parts(0, n) for n in (10, 300, 89, 1, 199, 1, 400)] == [True, False, False, True, False, True, True]
    assert store.own_parts(1, 50)
    store.select_rows([1, 1])
    assert [store.own_parts(0, 349), store.own_parts(1, 350)] == [False, True]
    store.prepared.tokens_per_own = 0.0
    assert all(store.own_parts(0, 1) for _ in range(5))
    store.prepared.tokens_per_own = float("inf")
    assert not store.own_parts(0, 10**9)


def test_attention_reads_what_was_stored(store_of):
    """Odd lengths, several segments and rows, raw text between, against plain softmax over the rebuilt numbers."""
    store = store_of(batch=2)
    for row, lengths in enumerate(((5, 64, 1), (7,))):
        for seed, length in enumerate(lengths):
            add(store, row, length, seed, prior=256, own_parts=seed != 1)
    store.add_dense(0, *tokens(9, 7))
    store.flush()
    got = attended(store, new=2)
    q = torch.randn(1, 4, 2, DIM, generator=torch.Generator().manual_seed(9))
    for row, heads in enumerate(reconstruct(store.view(splits=False))):
        for h, (keys, values) in enumerate(heads):
            assert keys.shape[0] == (5 + 64 + 1 + 9 + 5, 7 + 6)[row]
            for g in range(2):
                for t in range(2):
                    seen = keys.shape[0] - 1 + t  # the last of the two new tokens sees both
                    weights = (0.3 * keys[:seen] @ q[0, 2 * h + g, t]).softmax(0)
                    assert (got[row, 2 * h + g, t] - weights @ values[:seen]).abs().max() < 1e-5


def test_rows_share_and_what_none_has_is_freed(store_of):
    store = store_of(batch=3)
    for row in range(3):
        place, _ = add(store, row, 11 + 2 * row, seed=row)
    store.flush()
    store.share(0, 2, place)
    store.flush()
    assert store.ids.tolist() == [[1, 3], [2, 0], [3, 0]]
    assert store.coded_tokens() == 11 + 13 + 15  # a shared segment counts once
    assert len(list(store.segments())) == 3
    before, each = attended(store), store.codes.numel() // (12 + 14 + 16)
    store.select_rows([2, 0, 0])
    assert store.ids.tolist() == [[3, 0], [1, 3], [1, 3]]
    after = attended(store)
    assert (after[0] - before[2]).abs().max() < 1e-6
    assert torch.equal(after[1], after[2])
    assert store.codes.numel() == each * (12 + 16)  # what row 1 had is gone
    assert store.coded_tokens() == 11 + 15


def test_what_a_dropped_row_had_beside_its_codes(store_of):
    """Means, scales and own bases of segments that no row has any more."""
    store = store_of([HeadPlan(Slabs(8), RAW), HeadPlan(Slabs(0, 16), RAW)], batch=2)
    for row in range(2):
        add(store, row, 600, seed=row, prior=1)
    store.flush()
    kept = {name: getattr(store, name).numel() for name in ("scales", "own_means", "own_bases")}
    assert all(kept.values())
    before = attended(store)
    store.select_rows([1])
    assert (attended(store) - before[1]).abs().max() < 1e-6
    assert {name: getattr(store, name).numel() for name in kept} == {name: size // 2 for name, size in kept.items()}


def test_a_held_image_is_not_joined_or_lost(store_of, monkeypatch):
    monkeypatch.setattr(merging, "MERGE_AT", 2)
    store = store_of(batch=2)
    pieces = [tokens(64, seed) for seed in range(3)]
    for keys, values in pieces:
        store.hold(0, keys, values)
        store.flush()
    assert store.held_key(0) == (1, 2, 3)
    assert store.held_key(1) == ()
    add(store, 1, 6)
    store.flush()
    keys, values = store.take_held(0)
    assert torch.equal(keys, torch.cat([piece[0] for piece in pieces], 1))
    assert torch.equal(values, torch.cat([piece[1] for piece in pieces], 1))
    assert store.code_bytes(Kind.DENSE) == (0, 0)
    store.flush()
    assert store.codes.numel() == 6 * (8 * 4 + 16 + 32 * 4 + 16 + 8 * 4)  # their range of the pool is free again


@pytest.mark.parametrize("plan", [PLAN, [HeadPlan(Slabs(), Slabs(0, 0, 16)), HeadPlan(Slabs(0, 8), Slabs())], [HeadPlan(RAW, RAW)] * 2])
def test_joined_blocks_are_what_they_were(store_of, monkeypatch, plan):
    """Slabs of many blocks lie one behind the other after a join: the very numbers, and the same attention."""
    rebuilt, out, places = [], [], []
    for joining in (10**9, 3):
        monkeypatch.setattr(merging, "MERGE_AT", joining)
        store = store_of(plan, batch=2)
        blocks = TextBlocks(store, store.prepared.kinds["text"], Rules(0, 0))
        for seed in range(7):
            for row in range(2):
                blocks.write([row], *(x.unsqueeze(0) for x in tokens(64, seed + 10 * row)))
            if seed == 3:
                add(store, 0, 33)  # an image in between stays as it is
            store.flush()
        out.append(attended(store))
        rebuilt.append(reconstruct(store.view(splits=False)))
        places.append([sorted(row[row > 0].tolist()) for row in store.table[:, 0, :, LENGTH]])
        assert store.coded_tokens() == 14 * 64 + 33
        native = sum(
            int(entry[KEY + NATIVE] + entry[VALUE + NATIVE]) * (34 if entry[LENGTH] == 33 else int(entry[LENGTH]))
            for heads in store.segments()
            for entry in heads
        )
        assert store.codes.numel() == store.code_bytes(Kind.CODED)[0] + 2 * native
    assert places == [[[33] + [64] * 7, [64] * 7], [[33, 64 * 7], [64 * 7]]]
    assert (out[0] - out[1]).abs().max() < 1e-5
    for plain, joined in zip(rebuilt[0], rebuilt[1], strict=True):
        for (k1, v1), (k2, v2) in zip(plain, joined, strict=True):
            order = [torch.from_numpy(np.lexsort(x.numpy().T)) for x in (torch.cat([k1, v1], 1), torch.cat([k2, v2], 1))]
            assert torch.equal(k1[order[0]], k2[order[1]])
            assert torch.equal(v1[order[0]], v2[order[1]])


def test_text_in_calibrated_coordinates_takes_nothing_of_its_own(store_of):
    store = store_of()
    blocks = TextBlocks(store, store.prepared.kinds["text"], Rules(0, 0))
    for seed in range(4):
        blocks.write([0], *(x.unsqueeze(0) for x in tokens(64, seed)))
    store.flush()
    assert (store.own_means.numel(), store.own_bases.numel(), store.scales.numel()) == (0, 0, sum(CALIBRATED))
    keys, values = (calibrated(side).scales for side in store.prepared.kinds["text"].sides)
    assert torch.equal(store.scales, torch.cat([keys[0], values[0, :16], values[1, :8]]))
    assert store.code_bytes(Kind.CODED)[0] == 4 * 64 * (32 + 64 + 16 + 16)


@pytest.mark.parametrize("plan", [PLAN, [HeadPlan(Slabs(), Slabs(0, 0, 16)), HeadPlan(Slabs(0, 8), Slabs())], [HeadPlan(RAW, RAW)] * 2])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("joining", [3, 10**9])
def test_rows_written_at_once_are_what_each_is_alone(store_of, monkeypatch, plan, raw, joining):
    """Four rows in one piece, one by one, and in turns that leave their blocks in unequal distances: the same numbers, joined or not."""
    monkeypatch.setattr(merging, "MERGE_AT", joining)
    turns = {
        "at once": lambda n: [[0, 1, 2, 3]],
        "alone": lambda n: [[0], [1], [2], [3]],
        "in turns": lambda n: [[[2], [0, 1, 3]], [[3], [0, 2], [1]], [[0, 3], [1, 2]]][n % 3],
    }
    rebuilt, sums = {}, {}
    for name, of_block in turns.items():
        store = store_of(plan, batch=4)
        blocks = TextBlocks(store, store.prepared.kinds["text"], Rules(0, 1e9))
        for n in range(7):
            of_rows = [torch.stack(sides) for sides in zip(*(tokens(64, n + 10 * row) for row in range(4)), strict=True)]
            for rows in of_block(n):
                keys, values = (x[rows] for x in of_rows)
                if raw:
                    store.add_dense_rows(rows, keys, values)
                else:
                    blocks.write(rows, keys, values)
            store.flush()
        rebuilt[name] = reconstruct(store.view(splits=False))
        assert set(store.table[:, :, :, LENGTH].reshape(-1).tolist()) - {0} == ({64 * 7} if joining == 3 else {64})
        if raw:
            for row, heads in enumerate(rebuilt[name]):
                for h, (keys, values) in enumerate(heads):
                    exact = [
                        torch.cat(sides)
                        for sides in zip(*((k[h], v[h]) for k, v in (tokens(64, n + 10 * row) for n in range(7))), strict=True)
                    ]
                    assert torch.equal(keys, exact[0]) and torch.equal(values, exact[1])
        else:
            sums[name] = torch.tensor([blocks.rows[row].discarded for row in range(4)])
    for name in ("alone", "in turns"):
        assert raw or torch.allclose(sums[name], sums["at once"], rtol=1e-4) and (sums[name].max() > 0) == (RAW not in plan[0])
        for one, other in zip(rebuilt["at once"], rebuilt[name], strict=True):
            for (k1, v1), (k2, v2) in zip(one, other, strict=True):
                assert torch.allclose(k1, k2, atol=1e-5) and torch.allclose(v1, v2, atol=1e-5)


@pytest.mark.parametrize("begins", [0, 2])
@pytest.mark.parametrize("dropped", [0, 2, 30])
def test_ranges_that_overlap_stay_whole(store_of, begins, dropped):
    """The table of a saved cache may name a part of another segment: 2 tokens that begin with one of 8, or 2 later. What is dropped before
    both may be as much as they share."""
    store = store_of(batch=2)
    if dropped:
        store.add_dense(1, *tokens(dropped))
    short, long = store.add_dense(0, *tokens(2)), store.add_dense(0, *tokens(8, seed=1))
    store.flush()
    for side in (KEY, VALUE):
        store.table[0, :, short, side + OFFSET] = store.table[0, :, long, side + OFFSET] + begins * DIM * 4
    if dropped:
        store.clear(1, 0)
    merging.compact(store)
    assert store.codes.numel() == 2 * HEADS * 8 * DIM * 4
    for h, found in enumerate(reconstruct(store.view(splits=False))[0]):
        for x, exact in zip(found, tokens(8, seed=1), strict=True):
            assert torch.equal(x, torch.cat([exact[h, begins : begins + 2], exact[h]]))


def test_scales_that_reach_behind_the_calibrated_ones_stay_whole(store_of):
    """As they may in the table of a saved cache: 16 scales of which 8 are the last calibrated ones."""
    store = store_of()
    place, _ = add(store, 0, 64, kind="text", own_parts=False)
    add(store, 0, 64, seed=1)
    store.flush()
    end = sum(CALIBRATED)
    store.table[0, 0, place, VALUE + SCALES] = end - 8
    expected = store.scales[end - 8 : end + 8].clone()
    store.clear(0, 1 - place)
    merging.compact(store)
    at = int(store.table[0, 0, place, VALUE + SCALES])
    assert torch.equal(store.scales[at : at + 16], expected)
