"""The torch twin against attention by brute force in float64."""

import pytest
import torch

from kernel_caches import EMPTY, Coded, Piece, Segment, brute_force, random_cache, random_layout, relative_error
from rotatek_compile.kernels import codes, decode_torch
from rotatek_compile.kernels.slabs import Slabs

CASES = [  # B, Hkv, G, D, T, dtype, tolerance
    pytest.param(1, 2, 1, 64, 1, torch.float32, 1e-5, id="G1-D64-T1-fp32"),
    pytest.param(3, 2, 4, 128, 3, torch.float32, 1e-5, id="G4-D128-T3-fp32"),
    pytest.param(2, 1, 7, 96, 5, torch.float32, 1e-5, id="G7-D96-T5-fp32"),
    pytest.param(2, 3, 3, 32, 1, torch.float64, 1e-12, id="G3-D32-T1-fp64"),
    pytest.param(2, 2, 8, 128, 1, torch.bfloat16, 1e-2, id="G8-D128-T1-bf16"),
]


def a_case(seed, batch, heads, group, dim, new, dtype):
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(new, 97, (batch,), generator=generator).tolist()
    layout = random_layout(generator, batch, heads, dim, 300)
    cache = random_cache(layout, windows, dim, 96, dtype, seed=seed, full_bases=bool(seed % 2))
    q = torch.randn(batch, heads * group, new, dim, generator=generator).to(dtype)
    return q, cache, dim**-0.5


