"""Coding one segment: codes stand for what was coded, and errors are those of a straightforward computation in fp64."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from rotatek_compile.kernels.codes import unpack
from rotatek_compile.kernels.slabs import NIBBLE_UNIT, UNIT, Slabs
from rotatek_compile.plan import HeadPlan
from rotatek_compile.runtime.encode import calibrated, choose, packings, write
from rotatek_compile.runtime.observed import Rules, affordable, observe
from rotatek_compile.runtime.prepared import PreparedArtifact
from rotatek_compile.runtime.residual import token_errors
from rotatek_compile.runtime.rounding_error import SLACK

DIM, HEADS, LAYERS = 32, 2, 3
RAW = Slabs(DIM)
MIXED = [
    (Slabs(8, 8, 16), Slabs(0, 16)),
    (RAW, Slabs(0, 0, 16)),
    (Slabs(), RAW),
    (Slabs(0, 0, 32), Slabs(8)),
    (Slabs(24, 8), Slabs(0, 8, 16)),
]
"""Of two heads of one side."""


@pytest.fixture
def side_of(make_artifact):
    """`SideBasis` of the Keys of layer 0, random bases, and its whitened encode matrix fp64 [H, D, D] as the artifact has it."""

    def make(slabs):
        artifact = make_artifact(plan={i: [HeadPlan(one, RAW) for one in slabs] for i in range(LAYERS)})
        basis = PreparedArtifact(artifact).layer(0, torch.device("cpu"), torch.float32).kinds["visual"].key
        return basis, artifact.tensors["layers.0.visual.key_encode"].double()

    return make


def like_calibration(basis, tokens, seed=0, scale=1.0, heavy=False):
    """Tokens [H, S, D] whose covariance is about the calibrated one times scale², about the calibrated mean; `heavy` adds outliers."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(HEADS, tokens, DIM, generator=generator)
    if heavy:
        z = z * (1 + 20 * (torch.rand(z.shape, generator=generator) < 0.01))
    whitened = z * basis.spectrum.sqrt().float().unsqueeze(1) * scale
    return basis.mean.unsqueeze(1) + (whitened * basis.balance.unsqueeze(1)) @ basis.decode.mT


def stored(x, where, basis, dtype=torch.float32):
    """What the codes stand for, fp64 [H, S, D], and the scales."""
    codes, scales = write(x, where, dtype)
    rebuilt = []
    for h, slabs in enumerate(where.slabs):
        found = unpack(codes[h], x.shape[1], slabs, dtype).double()
        if slabs.native == DIM:
            rebuilt.append(found)
            continue
        found[:, slabs.native :] *= scales[h, slabs.native : slabs.rank].double()
        decode = where.own[h] if h in where.own else basis.decode[h, :, : slabs.rank]
        rebuilt.append(where.centre[h].double() + found @ decode.double().T)
    return torch.stack(rebuilt), scales


def straightforward(x, where, scales, basis, whiten):
    """Energy per token [H, S] in numpy and fp64: every head, direction and token by itself, decode inverted from the artifact's matrix."""
    errors = np.zeros((HEADS, x.shape[1]))
    for h, (native, byte, nibble) in enumerate(where.slabs):
        if native == DIM:
            continue
        w = whiten[h].numpy()
        centred = x[h].double().numpy() - where.centre[h].double().numpy()
        encode = where.encode[h].double().numpy()
        decode = where.own[h].double().numpy() if h in where.own else np.linalg.inv(encode).T
        left = centred.copy()
        for j in range(native + byte + nibble):
            z, s = centred @ encode[:, j], float(scales[h, j])
            if j >= native and s > 0:
                z = np.clip(np.rint(z / s), -127, 127) * s if j < native + byte else (np.clip(np.rint(z / s + 7.5), 0, 15) - 7.5) * s
            elif j >= native:
                z = 0 * z
            left -= np.outer(z, decode[:, j])
        errors[h] = ((left @ w) ** 2).sum(1)
    return errors


