"""The basis of the segment at hand: when it is corrected, what that captures, and what extreme segments do."""

import numpy as np
import pytest
import torch

from rotatek_compile.bases import calibrated_basis
from rotatek_compile.coding_error import ROUNDING, discarded
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan
from rotatek_compile.runtime.encode import as_published, choose, enough
from rotatek_compile.runtime.observed import Rules, observe
from rotatek_compile.runtime.online import corrected_directions, orthonormalise
from rotatek_compile.runtime.prepared import PreparedArtifact
from rotatek_compile.runtime.rounding_error import SLACK

DIM, HEADS, LAYERS = 32, 2, 3
RAW = Slabs(DIM)
EIGHT = (Slabs(8), Slabs(8))


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
    """The Keys' `SideBasis` of layer 0 for a plan, a given covariance and query moment."""

    def make(covariance, slabs=EIGHT, moment=None, basis="two-sided"):
        plan = {i: [HeadPlan(Slabs(*one), RAW) for one in slabs] for i in range(LAYERS)}
        artifact = make_artifact(plan=plan, basis=basis)
        made = calibrated_basis(basis, covariance, moment if moment is not None else decaying(9, 0.9))
        artifact.tensors["layers.0.visual.key_encode"] = made.encode.float()
        artifact.tensors["layers.0.visual.key_spectrum"] = made.spectrum.float()
        return PreparedArtifact(artifact).layer(0, torch.device("cpu"), torch.float32).kinds["visual"].key

    return make


def native(*ranks):
    return tuple(Slabs(rank) for rank in ranks)


def look(keys, basis, prior_tokens=256, factor=0.0, **rules):
    """What `choose` decides for one side alone."""
    return choose(observe([(keys, basis)], Rules(prior_tokens, factor, **rules)))[0]


def codes_of(keys, where, h):
    """Directions that a head keeps, exact: fp32 [S, R]."""
    return ((keys[h] - where.centre[h]) @ where.encode[h])[:, : where.slabs[h].rank]


def decode_of(where, basis, h):
    return where.own[h] if h in where.own else basis.decode[h, :, : where.slabs[h].rank]


def lost(keys, where, basis, h, moment):
    """Mean squared logit error of the coded Keys for queries of this second moment."""
    error = ((keys[h] - where.centre[h]) - codes_of(keys, where, h) @ decode_of(where, basis, h).T).double()
    return float((error @ moment[h] * error).sum(-1).mean())


def test_the_calibrated_segment_keeps_the_shared_basis(prepared):
    covariance = decaying(1)
    basis = prepared(covariance, native(8, 16))
    where = look(gaussian(covariance, 2000), basis)
    assert torch.allclose(where.centre, torch.full((HEADS, DIM), 3.0), atol=5e-3)  # the own mean is fp16
    assert torch.equal(where.centre, basis.mean + where.own_mean.float())
    assert (where.slabs, where.own, where.fallback) == (native(8, 16), {}, (False, False))
    assert torch.equal(where.encode, basis.encode)


@pytest.mark.parametrize(("share", "close"), [(0.3, 0.97), (1.0, 0.95)])
@pytest.mark.parametrize("name", ["two-sided", "pca"])
def test_another_segment_gets_its_own_basis(prepared, name, share, close):
    """Two warm-started iterations come close to the eigensolver even for a segment that has nothing in common with calibration."""
    basis = prepared(decaying(1), native(8, 8), basis=name)
    keys = gaussian(decaying(1) * (1 - share) + decaying(2) * share, 2000)
    where = look(keys, basis)
    assert where.slabs == native(8, 8)
    assert set(where.own) == {0, 1}
    whiten = basis.encode.double() / basis.balance.double().unsqueeze(1)
    z = (keys - where.centre.unsqueeze(1)).double() @ whiten
    observed = z.mT @ z / keys.shape[1]
    shrunk = (2000 * observed + 256 * torch.diag_embed(basis.spectrum)) / 2256
    top = torch.linalg.eigh(shrunk).eigenvectors.flip(-1)[..., :8]
    exact = ((observed @ top) * top).sum((1, 2))
    calibrated = observed.diagonal(dim1=1, dim2=2)[:, :8].sum(1)
    for h in range(HEADS):
        encode, decode = where.encode[h, :, :8].double(), where.own[h].double()
        assert torch.allclose(encode.T @ decode, torch.eye(8, dtype=torch.float64), atol=1e-4)  # the two sides undo each other
        # energy captured = total - lost, in the coordinates where queries are white
        left = z[h] - codes_of(keys, where, h).double() @ decode.T @ whiten[h]
        gone = float(left.pow(2).sum(-1).mean())
        captured = float(observed[h].trace()) - gone
        assert captured >= close * exact[h]
        assert captured > (1 + 0.05 * share) * calibrated[h]
        assert where.error[h] == pytest.approx(gone, rel=1e-3)  # and that is what it reports
        assert where.kept[h] == pytest.approx(float(calibrated[h] / observed[h].trace()), rel=1e-4)


