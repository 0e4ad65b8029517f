"""Run the Triton kernels in Triton's interpreter and print one JSON line per case: the error against float64.

A process of its own, because Triton reads TRITON_INTERPRET when kernels are decorated:
`TRITON_INTERPRET=1 python tools/run_in_checkout.py tests/kernels/interpreter_cases.py NAME...`
"""

import dataclasses
import json
import sys

import torch

from kernel_caches import brute_force, random_cache, random_layout, relative_error
from rotatek_compile.kernels import decode
from rotatek_compile.kernels.decode_torch import decode_attention_torch

SMALL = decode.Config(32, 2, 32, 2)


def coded(*ranks, length=70):
    return [[[("coded", length, rank)] for rank in ranks]]


def run(layout, windows, dim, group, new, dtype, *, capacity=72, min_tokens=64, tiles=None, two_part=False, full_bases=False):
    heads = len(layout[0])
    cache = random_cache(layout, windows, dim, capacity, dtype, full_bases=full_bases, num_programs=12, min_tokens=min_tokens)
    q = torch.randn(len(layout), new, heads * group, dim, generator=torch.Generator().manual_seed(1)).to(dtype).transpose(1, 2)
    out = decode.decode_attention(q, cache.view, dim**-0.5, tiles=tiles, two_part_query=two_part)
    return relative_error(out, brute_force(q, cache, dim**-0.5))


def ragged(seed, batch, heads, dim, longest=150):
    return random_layout(torch.Generator().manual_seed(seed), batch, heads, dim, longest)


def shared_offsets():
    """Two rows, as two beams, of which the second reads the first one's segments and has its own window."""
    cache = random_cache(ragged(5, 2, 1, 64), [9, 30], 64, 40, torch.float16, num_programs=6)
    table = cache.view.table[:1].expand(2, -1, -1, -1).contiguous()
    from rotatek_compile.kernels.table import plan_splits

    view = dataclasses.replace(cache.view, table=table, splits=plan_splits(table, window_capacity=40, head_dim=64, num_programs=6))
    cache.pieces[1] = cache.pieces[0]
    q = torch.randn(2, 4, 1, 64).half()
    return relative_error(decode.decode_attention(q, view, 0.125), brute_force(q, cache, 0.125))


def growing_window():
    """One plan serves every window length up to the capacity, none at all included."""
    cache = random_cache([[[("coded", 40, 24)]], [[("empty", 0, 0)]]], [130, 130], 64, 130, torch.float32, min_tokens=64, num_programs=64)
    q = torch.randn(2, 2, 1, 64)
    worst = 0.0
    for length in (0, 1, 64, 65, 130):
        view = dataclasses.replace(cache.view, window_lengths=torch.tensor([length, length], dtype=torch.int32))
        expected = decode_attention_torch(q.double(), view, 0.125)
        worst = max(worst, relative_error(decode.decode_attention(q, view, 0.125), expected))
    return worst


f16, f32, bf16 = torch.float16, torch.float32, torch.bfloat16
CASES = {  # name: (what to run, largest error)
    "ranks-0-8-24-40-128": (lambda: run(coded(0, 8, 24, 40, 128), [3], 128, 4, 1, f16), 2e-3),
    "ranks-16-64-fp32": (lambda: run(coded(16, 64), [3], 64, 1, 1, f32, full_bases=True), 1e-5),
    "only-rank-0": (lambda: run(coded(0, 0), [3], 64, 3, 1, f32), 1e-5),
    "window-only": (lambda: run([[[("empty", 0, 0)]] * 2] * 2, [1, 70], 64, 4, 1, f16), 2e-3),
    "no-window": (lambda: run(coded(24, 8), [0], 64, 4, 1, f16, capacity=0), 2e-3),
    "g1-d64": (lambda: run(ragged(0, 2, 2, 64), [5, 72], 64, 1, 1, f16, tiles=SMALL), 2e-3),
    "g3-d96-t3": (lambda: run(ragged(1, 2, 2, 96), [3, 60], 96, 3, 3, f16), 2e-3),
    "g4-d128": (lambda: run(ragged(2, 3, 1, 128), [1, 64, 65], 128, 4, 1, f32), 1e-5),
    "g7-d128-t3": (lambda: run(ragged(3, 2, 1, 128), [70, 3], 128, 7, 3, f16, full_bases=True), 2e-3),
    "g8-d64-t3": (lambda: run(ragged(4, 2, 1, 64), [4, 31], 64, 8, 3, f32, tiles=SMALL), 1e-5),
    "g5-t12-64-rows": (lambda: run(coded(40, 16), [20], 64, 5, 12, f16), 2e-3),
    "bf16": (lambda: run(ragged(6, 2, 1, 64), [9, 50], 64, 4, 1, bf16), 1.5e-2),
    "bf16-two-part-query": (lambda: run(ragged(6, 2, 1, 64), [9, 50], 64, 4, 1, bf16, two_part=True), 1e-2),
    "many-splits": (lambda: run(coded(24, 56, length=700), [9], 64, 4, 1, f16, min_tokens=64), 2e-3),
    "shared-offsets": (shared_offsets, 2e-3),
    "growing-window": (growing_window, 1e-5),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CASES:
        body, limit = CASES[name]
        torch.manual_seed(0)
        print(json.dumps({"case": name, "error": body(), "limit": limit}), flush=True)