@pytest.mark.parametrize("slabs", MIXED)
@pytest.mark.parametrize("own_parts", [True, False], ids=["own", "calibrated"])
@pytest.mark.parametrize("heavy", [False, True])
def test_what_is_written_and_what_it_discards(side_of, slabs, own_parts, heavy):
    basis, whiten = side_of(slabs)
    x = like_calibration(basis, 300, heavy=heavy)
    for prior in (0, 256):
        where = choose(observe([(x, basis)], Rules(prior, 0, own_parts)))[0]
        assert where.slabs == slabs
        rebuilt, scales = stored(x, where, basis)
        expected = straightforward(x, where, scales, basis, whiten)
        got = token_errors(x, where, scales, basis).double().numpy()
        left = (x.double() - rebuilt) @ whiten
        tolerance = {"rtol": 5e-3, "atol": 1e-5 * float(basis.spectrum.sum())}
        assert np.allclose(got, expected, **tolerance)
        assert np.allclose(left.square().sum(-1).numpy(), expected, **tolerance)  # the codes say the same
        for h, one in enumerate(slabs):
            if one == RAW:
                assert torch.equal(rebuilt[h], x[h].double())
            if not where.own:
                assert where.error[h] == pytest.approx(expected[h].mean(), rel=5e-3, abs=1e-9)  # measured before anything is written
        assert not (where.own and prior == 0)


@pytest.mark.parametrize("slabs", MIXED)
def test_heads_do_not_see_each_other(side_of, slabs):
    """Raw heads beside coded ones, other precisions beside these: a head's codes are what it has among heads like itself."""
    basis, _ = side_of(slabs)
    x = like_calibration(basis, 120, seed=3)
    codes, scales = write(x, choose(observe([(x, basis)], Rules(0, 0)))[0], torch.float32)
    for h, one in enumerate(slabs):
        alone, _ = side_of((one, one))
        again, others = write(x, choose(observe([(x, alone)], Rules(0, 0)))[0], torch.float32)
        assert torch.equal(codes[h], again[h])
        assert torch.equal(scales[h, one.native : one.rank], others[h, one.native : one.rank])


def test_own_means_and_scales_follow_the_segment(side_of):
    """A segment of ten times the size, elsewhere: with its own parts no worse in proportion, with calibrated ones far worse."""
    basis, _ = side_of((Slabs(0, 32), Slabs(0, 0, 32)))
    away = like_calibration(basis, 400, seed=5, scale=10.0) + 4.0
    usual = like_calibration(basis, 400, seed=5)
    at_home, own, shared = (
        choose(observe([(x, basis)], Rules(0, 0, parts)))[0] for x, parts in ((usual, True), (away, True), (away, False))
    )
    for h in range(HEADS):
        assert own.error[h] == pytest.approx(100 * at_home.error[h], rel=0.05)
        assert shared.error[h] > 10 * own.error[h]
    # about normal variables 4 bits lose 1.15 % (Max 1960); a little more with scales from a table of clips
    energy = float(observe([(usual, basis)], Rules(0, 0))[0].measured.figures[1, :DIM].sum())
    assert 0.008 < at_home.error[1] / energy < 0.02
    assert at_home.error[0] / at_home.error[1] < 0.01


def test_calibrated_coordinates_fit_calibrated_data(side_of):
    """For text: nothing of a block's own, and on data like the calibration's about as good as its own scales."""
    basis, whiten = side_of((Slabs(0, 8, 16), Slabs(8, 8)))
    where = calibrated(basis)
    assert (where.own_mean, where.own, where.calibrated_scales) == (None, {}, True)
    assert (where.slabs, where.expected, where.error) == (basis.slabs, basis.expected, basis.expected)
    x = like_calibration(basis, 4000, seed=8)
    _, scales = stored(x, where, basis)
    assert torch.equal(scales, where.scales)
    found = straightforward(x, where, scales, basis, whiten).mean(1)
    for h in range(HEADS):
        assert 0.8 * basis.expected[h] < found[h] < 1.05 * basis.expected[h]  # normal variables; those of a model have heavier tails
    own = choose(observe([(x, basis)], Rules(0, 0)))[0]
    assert found[0] < 1.1 * own.error[0]


