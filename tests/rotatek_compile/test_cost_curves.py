"""What options cost: bytes by hand, distortions against the codec itself, KL through its measures."""

import numpy as np
import pytest
import torch

from rotatek_compile.coding_error import ROUNDING
from rotatek_compile.cost_curves import (
    SHRUNK,
    TIE_WEIGHT,
    Curve,
    HeadCurve,
    Options,
    curve_of,
    curves_of,
    dense_bytes,
    distortions,
    every_slabs,
    lower_hull,
    plan_bytes,
    predicted_kl,
)
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.kernels.codes import clipped_scales, rounded
from rotatek_compile.kernels.slabs import Slabs, check_slabs
from rotatek_compile.plan import HeadPlan

LEVELS = (Slabs(), Slabs(nibble=16))
SPECTRUM = torch.tensor([2.0**-i for i in range(32)])


def geometry(layers=1, heads=2, dim=32):
    layer = LayerGeometry(layer_type="full_attention", query_heads=2 * heads, kv_heads=heads, head_dim=dim)
    return Geometry(model_type="m", layers=(layer,) * layers, visual_token_ids=(5,))


def test_every_slabs():
    some = every_slabs(32)
    for slabs in some:
        check_slabs(slabs, 32)
    assert len(set(some)) == len(some) == 15 + 6 + 1  # native and 8-bit steps beside no, one or two of 16 directions at 4 bit
    assert some[0] == Slabs() and some[-1] == Slabs(32)
    assert every_slabs(32, "4") == (Slabs(), Slabs(nibble=16), Slabs(nibble=32))
    assert every_slabs(24, "8") == tuple(Slabs(byte=n) for n in (0, 8, 16, 24))


@pytest.mark.parametrize("bits", [8, 4])
def test_coding_errors_lie_between_those_of_normal_and_laplacian_numbers(bits):
    generator = torch.Generator().manual_seed(0)
    normal, uniform = torch.randn(512, 512, generator=generator), torch.rand(512, 512, generator=generator) - 0.5
    laplacian = uniform.sign() * -torch.log1p(-2 * uniform.abs())
    shares = [
        float((rounded(z, clipped_scales(z, bits).float(), bits) - z).square().mean() / z.square().mean()) for z in (normal, laplacian)
    ]
    assert shares[0] < ROUNDING[bits] < shares[1]
    assert shares[0] == pytest.approx({8: 5.5e-5, 4: 0.0115}[bits], rel=0.05)


def test_distortions_by_hand():
    options = [Slabs(), Slabs(32), Slabs(8), Slabs(0, 8), Slabs(8, 8, 16)]
    kept = lambda a, b: float(SPECTRUM[a:b].double().sum() / SPECTRUM.double().sum())  # noqa: E731
    hand = [1, 0, 1 - kept(0, 8), 1 - kept(0, 8) + 1e-4 * kept(0, 8), 1e-4 * kept(8, 16) + 0.016 * kept(16, 32)]
    assert distortions(SPECTRUM, options) == pytest.approx(hand, rel=1e-6, abs=1e-12)
    assert distortions(torch.zeros(32), [Slabs(), Slabs(8)]).tolist() == [0, 0]


@pytest.mark.parametrize("trust", [1.0, 0.5])
def test_a_curve_passes_through_its_measures(trust):
    curve = curve_of(LEVELS, torch.tensor([1.0, 0.01]), SPECTRUM, every_slabs(32), trust)
    x = dict(zip(curve.options, distortions(SPECTRUM, curve.options), strict=True))
    line = {slabs: 1.0 * share for slabs, share in x.items()}
    small = Slabs(nibble=16)
    assert curve.of(Slabs()) == pytest.approx(1.0, rel=1e-5)
    assert curve.of(small) == pytest.approx(0.01**trust * line[small] ** (1 - trust), rel=1e-3)
    assert curve.of(Slabs(32)) == 0
    fine = Slabs(0, 16, 16)  # far below what was measured: proportional to the distortion
    proportional = 0.01 * x[fine] / x[small]
    assert curve.of(fine) == pytest.approx(proportional**trust * line[fine] ** (1 - trust) + TIE_WEIGHT * x[fine], rel=1e-3)
    between = Slabs(8)  # log KL over log distortion
    part = np.log(x[between] / x[small]) / np.log(1 / x[small])
    if 0 < part < 1:
        assert curve.of(between) == pytest.approx((0.01 ** (1 - part)) ** trust * line[between] ** (1 - trust), rel=1e-2)
    assert (np.diff(curve.kl[np.argsort([x[o] for o in curve.options])]) >= -1e-15).all()  # more error never costs less


def test_noise_of_larger_levels_lifts_smaller_ones():
    levels = (Slabs(), Slabs(nibble=16), Slabs(nibble=32))
    curve = curve_of(levels, torch.tensor([1.0, 0.1, 0.2]), torch.linspace(1, 0.1, 32), every_slabs(32), 1.0)
    assert curve.of(levels[1]) == pytest.approx(0.2, rel=1e-4) and curve.of(levels[2]) == pytest.approx(0.2, rel=1e-4)


