"""What coding discards of each token, measured on the codes themselves: for text blocks, and to find the tokens that escape it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels.codes import rounded
from ..kernels.slabs import Slabs
from .encode import Coordinates, as_planned
from .observed import Rules, observe
from .prepared import SideBasis
from .scales import used_bits


def token_errors(x: Tensor, where: Coordinates, scales: Tensor, basis: SideBasis, z: Tensor | None = None) -> Tensor:
    """Energy in whitened coordinates that writing x [..., H, S, D] discards of every token, clipping included: fp32 [..., H, S].

    Args:
        scales: bf16 [H, D] that the codes have.
        z: (x - centre) @ encode, where it is known already.
    """
    exact = x - where.centre.unsqueeze(1)
    z = exact @ where.encode if z is None else z
    raw, native, byte, nibble = _parts(where.slabs, x.shape[-1], x.device)
    scale = scales.float().unsqueeze(1)
    kept = torch.where(native, z, 0.0)
    for bits, part in ((8, byte), (4, nibble)):
        if bits in used_bits(where.slabs):
            kept = torch.where(part, rounded(z, scale, bits), kept)
    decode = basis.decode
    if where.own:
        decode = decode.clone()
        for h, own in where.own.items():
            decode[h, :, : own.shape[1]] = own
    left = exact - kept @ decode.mT
    errors = ((left @ basis.encode) / basis.balance.unsqueeze(1)).square().sum(-1)
    return torch.where(raw, 0.0, errors)


@lru_cache(maxsize=256)
def _parts(slabs: tuple[Slabs, ...], dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which heads are raw, bool [H, 1], and which directions are native and of 8 and 4 bits, bool [H, 1, D] each."""
    at = torch.arange(dim)
    ends = torch.tensor(slabs).cumsum(1).unsqueeze(2)  # [H, 3, 1]
    native, byte, nibble = (at < ends).unbind(1)
    raw = torch.tensor([one.native == dim for one in slabs]).unsqueeze(1)
    parts = (raw, native.unsqueeze(1), (byte & ~native).unsqueeze(1), (nibble & ~byte).unsqueeze(1))
    return parts[0].to(device), parts[1].to(device), parts[2].to(device), parts[3].to(device)


def worst_tokens(sides: Sequence[Tensor], bases: Sequence[SideBasis], count: int) -> Tensor:
    """Tokens of each head that the plan's codes would lose most of: indices [H, count], ascending.

    Errors of Keys and Values are added in units of what calibration expects of them per token.

    Args:
        sides: Keys and Values [H, S, D].
    """
    total = sides[0].new_zeros(sides[0].shape[:2], dtype=torch.float32)
    for x, basis in zip(sides, bases, strict=True):
        seen = observe([(x, basis)], Rules(prior_tokens=0, factor=0))[0]
        expected = torch.tensor(basis.expected, device=x.device, dtype=torch.float32).clamp_min(1e-30)
        total += token_errors(x, as_planned(seen), seen.measured.scales, basis) / expected.unsqueeze(1)
    return total.topk(count, dim=1).indices.sort(dim=1).values


def energies(x: Tensor, basis: SideBasis) -> Tensor:
    """Of each direction per token about the segment's own mean, in whitened coordinates: x [H, S, D] -> fp32 [H, D]."""
    z = (x - x.mean(1, keepdim=True, dtype=torch.float32)) @ basis.encode
    return (torch.linalg.vector_norm(z, dim=1) / basis.balance).square() / x.shape[1]


def without(x: Tensor, tokens: Tensor) -> Tensor:
    """x [H, S, D] without the tokens [H, E] of each head: [H, S - E, D]."""
    gone = torch.zeros(x.shape[:2], dtype=torch.uint8, device=x.device).scatter(1, tokens, 1)
    kept = gone.argsort(dim=1, stable=True)[:, : x.shape[1] - tokens.shape[1]]  # in order; a mask would have to be counted on the host
    return only(x, kept)


def only(x: Tensor, tokens: Tensor) -> Tensor:
    """The tokens [H, E] of each head of x [H, S, D]: [H, E, D]."""
    return x.gather(1, tokens.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
