"""Every rival: bytes against numbers worked out by hand, errors within what the method promises, exact cases."""

import math

import pytest
import torch

from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.runtime.rivals.hadamard import walsh_hadamard
from rotatek_compile.runtime.rivals.leank_learned import LearnedScales
from rotatek_compile.runtime.rivals.registry import RIVALS, make_coder

AFTER = [name for name in RIVALS if RIVALS[name].learned != "palu"]  # what codes Keys after RoPE; test_palu.py has the others


def geometry_of(kv_heads, head_dim, layers=2, group=2):
    layer = LayerGeometry(layer_type="full_attention", query_heads=kv_heads * group, kv_heads=kv_heads, head_dim=head_dim)
    return Geometry(model_type="made", layers=(layer,) * layers, visual_token_ids=(5,))


def tensors(kv_heads, tokens, head_dim, group=2, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(kv_heads, tokens, head_dim, generator=g) + 3 * torch.randn(kv_heads, 1, head_dim, generator=g)
    values = torch.randn(kv_heads, tokens, head_dim, generator=g)
    queries = torch.randn(kv_heads, group, 40, head_dim, generator=g)
    return keys.to(dtype), values.to(dtype), queries.to(dtype)


def knockout(kept, kv_heads):
    """Layer 0 keeps its first `kept` heads, layer 1 comes after."""
    return {"knockout": {0: torch.arange(10.0 + kv_heads, 10.0, -1), 1: torch.zeros(kv_heads)}}, kept / (2 * kv_heads)


def energy(kept, kv_heads, head_dim):
    """32 channels of each of the first `kept` heads of layer 0 stand out."""
    scores = {layer: torch.zeros(kv_heads, head_dim) for layer in range(2)}
    scores[0][:kept, :32] = 1
    return {"energy": scores, "leank-learned": LearnedScales(scores, {})}, 32 * kept / (2 * kv_heads * head_dim)


def coder_for(name, kv_heads, head_dim, channels, rank, kept):
    geometry = geometry_of(kv_heads, head_dim)
    if RIVALS[name].learned:
        state, ratio = energy(kept, kv_heads, head_dim) if name.startswith("leank") else knockout(kept, kv_heads)
        return make_coder(name, geometry, keep_ratio=ratio, state=state)
    ratio = {"think": channels / head_dim, "paper": rank / head_dim, "kq-svd": rank / head_dim, "svdq": 1 / 8}
    ratio |= {"spark-sign": channels / head_dim, "spark-mean": channels / head_dim}
    return make_coder(name, geometry, keep_ratio=ratio.get(name))


BYTES = {  # 2 heads of 128 and 520 tokens; 3 heads of 64 and 577 tokens
    "int8": (2 * 2 * 520 * (128 + 4), 2 * 3 * 577 * (64 + 4)),
    "int4": (141440, 124632),
    "fp8": (266256, 221592),
    "kivi4": (2 * (16 * 128 * (16 + 4) + 8 * 128 * 2 + 520 * (64 + 4 * 4)), 3 * (18 * 64 * (16 + 4) + 1 * 64 * 2 + 577 * (32 + 2 * 4))),
    "kivi2": (103168, 83400),
    "hadamard4": (141440, 124632),
    "hadamard2": (99840, 83088),
    "head-drop": (1 + 2 * 520 * (64 + 4) + 2 * 128 * 4, 1 + 2 * 2 * 577 * (32 + 4) + 2 * 64 * 4),  # 1 of 2 and 2 of 3 heads kept
    "head-drop-native": (267265, 295937),
    "think": (2 * (2 * 520 * (48 + 128) + 128 // 8), 304680),  # 48 of 128 and 24 of 64 channels
    "paper": (370944, 3 * (2 * 577 * (16 + 64) + 2 * 64 * 16 + 4 * 64)),  # 40 of 128 and 16 of 64 directions
    "spark-sign": (2 * (520 * (2 * 48 + 2 * 128 + 2 + 128 // 8 + 80 // 8) + 2 * 128), 331005),  # 48 of 128 and 24 of 64 channels
    "spark-mean": (384800, 3 * 577 * (2 * 24 + 2 * 64 + 2 + 64 // 8)),
    "svdq": (2 * (520 * (16 + 8 + 4 + 4 + 256) + 80 * (4 + 256) + 4 * 128), 265872),  # 80 and 40 directions at 2 bits a number
    "kq-svd": (369920, 3 * 2 * (577 * (16 + 64) + 64 * 16)),
    "leank": (2 * 520 * (32 + 128) + 8 * 128, 2 * 2 * 577 * (32 + 64) + 8 * 64),  # 1 of 2 and 2 of 3 heads have 32 channels
    "leank-learned": (2 * 520 * (32 + 128) + 8 * 128, 2 * 2 * 577 * (32 + 64) + 8 * 64),
    "native": (2 * 2 * 520 * 128 * 2, 443136),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", AFTER)
def test_bytes_by_hand(name, dtype):
    shapes = ((2, 520, 128, 48, 40, 1), (3, 577, 64, 24, 16, 2))
    for (heads, tokens, dim, channels, rank, kept), expected in zip(shapes, BYTES[name], strict=True):
        coder = coder_for(name, heads, dim, channels, rank, kept)
        segment = coder.code(0, *tensors(heads, tokens, dim, dtype=dtype))
        assert segment.bytes() == coder.bytes_of(tokens, 0) == expected
        stored = sum(part.untyped_storage().nbytes() for part in segment.parts.values())
        assert stored == sum(part.numel() * part.element_size() for part in segment.parts.values())
        if dtype == torch.bfloat16:
            assert stored == expected  # with 2-byte native numbers what counts is what lies in memory
        keys, values = segment.rebuild()
        assert keys.shape == values.shape == (heads, tokens, dim)
        assert keys.dtype == values.dtype == torch.float32


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("name", AFTER)
def test_bytes_are_predicted_for_short_segments(name, tokens):
    coder = coder_for(name, 2, 32, 8, 8, 1)
    segment = coder.code(0, *tensors(2, tokens, 32))
    assert segment.bytes() == coder.bytes_of(tokens, 0)
    assert all(x.shape == (2, tokens, 32) and x.isfinite().all() for x in segment.rebuild())


@pytest.mark.parametrize(("name", "bits", "group"), [("int8", 8, 64), ("int4", 4, 64), ("kivi4", 4, 32), ("kivi2", 2, 32)])
def test_errors_are_at_most_half_a_step(name, bits, group):
    keys, values, queries = tensors(2, 77, 64)
    segment = make_coder(name, geometry_of(2, 64)).code(0, keys, values, queries)
    rebuilt_keys, rebuilt_values = segment.rebuild()

    def steps(x, size):  # largest minus smallest of a group, over the levels: along the last axis
        groups = x.unflatten(-1, (-1, size))
        return ((groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / (2**bits - 1)).expand_as(groups).flatten(-2)

    slack = 1.01, 2e-3  # scales and zero points are fp16
    assert ((rebuilt_values - values).abs() <= steps(values, group) / 2 * slack[0] + slack[1]).all()
    if name.startswith("kivi"):
        assert torch.equal(rebuilt_keys[:, 64:], keys[:, 64:])  # the residual is native
        assert ((rebuilt_keys - keys).abs().mT[..., :64] <= steps(keys.mT[..., :64], 32) / 2 * slack[0] + slack[1]).all()
    else:
        assert ((rebuilt_keys - keys).abs() <= steps(keys, group) / 2 * slack[0] + slack[1]).all()
    assert (rebuilt_keys - keys).abs().amax() > 1e-3


def test_kivi_keys_are_coded_per_channel():
    """A channel of huge constant size costs its neighbours nothing, which it does with plain codes."""
    keys, values, queries = tensors(1, 64, 32)
    keys[..., 5] += 500.0
    error = {
        name: (make_coder(name, geometry_of(1, 32)).code(0, keys, values, queries).rebuild()[0] - keys)[..., :5].abs().amax()
        for name in ("int4", "kivi4", "hadamard4")
    }
    assert error["kivi4"] < 0.2 < 5 < error["int4"]


def test_hadamard_spreads_outliers():
    keys, values, queries = tensors(1, 64, 128)
    keys[:, ::3, 5] += 100.0
    error = {
        name: float((make_coder(name, geometry_of(1, 128)).code(0, keys, values, queries).rebuild()[0] - keys).pow(2).mean())
        for name in ("int4", "hadamard4")
    }
    assert error["hadamard4"] < error["int4"] / 3
    rotation = walsh_hadamard(128)
    assert torch.allclose(rotation @ rotation, torch.eye(128), atol=1e-6)
    assert (rotation.abs() - 128**-0.5).abs().max() < 1e-6


@pytest.mark.parametrize(("name", "bits", "group"), [("hadamard4", 4, 64), ("hadamard2", 2, 32)])
def test_hadamard_error_in_rotated_channels(name, bits, group):
    keys, values, queries = tensors(2, 33, 64)
    got = make_coder(name, geometry_of(2, 64)).code(0, keys, values, queries).rebuild()
    rotation = walsh_hadamard(64)
    for exact, rebuilt in zip((keys, values), got, strict=True):
        rotated, back = exact @ rotation, rebuilt @ rotation
        groups = rotated.unflatten(-1, (-1, group))
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / (2**bits - 1)
        assert ((back - rotated).abs().unflatten(-1, (-1, group)) <= step / 2 * 1.01 + 2e-3).all()


def test_fp8_is_e4m3_with_one_scale_per_head():
    keys, values, queries = tensors(2, 50, 32)
    keys[1] *= 1e-3
    values[0] = 0.0
    rebuilt_keys, rebuilt_values = make_coder("fp8", geometry_of(2, 32)).code(0, keys, values, queries).rebuild()
    for exact, rebuilt in ((keys, rebuilt_keys), (values, rebuilt_values)):
        scale = exact.abs().amax((1, 2), keepdim=True) / 448
        assert ((rebuilt - exact).abs() <= exact.abs() * 2.0**-4 + scale * 2.0**-10 * 1.01).all()
    assert torch.equal(rebuilt_values[0], values[0])
    assert torch.isclose(rebuilt_keys.abs().amax((1, 2)), keys.abs().amax((1, 2))).all()  # the largest is hit exactly


@pytest.mark.parametrize("name", ["int8", "int4", "kivi4", "kivi2", "fp8"])
def test_constant_rows_and_single_tokens_are_exact(name):
    coder = make_coder(name, geometry_of(2, 32))
    constant = torch.full((2, 40, 32), 1.75)
    for got in coder.code(0, constant, constant, constant[:, None]).rebuild():
        assert torch.equal(got, constant)
    if name.startswith("kivi"):
        keys, values, queries = tensors(2, 1, 32)
        assert torch.equal(coder.code(0, keys, values, queries).rebuild()[0], keys)


def test_head_drop_keeps_the_heads_of_largest_knockout():
    geometry = geometry_of(3, 32)
    state = {"knockout": {0: torch.tensor([0.1, 0.9, 0.0]), 1: torch.tensor([0.8, 0.05, 0.7])}}
    keys, values, queries = tensors(3, 40, 32)
    for name in ("head-drop", "head-drop-native"):
        coder = make_coder(name, geometry, keep_ratio=0.5, state=state)
        assert coder.kept == {0: (False, True, False), 1: (True, False, True)}
        assert coder.setting == "3 of 6 heads"
        for layer, kept in coder.kept.items():
            rebuilt_keys, rebuilt_values = coder.code(layer, keys, values, queries).rebuild()
            for exact, rebuilt in ((keys, rebuilt_keys), (values, rebuilt_values)):
                for head, keep in enumerate(kept):
                    error = (rebuilt[head] - exact[head]).abs()
                    if not keep:
                        assert torch.allclose(rebuilt[head], exact[head].mean(0).expand(40, 32), atol=1e-6)
                    elif name == "head-drop-native":
                        assert error.max() == 0
                    else:
                        spread = exact[head].amax(-1) - exact[head].amin(-1)
                        assert error.max() > 0 and (error <= spread[:, None] / 15 / 2 * 1.01 + 2e-3).all()


def test_head_drop_of_nothing_and_of_everything():
    keys, values, queries = tensors(2, 40, 32)
    state = {"knockout": {0: torch.ones(2), 1: torch.ones(2)}}
    everything = make_coder("head-drop-native", geometry_of(2, 32), keep_ratio=1.0, state=state)
    got = everything.code(1, keys, values, queries).rebuild()
    assert torch.equal(got[0], keys) and torch.equal(got[1], values)
    nothing = make_coder("head-drop", geometry_of(2, 32), kv_budget=0.02, state=state)
    assert nothing.setting == "0 of 4 heads"
    got = nothing.code(1, keys, values, queries).rebuild()
    assert torch.allclose(got[0], keys.mean(1, keepdim=True).expand_as(keys), atol=1e-6)


def test_think_keeps_the_channels_of_largest_score():
    heads, tokens, dim, group = 2, 40, 32, 2
    keys, values, _ = tensors(heads, tokens, dim)
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(heads, group, 50, dim, generator=generator)
    queries[:, :, :18] *= 1000  # older than the last 32: must not matter
    queries[:, 1] = -queries[:, 0]  # heads that disagree in sign: averaging them first would leave nothing
    coder = make_coder("think", geometry_of(heads, dim), keep_ratio=0.25)
    rebuilt, kept_values = coder.code(0, keys, values, queries).rebuild()
    assert torch.equal(kept_values, values)
    for head in range(heads):
        score = [sum(float(q[d]) ** 2 for q in queries[head, 0, 18:]) * float(keys[head, :, d].pow(2).sum()) for d in range(dim)]
        best = sorted(range(dim), key=lambda d: -score[d])[:8]
        expected = torch.zeros(tokens, dim)
        expected[:, best] = keys[head, :, best]
        assert torch.equal(rebuilt[head], expected)


def test_paper_is_the_projection_on_its_basis():
    keys, values, queries = tensors(2, 60, 32)
    coder = make_coder("paper", geometry_of(2, 32), keep_ratio=0.25)
    segment = coder.code(0, keys, values, queries)
    rebuilt, kept_values = segment.rebuild()
    basis, mean = segment.parts["basis"], keys.mean(1, keepdim=True)
    assert basis.shape == (2, 32, 8)
    assert torch.allclose(rebuilt, mean + (keys - mean) @ basis @ basis.mT, atol=1e-4)
    assert torch.equal(kept_values, values)
    whole = make_coder("paper", geometry_of(2, 32), keep_ratio=1.0).code(0, keys, values, queries)
    assert torch.allclose(whole.rebuild()[0], keys, atol=1e-4)


@pytest.mark.parametrize("name", AFTER)
def test_every_rival_is_finite_and_better_than_nothing(name):
    keys, values, queries = tensors(2, 65, 32, dtype=torch.bfloat16)
    coder = coder_for(name, 2, 32, 16, 16, 1)
    for exact, rebuilt in zip((keys, values), coder.code(0, keys, values, queries).rebuild(), strict=True):
        assert rebuilt.isfinite().all()
        assert math.sqrt(float((rebuilt - exact.float()).pow(2).mean())) < float(exact.float().pow(2).mean().sqrt())
