"""SparK against a loop over tokens: what each keeps, what its dropped channels become, and where the formula has no bound."""

import math

import pytest
import torch

from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.runtime.rivals.registry import make_coder
from rotatek_compile.runtime.rivals.spark import query_norms

HEADS, TOKENS, DIM = 2, 37, 32


def coder(name, keep_ratio):
    layer = LayerGeometry(layer_type="full_attention", query_heads=2 * HEADS, kv_heads=HEADS, head_dim=DIM)
    return make_coder(name, Geometry(model_type="made", layers=(layer,), visual_token_ids=(5,)), keep_ratio=keep_ratio)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(HEADS, TOKENS, DIM, generator=generator) for _ in range(2))
    queries = torch.randn(HEADS, 2, 50, DIM, generator=generator) * torch.logspace(-1, 1, DIM)
    queries[:, :, :18] *= torch.logspace(3, -3, DIM)  # older than the last 32: must not matter
    return keys, values, queries


def by_token(key, norms, count, signs):
    """One token's rebuilt Key from lists of numbers; norms on their own scale."""
    score = [n * k * k for n, k in zip(norms, key, strict=True)]
    order = sorted(range(len(key)), key=lambda d: -score[d])
    dropped = order[count:]
    rebuilt = list(key)
    for d in dropped:
        if signs:
            size = math.sqrt(sum(score[j] for j in dropped) / len(dropped) / norms[d])
            rebuilt[d] = math.copysign(size, key[d])
        else:
            rebuilt[d] = sum(key[j] for j in dropped) / len(dropped)
    return torch.tensor(rebuilt)


@pytest.mark.parametrize("signs", [True, False], ids=["sign", "mean"])
@pytest.mark.parametrize("count", [1, 5, 8, 31])
def test_every_token_keeps_its_own_channels(tensors, signs, count):
    keys, values, queries = tensors
    rebuilt, kept_values = coder("spark-sign" if signs else "spark-mean", count / DIM).code(0, keys, values, queries).rebuild()
    assert torch.equal(kept_values, values)
    for head in range(HEADS):
        averaged = [[(float(a) + float(b)) / 2 for a, b in zip(*rows, strict=True)] for rows in zip(*queries[head, :, 18:], strict=True)]
        norms = [math.sqrt(sum(row[d] ** 2 for row in averaged)) for d in range(DIM)]
        for token in range(TOKENS):
            expected = by_token(keys[head, token].tolist(), norms, count, signs)
            assert torch.allclose(rebuilt[head, token], expected, atol=1e-5)
            exact = int((rebuilt[head, token] == keys[head, token]).sum())
            assert exact == count or (count == DIM - 1 and exact == DIM)  # a single dropped number is its own mean


def test_masks_differ_between_tokens_and_are_a_bit_per_channel(tensors):
    segment = coder("spark-sign", 0.25).code(0, *tensors)
    mask = segment.parts["channels"]
    assert mask.shape == (HEADS, TOKENS, DIM // 8) and mask.dtype == torch.uint8
    assert len({tuple(row) for row in mask[0].tolist()}) > TOKENS // 2
    assert segment.parts["signs"].shape == (HEADS, TOKENS, (DIM - 8) // 8)
    assert segment.parts["keys"].shape == (HEADS, TOKENS, 8)
    assert "signs" not in coder("spark-mean", 0.25).code(0, *tensors).parts


@pytest.mark.parametrize("name", ["spark-sign", "spark-mean"])
@pytest.mark.parametrize("tokens", [1, 37])
def test_all_channels_kept_is_exact(tensors, name, tokens):
    keys, values, queries = (x[:, :tokens] if x.dim() == 3 else x for x in tensors)
    segment = coder(name, 1.0).code(0, keys, values, queries)
    assert torch.equal(segment.rebuild()[0], keys)
    assert segment.bytes() == coder(name, 1.0).bytes_of(tokens, 0)


def test_signs_are_worth_their_bits(tensors):
    keys = tensors[0]
    error = {name: float((coder(name, 0.25).code(0, *tensors).rebuild()[0] - keys).pow(2).mean()) for name in ("spark-sign", "spark-mean")}
    even = torch.ones(HEADS, 2, 32, DIM)
    signed = float((coder("spark-sign", 0.25).code(0, keys, keys, even).rebuild()[0] - keys).pow(2).mean())
    meant = float((coder("spark-mean", 0.25).code(0, keys, keys, even).rebuild()[0] - keys).pow(2).mean())
    assert signed < meant / 2  # where queries look at all channels alike
    assert error["spark-sign"] > signed  # and the size is the score's, not the Key's, where they do not


def test_heads_are_averaged_before_the_norm_as_published(tensors):
    queries = tensors[2].clone()
    queries[:, 1] = -queries[:, 0]
    queries[:, 1, :, 3] = queries[:, 0, :, 3]
    norms = query_norms(queries)
    assert norms[:, 3].eq(1).all() and norms[:, 4:].max() == pytest.approx(1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_channels_that_no_query_sees_stay_finite(tensors, dtype):
    keys, values, queries = (x.to(dtype) for x in tensors)
    keys = keys * 100
    queries[..., ::2] = 0
    for name in ("spark-sign", "spark-mean"):
        for seen in (queries, torch.zeros_like(queries), queries[:, :, :1]):
            rebuilt, _ = coder(name, 0.25).code(0, keys, values, seen).rebuild()
            assert rebuilt.isfinite().all()
