"""The basis of the segment at hand: when it is corrected, what that captures, and what extreme segments do."""

import numpy as np
import pytest
import torch

from rotatek_compile.bases import calibrated_basis
from rotatek_compile.runtime.online import code_segment, code_segment_as_published, corrected_directions, orthonormalise
from rotatek_compile.runtime.prepared import PreparedArtifact

DIM, HEADS = 32, 2


def gaussian(covariance, tokens, seed=0):
    """Tokens whose empirical mean is 3 and whose empirical covariance is exactly the one given, fp32 [H, S, D]."""
    z = torch.randn(covariance.shape[0], tokens, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = z - z.mean(1, keepdim=True)
    chol = torch.linalg.cholesky(z.mT @ z / tokens)
    white = torch.linalg.solve_triangular(chol, z.mT, upper=False).mT
    return (white @ torch.linalg.cholesky(covariance).mT + 3).float()


def decaying(seed, factor=0.7, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=generator, dtype=torch.float64)).Q
    return scale * (q * factor ** torch.arange(DIM)) @ q.mT


@pytest.fixture
def prepared(make_artifact):
    """`KindBasis` of layer 0 for a given covariance and query moment."""

    def make(covariance, moment=None, ranks=DIM, basis="two-sided"):
        artifact = make_artifact(ranks, basis=basis)
        made = calibrated_basis(basis, covariance, moment if moment is not None else decaying(9, 0.9))
        artifact.tensors["layers.0.visual.key_encode"] = made.encode.float()
        artifact.tensors["layers.0.visual.key_spectrum"] = made.spectrum.float()
        return PreparedArtifact(artifact).layer(0, torch.device("cpu"), torch.float32).kinds["visual"]

    return make


def lost(keys, mean, code, h, moment):
    """Mean squared logit error of the coded Keys for queries of this second moment."""
    decode = code.own if code.own is not None else None
    centred = (keys[h] - mean[h]).double()
    error = centred - centred @ code.encode.double() @ decode.double().T
    return float((error @ moment[h] * error).sum(-1).mean())


def test_the_calibrated_segment_keeps_the_shared_basis(prepared):
    covariance = decaying(1)
    basis = prepared(covariance)
    keys = gaussian(covariance, 2000)
    mean, codes = code_segment(keys, basis, (8, 16), 256, 0.0)
    assert torch.allclose(mean, torch.full((HEADS, DIM), 3.0), atol=1e-4)
    assert [(c.rank, c.own, c.fallback) for c in codes] == [(8, None, False), (16, None, False)]
    for h, code in enumerate(codes):
        assert torch.equal(code.encode, basis.encode[h, :, : code.rank] * basis.scale[h, : code.rank])


@pytest.mark.parametrize(("share", "close"), [(0.3, 0.97), (1.0, 0.95)])
@pytest.mark.parametrize("name", ["two-sided", "pca"])
def test_another_segment_gets_its_own_basis(prepared, name, share, close):
    """Two warm-started iterations come close to the eigensolver even for a segment that has nothing in common with calibration."""
    moment = decaying(9, 0.9)
    basis = prepared(decaying(1), moment, basis=name)
    keys = gaussian(decaying(1) * (1 - share) + decaying(2) * share, 2000)
    mean, codes = code_segment(keys, basis, (8, 8), 256, 0.0)
    z = (keys - mean.unsqueeze(1)) @ basis.encode
    observed = (z.mT @ z / keys.shape[1]).double()
    shrunk = (2000 * observed + 256 * torch.diag_embed(basis.spectrum.double())) / 2256
    top = torch.linalg.eigh(shrunk).eigenvectors.flip(-1)[..., :8]
    exact = ((observed @ top) * top).sum((1, 2))
    calibrated = observed.diagonal(dim1=1, dim2=2)[:, :8].sum(1)
    for h, code in enumerate(codes):
        assert code.rank == 8
        assert code.own is not None
        assert torch.allclose(code.encode.T @ code.own, torch.eye(8), atol=1e-4)  # the two sides undo each other
        rebuilt = z[h].double() @ torch.linalg.inv(basis.encode[h].double()) @ code.encode.double()  # codes of centred Keys
        again = (keys[h] - mean[h]) @ code.encode
        assert torch.allclose(rebuilt.float(), again, atol=1e-3)
        # energy captured = total - lost, in the coordinates where queries are white
        left = z[h].double() - (again.double() @ code.own.double().T) @ basis.encode[h].double()
        captured = float(observed[h].trace() - left.pow(2).sum(-1).mean())
        assert captured >= close * exact[h]
        assert captured > (1 + 0.05 * share) * calibrated[h]


