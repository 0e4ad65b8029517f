"""Additive second-order statistics of Keys, Values and Queries (DESIGN.md §4.1).

Summed per compressed layer and KV head in fp64, on the device that computes the layer: a transfer per layer and document would cost as
much as the forward pass. Sums over samples and over processes of a distributed run may simply be added (`added`).
Keys and Values are split by token kind; each image (or a row's text) is one *segment* whose mean is kept apart, so that the
covariance within segments and the total one both follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .geometry import Geometry


@dataclass(slots=True)
class Moments:
    """Sums by tensor name:

    {i}.{kind}.count [1]; {i}.{kind}.{key,value}_sum [Hkv, D]; _outer [Hkv, D, D], Σ x xᵀ; _mean_outer [Hkv, D, D], Σ over
    segments of n·mean·meanᵀ (images only: text has its total covariance); {i}.query_outer [Hkv, D, D], Σ over tokens and the G
    heads of scaling²·q qᵀ; {i}.query_count [1]; {i}.output_gram [Hkv, D, D], Σ over the group of W_oᵀ W_o (not a sum over samples:
    set once).

    Every matrix is exactly symmetric, so that half of it is enough to keep (`packed`).
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    documents: int = 0

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum, never in place: a copy of the dictionary stays what it was."""
        value = value.double()
        if name in self.sums:
            value = self.sums[name].to(value.device) + value
        self.sums[name] = value

    def on_cpu(self) -> Moments:
        """The same sums, all in main memory."""
        return Moments({name: value.cpu() for name, value in self.sums.items()}, self.documents)

    def packed(self) -> dict[str, Tensor]:
        """What a file keeps: the sums in main memory, of matrices the upper half [Hkv, D (D + 1) / 2], bit for bit."""
        return {name: _half(value.cpu()) if _is_matrix(name) else value.cpu() for name, value in self.sums.items()}

    @classmethod
    def unpacked(cls, stored: Mapping[str, Tensor], documents: int) -> Moments:
        """Inverse of `packed`."""
        return cls({name: _whole(value) if _is_matrix(name) and value.dim() == 2 else value for name, value in stored.items()}, documents)

    def add_segment(self, layer: int, kind: str, keys: Tensor, values: Tensor) -> None:
        """One image's Keys and Values, each [Hkv, S, D]; or any text's."""
        prefix, tokens = f"{layer}.{kind}", keys.shape[1]
        self.add(f"{prefix}.count", torch.tensor([tokens]))
        x = torch.stack([keys, values]).float().flatten(0, 1)  # one product for both
        total = x.sum(1)
        outer, means = gram(x), total.unsqueeze(-1) * total.unsqueeze(-2) / tokens
        for half, side in zip((slice(0, len(keys)), slice(len(keys), None)), ("key", "value"), strict=True):
            self.add(f"{prefix}.{side}_sum", total[half])
            self.add(f"{prefix}.{side}_outer", outer[half])
            if kind == "visual":
                self.add(f"{prefix}.{side}_mean_outer", means[half])

    def add_queries(self, layer: int, queries: Tensor, scaling: float) -> None:
        """Queries [Hkv, G, T, D] of tokens that read the images."""
        q = queries.float().flatten(1, 2) * scaling
        self.add(f"{layer}.query_outer", gram(q))
        self.add(f"{layer}.query_count", torch.tensor([queries.shape[2]]))

    def mean(self, layer: int, kind: str, side: str) -> Tensor:
        """Mean [Hkv, D] over all tokens of a kind."""
        return self.sums[f"{layer}.{kind}.{side}_sum"] / self.sums[f"{layer}.{kind}.count"]

    def covariance(self, layer: int, kind: str, side: str) -> Tensor:
        """Covariance [Hkv, D, D]: within images for visual tokens (each image carries its own mean), total for text."""
        prefix = f"{layer}.{kind}"
        count = self.sums[f"{prefix}.count"]
        outer = self.sums[f"{prefix}.{side}_outer"] / count
        if kind == "visual":
            return outer - self.sums[f"{prefix}.{side}_mean_outer"] / count
        mean = self.mean(layer, kind, side)
        return outer - mean.unsqueeze(-1) * mean.unsqueeze(-2)

    def query_moment(self, layer: int) -> Tensor:
        """M_q [Hkv, D, D]: second moment of the scaled queries per token, summed over the group (never averaged: signs cancel)."""
        return self.sums[f"{layer}.query_outer"] / self.sums[f"{layer}.query_count"]

    def output_gram(self, layer: int) -> Tensor:
        """Σ over the group of W_oᵀ W_o [Hkv, D, D]: how much an error in a head's output matters to the residual stream."""
        return self.sums[f"{layer}.output_gram"]

    def missing(self, geometry: Geometry, kinds: tuple[str, ...]) -> str | None:
        """What the statistics lack for a compilation, in words."""
        for layer in geometry.compressible:
            for kind in kinds:
                if f"{layer}.{kind}.count" not in self.sums:
                    return f"layer {layer} saw no {kind} tokens"
            if f"{layer}.query_count" not in self.sums:
                return f"layer {layer} saw no queries after the images"
        for name, value in self.sums.items():
            if not bool(torch.isfinite(value).all()):
                return f"statistic {name} is not finite; the model overflows in this dtype"
        return None


def gram(x: Tensor) -> Tensor:
    """Σ x xᵀ over the rows of x [H, T, D], fp64 [H, D, D]; a matrix product rounds its two halves differently, this has them equal."""
    product = (x.mT @ x).double()
    return (product + product.mT) / 2


def _is_matrix(name: str) -> bool:
    return name.endswith(("_outer", ".output_gram"))


def _half(matrix: Tensor) -> Tensor:
    row, column = torch.triu_indices(matrix.shape[-1], matrix.shape[-1])
    return matrix[..., row, column]


def _whole(half: Tensor) -> Tensor:
    dim = math.isqrt(2 * half.shape[-1])  # dim² < 2 · dim (dim + 1) / 2 < (dim + 1)²
    row, column = torch.triu_indices(dim, dim)
    matrix = half.new_zeros(*half.shape[:-1], dim, dim)
    matrix[..., row, column] = half
    matrix[..., column, row] = half
    return matrix
