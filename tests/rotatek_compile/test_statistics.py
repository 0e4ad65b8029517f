"""Bootstrap intervals against what is known without sampling."""

import math

import numpy as np
import pytest

from rotatek_compile.statistics import Bootstrap


def test_mean_of_coin_flips_has_the_binomial_interval():
    n, share = 400, 0.3
    low, high = Bootstrap(n).interval([1.0] * int(n * share) + [0.0] * int(n * (1 - share)))
    half = 1.96 * math.sqrt(share * (1 - share) / n)
    assert low == pytest.approx(share - half, abs=0.006) and high == pytest.approx(share + half, abs=0.006)


def test_weighted_mean_has_the_interval_of_a_ratio_estimate():
    generator = np.random.default_rng(1)
    tokens = generator.integers(1, 9, 500)
    kl = tokens * 0.2 + generator.normal(0, 0.1, 500)
    residual = kl - kl.sum() / tokens.sum() * tokens
    half = 1.96 * residual.std() / (math.sqrt(500) * tokens.mean())  # the delta method
    low, high = Bootstrap(500).interval(kl, tokens)
    assert (low + high) / 2 == pytest.approx(kl.sum() / tokens.sum(), abs=0.1 * half)
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)


def test_constant_and_single_documents_have_no_width():
    assert Bootstrap(7).interval([0.5] * 7) == (0.5, 0.5)
    assert Bootstrap(1).interval([3.0], [4.0]) == (0.75, 0.75)


def test_pairing_removes_what_documents_share():
    generator = np.random.default_rng(2)
    common = generator.normal(0, 10, 200)
    draws = Bootstrap(200)
    assert draws.difference(common, common) == (0.0, 0.0)
    low, high = draws.difference(common + 1, common)
    assert low == pytest.approx(1) and high == pytest.approx(1)
    wide = draws.interval(common)
    noisy = draws.difference(common + generator.normal(1, 0.1, 200), common)
    assert 0.9 < noisy[0] < noisy[1] < 1.1 and wide[1] - wide[0] > 1


def test_ratio_of_methods():
    draws, values = Bootstrap(50), np.arange(1.0, 51.0)
    assert draws.ratio(2 * values, values) == (2.0, 2.0)
    assert draws.ratio(values, 0 * values) == (math.inf, math.inf)
    assert all(math.isnan(x) for x in draws.ratio(0 * values, 0 * values))
    rare = np.zeros(50)
    rare[0] = 1.0
    assert draws.ratio(rare, rare) == (1.0, 1.0)  # draws without the one document say nothing


def test_seeds():
    values = np.arange(20.0)
    assert Bootstrap(20).interval(values) == Bootstrap(20).interval(values) != Bootstrap(20, seed=1).interval(values)


def test_wrong_lengths():
    with pytest.raises(ValueError, match="at least one"):
        Bootstrap(0)
    with pytest.raises(ValueError, match="3 documents"):
        Bootstrap(3).interval([1.0, 2.0])