@pytest.mark.parametrize(("batch", "heads", "group", "dim", "new", "dtype", "tolerance"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_matches_brute_force(batch, heads, group, dim, new, dtype, tolerance, seed):
    q, cache, scaling = a_case(seed, batch, heads, group, dim, new, dtype)
    expected = brute_force(q, cache, scaling)
    out = decode_torch.decode_attention_torch(q, cache.view, scaling)
    assert out.dtype == dtype and out.shape == q.shape
    assert relative_error(out, expected) < tolerance
    assert relative_error(decode_torch.decode_attention_reconstruct(q, cache.view, scaling), expected) < tolerance
    everything = decode_torch.finish(decode_torch.segment_partials(q, cache.view, scaling, causal_window=False))
    assert relative_error(everything, brute_force(q, cache, scaling, causal=False)) < tolerance


def test_partials_of_other_tokens_merge():
    """Partials over the cache and over tokens stored elsewhere merge to attention over both."""
    q, cache, scaling = a_case(0, 1, 1, 2, 64, 4, torch.float32)
    keys, values = torch.randn(2, 40, 64)
    logits = scaling * q @ keys.T
    stored = decode_torch.segment_partials(q, cache.view, scaling, causal_window=False)
    both = decode_torch.finish(decode_torch.merge_partials([stored, decode_torch.partials_of(logits, values)]))
    cache.pieces[0][0].append(Piece(keys.double(), values.double()))
    assert relative_error(both, brute_force(q, cache, scaling, causal=False)) < 1e-5


def test_long_segments_are_cut(monkeypatch):
    q, cache, scaling = a_case(1, 2, 2, 3, 64, 2, torch.float32)
    whole = decode_torch.decode_attention_torch(q, cache.view, scaling)
    monkeypatch.setattr(decode_torch, "TOKENS_AT_ONCE", 37)
    assert relative_error(decode_torch.decode_attention_torch(q, cache.view, scaling), whole.double()) < 1e-5


@pytest.mark.parametrize("key", [None, Coded(), Coded(8, 16, 16)])
@pytest.mark.parametrize("value", [None, Coded(), Coded(16, 8, 32)])
def test_every_pair_of_sides(key, value):
    """Each side alone and together, nothing at all kept included, beside a raw segment that shares the softmax."""
    cache = random_cache([[[Segment(51, key, value), Segment(20)]]], [7], 64, 8, torch.float32)
    q = torch.randn(1, 3, 1, 64)
    assert relative_error(decode_torch.decode_attention_torch(q, cache.view, 0.125), brute_force(q, cache, 0.125)) < 1e-5


def test_rank_zero_is_only_a_bias():
    """All Keys alike and all Values alike: the answer is the Value's mean, whatever the query."""
    cache = random_cache([[[Segment(50, Coded(), Coded())]]], [0], 64, 8, torch.float32)
    out = decode_torch.decode_attention_torch(torch.randn(1, 1, 1, 64), cache.view, 1.0)
    assert torch.allclose(out[0, 0, 0].double(), cache.pieces[0][0][0].values[0], atol=1e-6)


def test_nothing_stored_gives_zeros():
    cache = random_cache([[[EMPTY]]], [0], 64, 8, torch.float32)
    q = torch.randn(1, 2, 1, 64)
    assert torch.equal(decode_torch.decode_attention_torch(q, cache.view, 1.0), torch.zeros_like(q))
    assert torch.equal(decode_torch.decode_attention_reconstruct(q, cache.view, 1.0), torch.zeros_like(q))


def test_full_rank_equals_dense_attention():
    """An orthogonal basis at full rank changes nothing: the claim every approximation starts from."""
    dim, length = 64, 100
    full = Coded(dim, own_mean=False)
    cache = random_cache([[[Segment(length, full, full)]]], [1], dim, 8, torch.float32)
    bases = [torch.linalg.qr(torch.randn(dim, dim))[0] for _ in range(2)]
    sides = [torch.randn(length, dim) + 3.0 for _ in range(2)]
    view, flat = cache.view, []
    means = torch.zeros_like(view.means)
    entry = view.table[0, 0, 0]
    for x, basis, at in zip(sides, bases, (2, 11), strict=True):  # KEY and VALUE
        flat.append(codes.pack((x - x.mean(0)) @ basis, torch.zeros(0).bfloat16(), Slabs(dim), torch.float32))
        view.codes[entry[at] : entry[at] + flat[-1].numel()] = flat[-1]
        view.bases[entry[at + 4] : entry[at + 4] + dim * dim] = basis.reshape(-1)
        means[entry[at + 7] : entry[at + 7] + dim] = x.mean(0)
    view.means.copy_(means)
    q = torch.randn(1, 2, 1, dim)
    out = decode_torch.decode_attention_torch(q, view, 0.1)
    window = cache.windows[0][0]
    keys, values = torch.cat([sides[0].double(), window.keys]), torch.cat([sides[1].double(), window.values])
    assert relative_error(out, torch.softmax(0.1 * q.double() @ keys.T, -1) @ values) < 1e-5


def test_package_and_test_lay_codes_out_alike():
    """What `codes.pack` writes is read back as what it stands for."""
    slabs, length = Slabs(8, 16, 32), 33
    cache = random_cache([[[Segment(length, Coded(*slabs), Coded(*slabs))]]], [0], 64, 8, torch.float32)
    z = torch.randn(length, slabs.rank)
    side = decode_torch.load_side(cache.view, cache.view.table[0, 0, 0].tolist(), 2)
    scales = cache.view.scales[: slabs.scaled]
    start = int(cache.view.table[0, 0, 0, 2])
    packed = codes.pack(z, scales, slabs, torch.float32)
    cache.view.codes[start : start + packed.numel()] = packed
    found = decode_torch.load_side(cache.view, cache.view.table[0, 0, 0].tolist(), 2)
    assert found.decode is not None and torch.equal(found.decode, side.decode)
    weights = torch.cat([torch.ones(8), scales.float()])
    expected = torch.cat(
        [z[:, :8], codes.rounded(z[:, 8:24], weights[8:24], 8), codes.rounded(z[:, 24:], weights[24:], 4)], 1
    )  # fmt: skip
    assert torch.allclose(found.levels * weights, expected, atol=1e-6)