def test_heads_that_measured_nothing_are_ordered_by_energy():
    weak, strong = torch.tensor([1.0] * 8 + [0.0] * 24), torch.ones(32)
    one, other = (curve_of(LEVELS, torch.zeros(2), spectrum, every_slabs(32)) for spectrum in (weak, strong))
    assert one.of(Slabs(8)) < other.of(Slabs(8)) == pytest.approx(TIE_WEIGHT * 0.75)


def test_lower_hull():
    assert lower_hull(np.array([0, 1, 2, 3, 4]), np.array([10, 10, 10, 1, 0.0])) == [0, 3, 4]
    assert lower_hull(np.array([0, 1, 1, 2]), np.array([4, 3, 2, 2.5])) == [0, 2]
    assert lower_hull(np.array([5]), np.array([1.0])) == [0]


def test_a_head_that_lost_all_its_keys_has_nothing_left_to_lose():
    shape = geometry()
    table = {0: torch.tensor([[1.0, 0.01]] * 2)}
    spectra = {side: {0: SPECTRUM.repeat(2, 1)} for side in ("key", "value")}
    curves = curves_of(shape, LEVELS, {"key": table, "value": table}, spectra, 1.0)
    nothing, some, raw = Slabs(), Slabs(nibble=16), Slabs(32)
    head = curves[0, 1]
    assert head.kl(HeadPlan(nothing, nothing)) == pytest.approx(1.0, rel=1e-4)
    assert head.kl(HeadPlan(nothing, some)) == pytest.approx(1.0, rel=1e-4)
    assert head.kl(HeadPlan(some, some)) == pytest.approx(0.02 - 1e-4, rel=1e-3)
    assert head.kl(HeadPlan(raw, some)) == pytest.approx(0.01, rel=1e-3)
    plan = {0: [HeadPlan(raw, some), HeadPlan(some, raw)]}
    assert predicted_kl(plan, curves) == pytest.approx(0.02, rel=1e-3)
    keys = curves_of(shape, LEVELS, {"key": table, "value": {}}, spectra, 1.0)
    assert keys[0, 0].value is None and keys[0, 0].kl(HeadPlan(some, raw)) == pytest.approx(0.01, rel=1e-3)


def test_a_head_that_no_document_minded_is_moved_towards_the_others():
    shape = geometry()
    table = {0: torch.tensor([[1.0, 0.01], [1e-6, 1e-8]])}
    spectra = {side: {0: SPECTRUM.repeat(2, 1)} for side in ("key", "value")}
    curves = curves_of(shape, LEVELS, {"key": table, "value": {0: torch.zeros(2, 2)}}, spectra, 1.0)
    lost = distortions(SPECTRUM, [Slabs(nibble=16)])[0]
    for h, levels in enumerate(((0, -2), (-6 + 6 * SHRUNK, -8 + 6.15 * SHRUNK))):  # powers of ten
        found = [curves[0, h].key.of(slabs) for slabs in LEVELS]
        assert found == pytest.approx([10 ** levels[0] + TIE_WEIGHT, 10 ** levels[1] + TIE_WEIGHT * lost], rel=0.1)
    assert curves[0, 1].value.of(Slabs()) == pytest.approx(TIE_WEIGHT, rel=1e-2)
    alone = curves_of(shape, LEVELS, {"key": table, "value": table}, spectra, shrunk=0.0)
    assert alone[0, 1].key.of(Slabs()) == pytest.approx(1e-6 + TIE_WEIGHT, rel=1e-2)


def test_bytes_of_a_plan_by_hand():
    shape = geometry()
    plan = {0: [HeadPlan(Slabs(8, 8, 16), Slabs(32)), HeadPlan(Slabs(), Slabs(0, 32, 0))]}
    first = 512 * (16 + 8 + 8) + 2 * 24 + 2 * 32 + 512 * 64  # scales of 24 directions, a mean of 32 channels; raw numbers have neither
    second = 2 * 32 + 512 * 32 + 2 * 32 + 2 * 32
    assert plan_bytes(shape, plan) == first + second
    assert plan_bytes(shape, plan, tokens=0) == 2 * 24 + 3 * 2 * 32 + 2 * 32
    assert dense_bytes(shape) == 512 * 2 * 4 * 32


def test_curve_only_knows_its_options():
    curve = Curve(Options((Slabs(), Slabs(8))), np.array([0, 8]), np.array([1.0, 0.5]))
    assert curve.at(Slabs(8)) == 1 and HeadCurve(curve).kl(HeadPlan(Slabs(8), Slabs(32))) == 0.5
    with pytest.raises(KeyError):
        curve.at(Slabs(16))
