"""KQ-SVD against the truncated decomposition of the logits themselves, written with the paper's pseudo-inverse."""

import pytest
import torch

from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.runtime.rivals.registry import make_coder

HEADS, DIM, GROUP = 2, 32, 3


def coder(keep_ratio, name="kq-svd"):
    layer = LayerGeometry(layer_type="full_attention", query_heads=GROUP * HEADS, kv_heads=HEADS, head_dim=DIM)
    return make_coder(name, Geometry(model_type="made", layers=(layer,), visual_token_ids=(5,)), keep_ratio=keep_ratio)


def tensors(tokens=70, seen=40):
    """Channels of very different size, Keys and queries each in their own way."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(HEADS, tokens, DIM, generator=generator) * torch.logspace(0, -1, DIM)
    queries = torch.randn(HEADS, GROUP, seen, DIM, generator=generator) * torch.logspace(-1.5, 0, DIM)
    mix = torch.randn(DIM, DIM, generator=generator)
    return keys @ mix, torch.randn(HEADS, tokens, DIM, generator=generator), queries @ mix


@pytest.mark.parametrize("rank", [8, 16, 24])
def test_logits_are_the_best_of_their_rank(rank):
    keys, values, queries = tensors()
    rebuilt, kept_values = coder(rank / DIM).code(0, keys, values, queries).rebuild()
    assert torch.equal(kept_values, values)
    for head in range(HEADS):
        key, query = keys[head].double(), queries[head].reshape(-1, DIM).double()
        logits = key @ query.T
        left, sizes, right = torch.linalg.svd(logits, full_matrices=False)
        best = left[:, :rank] * sizes[:rank] @ right[:rank]
        a, b = torch.linalg.pinv(key) @ left[:, :rank], key.T @ left[:, :rank]  # as the paper writes it
        assert torch.allclose((key @ a) @ (query @ b).T, best, atol=1e-6)
        got = rebuilt[head].double() @ query.T
        least, error = float((best - logits).norm()), float((got - logits).norm())
        assert least > 1e-3 * float(logits.norm())  # there is something to lose
        assert error == pytest.approx(least, rel=1e-3)
        assert torch.allclose(rebuilt[head].double(), key @ a @ b.T, atol=2e-2 * float(key.abs().max()))


def test_it_beats_the_basis_of_the_paper_on_its_queries():
    keys, values, queries = tensors()
    logits = keys @ queries.flatten(1, 2).mT
    errors = [
        float((coder(0.25, name).code(0, keys, values, queries).rebuild()[0] @ queries.flatten(1, 2).mT - logits).norm())
        for name in ("kq-svd", "paper", "think")
    ]
    assert errors[0] < 0.9 * errors[1] < errors[2]


def test_heads_of_the_group_are_stacked_not_averaged():
    keys, values, queries = tensors()
    queries[:, 1], queries[:, 2] = -queries[:, 0], 0
    expected = coder(0.25).code(0, keys, values, queries[:, :1]).rebuild()[0]
    assert torch.allclose(coder(0.25).code(0, keys, values, queries).rebuild()[0], expected, atol=1e-3)


@pytest.mark.parametrize("seen", [1, 2, 40])
@pytest.mark.parametrize("tokens", [1, 7, 8, 31, 32, 70])
def test_all_directions_are_exact_whatever_queries_see(tokens, seen):
    keys, values, queries = tensors(tokens, seen)
    segment = coder(1.0).code(0, keys, values, queries)
    assert torch.allclose(segment.rebuild()[0], keys, atol=1e-4)
    rank = min(tokens, DIM)
    assert segment.parts["keys"].shape == (HEADS, tokens, rank)
    assert segment.bytes() == coder(1.0).bytes_of(tokens, 0) == 2 * HEADS * (tokens * (rank + DIM) + DIM * rank)


def test_directions_that_queries_leave_open_follow_the_keys():
    """One query settles three directions; the other five are those of largest Key energy outside of them."""
    keys, values, queries = tensors(70, 1)
    rebuilt = coder(0.25).code(0, keys, values, queries).rebuild()[0]
    for head in range(HEADS):
        key, query = keys[head].double(), queries[head, :, 0].double()
        settled = torch.linalg.qr(key @ query.T).Q
        rest = key - settled @ (settled.T @ key)
        left = torch.linalg.svd(rest, full_matrices=False).U[:, :5]
        expected = key - rest + left @ (left.T @ rest)
        error, least = float((rebuilt[head] - key).norm()), float((expected - key).norm())
        assert error == pytest.approx(least, rel=2e-2)
        assert torch.allclose(rebuilt[head].double() @ query.T, key @ query.T, atol=1e-2 * float((key @ query.T).abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_nothing_at_all(dtype):
    keys, values, queries = (x.to(dtype) for x in tensors())
    keys = keys * 100
    rebuilt = coder(1.0).code(0, keys, values, queries).rebuild()[0]
    assert (rebuilt - keys.float()).norm() < 2e-2 * keys.float().norm()
    for k, q in ((keys * 0, queries), (keys, queries * 0), (keys[:, :1].expand_as(keys).contiguous(), queries)):
        rebuilt = coder(0.25).code(0, k, values, q).rebuild()[0]
        assert rebuilt.isfinite().all()
    assert (rebuilt - k.float()).norm() < 2e-2 * k.float().norm()  # equal Keys are of rank one
