"""Run the Triton kernels in Triton's interpreter and print one JSON line per case: the error against float64.

A process of its own, because Triton reads TRITON_INTERPRET when kernels are decorated:
`TRITON_INTERPRET=1 python tools/run_in_checkout.py tests/kernels/interpreter_cases.py NAME...`
"""

import dataclasses
import json
import sys

import torch

from kernel_caches import EMPTY, Coded, Segment, brute_force, random_cache, random_layout, relative_error
from rotatek_compile.kernels import decode
from rotatek_compile.kernels.decode_torch import decode_attention_torch
from rotatek_compile.kernels.splits import plan_splits

SMALL = decode.Config(32, 2, 32, 2)
APART, APART_8 = decode.Config(128, 2, 32, 2, 4, apart=True), decode.Config(256, 2, 32, 2, 8, apart=True)


def pairs(*sides, length=70):
    """One sequence, one segment per head, its Keys and Values as given, or the same twice."""
    return [[[Segment(length + h, *(side if isinstance(side, list) else (side, side)))] for h, side in enumerate(sides)]]


def run(layout, windows, dim, group, new, dtype, *, capacity=72, min_tokens=64, tiles=None, two_part=False, full_bases=False):
    heads = len(layout[0])
    cache = random_cache(layout, windows, dim, capacity, dtype, full_bases=full_bases, num_programs=12, min_tokens=min_tokens)
    q = torch.randn(len(layout), new, heads * group, dim, generator=torch.Generator().manual_seed(1)).to(dtype).transpose(1, 2)
    out = decode.decode_attention(q, cache.view, dim**-0.5, tiles=tiles, two_part_query=two_part)
    return relative_error(out, brute_force(q, cache, dim**-0.5))


