"""KQ-SVD (arXiv 2512.05916): the rank-r factors of the image's Keys whose logits are nearest to the exact ones, in closed form.

Formula: U [S, r] the first left singular vectors of K Qᵀ, Q the queries of all G heads of the group stacked. The Keys are stored as
K A with A = K⁺ U and the query is multiplied by B = Kᵀ U, so that logits are U Uᵀ K Qᵀ: no other rank-r factors come nearer, by
Eckart and Young. K A is U itself, and K̂ = U (Kᵀ U)ᵀ. Computed by QR of K and Q and the SVD of R_K R_Qᵀ, which is small. Both factors are
native and count for every head and image; Values stay native.
Where it differs: published with A and B from calibration text, once per model and free at run time; here from the image at hand, like
the other methods with a basis per image.
Limits: optimal for the queries it sees, which are those of the call that brought the image: asked after compression, none of them is the
question's. Directions that they leave open (fewer queries than channels) are chosen by Key error. Keys are not centred, as published.
Values are untouched, so at least half of the bytes stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..coder import NATIVE_BYTES, CodedSegment
from .base import RankCoder

OPEN = 1e-3  # weight of Key errors in directions that queries do not settle, against root mean square queries


@dataclass(frozen=True, kw_only=True)
class KqSvdCoder(RankCoder):
    """Never more directions than the segment has tokens."""

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        tokens, dim = keys.shape[1:]
        size = tokens**0.5  # between the factors, so that both have the size of ordinary numbers
        left, right = factors(keys.float(), queries.float().flatten(1, 2), self.rank(dim))
        parts = {"keys": (left * size).to(keys.dtype), "basis": (right / size).to(keys.dtype), "values": values}
        return CodedSegment(tokens, parts, frozenset(parts), _rebuild)

    def bytes_of(self, tokens: int, layer: int) -> int:
        shape = self.shape(layer)
        dim, rank = shape.head_dim, min(self.rank(shape.head_dim), tokens)
        return shape.kv_heads * NATIVE_BYTES * (tokens * (rank + dim) + dim * rank)


def factors(keys: Tensor, queries: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U [H, S, r] and Kᵀ U [H, D, r] for the r largest singular values of K Qᵀ.

    Args:
        keys: fp32 [H, S, D].
        queries: fp32 [H, N, D].
        rank: r; S where that is less.
    """
    columns, rows = torch.linalg.qr(keys)  # [H, S, M], [H, M, D] with M = min(S, D)
    seen = torch.linalg.qr(queries, mode="r").R  # [H, min(N, D), D], with the second moment of the queries
    typical = seen.pow(2).sum((1, 2), keepdim=True).div(keys.shape[-1]).sqrt()
    settled = torch.cat([rows @ seen.mT, OPEN * torch.where(typical > 0, typical, 1.0) * rows], -1)
    turn = torch.linalg.svd(settled, full_matrices=False).U[..., :rank]  # [H, M, r]
    return columns @ turn, rows.mT @ turn


def _rebuild(parts: Mapping[str, Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    return parts["keys"].float() @ parts["basis"].float().mT, parts["values"].float()
