"""RotateK as published (arXiv 2605.19218): a basis per image from its own Keys and the last queries, uniform rank, native Values.

Formula: R = first r eigenvectors of diag(n) C diag(n), C the segment's Key covariance, n the channel norms of the last 32 queries;
kept are (K - mean) R, R [D, r] and the mean, and K̂ = mean + (K - mean) R Rᵀ. Codes and R are native, the mean is fp32 as in our
own cache (published: codes uncentred and a bias vector of the same size; the same product).
Limits: exact eigenvectors in place of the published five subspace iterations, which its authors found equal. Values are native, so
at least half of the bytes stay; R and the mean of every image count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..coder import NATIVE_BYTES, CodedSegment
from ..online import published_basis
from .base import RankCoder


@dataclass(frozen=True, kw_only=True)
class PaperCoder(RankCoder):
    """The leading directions of the image itself."""

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        exact = keys.float()
        mean = exact.mean(1)
        centred = exact - mean.unsqueeze(1)
        basis = published_basis(centred, queries.float())[..., : self.rank(keys.shape[-1])]  # [H, D, R]
        codes = centred @ basis
        parts = {"keys": codes.to(keys.dtype), "basis": basis.to(keys.dtype), "mean": mean, "values": values}
        return CodedSegment(keys.shape[1], parts, frozenset({"keys", "basis", "values"}), _rebuild)

    def bytes_of(self, tokens: int, layer: int) -> int:
        shape = self.shape(layer)
        dim, rank = shape.head_dim, self.rank(shape.head_dim)
        return shape.kv_heads * (NATIVE_BYTES * (tokens * (rank + dim) + dim * rank) + 4 * dim)


def _rebuild(parts: Mapping[str, Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    keys = parts["mean"].unsqueeze(1) + parts["keys"].float() @ parts["basis"].float().mT
    return keys, parts["values"].float()
