"""The torch twin against attention by brute force in float64."""

import pytest
import torch

from kernel_caches import brute_force, random_cache, random_layout, relative_error
from rotatek_compile.kernels import decode_torch

CASES = [  # B, Hkv, G, D, T, dtype, tolerance
    pytest.param(1, 2, 1, 64, 1, torch.float32, 1e-5, id="G1-D64-T1-fp32"),
    pytest.param(3, 2, 4, 128, 3, torch.float32, 1e-5, id="G4-D128-T3-fp32"),
    pytest.param(2, 1, 7, 96, 5, torch.float32, 1e-5, id="G7-D96-T5-fp32"),
    pytest.param(2, 3, 3, 32, 1, torch.float64, 1e-6, id="G3-D32-T1-fp64"),  # means are fp32, exactly representable
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
    assert relative_error(everything, brute_force(q, cache, scaling, causal=False)) < max(tolerance / 2, 1e-6)


def test_partials_of_other_tokens_merge():
    """Partials over the cache and over tokens stored elsewhere merge to attention over both."""
    q, cache, scaling = a_case(0, 1, 1, 2, 64, 4, torch.float32)
    keys, values = torch.randn(2, 40, 64)
    logits = scaling * q @ keys.T
    stored = decode_torch.segment_partials(q, cache.view, scaling, causal_window=False)
    both = decode_torch.finish(decode_torch.merge_partials([stored, decode_torch.partials_of(logits, values)]))
    piece = type(cache.pieces[0][0][0])(keys, values)
    cache.pieces[0][0].append(piece)
    assert relative_error(both, brute_force(q, cache, scaling, causal=False)) < 1e-5


def test_long_segments_are_cut(monkeypatch):
    q, cache, scaling = a_case(1, 2, 2, 3, 64, 2, torch.float32)
    whole = decode_torch.decode_attention_torch(q, cache.view, scaling)
    monkeypatch.setattr(decode_torch, "TOKENS_AT_ONCE", 37)
    assert relative_error(decode_torch.decode_attention_torch(q, cache.view, scaling), whole.double()) < 1e-5


def test_rank_zero_is_only_a_bias():
    cache = random_cache([[[("coded", 50, 0)]]], [0], 64, 8, torch.float32)
    q = torch.randn(1, 1, 1, 64)
    out = decode_torch.decode_attention_torch(q, cache.view, 1.0)
    assert torch.allclose(out[0, 0, 0], cache.pieces[0][0][0].values.mean(0), atol=1e-6)


def test_nothing_stored_gives_zeros():
    cache = random_cache([[[("empty", 0, 0)]]], [0], 64, 8, torch.float32)
    q = torch.randn(1, 2, 1, 64)
    assert torch.equal(decode_torch.decode_attention_torch(q, cache.view, 1.0), torch.zeros_like(q))
    assert torch.equal(decode_torch.decode_attention_reconstruct(q, cache.view, 1.0), torch.zeros_like(q))


def test_full_rank_equals_dense_attention():
    """An orthogonal basis at full rank changes nothing: the claim every approximation starts from."""
    dim, length = 64, 100
    basis = torch.linalg.qr(torch.randn(dim, dim))[0]
    keys = torch.randn(length, dim) + 3.0
    cache = random_cache([[[("coded", length, dim)]]], [1], dim, 8, torch.float32)
    piece, view = cache.pieces[0][0][0], cache.view
    view.bases.copy_(basis.reshape(-1))
    view.means.copy_(keys.mean(0))
    view.keys[: length * dim].view(length, dim).copy_((keys - keys.mean(0)) @ basis)
    q = torch.randn(1, 2, 1, dim)
    out = decode_torch.decode_attention_torch(q, view, 0.1)
    both = [torch.cat([x, y]) for x, y in ((keys, cache.windows[0][0].keys), (piece.values, cache.windows[0][0].values))]
    expected = torch.softmax(0.1 * q.double() @ both[0].double().T, -1) @ both[1].double()
    assert relative_error(out, expected) < 1e-5