def test_own_bases_lose_less_for_real_queries(prepared):
    moment = decaying(9, 0.9)
    basis = prepared(decaying(1), native(8, 8), moment)
    keys = gaussian(decaying(2), 2000)
    own, stay = look(keys, basis), look(keys, basis, 10**9)
    assert stay.own == {}
    for h in range(HEADS):
        assert lost(keys, own, basis, h, moment) < 0.7 * lost(keys, stay, basis, h, moment)


def test_a_full_head_does_not_stop_the_others_from_being_corrected(prepared):
    keys = gaussian(decaying(2), 2000)
    where = look(keys, basis := prepared(decaying(1), (RAW, Slabs(8))))
    assert set(where.own) == {1}
    alone = look(keys, prepared(decaying(1), native(8, 8)))
    assert torch.allclose(where.encode[1], alone.encode[1], atol=1e-5)
    # all directions at 8 bits: coded, but a rotation of all of them gains nothing
    assert set(look(keys, prepared(decaying(1), (Slabs(0, DIM), Slabs(8)))).own) == {1}
    assert look(keys, basis, 0).own == {}  # the prior of no tokens means never


def test_short_segments_do_not_pay_for_a_basis(prepared):
    """An own basis of D·R numbers must beat D·R / S more shared directions."""
    basis = prepared(decaying(1), native(8, 8))
    long, short = gaussian(decaying(2), 2000), gaussian(decaying(2), 40)
    assert set(look(long, basis, 1).own) == {0, 1}
    # 40 tokens: 32 * 8 / 40 = 7 more directions are as dear, and these 15 capture more than 8 of the segment's own
    assert look(short, basis).own == {}
    # at 8 tokens every direction is affordable: never worth it
    assert look(long[:, :8], prepared(decaying(1), native(8, 24)), 1).own == {}


def test_within_the_same_bytes_an_own_basis_has_fewer_directions(prepared):
    """`same_bytes`: a budget was promised, so the basis is paid for with directions, or not taken."""
    basis = prepared(decaying(1), (Slabs(8, 8), Slabs(0, 8, 16)))
    for tokens, other in ((2000, 2), (600, 2), (40, 2), (2000, 1)):
        where = look(gaussian(decaying(other), tokens), basis, same_bytes=True)
        free = look(gaussian(decaying(other), tokens), basis)
        for h, plan in enumerate(basis.slabs):
            taken = where.slabs[h].bytes_per_token() * tokens + (2 * DIM * where.slabs[h].rank if h in where.own else 0)
            assert taken <= plan.bytes_per_token() * tokens
            assert (where.slabs[h] == plan) == (h not in where.own)
            assert free.slabs[h] == plan
        assert bool(where.own) == (other == 2 and tokens > 40)


def test_no_own_parts_means_the_calibrated_ones(prepared):
    basis = prepared(decaying(1), (Slabs(8, 8), Slabs(0, 8, 16)))
    where = look(gaussian(decaying(2), 2000), basis, own_parts=False)
    assert (where.own, where.own_mean, where.calibrated_scales) == ({}, None, True)
    assert torch.equal(where.centre, basis.mean)
    deviation = basis.spectrum.sqrt() * basis.balance.double()
    assert torch.allclose(where.scales[0, 8:16].double(), 6 / 127 * deviation[0, 8:16], rtol=1e-2)
    assert torch.allclose(where.scales[1, :8].double(), 6 / 127 * deviation[1, :8], rtol=1e-2)
    assert torch.allclose(where.scales[1, 8:24].double(), 0.36 * deviation[1, 8:24], rtol=1e-2)


def test_fallback_keeps_enough(prepared):
    keys = gaussian(decaying(2, 0.97, scale=5.0), 2000)
    plans = (native(8, 0), native(16, 24), (RAW, Slabs(8)), (Slabs(8, 8), Slabs(0, 0, 16)))
    for slabs in plans:
        basis = prepared(decaying(1, 0.5), slabs)
        z = (keys - keys.mean(1, keepdim=True)) @ basis.encode / basis.balance.unsqueeze(1)
        energy = z.pow(2).mean(1).tolist()
        for factor in (0.5, 8.0, 200.0):
            where = look(keys, basis, 0, factor)
            for h, (kept, plan) in enumerate(zip(where.slabs, slabs, strict=True)):
                most = factor * basis.expected[h] + SLACK * float(basis.spectrum[h].sum())
                assert where.fallback[h] == (kept != plan)
                assert where.error[h] <= most * 1.001  # whatever happened, the bound holds
                if where.fallback[h]:
                    assert kept == RAW or kept == Slabs(0, kept.byte)
                    assert kept.bytes_per_token() > plan.bytes_per_token()
                    assert discarded(energy[h], kept) <= most * 1.001
                    if kept.byte > 8 and Slabs(0, kept.byte - 8).bytes_per_token() > plan.bytes_per_token() and kept.byte - 8 > plan.rank:
                        assert discarded(energy[h], Slabs(0, kept.byte - 8)) > most * 0.999
    assert look(keys, prepared(decaying(1, 0.5), native(8, 0)), 256, 0.5).fallback == (True, True)
    assert not any(look(keys, prepared(decaying(1, 0.5), native(8, 0)), 256, 0.0).fallback)
    same = gaussian(decaying(1, 0.5), 2000)
    assert not any(look(same, prepared(decaying(1, 0.5), native(8, 0)), 256, 8.0).fallback)


