"""Which KV heads this process holds of a model under transformers' tensor parallelism.

Every process holds the same share of each layer's KV heads, in order, and its cache compresses those. Nothing is exchanged for it: bases,
corrections and codes belong to one head each, and the output projection adds up the heads as it does without us.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import RotateKError
from ..geometry import Geometry


@dataclass(frozen=True, slots=True)
class Shard:
    """Part number `rank` of `size` equal parts of every layer's KV heads."""

    rank: int = 0
    size: int = 1

    def heads(self, kv_heads: int) -> slice:
        """The KV heads of this part."""
        own = kv_heads // self.size
        return slice(self.rank * own, (self.rank + 1) * own)


def shard_of(model: nn.Module, geometry: Geometry) -> Shard:
    """The part of the KV heads that this process computes; all of them without tensor parallelism.

    Raises:
        RotateKError: the model was loaded for tensor parallelism but its attention is not split, or not into whole KV heads.
    """
    size = int(getattr(model, "tp_size", None) or 1)
    name = type(model).__name__
    found: set[Shard] = set()
    for module in model.modules():
        index, projection = getattr(module, "layer_idx", None), getattr(module, "k_proj", None)
        if index not in geometry.compressible or projection is None:
            continue
        layer = geometry.layers[int(index)]
        rank, parts = _split(projection.weight)
        size = max(size, parts)
        if parts > 1 and layer.kv_heads % parts:
            raise RotateKError(
                f"{name} has {layer.kv_heads} KV heads in layer {index}, which {parts} processes cannot share; "
                f"use a number of processes that divides {layer.kv_heads}"
            )
        found.add(Shard(rank, parts))
    if size == 1:
        return Shard()
    if found != {Shard(rank, size) for rank in {shard.rank for shard in found}} or len(found) != 1:
        raise RotateKError(
            f"{name} has no tensor-parallel plan for its attention, so each of the {size} processes holds all of it; "
            "load it in one process, or with device_map='auto' over several GPUs"
        )
    return found.pop()


def _split(weight: Tensor) -> tuple[int, int]:
    """(rank, parts) of a Key projection [Hkv·D, hidden] along its heads."""
    placements: Any = getattr(weight, "placements", None)
    if placements is None:
        return 0, 1
    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
    for dimension, placement in enumerate(placements):
        if placement.is_shard(0) and mesh.size(dimension) > 1:
            return mesh.get_local_rank(dimension), mesh.size(dimension)
    return 0, 1
