"""The basis of the segment at hand: calibrated, corrected by what the segment shows, or as the paper does it.

All of it works in the whitened coordinates z = (k - mean) @ encode of the calibrated basis, where queries have unit second
moment and the calibrated covariance is diag(spectrum): a correction is an orthogonal matrix V there, found by subspace
iterations that start from the calibrated directions (V = I), never by an eigensolver.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bases import paper
from .prepared import KindBasis, balance

ITERATIONS = 2
RANK_STEP = 8
PAPER_QUERIES = 32  # the published window of queries


@dataclass(frozen=True, slots=True)
class HeadCode:
    """How one KV head of one segment is coded.

    rank: directions kept; own: decode [D, R] fp32 when the basis belongs to this segment, None for the shared one;
    encode: [D, R] fp32 with the balance folded in; fallback: the plan was not enough for this segment.
    """

    rank: int
    encode: Tensor
    own: Tensor | None
    fallback: bool


def orthonormalise(columns: Tensor) -> Tensor:
    """Gram-Schmidt through the Cholesky factor of the Gram matrix; [H, D, R] -> [H, D, R].

    Column j depends on columns <= j only, so the first R' columns are what a smaller R would have given: ranks nest.
    """
    gram = columns.mT @ columns
    trace = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    eye = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    factor, _ = torch.linalg.cholesky_ex(gram + 1e-6 * trace[:, None, None] * eye)
    return torch.linalg.solve_triangular(factor, columns.mT, upper=False).mT


def corrected_directions(observed: Tensor, spectrum: Tensor, tokens: int, prior_tokens: int, rank: int) -> Tensor:
    """Directions V [H, D, R] of `(n C_online + n0 C_calib)/(n + n0)` in whitened coordinates (DESIGN.md §4.6).

    Args:
        observed: covariance of the segment, [H, D, D]; `tokens` = n samples stand behind it.
        spectrum: calibrated one, [H, D]; it counts as `prior_tokens` = n0 samples.
    """
    shrunk = (tokens * observed + prior_tokens * torch.diag_embed(spectrum)) / (tokens + prior_tokens)
    columns = shrunk[..., :rank]  # the first iteration from V = I
    for _ in range(ITERATIONS - 1):
        columns = shrunk @ orthonormalise(columns)
    columns = orthonormalise(columns)
    # a second pass: one Cholesky pass loses orthogonality when the energies span many decades
    return orthonormalise(columns)


def code_segment(
    keys: Tensor, basis: KindBasis, ranks: tuple[int, ...], prior_tokens: int, fallback_factor: float
) -> tuple[Tensor, list[HeadCode]]:
    """Choose the basis and rank of every head for one segment.

    The online basis is used where it discards less than the calibrated one would with the same bytes, an own basis costing D·R
    numbers against S numbers for one more direction. A head whose discarded energy exceeds `fallback_factor` times what
    calibration expects is given more directions until it does not (up to all D).

    Args:
        keys: fp32 [H, S, D] after RoPE.
        ranks: planned directions per head.

    Returns:
        the segment's Key means fp32 [H, D], and a `HeadCode` per head.
    """
    heads, tokens, dim = keys.shape
    mean = keys.mean(1)
    z = (keys - mean.unsqueeze(1)) @ basis.encode
    observed = z.mT @ z / tokens
    energy = observed.diagonal(dim1=-2, dim2=-1)  # [H, D] per calibrated direction
    top = max((rank for rank in ranks if rank < dim), default=0)
    directions = corrected_directions(observed, basis.spectrum, tokens, prior_tokens, top) if top else None
    if directions is not None:
        captured = ((observed @ directions) * directions).sum(-2)  # [H, top], energy of each corrected direction
        kept_online = captured.cumsum(-1)
    # one copy to the host for all decisions of the segment
    left = torch.cat([energy.sum(-1, keepdim=True), energy], -1)
    total, calibrated = left[:, 0].tolist(), _tails(energy).tolist()
    expected = _tails(basis.spectrum).tolist()
    online = kept_online.tolist() if directions is not None else None
    codes = []
    for h, rank in enumerate(ranks):
        discarded, own = calibrated[h][rank], False
        if online is not None and 0 < rank < dim:
            price = math.ceil(dim * rank / tokens)
            after = max(total[h] - online[h][rank - 1], 0.0)
            if after < calibrated[h][min(rank + price, dim)]:
                discarded, own = after, True
        bound = fallback_factor * expected[h][rank] + 1e-2
        if fallback_factor > 0 and discarded > bound:
            more = next(r for r in range(rank + RANK_STEP, dim + RANK_STEP, RANK_STEP) if calibrated[h][min(r, dim)] <= bound)
            codes.append(_calibrated_code(basis, h, min(more, dim), own=True, fallback=True))
        elif own:
            v = directions[h, :, :rank]  # type: ignore[index]
            scale = balance(captured[h, :rank].clamp_min(0))
            codes.append(HeadCode(rank, (basis.encode[h] @ v) * scale, (basis.decode[h] @ v) / scale, False))
        else:
            codes.append(_calibrated_code(basis, h, rank, own=False, fallback=False))
    return mean, codes


def code_segment_as_published(keys: Tensor, queries: Tensor, ranks: tuple[int, ...]) -> tuple[Tensor, list[HeadCode]]:
    """RotateK as published: diag(n) C diag(n) of this segment, n the channel norms of the last queries (2605.19218).

    As published, the G query heads of a KV head are averaged before the norm is taken, and nothing is calibrated.

    Args:
        keys: fp32 [H, S, D].
        queries: fp32 [H, G, T, D], the newest queries of this row; the last 32 are used.
    """
    mean = keys.mean(1)
    centred = keys - mean.unsqueeze(1)
    norms = queries[:, :, -PAPER_QUERIES:].mean(1).norm(dim=1)  # [H, D]
    basis = paper(centred.mT @ centred / keys.shape[1], norms)
    decode = basis.decode.float()
    return mean, [HeadCode(rank, decode[h, :, :rank], decode[h, :, :rank], False) for h, rank in enumerate(ranks)]


def _tails(energy: Tensor) -> Tensor:
    """[H, D] -> [H, D + 1]: energy left when the first r directions are kept, r = 0..D."""
    tails = energy.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([tails, torch.zeros_like(tails[:, :1])], -1)


def _calibrated_code(basis: KindBasis, head: int, rank: int, own: bool, fallback: bool) -> HeadCode:
    scale = basis.scale[head, :rank]
    decode = basis.decode[head, :, :rank] / scale if own else None
    return HeadCode(rank, basis.encode[head, :, :rank] * scale, decode, fallback)