def test_own_bases_lose_less_for_real_queries(prepared):
    moment = decaying(9, 0.9)
    basis = prepared(decaying(1), moment)
    keys = gaussian(decaying(2), 2000)
    mean, own = code_segment(keys, basis, (8, 8), 256, 0.0)
    _, stay = code_segment(keys, basis, (8, 8), 10**9, 0.0)
    for h in range(HEADS):
        assert stay[h].own is None
        shared = type(stay[h])(8, stay[h].encode, basis.decode[h, :, :8] / basis.scale[h, :8], False)
        assert lost(keys, mean, own[h], h, moment) < 0.7 * lost(keys, mean, shared, h, moment)


def test_a_full_head_does_not_stop_the_others_from_being_corrected(prepared):
    basis = prepared(decaying(1))
    _, codes = code_segment(gaussian(decaying(2), 2000), basis, (DIM, 8), 256, 0.0)
    assert codes[0].own is None
    assert codes[1].own is not None
    _, alone = code_segment(gaussian(decaying(2), 2000), basis, (8, 8), 256, 0.0)
    assert torch.allclose(codes[1].encode, alone[1].encode, atol=1e-5)


def test_short_segments_do_not_pay_for_a_basis(prepared):
    """An own basis of D·R numbers must beat D·R / S more shared directions."""
    basis = prepared(decaying(1))
    long, short = gaussian(decaying(2), 2000), gaussian(decaying(2), 40)
    assert all(code.own is not None for code in code_segment(long, basis, (8, 8), 0, 0.0)[1])
    # 40 tokens: 32 * 8 / 40 = 7 more directions are as dear, and these 15 capture more than 8 of the segment's own
    codes = code_segment(short, basis, (8, 8), 256, 0.0)[1]
    assert all(code.own is None for code in codes)
    # at 8 tokens every direction is affordable: never worth it
    assert all(code.own is None for code in code_segment(long[:, :8], basis, (8, 24), 0, 0.0)[1])


def test_fallback_keeps_enough(prepared):
    calibrated = decaying(1, 0.5)
    basis = prepared(calibrated)
    keys = gaussian(decaying(2, 0.97, scale=5.0), 2000)
    z = (keys - keys.mean(1, keepdim=True)) @ basis.encode
    energy = z.pow(2).mean(1)
    for factor in (0.5, 8.0, 200.0):
        for plan in ((8, 0), (16, 24), (DIM, 8)):
            _, codes = code_segment(keys, basis, plan, 256, factor)
            for h, (code, planned) in enumerate(zip(codes, plan, strict=True)):
                bound = factor * float(basis.spectrum[h, planned:].sum()) + 1e-2
                assert planned <= code.rank <= DIM
                assert code.rank % 8 == 0
                assert code.fallback == (code.rank > planned)
                if code.fallback:
                    assert float(energy[h, code.rank :].sum()) <= bound * 1.0001
                    assert float(energy[h, code.rank - 8 :].sum()) > bound * 0.9999 or code.rank - 8 == planned
                    assert torch.allclose(code.encode.T @ code.own, torch.eye(code.rank), atol=1e-4)
    assert code_segment(keys, basis, (8, 0), 256, 0.5)[1][0].rank > 8
    assert not any(code.fallback for code in code_segment(keys, basis, (8, 0), 256, 0.0)[1])
    same = gaussian(calibrated, 2000)
    assert not any(code.fallback for code in code_segment(same, basis, (8, 0), 256, 8.0)[1])


