"""A rebuilt segment is what pack and unpack of the codec give; everything outside segments stays as it was."""

import pytest
import torch

from rotatek_compile.bases import two_sided
from rotatek_compile.kernels.codes import clipped_scales, pack, unpack
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.recoding import CodingBasis, recoded, runs_of

DIM = 32
RUNS = [(0, 2, 19), (1, 0, 8), (1, 10, 20)]


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 20, DIM, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1, DIM) + 3


@pytest.fixture(scope="module")
def basis(x):
    flat = x.transpose(0, 1).flatten(1, 2).double()
    centred = flat - flat.mean(1, keepdim=True)
    moment = torch.randn(3, DIM, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return CodingBasis.of(two_sided(centred.mT @ centred, moment @ moment.mT), torch.device("cpu"))


@pytest.mark.parametrize("slabs", [Slabs(), Slabs(8), Slabs(0, 16), Slabs(0, 0, 16), Slabs(8, 8, 16)])
def test_against_the_codec(x, basis, slabs):
    (got,) = recoded(x, RUNS, basis, {(1, slabs)}).values()
    expected = x[:, 1].clone()
    for row, start, end in RUNS:
        mean = x[row, 1, start:end].mean(0)
        z = (x[row, 1, start:end] - mean) @ basis.encode[1, :, : slabs.rank]
        first, second = z[:, slabs.native : slabs.native + slabs.byte], z[:, slabs.native + slabs.byte :]
        parts = [clipped_scales(part, bits) for part, bits in ((first, 8), (second, 4)) if part.shape[1]]
        scales = torch.cat(parts or [z[0, :0].bfloat16()])
        codes = unpack(pack(z, scales, slabs, torch.float32), end - start, slabs, torch.float32)
        whole = torch.cat([torch.ones(slabs.native), scales.float()])
        expected[row, start:end] = mean + (codes * whole) @ basis.decode[1, :, : slabs.rank].mT
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.equal(got[0, :2], x[0, 1, :2]) and torch.equal(got[1, 8:10], x[1, 1, 8:10])


def test_many_at_once_are_each_alone(x, basis):
    wanted = {(0, Slabs(8)), (2, Slabs(0, 8, 16)), (2, Slabs(nibble=32)), (1, Slabs())}
    together = recoded(x, RUNS, basis, wanted)
    for key in wanted:
        assert torch.allclose(together[key], recoded(x, RUNS, basis, {key})[key], atol=1e-5)


def test_more_keeps_more_and_nothing_needs_no_basis(x, basis):
    options = [Slabs(), Slabs(nibble=16), Slabs(nibble=32), Slabs(byte=32), Slabs(24, 8)]
    found = recoded(x, RUNS, basis, {(0, slabs) for slabs in options})
    errors = [float((found[0, slabs] - x[:, 0]).square().sum()) for slabs in options]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4 * errors[0]
    assert torch.equal(recoded(x, RUNS, None, {(0, Slabs())})[0, Slabs()], found[0, Slabs()])


def test_half_precision_rounds_native_directions(x, basis):
    half = x.bfloat16()
    got = recoded(half, RUNS, basis, {(0, Slabs(24))})[0, Slabs(24)]
    exact = recoded(half.float(), RUNS, basis, {(0, Slabs(24))})[0, Slabs(24)]
    assert got.dtype == torch.bfloat16
    assert 0 < float((got.float() - exact).abs().max()) < 0.1


def test_runs():
    segments = torch.zeros(2, 6, 2)
    segments[0, 1:3, 0] = segments[0, 4:6, 1] = segments[1, 5:, 0] = 1
    assert runs_of(segments) == [(0, 1, 3), (0, 4, 6), (1, 5, 6)]