def test_enough():
    """The fewest 8-bit directions above the plan whose discarded energy is within the bound."""
    energy = [2.0**-n for n in range(DIM)]
    whole = sum(energy)

    def needed(rank):
        return sum(energy[rank:]) + ROUNDING[8] * sum(energy[:rank])

    assert enough(energy, Slabs(8), needed(24) * 1.0001, DIM) == Slabs(0, 24)
    assert enough(energy, Slabs(8), needed(24) * 0.9999, DIM) == Slabs(0, 32)
    assert enough(energy, Slabs(8), whole, DIM) == Slabs(0, 16)  # more directions, though no more bytes
    assert enough(energy, Slabs(0, 0, 16), whole, DIM) == Slabs(0, 24)
    assert enough(energy, Slabs(), whole, DIM) == Slabs(0, 8)
    assert enough(energy, Slabs(8), needed(32) * 0.99, DIM) == RAW  # even all of them at 8 bits do not do
    assert enough(energy, Slabs(24), whole, DIM) == Slabs(0, 32)
    assert enough([0.0] * DIM, Slabs(0, 32), 0.0, DIM) == RAW


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


def test_paper_is_an_independent_straightforward_implementation(prepared):
    generator = torch.Generator().manual_seed(4)
    keys = torch.randn(HEADS, 50, DIM, generator=generator) @ decaying(5, 0.8).float() + 2
    queries = torch.randn(HEADS, 3, 70, DIM, generator=generator) * torch.linspace(0.1, 3, DIM)
    where = as_published(keys, queries, prepared(decaying(1), native(8, 24), basis="paper"))
    assert (where.slabs, where.fallback) == (native(8, 24), (False, False))
    for h, slabs in enumerate(where.slabs):
        k, q = keys[h].double().numpy(), queries[h].double().numpy()
        n = np.sqrt((q[:, -32:].mean(0) ** 2).sum(0))
        n = np.maximum(n, 1e-3 * np.sort(n)[(DIM - 1) // 2])
        assert np.allclose(where.centre[h].numpy(), k.mean(0), atol=2e-3)  # kept in fp16, so the mean of the rest is not quite zero
        centred = k - where.centre[h].double().numpy()
        weighted = np.diag(n) @ (centred.T @ centred / len(k)) @ np.diag(n)
        weighted += 1e-4 * np.trace(weighted) / DIM * np.eye(DIM)
        vectors = np.linalg.eigh(weighted)[1][:, ::-1][:, : slabs.rank]
        assert torch.equal(where.encode[h, :, : slabs.rank], where.own[h])
        same = np.abs((vectors * where.own[h].double().numpy()).sum(0))
        assert np.allclose(same, 1, atol=1e-4)


@pytest.mark.parametrize("fallback", [0.0, 8.0])
@pytest.mark.parametrize("case", ["one token", "constant", "few", "huge", "tiny", "half"])
def test_extreme_segments(prepared, case, fallback):
    keys = gaussian(decaying(2), 200)
    keys = {
        "one token": keys[:, :1],
        "constant": keys[:, :1].expand(HEADS, 70, DIM),
        "few": keys[:, :9],
        "huge": keys * 1e6,
        "tiny": keys * 1e-12,
        "half": keys.half().float(),
    }[case]
    for slabs in (native(8, 24), native(0, DIM), (Slabs(8, 8, 16), Slabs(0, 0, 32))):
        basis = prepared(decaying(1), slabs)
        where = look(keys, basis, 256, fallback)
        assert torch.isfinite(where.centre).all()
        assert torch.isfinite(where.encode).all()
        for h, (kept, plan) in enumerate(zip(where.slabs, slabs, strict=True)):
            assert kept in (plan, RAW) or kept.rank > plan.rank
            if h in where.own:
                assert torch.isfinite(where.own[h]).all()
                gone = keys[h] - where.centre[h] - codes_of(keys, where, h) @ where.own[h].T
                left = float((gone @ basis.encode[h] / basis.balance[h]).square().sum(-1).mean())
                stay = look(keys, basis, 0).error[h]
                assert left <= 1.02 * where.error[h]
                assert where.error[h] < stay  # so the two sides undo each other, and it was worth it
            if case in ("one token", "constant"):  # the mean is all there is
                assert torch.allclose(codes_of(keys, where, h), torch.zeros(()), atol=0.02)  # but for its fp16 rounding
                assert h not in where.own
                assert not where.fallback[h]
