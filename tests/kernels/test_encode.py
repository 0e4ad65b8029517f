"""Coding all heads at once: the Triton kernel against `codes.pack`, to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rotatek_compile.kernels.codes import clipped_scales
from rotatek_compile.kernels.encode import Packing, pack_heads, pack_heads_triton
from rotatek_compile.kernels.slabs import Slabs

HERE = Path(__file__).resolve()
SHAPES = ((64, 77), (128, 64), (96, 33), (128, 1))  # head_dim, tokens


def example(dim: int, tokens: int, dtype: torch.dtype, device: str = "cpu"):
    """Heads with every mixture of slabs, outliers and a channel that is zero."""
    slabs = [Slabs(8, 16, 32), Slabs(0, 0, 48), Slabs(dim), Slabs(0, 8, 0), Slabs(), Slabs(16, 0, 16)]
    generator = torch.Generator().manual_seed(dim + tokens)
    z = 3 * torch.randn(len(slabs), tokens, dim, generator=generator)
    z[0, 0, 20], z[1, :, 5], z[3, 0, 3] = 500.0, 0.0, -1e30
    raw = torch.randn(len(slabs), tokens, dim, generator=generator).to(dtype)
    scales = torch.where(
        torch.arange(dim) < torch.tensor([[s.native + s.byte] for s in slabs]), clipped_scales(z, 8), clipped_scales(z, 4)
    ).contiguous()
    return z.to(device), raw.to(device), scales.to(device), slabs


def differing(dim: int, tokens: int, dtype: torch.dtype, device: str) -> int:
    """Bytes in which the kernel's codes differ from the specification's: three jobs of different lengths, one with strides."""
    jobs, moved = [], []
    for n, length in enumerate((tokens, tokens + 5, 3)):
        z, raw, scales, slabs = example(dim, length, dtype)
        order = torch.randperm(len(slabs), generator=torch.Generator().manual_seed(n)).tolist()
        z, raw, scales, slabs = z[order], raw[order], scales[order], tuple(slabs[h] for h in order)
        wide = torch.zeros(length + 2, len(slabs), dim, dtype=dtype)
        wide[1:-1] = raw.transpose(0, 1)
        jobs.append(Packing(z, raw, scales, slabs))
        strided = wide.to(device)[1:-1].transpose(0, 1) if n == 1 else raw.to(device)
        moved.append(Packing(z.to(device), strided, scales.to(device), slabs))
    expected = [part for codes in pack_heads(jobs, dtype) for part in codes]
    got = [part for codes in pack_heads_triton(moved, dtype) for part in codes]
    assert [part.numel() for part in got] == [part.numel() for part in expected]
    assert sum(part.numel() for part in got) > 0
    return sum(int((a.cpu() != b).sum()) for a, b in zip(got, expected, strict=True))


def test_interpreted():
    """A process of its own, because Triton reads TRITON_INTERPRET when kernels are decorated."""
    root = HERE.parents[2]
    command = [sys.executable, str(root / "tools" / "run_in_checkout.py"), str(HERE)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["0"] * (2 * len(SHAPES))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("dim", "tokens"), SHAPES)
def test_on_a_gpu(dim, tokens, dtype):
    assert differing(dim, tokens, dtype, "cuda") == 0


if __name__ == "__main__":
    for shape in SHAPES:
        for number in (torch.float16, torch.float32):  # the interpreter cuts bf16 off instead of rounding it
            print(differing(*shape, number, "cpu"))