def test_directions_nest_and_are_orthonormal():
    """Also for energies over eight decades, which a plain Cholesky pass cannot take."""
    for factor in (0.9, 0.55):
        observed = decaying(3, factor).float()
        spectrum = decaying(4, factor).diagonal(dim1=1, dim2=2).float().sort(descending=True).values
        wide = corrected_directions(observed, spectrum, 1000, 256, 24)
        for rank in (8, 16):
            assert torch.allclose(corrected_directions(observed, spectrum, 1000, 256, rank), wide[..., :rank], atol=2e-3)
        assert torch.allclose(wide.mT @ wide, torch.eye(24).expand(HEADS, 24, 24), atol=1e-3)


def test_orthonormalise_is_gram_schmidt():
    columns = torch.randn(HEADS, DIM, 12, generator=torch.Generator().manual_seed(0))
    got = orthonormalise(orthonormalise(columns))
    for h in range(HEADS):
        q, r = np.linalg.qr(columns[h].numpy())
        assert np.allclose(got[h].numpy(), q * np.sign(np.diag(r)), atol=1e-4)


def test_paper_is_an_independent_straightforward_implementation():
    generator = torch.Generator().manual_seed(4)
    keys = torch.randn(HEADS, 50, DIM, generator=generator) @ decaying(5, 0.8).float() + 2
    queries = torch.randn(HEADS, 3, 70, DIM, generator=generator) * torch.linspace(0.1, 3, DIM)
    mean, codes = code_segment_as_published(keys, queries, (8, 32))
    for h, code in enumerate(codes):
        k, q = keys[h].double().numpy(), queries[h].double().numpy()
        n = np.sqrt((q[:, -32:].mean(0) ** 2).sum(0))
        n = np.maximum(n, 1e-3 * np.sort(n)[(DIM - 1) // 2])
        weighted = np.diag(n) @ np.cov(k.T, bias=True) @ np.diag(n)
        weighted += 1e-4 * np.trace(weighted) / DIM * np.eye(DIM)
        vectors = np.linalg.eigh(weighted)[1][:, ::-1][:, : code.rank]
        assert np.allclose(mean[h].numpy(), k.mean(0), atol=1e-5)
        assert torch.equal(code.encode, code.own)
        same = np.abs((vectors * code.encode.double().numpy()).sum(0))
        assert np.allclose(same, 1, atol=1e-4)
        assert (code.rank, code.fallback) == ((8, 32)[h], False)


@pytest.mark.parametrize("fallback", [0.0, 8.0])
@pytest.mark.parametrize("case", ["one token", "constant", "few", "huge", "tiny", "half"])
def test_extreme_segments(prepared, case, fallback):
    basis = prepared(decaying(1))
    keys = gaussian(decaying(2), 200)
    keys = {
        "one token": keys[:, :1],
        "constant": keys[:, :1].expand(HEADS, 70, DIM),
        "few": keys[:, :9],
        "huge": keys * 1e6,
        "tiny": keys * 1e-12,
        "half": keys.half().float(),
    }[case]
    for ranks in ((8, 24), (0, DIM)):
        mean, codes = code_segment(keys, basis, ranks, 256, fallback)
        for h, (code, planned) in enumerate(zip(codes, ranks, strict=True)):
            assert torch.isfinite(mean).all()
            assert torch.isfinite(code.encode).all()
            assert code.own is None or torch.isfinite(code.own).all()
            assert planned <= code.rank <= DIM
            assert code.own is None or torch.allclose(code.encode.T @ code.own, torch.eye(code.rank), atol=2e-3)
            if case in ("one token", "constant"):  # the mean is all there is
                assert ((keys[h] - mean[h]) @ code.encode).norm() < 1e-3
                assert code.own is None
                assert not code.fallback
