"""Inputs of the kernels for pruned attention, and how far these are from their specifications; run as a script, in the interpreter.

`TRITON_INTERPRET=1 python tools/run_in_checkout.py tests/kernels/rap_kernel_cases.py` prints one JSON line per case; a process of its own,
because Triton reads TRITON_INTERPRET when kernels are decorated. The interpreter cuts bf16 off instead of rounding it: fp16 and fp32 only.
"""

import json
import sys

import torch

from kernel_caches import relative_error
from rotatek_compile.kernels.narrow import narrow_attention
from rotatek_compile.kernels.pairs import turn
from rotatek_compile.kernels.pairs_torch import turned

f16, f32 = torch.float16, torch.float32


def angles(rows, tokens, dim, dtype, draw):
    """Cosines and sines [rows, S, D] of random positions, the second half of the channels repeating the first."""
    half = torch.rand(rows, tokens, dim // 2, generator=draw) * 900
    both = torch.cat([half, half], -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def pair_inputs(batch, tokens, heads, group, count, dim, dtype, device="cpu", shared=False, strided=False):
    """q, k, cos, sin and pairs; `shared` angles are those of all sequences, `strided` ones lie channels first and tokens apart."""
    draw = torch.Generator().manual_seed(batch + 10 * tokens + 100 * count)
    q, k = (torch.randn(batch, tokens, heads * g * 2 * count, generator=draw).to(dtype) for g in (group, 1))
    cos, sin = angles(1 if shared else batch, tokens, dim, dtype, draw)
    pairs = torch.stack([torch.randperm(dim // 2, generator=draw)[:count].sort().values for _ in range(heads)])
    q, k, cos, sin, pairs = (x.to(device) for x in (q, k, cos, sin, pairs))
    if strided:
        cos = cos.transpose(1, 2).contiguous().transpose(1, 2)
        q, sin = (torch.cat([x, x, x[..., :3]], -1)[..., : x.shape[-1]] for x in (q, sin))
    return q, k, cos, sin, pairs


def differing(*shape, **options):
    """Numbers in which what the kernel left in place differs from the specification, NaN included; what lies between rows must stay."""
    q, k, cos, sin, pairs = pair_inputs(*shape, **options)
    expected = [turned(x, cos, sin, pairs) for x in (q, k)]
    beside = (
        q.as_strided((q.shape[0], q.shape[1], q.stride(1)), q.stride())[..., q.shape[2] :].clone() if q.stride(1) > q.shape[2] else None
    )
    turn(q, k, cos, sin, pairs)
    lost = sum(int((a != b).sum()) for a, b in zip((q, k), expected, strict=True))
    if beside is not None:
        lost += int((q.as_strided((q.shape[0], q.shape[1], q.stride(1)), q.stride())[..., q.shape[2] :] != beside).sum())
    return lost


def narrow_inputs(batch, heads, group, new, stored, key, value, dtype, device="cpu", spare=0):
    """q, keys and values as a model and a cache have them, logits of a few units; NaN in the cache's `spare` places."""
    draw = torch.Generator().manual_seed(stored + key + 7 * value + new)
    q = torch.randn(batch, new, heads * group, key, generator=draw).to(dtype).to(device).transpose(1, 2)
    sides = []
    for width in (key, value):
        room = torch.full((batch + 1, heads, stored + spare, width), float("nan"), dtype=dtype, device=device)
        room[:batch, :, :stored] = torch.randn(batch, heads, stored, width, generator=draw).to(dtype).to(device)
        sides.append(room[:batch, :, :stored])
    return q, *sides, 3 * key**-0.5


def brute_force(q, keys, values, scaling):
    """In float64, one query at a time: [B, T, Hq, V]."""
    batch, query_heads, new, _ = q.shape
    group, stored = query_heads // keys.shape[1], keys.shape[2]
    out = torch.empty(batch, new, query_heads, values.shape[3], dtype=torch.float64, device=q.device)
    for b in range(batch):
        for h in range(query_heads):
            for t in range(new):
                seen = stored - new + t + 1
                logits = keys[b, h // group, :seen].double() @ q[b, h, t].double() * scaling
                out[b, t, h] = logits.softmax(0) @ values[b, h // group, :seen].double()
    return out


def narrow_error(*shape, splits=None, **options):
    q, keys, values, scaling = narrow_inputs(*shape, **options)
    return relative_error(narrow_attention(q, keys, values, scaling, splits=splits), brute_force(q, keys, values, scaling))


CASES = {  # name: (what to run, largest error); pairs: B, S, Hkv, G, m, D; narrow: B, Hkv, G, T, S, K, V
    "pairs-one-token-fp16": (lambda: differing(2, 1, 2, 4, 40, 128, f16), 0),
    "pairs-one-token-fp32": (lambda: differing(3, 1, 2, 1, 44, 128, f32), 0),
    "pairs-m3-g3": (lambda: differing(2, 5, 2, 3, 3, 16, f16), 0),
    "pairs-m1-g8": (lambda: differing(1, 4, 1, 8, 1, 4, f32), 0),
    "pairs-prefill-fp16": (lambda: differing(2, 77, 2, 4, 40, 128, f16), 0),
    "pairs-prefill-fp32": (lambda: differing(1, 130, 1, 7, 33, 96, f32), 0),
    "pairs-shared-angles": (lambda: differing(3, 9, 2, 2, 24, 64, f32, shared=True), 0),
    "pairs-strides": (lambda: differing(2, 37, 2, 2, 24, 64, f16, strided=True), 0),
    "pairs-strides-few": (lambda: differing(2, 3, 2, 5, 12, 32, f32, strided=True, shared=True), 0),
    "narrow-k80-v96": (lambda: narrow_error(1, 2, 4, 1, 700, 80, 96, f16), 2e-3),
    "narrow-k64-v112-fp32": (lambda: narrow_error(2, 1, 4, 1, 333, 64, 112, f32), 1e-5),
    "narrow-k88-v88-odd": (lambda: narrow_error(2, 2, 1, 1, 601, 88, 88, f16, splits=7), 2e-3),
    "narrow-k6-v10": (lambda: narrow_error(2, 2, 3, 1, 65, 6, 10, f32), 1e-5),
    "narrow-k16-v8-t4-g8": (lambda: narrow_error(1, 1, 8, 4, 300, 16, 8, f32), 1e-5),
    "narrow-k96-v80-t3-g7": (lambda: narrow_error(1, 2, 7, 3, 514, 96, 80, f16, splits=2), 2e-3),
    "narrow-alone": (lambda: narrow_error(2, 2, 2, 1, 1, 24, 40, f32), 1e-5),
    "narrow-new-tokens-alone": (lambda: narrow_error(1, 2, 2, 4, 4, 24, 40, f32), 1e-5),
    "narrow-new-tokens-in-two-splits": (lambda: narrow_error(1, 1, 2, 4, 1602, 24, 40, f32, splits=8), 1e-5),
    "narrow-static-cache": (lambda: narrow_error(2, 2, 4, 1, 130, 80, 112, f16, spare=62), 2e-3),
    "narrow-70-splits": (lambda: narrow_error(1, 1, 1, 1, 70 * 256, 16, 24, f32, splits=70), 1e-5),
    "narrow-d256": (lambda: narrow_error(1, 1, 2, 1, 300, 176, 256, f16), 2e-3),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CASES:
        body, limit = CASES[name]
        print(json.dumps({"case": name, "error": body(), "limit": limit}), flush=True)
