"""Bases of two bytes a number: which are stored so, and what rounding may do to them."""

import torch

from rotatek_compile.packing import WORST, compact

NAME = "layers.0.visual.key_encode"


def basis(condition, dim=32):
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(2, dim, dim, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    return (left * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), dim, dtype=torch.float64)) @ right


def test_ordinary_bases_take_half_the_bytes_and_their_directions_stay():
    exact = basis(100.0).float()
    stored = compact(NAME, exact)
    assert stored.dtype == torch.float16
    moved = torch.linalg.solve(exact.double(), stored.double() - exact.double())
    assert float(torch.linalg.matrix_norm(moved, 2).max()) <= WORST
    # what is dropped beyond 8 directions costs the same to four digits: energies fall by a factor of 1e4 over all directions
    energy = torch.logspace(0, -4, 32, dtype=torch.float64)
    change = torch.linalg.solve(exact.double(), stored.double())
    kept = torch.linalg.inv(change).mT[..., :8] @ change.mT[..., :8, :]
    error = ((torch.eye(32) - kept) ** 2 * energy).sum((1, 2))
    assert (error / energy[8:].sum() - 1).abs().max() < 1e-4


def test_what_half_precision_would_spoil_stays_whole():
    for spoiled in (basis(9000.0).float(), basis(10.0).float() * 1e-7, basis(10.0).float() * 1e6):
        assert compact(NAME, spoiled) is spoiled
    for odd in (torch.zeros(1, 8, 8), torch.full((1, 8, 8), torch.nan)):  # the reader refuses them, and says why
        assert compact(NAME, odd) is odd


def test_one_spoiled_head_is_enough():
    exact = torch.stack([basis(10.0), basis(9000.0), basis(10.0)]).float()
    assert compact(NAME, exact) is exact and compact(NAME, exact[::2]).dtype == torch.float16


def test_nothing_else_is_rounded():
    for name in ("layers.0.visual.key_mean", "layers.0.visual.key_spectrum", "layers.0.sensitivity"):
        tensor = torch.rand(2, 8)
        assert compact(name, tensor) is tensor
