"""Additive second-order statistics of Keys, Values and Queries (DESIGN.md §4.1).

Stored per compressed layer and KV head in fp64; sums over samples and over ranks of a distributed run may simply be added.
Keys and Values are split by token kind; each image (or a row's text) is one *segment* whose mean is kept apart, so that the
covariance within segments and the total one both follow.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .geometry import Geometry


@dataclass(slots=True)
class Moments:
    """Sums by tensor name:

    {i}.{kind}.count [1]; {i}.{kind}.{key,value}_sum [Hkv, D]; _outer [Hkv, D, D], Σ x xᵀ; _mean_outer [Hkv, D, D], Σ over
    segments of n·mean·meanᵀ; {i}.query_outer [Hkv, D, D], Σ over tokens and the G heads of scaling²·q qᵀ; {i}.query_count [1];
    {i}.output_gram [Hkv, D, D], Σ over the group of W_oᵀ W_o (not a sum over samples: set once).
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    documents: int = 0

    def add(self, name: str, value: Tensor) -> None:
        value = value.double().cpu()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def add_segment(self, layer: int, kind: str, keys: Tensor, values: Tensor) -> None:
        """One segment's Keys and Values, each [Hkv, S, D]."""
        prefix, tokens = f"{layer}.{kind}", keys.shape[1]
        self.add(f"{prefix}.count", torch.tensor([tokens]))
        for side, x in (("key", keys), ("value", values)):
            x = x.float()
            total = x.sum(1)
            self.add(f"{prefix}.{side}_sum", total)
            self.add(f"{prefix}.{side}_outer", x.mT @ x)
            self.add(f"{prefix}.{side}_mean_outer", total.unsqueeze(-1) * total.unsqueeze(-2) / tokens)

    def add_queries(self, layer: int, queries: Tensor, scaling: float) -> None:
        """Queries [Hkv, G, T, D] of tokens that read the images."""
        q = queries.float().flatten(1, 2) * scaling
        self.add(f"{layer}.query_outer", q.mT @ q)
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
