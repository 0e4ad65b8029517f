"""What coding discards of each token, measured on the codes themselves: for text blocks, and to find the tokens that escape it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.codes import rounded
from .encode import Coordinates, as_planned
from .observed import Rules, observe
from .prepared import SideBasis


def token_errors(x: Tensor, where: Coordinates, scales: Tensor, basis: SideBasis) -> Tensor:
    """Energy in whitened coordinates that writing x [H, S, D] discards of every token, clipping included: fp32 [H, S].

    Args:
        scales: bf16 [H, D] that the codes have.
    """
    z = (x - where.centre.unsqueeze(1)) @ where.encode
    errors = []
    for h, slabs in enumerate(where.slabs):
        if slabs.native == x.shape[-1]:
            errors.append(z.new_zeros(x.shape[1]))
            continue
        native, byte, nibble = slabs
        kept, scale = z[h, :, : slabs.rank].clone(), scales[h].float()
        for bits, part in ((8, slice(native, native + byte)), (4, slice(native + byte, native + byte + nibble))):
            kept[:, part] = rounded(kept[:, part], scale[part], bits)
        decode = where.own[h] if h in where.own else basis.decode[h, :, : slabs.rank]
        left = x[h] - where.centre[h] - kept @ decode.mT
        errors.append(((left @ basis.encode[h]) / basis.balance[h]).square().sum(-1))
    return torch.stack(errors)


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
