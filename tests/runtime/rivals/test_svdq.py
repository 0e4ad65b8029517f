"""SVDq against a singular value decomposition and a loop over directions; its schedules; the choice of a step."""

import pytest
import torch

from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.runtime.rivals.registry import make_coder, worst_share
from rotatek_compile.runtime.rivals.rounding import dequantise, quantise
from rotatek_compile.runtime.rivals.svdq import GAUSSIAN_STEP, GROUPS, SCHEDULES, SHARES, _least_error, schedule

HEADS, DIM = 2, 64


def geometry():
    layer = LayerGeometry(layer_type="full_attention", query_heads=HEADS, kv_heads=HEADS, head_dim=DIM)
    return Geometry(model_type="made", layers=(layer,), visual_token_ids=(5,))


def tensors(tokens=300):
    """Keys with a mean and a decaying spectrum in directions of their own."""
    generator = torch.Generator().manual_seed(0)
    turns = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=generator)).Q
    latent = torch.randn(HEADS, tokens, DIM, generator=generator) * torch.logspace(1, -2, DIM)
    keys = latent @ turns.mT + 5 * torch.randn(HEADS, 1, DIM, generator=generator)
    return keys, torch.randn(HEADS, tokens, DIM, generator=generator), torch.randn(HEADS, 1, 4, DIM, generator=generator)


@pytest.mark.parametrize("share", [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2])
def test_directions_are_singular_vectors_with_bits_by_their_rank(share):
    keys, values, queries = tensors()
    coder = make_coder("svdq", geometry(), keep_ratio=share)
    rebuilt, kept_values = coder.code(0, keys, values, queries).rebuild()
    assert torch.equal(kept_values, values)
    for head in range(HEADS):
        mean = keys[head].mean(0)
        vectors = torch.linalg.svd(keys[head] - mean).Vh
        exact, got = (keys[head] - mean) @ vectors.T, (rebuilt[head] - mean) @ vectors.T
        for direction in range(DIM):
            bits = coder.bits[direction // (DIM // GROUPS)]
            error, energy = (got[:, direction] - exact[:, direction]).pow(2).mean(), exact[:, direction].pow(2).mean()
            if not bits:
                assert error == pytest.approx(float(energy), rel=1e-2, abs=1e-4)  # dropped
                continue
            step = (exact[:, direction].max() - exact[:, direction].min()) / (2**bits - 1)
            gaussian = {1: 0.45, 2: 0.15, 4: 0.02}.get(bits, 1.0)  # shares of the energy, with 300 samples' slack
            assert error <= min(float(energy) * gaussian, float(step) ** 2) + 1e-4
            assert error > 0


def test_published_schedule_and_the_others():
    assert (8, 4, 2, 1, 1, 0, 0, 0) in SCHEDULES and schedule(2 / 16) == (8, 4, 2, 1, 1, 0, 0, 0)
    for bits, share in zip(SCHEDULES, SHARES, strict=True):
        assert len(bits) == GROUPS and list(bits) == sorted(bits, reverse=True)
        assert share == pytest.approx(sum(bits) / 8 / 16)
        assert schedule(share) == bits
    for small, large in zip(SCHEDULES, SCHEDULES[1:], strict=False):
        assert all(a <= b for a, b in zip(small, large, strict=True)) and small != large
    shares = [worst_share(make_coder("svdq", geometry(), keep_ratio=share), geometry()) for share in SHARES]
    assert shares == sorted(shares)  # what the search for a budget relies on


def test_more_bits_lose_less():
    keys, values, queries = tensors()
    errors = []
    for share in SHARES:
        rebuilt, _ = make_coder("svdq", geometry(), keep_ratio=share).code(0, keys, values, queries).rebuild()
        errors.append(float((rebuilt - keys).pow(2).mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 1e3


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gaussian_steps_are_the_best(bits):
    x = torch.erfinv(2 * (torch.arange(20000) + 0.5) / 20000 - 1) * 2**0.5  # quantiles of a normal
    levels = 2**bits - 1

    def error(step):
        codes = ((x + step * levels / 2) / step).round().clamp(0, levels)
        return float((codes * step - step * levels / 2 - x).pow(2).mean())

    best = GAUSSIAN_STEP[bits]
    assert error(best) < min(error(best * 0.97), error(best * 1.03))
    assert error(best) == pytest.approx({1: 0.3634, 2: 0.1188, 4: 0.01154}[bits], rel=1e-2)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_step_that_errs_less(bits):
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(1, 3, 500, generator=generator)
    normal[0, 2] = torch.randint(0, 2**bits, (500,), generator=generator)  # even levels: its range is exact
    normal[0, 2, 0], normal[0, 2, 1] = 0, 2**bits - 1
    covering, chosen = (dequantise(*f(normal, bits)) for f in (quantise, _least_error))
    errors = [(x - normal).pow(2).mean(-1)[0] for x in (covering, chosen)]
    assert errors[1][2] == errors[0][2] == 0
    assert (errors[1] <= errors[0]).all()
    if bits < 4:
        assert (errors[1][:2] < 0.7 * errors[0][:2]).all()


def test_a_constant_image_and_a_single_token_are_their_mean():
    coder = make_coder("svdq", geometry(), keep_ratio=0.125)
    for tokens in (1, 9):
        keys = torch.linspace(-3, 3, DIM).expand(HEADS, tokens, DIM).contiguous()
        segment = coder.code(0, keys, keys, keys[:, None])
        assert torch.allclose(segment.rebuild()[0], keys, atol=1e-5)
        assert segment.bytes() == coder.bytes_of(tokens, 0)
