"""Measuring sides of segments at once: the Triton kernels against measure_torch.py, and that against plain sums."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rotatek_compile.kernels.codes import rounded, sample
from rotatek_compile.kernels.measure import measure, measure_triton
from rotatek_compile.kernels.measure_torch import Job, coded_directions, measure_torch
from rotatek_compile.kernels.slabs import Slabs

HERE = Path(__file__).resolve()
SHAPES = ((64, (77, 1, 300)), (96, (40, 513)), (128, (600, 64)), (256, (33,)))  # head_dim, tokens of each segment


def examples(dim: int, lengths: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Job]:
    """Keys and Values of segments that lie in one tensor [H, T, D] each, Values with the strides of a projection's output."""
    slabs = [Slabs(8, 16, 32), Slabs(0, 0, 48), Slabs(dim), Slabs(0, 8, 0), Slabs(), Slabs(16, 0, 16)]
    generator = torch.Generator().manual_seed(dim)
    jobs = []
    for n, strided in enumerate((False, True)):
        encode = torch.randn(len(slabs), dim, dim, generator=generator) / dim**0.5
        mean, balance = torch.randn(len(slabs), dim, generator=generator), 1 + torch.rand(len(slabs), dim, generator=generator)
        x = 2 * torch.randn(len(slabs), sum(lengths) + 3, dim, generator=generator) + 30
        x[n, 5] *= 50  # outliers
        x = x.to(dtype).to(device)
        if strided:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        at = 3
        for length in lengths:
            jobs.append(Job(x[:, at : at + length], mean.to(device), encode.to(device), balance.to(device), tuple(slabs[n:] + slabs[:n])))
            at += length
    return [jobs[place] for place in range(0, len(jobs), 2)] + [jobs[place] for place in range(1, len(jobs), 2)]


def difference(dim: int, lengths: tuple[int, ...], dtype: torch.dtype, device: str) -> float:
    """How far the kernels' numbers are off at most, relative to the largest; figures relative to what codes with their scales lose."""
    found = 0.0
    jobs = examples(dim, lengths, dtype, device)
    for job, got in zip(jobs, measure_triton(jobs), strict=True):
        expected = measure_torch(job, own=True)
        assert (got.own_mean.dtype, got.scales.dtype) == (torch.float16, torch.bfloat16)
        for name in ("centre", "z"):
            one, other = (getattr(part, name).cpu() for part in (got, expected))
            assert one.shape == other.shape
            # an own mean that lies between two numbers of fp16 may be either
            found = max(found, float((one - other).abs().max() / other.abs().max()) * (0.1 if name == "centre" else 1))
        z, whiten = got.z.double().cpu(), job.balance.double().square().cpu()
        energy, error = got.figures.double().cpu().split(dim, -1)
        found = max(found, relative(energy, z.square().mean(1) / whiten))
        some, best = sample(z), expected.figures.double().cpu()[:, dim:]
        for bits, coded in coded_directions(job.slabs, dim).items():
            lost = (rounded(some, got.scales.double().cpu().unsqueeze(1), bits) - some).square().mean(1) / whiten
            found = max(found, relative(error[coded], lost[coded]))  # it says what its scales lose
            # and they lose no more than the specification's, but for the last bit of a scale; the interpreter cuts that off
            room = 5e-5 * energy[coded] if device == "cuda" else 0.1 * best[coded] + 1e-4 * energy[coded]
            assert (lost[coded] <= 1.01 * best[coded] + room).all()
        left = ~(sum(coded_directions(job.slabs, dim).values()).bool())
        assert not got.scales.cpu()[left].any() and not error[left].any()
    return found


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((got - expected).abs() / (expected.abs() + 1e-6 * expected.abs().max() + 1e-30)).max()) if got.numel() else 0.0


def test_interpreted():
    """A process of its own, because Triton reads TRITON_INTERPRET when kernels are decorated."""
    root = HERE.parents[2]
    command = [sys.executable, str(root / "tools" / "run_in_checkout.py"), str(HERE)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [float(line) < 1e-4 for line in done.stdout.split()] == [True] * len(SHAPES), done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("dim", "lengths"), SHAPES)
def test_on_a_gpu(dim, lengths, dtype):
    assert difference(dim, lengths, dtype, "cuda") < 2e-4
    jobs = examples(dim, lengths, dtype, "cuda")
    for one, two in zip(measure_triton(jobs), measure_triton(jobs), strict=True):  # the same bits from run to run
        assert torch.equal(one.figures, two.figures) and torch.equal(one.z, two.z)


def test_the_specification_against_plain_sums():
    dim, length = 64, 700  # every second token is sampled
    job = examples(dim, (length,), torch.float32)[0]
    got = measure([job])[0]
    x, mean = job.x.double(), job.mean.double()
    assert torch.allclose(got.own_mean.double(), x.mean(1) - mean, rtol=1e-3)
    z = torch.einsum("hsd,hde->hse", x - (mean + got.own_mean.double()).unsqueeze(1), job.encode.double())
    assert torch.allclose(got.z.double(), z, atol=1e-3)
    assert torch.allclose(got.figures[:, :dim].double(), z.square().mean(1) / job.balance.double().square(), rtol=1e-4)
    for h, (native, byte, nibble) in enumerate(job.slabs):
        for d in range(dim):
            error = 0.0
            if native <= d < native + byte + nibble:
                scale, some = float(got.scales[h, d]), z[h, ::2, d]
                if d < native + byte:
                    error = ((some / scale).round().clamp(-127, 127) * scale - some).square().mean()
                else:
                    error = (((some / scale + 7.5).round().clamp(0, 15) - 7.5) * scale - some).square().mean()
            assert float(got.figures[h, dim + d]) == pytest.approx(float(error / job.balance[h, d] ** 2), rel=1e-2, abs=1e-12)


def test_given_mean_and_scales_are_used():
    job = examples(64, (100,), torch.float32)[0]
    like = measure_torch(job, own=True)
    other = Job(job.x[:, :50], job.mean, job.encode, job.balance, job.slabs, like.own_mean, like.scales)
    got = measure_torch(other, own=False)
    assert torch.equal(got.centre, like.centre)
    assert torch.equal(got.scales, like.scales)
    assert torch.allclose(got.z, like.z[:, :50])
    none = measure_torch(Job(job.x, job.mean, job.encode, job.balance, job.slabs, None, like.scales), own=False)
    assert none.own_mean is None and torch.equal(none.centre, job.mean)


if __name__ == "__main__":
    for shape in SHAPES:
        print(difference(*shape, torch.float32, "cpu"))
