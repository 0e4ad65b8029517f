"""An artifact made ready for decoding: bases on the device, in the compute dtype, cut to the plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..artifact import Artifact, Method
from ..errors import RotateKError
from ..geometry import LayerGeometry
from .coder import Coder
from .tensor_parallel import Shard


def balance(energy: Tensor) -> Tensor:
    """Scale per direction that gives Key codes and rotated queries like size (free to choose, DESIGN.md §4.3).

    In whitened coordinates a direction has query variance 1 and Key variance `energy` [..., R]; scaling codes by
    energy^{-1/4} and queries by its inverse makes both energy^{1/2}, which keeps fp16 codes away from overflow and underflow.
    """
    floor = 1e-6 * energy.amax(-1, keepdim=True).clamp_min(1e-12)
    return energy.maximum(floor) ** -0.25


@dataclass(frozen=True, slots=True)
class KindBasis:
    """Calibrated basis of one layer and token kind, whitened (bases.py). H = KV heads.

    encode, decode: fp32 [H, D, D]; spectrum fp32 [H, D]; mean fp32 [H, D].
    shared: flat pool in the compute dtype with the balanced decode [D, R_h] of every head at `offsets[h]`, row stride R_h;
    `scale` fp32 [H, D] is the balance that the codes need.
    """

    kind: str
    encode: Tensor
    decode: Tensor
    spectrum: Tensor
    mean: Tensor
    scale: Tensor
    shared: Tensor
    offsets: np.ndarray


@dataclass(frozen=True, slots=True)
class PreparedLayer:
    """Everything one cache layer needs; immutable and shared by all caches of a model."""

    geometry: LayerGeometry
    ranks: tuple[int, ...]
    kinds: dict[str, KindBasis]
    method: Method

    def __deepcopy__(self, memo: dict[int, object]) -> PreparedLayer:
        return self  # a copied cache goes on sharing the artifact


class PreparedArtifact:
    """Lazily prepares layers on the device and dtype of the Keys they first meet (accelerate may spread layers).

    Under tensor parallelism only the KV heads of `shard`: shapes below have their number.
    """

    def __init__(self, artifact: Artifact, shard: Shard | None = None) -> None:
        self.artifact, self.shard = artifact, shard or Shard()
        self._layers: dict[tuple[int, torch.device, torch.dtype], PreparedLayer] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> PreparedArtifact:
        return self  # a copied cache goes on sharing the artifact

    @cached_property
    def coder(self) -> Coder | None:
        """The rival method this artifact was compiled for; None for our own.

        Raises:
            UsageError: the artifact names a rival or a setting that does not exist.
        """
        method = self.artifact.method
        if (name := method.rival) is None:
            return None
        from .rivals.registry import RIVALS, make_coder  # the rivals import this module, through online.py

        by_ratio = method.kv_budget is None and name in RIVALS and "keep_ratio" in RIVALS[name].settings
        ratio, state = method.keep_ratio if by_ratio else None, {"knockout": self.artifact.knockout()}
        return make_coder(name, self.artifact.geometry, kv_budget=method.kv_budget, keep_ratio=ratio, state=state)

    def plain_layer(self, index: int) -> PreparedLayer:
        """What a layer needs that a rival codes: geometry and window, no bases."""
        if self.shard.size > 1:
            raise RotateKError("rivals need all heads in one process; load the model without tensor parallelism to compare them")
        return PreparedLayer(self.artifact.geometry.layers[index], (), {}, self.artifact.method)

    def layer(self, index: int, device: torch.device, dtype: torch.dtype) -> PreparedLayer:
        key = (index, device, dtype)
        if key not in self._layers:
            self._layers[key] = self._prepare(index, device, dtype)
        return self._layers[key]

    def _prepare(self, index: int, device: torch.device, dtype: torch.dtype) -> PreparedLayer:
        artifact = self.artifact
        geometry = artifact.geometry.layers[index]
        own = self.shard.heads(geometry.kv_heads)
        ranks = tuple(artifact.ranks()[index][own])
        kinds = {}
        for kind in artifact.method.kinds:
            prefix = f"layers.{index}.{kind}.key"
            encode = artifact.tensors[f"{prefix}_encode"][own].double()
            # made here, not stored: exactly the inverse of what was stored (DESIGN.md §5)
            decode = torch.linalg.inv(encode).mT
            spectrum = artifact.tensors[f"{prefix}_spectrum"][own].float()
            scale = balance(spectrum)
            balanced = decode / scale.unsqueeze(-2)
            parts = [balanced[h, :, :rank].reshape(-1) for h, rank in enumerate(ranks)]
            sizes = [part.numel() for part in parts]
            kinds[kind] = KindBasis(
                kind=kind,
                encode=encode.to(device, torch.float32),
                decode=decode.to(device, torch.float32),
                spectrum=spectrum.to(device),
                mean=artifact.tensors[f"{prefix}_mean"][own].to(device, torch.float32),
                scale=scale.to(device, torch.float32),
                shared=torch.cat(parts).to(device, dtype),
                offsets=np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64),
            )
        local = replace(geometry, query_heads=geometry.query_heads // self.shard.size, kv_heads=geometry.kv_heads // self.shard.size)
        return PreparedLayer(local, ranks, kinds, artifact.method)
