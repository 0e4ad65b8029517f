"""Bases: two sides that undo each other, two-sided as the least logit error, conditions that stay bounded."""

import pytest
import torch

from rotatek_compile.bases import calibrated_basis, paper, pca, shrink_to_condition, two_sided
from rotatek_compile.names import BASES

H, D = 2, 32


def spd(seed, decades=3.0):
    """Random covariances [H, D, D] whose eigenvalues span this many decades."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(H, D, D, generator=generator, dtype=torch.float64)).Q
    return (q * 10 ** torch.linspace(0, -decades, D, dtype=torch.float64)) @ q.mT


def logit_error(covariance, moment, encode, decode, rank):
    """Expected squared logit error tr(M P C Pᵀ) with P the dropped part of k, per head."""
    dropped = torch.eye(D, dtype=torch.float64) - decode[..., :rank] @ encode[..., :rank].mT
    return (moment @ dropped @ covariance @ dropped.mT).diagonal(dim1=1, dim2=2).sum(-1)


@pytest.mark.parametrize("name", BASES)
def test_the_two_sides_undo_each_other(name):
    basis = calibrated_basis(name, spd(1), spd(2))
    assert torch.allclose(basis.encode.mT @ basis.decode, torch.eye(D, dtype=torch.float64).expand(H, D, D), atol=1e-9)
    assert (basis.spectrum[:, :-1] >= basis.spectrum[:, 1:]).all()
    assert (basis.spectrum >= 0).all()


@pytest.mark.parametrize("name", ["two-sided", "pca"])
def test_covariance_follows_from_the_basis(name):
    covariance, moment = spd(1), spd(2)
    basis = calibrated_basis(name, covariance, moment)
    assert torch.allclose((basis.decode * basis.spectrum.unsqueeze(1)) @ basis.decode.mT, covariance, atol=1e-10)
    expected = shrink_to_condition(moment) if name == "two-sided" else torch.eye(D, dtype=torch.float64).expand(H, D, D)
    assert torch.allclose(basis.encode @ basis.encode.mT, expected, atol=1e-10)


@pytest.mark.parametrize("rank", [0, 8, 16, 24, 32])
def test_two_sided_loses_least(rank):
    covariance = spd(1)
    moment = shrink_to_condition(spd(2))  # the moment it really optimises for
    basis = two_sided(covariance, spd(2))
    least = logit_error(covariance, moment, basis.encode, basis.decode, rank)
    assert torch.allclose(least, basis.spectrum[:, rank:].sum(-1), atol=1e-12, rtol=1e-8)
    rivals = [pca(covariance), paper(covariance, moment.diagonal(dim1=1, dim2=2).sqrt())]
    for rival in rivals:
        assert (least <= logit_error(covariance, moment, rival.encode, rival.decode, rank) + 1e-12).all()
    for seed in range(20):
        encode = torch.randn(H, D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert (least <= logit_error(covariance, moment, encode, torch.linalg.inv(encode).mT, rank) + 1e-12).all()
        near = basis.encode @ torch.matrix_exp(0.01 * (encode - encode.mT))
        assert (least <= logit_error(covariance, moment, near, torch.linalg.inv(near).mT, rank) + 1e-12).all()
    if rank == 8:
        assert (least < 0.9 * logit_error(covariance, moment, rivals[0].encode, rivals[0].decode, rank)).all()


def test_two_sided_is_pca_when_queries_are_white():
    covariance = spd(1)
    white, plain = two_sided(covariance, torch.eye(D).expand(H, D, D)), pca(covariance)
    ratio = white.spectrum / plain.spectrum
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-6)  # the ridge only scales
    assert torch.allclose((white.decode.mT @ plain.decode).abs(), torch.eye(D).double() / ratio.sqrt().unsqueeze(-1), atol=1e-5)


@pytest.mark.parametrize("decades", [0.0, 8.0, 16.0])
def test_condition_is_bounded(decades):
    moment = spd(3, decades)
    basis = two_sided(spd(1), moment)
    assert (torch.linalg.cond(basis.encode) <= 1e4 * (1 + 1e-6)).all()
    one = torch.zeros(H, D, D, dtype=torch.float64)
    one[:, 3, 3] = 1.0
    assert (torch.linalg.cond(two_sided(spd(1), one).encode) <= 1e4 * (1 + 1e-6)).all()
    assert torch.isfinite(basis.decode).all()


def test_shrinking_follows_its_formula():
    moment = spd(3)
    level = moment.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    expected = 0.9 * moment + 0.1 * torch.diag_embed(moment.diagonal(dim1=1, dim2=2)) + 1e-3 * level * torch.eye(D)
    assert torch.allclose(shrink_to_condition(moment), expected, atol=1e-12)
    tight = shrink_to_condition(moment, max_condition=4.0)
    assert not torch.allclose(tight, expected)
    assert (torch.linalg.cond(tight).sqrt() <= 4.0).all()


def test_a_head_that_nobody_asks():
    moment = spd(2)
    moment[1] = 0
    basis, plain = two_sided(spd(1), moment), pca(spd(1))
    assert torch.allclose(basis.spectrum[1], plain.spectrum[1], atol=1e-12)
    assert torch.allclose(basis.encode[1].mT @ basis.encode[1], torch.eye(D, dtype=torch.float64), atol=1e-10)
    assert not torch.allclose(basis.spectrum[0], plain.spectrum[0])


def test_keys_that_never_vary():
    for name in BASES:
        basis = calibrated_basis(name, torch.zeros(H, D, D), spd(2))
        assert torch.isfinite(basis.encode).all()
        assert torch.allclose(basis.encode.mT @ basis.decode, torch.eye(D, dtype=torch.float64).expand(H, D, D), atol=1e-9)
        assert (basis.spectrum <= 1e-9).all()


def test_unknown_name():
    with pytest.raises(ValueError, match="two-sided, pca, paper"):
        calibrated_basis("svd", spd(1), spd(2))
