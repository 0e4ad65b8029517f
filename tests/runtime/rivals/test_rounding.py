"""Codes and their packing: the error bound, exact cases, and bits where they belong."""

import pytest
import torch

from rotatek_compile.errors import RotateKError
from rotatek_compile.runtime.rivals.rounding import dequantise, half_below, pack_bits, packed_bytes, quantise, unpack_bits


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("offset", [0.0, 1000.3, -77.7])
def test_no_number_is_off_by_more_than_half_a_step(bits, offset):
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 50)[:, None] + offset
    codes, scale, zero = quantise(x, bits)
    error = (dequantise(codes, scale, zero) - x).abs()
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.float16, torch.float16)
    assert (error <= scale.float() / 2 * (1 + 1e-3) + 1e-4 * x.abs() * 2**-8).all()
    spread = x.amax(-1) - x.amin(-1)
    assert (scale.float()[:, 0] <= spread / (2**bits - 1) * 1.01 + abs(offset) * 2.0**-9 / (2**bits - 1) + 1e-7).all()
    if offset == 0:
        assert (codes.amax(-1)[10:] >= 2**bits - 2).all()  # the whole range is used
        assert (codes.amin(-1)[10:] == 0).all()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_exact_cases(bits):
    constant = torch.tensor([[0.0], [1.5], [-2048.0], [2.0**-14]]).expand(4, 32)
    codes, scale, zero = quantise(constant, bits)
    assert torch.equal(dequantise(codes, scale, zero), constant)
    levels = 2**bits - 1
    grid = 0.25 * torch.randint(0, levels + 1, (5, 40), generator=torch.Generator().manual_seed(1)).float() - 3.0
    grid[:, 0], grid[:, 1] = -3.0, -3.0 + 0.25 * levels
    codes, scale, zero = quantise(grid, bits)
    assert torch.equal(dequantise(codes, scale, zero), grid)


def test_half_below():
    x = torch.cat([torch.randn(1000, generator=torch.Generator().manual_seed(0)) * s for s in (1e-7, 1e-3, 1.0, 1e4)])
    low = half_below(x)
    assert (low.float() <= x).all()
    assert (x - low.float() <= x.abs() * 2.0**-9 + 2.0**-23).all()
    representable = torch.tensor([0.0, 1.0, -1.0, 65504.0, 0.5])
    assert torch.equal(half_below(representable).float(), representable)


def test_numbers_beyond_fp16_are_refused():
    with pytest.raises(RotateKError, match="1e\\+05"):
        quantise(torch.tensor([[1e5, 0.0], [1.0, 2.0]]).neg(), 4)


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_packing(bits):
    codes = torch.randint(0, 2**bits, (3, 5, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, 5, packed_bytes(13, bits)) == (3, 5, {8: 13, 4: 7, 2: 4, 1: 2}[bits])
    assert torch.equal(unpack_bits(packed, bits, 13), codes)


def test_first_code_is_in_the_lowest_bits():
    assert pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert pack_bits(torch.tensor([1, 0, 3, 2], dtype=torch.uint8), 2).tolist() == [0b10110001]
