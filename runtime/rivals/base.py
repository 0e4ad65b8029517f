"""What every rival coder has: the model's geometry, a name, a setting in words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...errors import UsageError
from ...geometry import Geometry, LayerGeometry
from ...kernels.slabs import UNIT
from ..coder import CodedSegment


@dataclass(frozen=True, kw_only=True)
class RivalCoder(ABC):
    """Base of the coders; immutable and shared by all caches (see `runtime.coder.Coder`)."""

    name: str
    geometry: Geometry
    setting: str = ""

    def __deepcopy__(self, memo: dict[int, object]) -> RivalCoder:
        return self  # a copied cache goes on sharing settings and learned state

    @abstractmethod
    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        """As `Coder.code`."""

    @abstractmethod
    def bytes_of(self, tokens: int, layer: int) -> int:
        """As `Coder.bytes_of`."""

    def shape(self, layer: int) -> LayerGeometry:
        return self.geometry.layers[layer]

    def value_heads(self, layer: int) -> tuple[int, ...]:
        """Of a method that codes Keys alone: the heads whose Values are its part `values`, native; all but for leank."""
        return tuple(range(self.shape(layer).kv_heads))


@dataclass(frozen=True, kw_only=True)
class ChannelCoder(RivalCoder):
    """Keeps `channels(D)` Key channels: per head (think) or per token (spark)."""

    keep_ratio: float

    def channels(self, dim: int) -> int:
        """Channels kept of D, at least one."""
        return max(1, int(self.keep_ratio * dim + 1e-6))


@dataclass(frozen=True, kw_only=True)
class RankCoder(RivalCoder):
    """Keeps `rank(D)` directions per head, a multiple of 8."""

    keep_ratio: float

    def rank(self, dim: int) -> int:
        """Directions kept of D: whole steps of 8, at least one."""
        return max(UNIT, int(self.keep_ratio * dim + 1e-6) // UNIT * UNIT)


def require_head_dim(name: str, geometry: Geometry, fits: Callable[[int], bool], needed: str) -> None:
    """Refuse a model whose head dimension a method cannot code.

    Raises:
        UsageError: naming the head dimension and what is needed.
    """
    for index in geometry.compressible:
        if not fits(dim := geometry.layers[index].head_dim):
            raise UsageError(f"{name} needs a head_dim that is {needed}, this model has {dim}; choose another method")
