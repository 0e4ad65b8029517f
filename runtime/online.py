"""The basis of the segment at hand: corrected by what the segment shows, or as the paper does it.

All of it works in the whitened coordinates z = (k - mean) @ encode of the calibrated basis, where queries have unit second
moment and the calibrated covariance is diag(spectrum): a correction is an orthogonal matrix V there, found by subspace
iterations that start from the calibrated directions (V = I), never by an eigensolver.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bases import paper

ITERATIONS = 2
PAPER_QUERIES = 32  # the published window of queries


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


def published_basis(keys: Tensor, queries: Tensor) -> Tensor:
    """RotateK as published: eigenvectors of diag(n) C diag(n) of this segment, n the channel norms of the last queries (2605.19218).

    As published, the G query heads of a KV head are averaged before the norm is taken, and nothing is calibrated.

    Args:
        keys: fp32 [H, S, D], the segment's mean taken off.
        queries: fp32 [H, G, T, D], the newest queries of this row; the last 32 are used.

    Returns:
        orthonormal columns fp32 [H, D, D], most important first.
    """
    norms = queries[:, :, -PAPER_QUERIES:].mean(1).norm(dim=1)  # [H, D]
    return paper(keys.mT @ keys / keys.shape[1], norms).decode.float()