def appended(layout, windows, dim, group, new, dtype, two_part=False):
    """The kernel writes the newest tokens to the window itself; their places held NaN before, and hold the tokens afterwards."""
    cache = random_cache(layout, windows, dim, 130, dtype, num_programs=12, min_tokens=64)
    q = torch.randn(len(layout), len(layout[0]) * group, new, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected, kept, newest = brute_force(q, cache, dim**-0.5), [], []
    for window in (cache.view.window_keys, cache.view.window_values):
        kept.append(window.clone())
        newest.append(torch.stack([window[b, :, n - new : n] for b, n in enumerate(windows)]).transpose(1, 2).contiguous().transpose(1, 2))
        for b, n in enumerate(windows):
            window[b, :, n - new : n] = float("nan")
    out = decode.decode_attention(q, cache.view, dim**-0.5, new=tuple(newest), two_part_query=two_part)
    found = cache.view.window_keys, cache.view.window_values
    same = [torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(kept, found, strict=True)]
    return relative_error(out, expected) if all(same) else float("inf")


def ragged(seed, batch, heads, dim, longest=150):
    return random_layout(torch.Generator().manual_seed(seed), batch, heads, dim, longest)


def shared_offsets():
    """Two rows, as two beams, of which the second reads the first one's segments and has its own window."""
    layout = [[[Segment(77, Coded(8, 8, 16), Coded(0, 24, 16)), Segment(30), Segment(9, Coded(), None)]], [[Segment(5)]]]
    cache = random_cache(layout, [9, 30], 64, 40, torch.float16, num_programs=6)
    table = cache.view.table[:1].expand(2, -1, -1, -1).contiguous()
    view = dataclasses.replace(cache.view, table=table, splits=plan_splits(table, window_capacity=40, head_dim=64, num_programs=6))
    cache.pieces[1] = cache.pieces[0]
    q = torch.randn(2, 4, 1, 64).half()
    return relative_error(decode.decode_attention(q, view, 0.125), brute_force(q, cache, 0.125))


def growing_window():
    """One plan serves every window length up to the capacity, none at all included."""
    layout = [[[Segment(40, Coded(0, 8, 16), Coded(8, 0, 16))]], [[EMPTY]]]
    cache = random_cache(layout, [130, 130], 64, 130, torch.float32, min_tokens=64, num_programs=64)
    q = torch.randn(2, 2, 1, 64)
    worst = 0.0
    for length in (0, 1, 64, 65, 130):
        view = dataclasses.replace(cache.view, window_lengths=torch.tensor([length, length], dtype=torch.int32))
        expected = decode_attention_torch(q.double(), view, 0.125)
        worst = max(worst, relative_error(decode.decode_attention(q, view, 0.125), expected))
    return worst


def planned_ahead():
    """A plan for larger windows: places of partials that no split writes hold NaN, and are not read."""
    layout = [[[Segment(40, Coded(0, 8, 16), Coded(8, 0, 16))], [EMPTY]], [[EMPTY], [Segment(90)]]]
    cache = random_cache(layout, [130, 7], 64, 130, torch.float32, num_programs=8, grows_to=1000)
    assert cache.view.splits.unused > 0
    q, empty = torch.randn(2, 4, 1, 64), torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan"))
    try:
        found = decode.decode_attention(q, cache.view, 0.125)
    finally:
        torch.empty = empty
    return relative_error(found, brute_force(q, cache, 0.125))


def missing_means():
    """Shared and own means, either, both or none on either side."""
    kept = [Coded(0, 8, 16, shared, own) for shared in (False, True) for own in (False, True)]
    return run([[[Segment(33, key, kept[3 - i])] for i, key in enumerate(kept)]], [4], 64, 2, 1, f32)


def overflow(tiles=None):
    """A query in fp16 of which every rotated number is beyond fp16: the softmax picks single tokens, so Keys must be met exactly."""
    layout = pairs(Coded(16, 8, 16), [Coded(8, 0, 32), None], length=5)
    cache = random_cache(layout, [3], 64, 8, f16)
    view = dataclasses.replace(cache.view, scales=cache.view.scales * 100)
    q = (torch.randn(1, 8, 1, 64) * 1e4).half()
    expected = decode_attention_torch(q.double(), view, 1.0)
    return relative_error(decode.decode_attention(q, view, 1.0, tiles=tiles, two_part_query=True), expected)


f16, f32, bf16 = torch.float16, torch.float32, torch.bfloat16
NATIVE = [[Coded(rank), None] for rank in (0, 8, 24, 40, 128)]  # Keys alone, in native numbers
BYTES = [Coded(0, 8), Coded(0, 24), Coded(0, 128)]
NIBBLES = [Coded(0, 0, 16), Coded(0, 0, 48), Coded(0, 0, 128)]
ALL = [Coded(16, 8, 16), Coded(8, 24, 32, own_basis=True), Coded(0, 32, 64), Coded(24, 0, 48)]
CASES = {  # name: (what to run, largest error)
    "native-keys-0-8-24-40-128": (lambda: run(pairs(*NATIVE), [3], 128, 4, 1, f16), 2e-3),
    "native-16-64-fp32": (lambda: run(pairs(Coded(16), [Coded(64), Coded(8)]), [3], 64, 1, 1, f32, full_bases=True), 1e-5),
    "bytes": (lambda: run(pairs(*BYTES), [3], 128, 4, 1, f32), 1e-5),
    "nibbles": (lambda: run(pairs(*NIBBLES), [3], 128, 4, 1, f32, full_bases=True), 1e-5),
    "nibbles-fp16": (lambda: run(pairs(*NIBBLES), [3], 128, 4, 1, f16), 2e-3),
    "three-slabs": (lambda: run(pairs(*ALL), [3], 96, 2, 1, f32, two_part=True), 1e-5),
    "three-slabs-bf16": (lambda: run(pairs(*ALL), [3], 128, 4, 1, bf16, two_part=True), 1e-2),
    "rank-0-both": (lambda: run(pairs(Coded(), Coded()), [3], 64, 3, 1, f32), 1e-5),
    "rank-0-either": (lambda: run(pairs([Coded(), Coded(0, 8, 16)], [Coded(8, 0, 16), Coded()]), [3], 64, 3, 1, f32), 1e-5),
    "raw-keys-coded-values": (lambda: run(pairs(*([None, x] for x in ALL)), [3], 128, 2, 1, f32), 1e-5),
    "coded-keys-raw-values": (lambda: run(pairs(*([x, None] for x in ALL)), [3], 96, 2, 1, f32), 1e-5),
    "missing-means": (missing_means, 1e-5),
    "window-only": (lambda: run([[[EMPTY]] * 2] * 2, [1, 70], 64, 4, 1, f16), 2e-3),
    "no-window": (lambda: run(pairs(Coded(24), Coded(0, 8)), [0], 64, 4, 1, f16, capacity=0), 2e-3),
    "g1-d64": (lambda: run(ragged(0, 2, 2, 64), [5, 72], 64, 1, 1, f16, tiles=SMALL), 2e-3),
    "g3-d96-t3": (lambda: run(ragged(1, 2, 2, 96), [3, 60], 96, 3, 3, f16), 2e-3),
    "g4-d128": (lambda: run(ragged(2, 3, 1, 128), [1, 64, 65], 128, 4, 1, f32), 1e-5),
    "g7-d128-t3": (lambda: run(ragged(3, 2, 1, 128), [70, 3], 128, 7, 3, f16, full_bases=True), 2e-3),
    "g8-d64-t3": (lambda: run(ragged(4, 2, 1, 64), [4, 31], 64, 8, 3, f32, tiles=SMALL), 1e-5),
    "g5-t12-64-rows": (lambda: run(pairs(Coded(40), Coded(16)), [20], 64, 5, 12, f16), 2e-3),
    "g5-t6-32-rows": (lambda: run(pairs(Coded(40), Coded(0, 0, 32)), [20], 64, 5, 6, f16), 2e-3),
    "bf16": (lambda: run(ragged(6, 2, 1, 64), [9, 50], 64, 4, 1, bf16), 1.5e-2),
    "bf16-two-part-query": (lambda: run(ragged(6, 2, 1, 64), [9, 50], 64, 4, 1, bf16, two_part=True), 1e-2),
    "many-splits": (lambda: run(pairs(*ALL[:2], length=699), [9], 64, 4, 1, f32, min_tokens=64), 1e-5),
    "apart-nibbles": (lambda: run(pairs(*NIBBLES, Coded(0, 0, 16), length=290), [3], 128, 4, 1, f16, min_tokens=256), 2e-3),
    "apart-bytes": (lambda: run(pairs(*BYTES, length=290), [3], 128, 8, 1, f16, min_tokens=256), 2e-3),
    "apart-three-slabs-16-rows": (lambda: run(pairs(*ALL, length=140), [3], 96, 8, 2, f16, two_part=True), 2e-3),
    "apart-12-rows": (lambda: run(pairs(*ALL[:3], length=129), [5], 128, 4, 3, bf16), 1e-2),
    "apart-raw-keys": (lambda: run(pairs(*([None, x] for x in ALL)), [3], 128, 7, 1, f16), 2e-3),
    "apart-raw-values": (lambda: run(pairs(*([x, None] for x in ALL), length=127), [3], 96, 1, 1, f16), 2e-3),
    "apart-d256": (lambda: run(pairs(Coded(0, 0, 128), Coded(0, 32, 16), length=200), [3], 256, 2, 1, f16), 2e-3),
    "apart-own-way-fp32": (lambda: run(pairs(*ALL, length=200), [3], 128, 2, 1, f32, tiles=APART, two_part=True), 1e-5),
    "apart-8-warps": (lambda: run(pairs(*ALL, length=300), [3], 128, 2, 1, f32, tiles=APART_8), 1e-5),
    "fp16-overflow": (overflow, 3e-3),
    "fp16-overflow-together": (lambda: overflow(SMALL), 3e-3),
    "append": (lambda: appended(pairs(Coded(0, 0, 32), Coded(8), None), [1], 64, 4, 1, f16), 2e-3),
    "append-3-to-splits": (lambda: appended([[[Segment(9)]] * 2] * 3, [130, 65, 3], 96, 2, 3, f16), 2e-3),
    "shared-offsets": (shared_offsets, 2e-3),
    "growing-window": (growing_window, 1e-5),
    "planned-ahead": (planned_ahead, 1e-5),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CASES:
        body, limit = CASES[name]
        torch.manual_seed(0)
        print(json.dumps({"case": name, "error": body(), "limit": limit}), flush=True)
