"""The codec: errors within what the scale implies, clipping, bytes and their order written out by hand, refusals."""

import pytest
import torch

from rotatek_compile.kernels import codes
from rotatek_compile.kernels.slabs import Slabs, check_slabs

LAYOUTS = [Slabs(*s) for s in [(0, 0, 0), (8, 0, 0), (0, 8, 0), (0, 0, 16), (8, 8, 16), (0, 16, 48), (24, 40, 64), (128, 0, 0)]]
LENGTHS = (0, 1, 2, 63, 64, 111)
TOP = {8: 127.0, 4: 7.5}


def numbers(length, rank, seed=0):
    """Directions of very different size, as a rotated segment has."""
    z = torch.randn(length, rank, generator=torch.Generator().manual_seed(seed))
    return z * torch.logspace(2, -3, max(rank, 1))[:rank]


def scales_of(z, slabs):
    coded = z[:, slabs.native :]
    parts = [codes.clipped_scales(x, bits) for x, bits in ((coded[:, : slabs.byte], 8), (coded[:, slabs.byte :], 4)) if x.shape[1]]
    return torch.cat([torch.zeros(0, dtype=torch.bfloat16), *parts])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("seed", range(3))
def test_error_is_half_a_step_unless_clipped(bits, seed):
    z = numbers(777, 24, seed)
    scale = codes.clipped_scales(z, bits).float()
    error = (codes.rounded(z, scale, bits) - z).abs()
    inside = z.abs() <= TOP[bits] * scale
    assert inside.float().mean() > 0.95  # noise is hardly ever clipped
    assert bool((error <= scale * 0.5001)[inside].all())
    clipped = ~inside
    assert torch.allclose(error[clipped], (z.abs() - TOP[bits] * scale)[clipped], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_levels_are_of_the_code(bits):
    levels = codes.levels(numbers(500, 16), codes.clipped_scales(numbers(400, 16, 1), bits).float(), bits)
    allowed = torch.arange(-127.0, 128.0) if bits == 8 else torch.arange(16) - 7.5
    assert bool(torch.isin(levels, allowed).all())
    if bits == 4:
        assert set(levels.unique().tolist()) == set(allowed.tolist())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("outlier", [1.0, 10.0, 100.0])
def test_clipping_is_never_worse_than_the_maximum(bits, outlier):
    z = torch.randn(256, 8, generator=torch.Generator().manual_seed(3))
    z[17] *= outlier
    scale = codes.clipped_scales(z, bits).float()
    by_maximum = (z.abs().amax(0) / TOP[bits]).bfloat16().float()
    error, before = ((codes.rounded(z, s, bits) - z).square().sum(0) for s in (scale, by_maximum))
    assert bool((error <= before).all())
    if outlier > 5 and bits == 4:
        assert error.sum() < 0.8 * before.sum()
    assert bool((scale <= by_maximum).all())


def test_scales_by_hand():
    """Two values only: at 4 bits the maximum is the level 7.5, so nothing is lost without clipping."""
    z = torch.tensor([[15.0], [-15.0], [15.0], [-15.0]])
    assert codes.clipped_scales(z, 4).item() == 2.0
    assert torch.equal(codes.rounded(z, torch.tensor([2.0]), 4), z)
    assert codes.clipped_scales(z, 4).dtype == torch.bfloat16


def test_zero_input_stays_finite():
    z = torch.zeros(9, 16)
    for bits in (8, 4):
        scale = codes.clipped_scales(z, bits).float()
        assert torch.equal(scale, torch.zeros(16))
        assert torch.equal(codes.rounded(z, scale, bits), z)
    flat = codes.pack(z, torch.zeros(16, dtype=torch.bfloat16), Slabs(0, 0, 16), torch.float32)
    assert bool(torch.isfinite(codes.unpack(flat, 9, Slabs(0, 0, 16), torch.float32)).all())


def test_one_zero_direction_among_others():
    z = numbers(50, 16)
    z[:, 5] = 0
    scale = codes.clipped_scales(z, 4).float()
    assert scale[5] == 0 and bool((scale[:5] > 0).all())
    assert torch.equal(codes.rounded(z, scale, 4)[:, 5], torch.zeros(50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("slabs", LAYOUTS, ids=str)
def test_round_trip(slabs, dtype):
    for length in LENGTHS:
        z = numbers(length, slabs.rank)
        scales = scales_of(z, slabs) if length else torch.ones(slabs.scaled).bfloat16()
        flat = codes.pack(z, scales, slabs, dtype)
        assert flat.dtype == torch.uint8 and flat.shape == (codes.pool_bytes(length, slabs, dtype.itemsize),)
        assert flat.numel() % 16 == 0
        levels = codes.unpack(torch.cat([flat, torch.full((7,), 99, dtype=torch.uint8)]), length, slabs, dtype)
        assert levels.shape == (length, slabs.rank)
        native, byte, nibble = levels.split(slabs, 1)
        assert torch.equal(native, z[:, : slabs.native].to(dtype).to(native.dtype))
        for part, bits, start in ((byte, 8, slabs.native), (nibble, 4, slabs.native + slabs.byte)):
            first = start - slabs.native
            scale = scales[first : first + part.shape[1]].float()
            assert torch.equal(part.float() * scale, codes.rounded(z[:, start : start + part.shape[1]], scale, bits))


@pytest.mark.parametrize(
    ("length", "slabs", "itemsize", "expected"),
    [
        (1, Slabs(0, 8, 0), 2, 16),  # one token is stored as two
        (5, Slabs(8, 8, 16), 2, 6 * (16 + 8 + 8)),
        (64, Slabs(0, 32, 64), 2, 64 * 64),
        (65, Slabs(0, 32, 64), 2, 66 * 64),
        (7, Slabs(24, 0, 48), 4, 8 * (96 + 24)),
        (1000, Slabs(), 2, 0),
        (0, Slabs(8, 8, 16), 2, 0),
    ],
)
def test_bytes_by_hand(length, slabs, itemsize, expected):
    assert codes.pool_bytes(length, slabs, itemsize) == expected


def test_bytes_and_their_order():
    """Three tokens: one native direction slab in fp16, then 8 bit, then 4 bit, each padded to four tokens."""
    z = torch.zeros(3, 32)
    z[0, 0], z[2, 7] = 1.0, -2.0  # native
    z[1, 8], z[1, 15] = 3.0, -128.0  # 8 bit; the last is clipped
    z[0, 16], z[0, 24], z[2, 31] = 7.5, -7.5, 0.5  # 4 bit: levels u = 15, 0 and 8
    flat = codes.pack(z, torch.ones(24).bfloat16(), Slabs(8, 8, 16), torch.float16).tolist()
    assert len(flat) == 4 * (16 + 8 + 8)
    native, byte, nibble = flat[:64], flat[64:96], flat[96:]
    assert {i: b for i, b in enumerate(native) if b} == {1: 0x3C, 2 * 16 + 15: 0xC0}  # 1.0 is 3C00, -2.0 is C000
    assert {i: b for i, b in enumerate(byte) if b} == {8: 3, 15: 256 - 127}
    # Zero lies between the levels 7 and 8; both are half a step away, and both halves of a byte take the even one.
    assert {i: b for i, b in enumerate(nibble) if b != 0x88} == {0: 0x0F}
    assert nibble[0] == 0x0F  # directions 0 (low half) and 8 (high half)
    assert nibble[2 * 8 + 7] == 0x88


def test_batches_are_packed_alike():
    z = torch.stack([numbers(9, 32, seed) for seed in range(3)])
    scales = torch.rand(3, 24).bfloat16()
    together = codes.pack(z, scales, Slabs(8, 8, 16), torch.bfloat16)
    assert together.shape == (3, 10 * (16 + 8 + 8))
    for i in range(3):
        assert torch.equal(together[i], codes.pack(z[i], scales[i], Slabs(8, 8, 16), torch.bfloat16))


def test_raw_numbers_are_a_view():
    raw = torch.randn(5, 64).bfloat16()
    flat = codes.pack(raw.float(), torch.zeros(0).bfloat16(), Slabs(64), torch.bfloat16)
    view = codes.native_view(flat, 5, 64, torch.bfloat16)
    assert torch.equal(view, raw)
    view[3] = 1.0
    assert torch.equal(codes.unpack(flat, 5, Slabs(64), torch.bfloat16)[3], torch.ones(64))


def test_refusals():
    with pytest.raises(ValueError, match="takes 64 bytes, the slice has 63"):
        codes.unpack(torch.zeros(63, dtype=torch.uint8), 3, Slabs(0, 8, 16), torch.float32)
    for slabs in (Slabs(4, 0, 0), Slabs(0, 12, 0), Slabs(0, 0, 8), Slabs(-8, 8, 0), Slabs(32, 32, 16)):
        with pytest.raises(ValueError, match="multiples of 8, 8 and 16"):
            check_slabs(slabs, 64)
    for slabs in (Slabs(), Slabs(64), Slabs(8, 24, 32)):
        check_slabs(slabs, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("slabs", LAYOUTS[1:], ids=str)
def test_same_bytes_on_a_gpu(slabs):
    z = numbers(301, slabs.rank)
    scales = scales_of(z, slabs)
    assert torch.equal(codes.pack(z.cuda(), scales.cuda(), slabs, torch.bfloat16).cpu(), codes.pack(z, scales, slabs, torch.bfloat16))