@pytest.mark.parametrize("own_parts", [True, False], ids=["own", "calibrated"])
@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0])
def test_after_a_fallback_the_bound_holds(side_of, scale, own_parts):
    """Measured on the codes that are written, not as predicted."""
    slabs = (Slabs(8, 0, 16), Slabs(0, 8))
    basis, whiten = side_of(slabs)
    factor = 2.0
    x = like_calibration(basis, 500, seed=2, scale=scale)
    where = choose(observe([(x, basis)], Rules(0, factor, own_parts)))[0]
    _, scales = stored(x, where, basis)
    found = straightforward(x, where, scales, basis, whiten).mean(1)
    assert where.fallback == (scale > 1,) * HEADS
    for h in range(HEADS):
        assert found[h] <= 1.05 * (factor * basis.expected[h] + SLACK * float(basis.spectrum[h].sum()))
        assert found[h] == pytest.approx(where.error[h], rel=0.5, abs=SLACK * float(basis.spectrum[h].sum()))


def test_affordable_is_the_most_that_fits():
    """Against trying everything: the longest prefix of the plan's directions whose codes and basis fit into the plan's bytes."""
    generator = random.Random(0)
    for _ in range(300):
        dim = generator.choice((32, 64, 128))
        native = UNIT * generator.randrange(dim // UNIT + 1)
        byte = UNIT * generator.randrange((dim - native) // UNIT + 1)
        nibble = NIBBLE_UNIT * generator.randrange((dim - native - byte) // NIBBLE_UNIT + 1)
        plan, tokens = Slabs(native, byte, nibble), generator.choice((1, 16, 63, 200, 576, 3000))
        shorter = [Slabs(native, byte, n) for n in range(nibble, 0, -NIBBLE_UNIT)]
        shorter += [Slabs(native, n) for n in range(byte, 0, -UNIT)] + [Slabs(n) for n in range(native, 0, -UNIT)]
        had = plan.bytes_per_token() * tokens
        fitting = [one for one in shorter if one.bytes_per_token() * tokens + 2 * dim * one.rank <= had]
        assert affordable(plan, dim, tokens) == (fitting[0] if fitting else None)
        assert not fitting or fitting[0] != plan  # a basis is never free
    assert affordable(Slabs(), 128, 1000) is None
    assert affordable(Slabs(0, 8), 32, 10**6) is None  # less than one step is nothing


def test_half_precision_is_coded_like_single(side_of):
    """Keys in the compute dtype: centred and rotated in fp32."""
    slabs = (Slabs(8, 8, 16), Slabs(0, 16))
    basis, _ = side_of(slabs)
    x = like_calibration(basis, 200, seed=6).bfloat16()
    one, two = (choose(observe([(y, basis)], Rules(256, 0)))[0] for y in (x, x.float()))
    assert torch.equal(one.centre, two.centre)
    assert one.slabs == two.slabs
    for a, b in zip(write(x, one, torch.bfloat16)[0], write(x.float(), two, torch.bfloat16)[0], strict=True):
        assert torch.equal(a, b)


def test_bases_in_any_layout(make_artifact):
    """Eigenvectors come column by column, and an artifact just compiled was never written; kernels take rows."""
    artifact = make_artifact(plan=[[HeadPlan(Slabs(8), RAW)] * HEADS] * LAYERS)
    expected = PreparedArtifact(artifact).layer(1, torch.device("cpu"), torch.float32).kinds["visual"]
    turned = {name: x.mT.contiguous().mT if name.endswith("_encode") else x for name, x in artifact.tensors.items()}
    turned |= {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in turned.items() if name.endswith("_mean")}
    got = PreparedArtifact(replace(artifact, tensors=turned)).layer(1, torch.device("cpu"), torch.float32).kinds["visual"]
    assert not turned["layers.1.visual.key_encode"].is_contiguous() and not turned["layers.1.visual.key_mean"].is_contiguous()
    for before, after in zip(expected.sides, got.sides, strict=True):
        assert torch.equal(before.encode, after.encode) and torch.equal(before.mean, after.mean)
        assert after.encode.is_contiguous() and after.mean.is_contiguous() and after.balance.is_contiguous()


def test_rows_without_scales_are_written_one_by_one(side_of):
    """Scales are taken from what is written, so several rows cannot share them."""
    basis, _ = side_of(MIXED[0])
    x = torch.stack([like_calibration(basis, 8, seed) for seed in range(2)])
    where = replace(calibrated(basis), scales=None)
    with pytest.raises(ValueError, match="one by one"):
        packings(x, x, where)
    assert len(packings(x[:1], x[:1], where)) == 1 and len(packings(x, x, calibrated(basis))) == 2
