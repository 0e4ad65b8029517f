"""An artifact made ready for decoding: bases on the device, in the compute dtype, and the plan of every head."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..artifact import Artifact, Method
from ..bases import balance
from ..errors import RotateKError
from ..geometry import LayerGeometry
from ..kernels.slabs import Slabs
from ..plan import SIDES, HeadPlan, own_part_bytes
from ..token_budget import kept_tokens
from ..usual import legible
from .coder import Coder
from .rounding_error import expected_errors, usual_ratios
from .scales import calibrated_scales, merged_scales
from .tensor_parallel import Shard


@dataclass(frozen=True, slots=True)
class SideBasis:
    """Calibrated basis of the Keys or the Values of one layer and token kind. H = KV heads.

    encode fp32 [H, D, D]: whitened coordinates times `balance` (bases.py), z = (x - mean) @ encode; decode fp32 [H, D, D], its inverse
    transposed; spectrum fp64 [H, D] on the CPU, energies in whitened coordinates; mean, balance fp32 [H, D].
    slabs: the plan. plan_scales: bf16 [H, D] for its codes where their energies are the calibrated ones.
    expected: by head, the energy that the plan discards on the calibration data, coding errors included; usual: how many times as much
    single calibration documents discard at most, 1 where that is not known.
    angles: fp64 [H, 2], mean and deviation of the angle between calibration images and the leading directions (usual.py), or None;
    an infinite deviation where the compute dtype is too coarse for the angle.
    number: which of the layer's shared matrices this is.
    """

    encode: Tensor
    decode: Tensor
    spectrum: Tensor
    mean: Tensor
    balance: Tensor
    slabs: tuple[Slabs, ...]
    plan_scales: Tensor
    expected: tuple[float, ...]
    number: int
    usual: tuple[float, ...]
    angles: np.ndarray | None

    @property
    def scale_starts(self) -> np.ndarray:
        """Where in `kept_scales` each head's begin, and where the last one's end: int64 [H + 1]."""
        return np.cumsum([0, *(0 if slabs.native == self.encode.shape[-1] else slabs.rank for slabs in self.slabs)])

    def kept_scales(self) -> Tensor:
        """What a cache keeps of `plan_scales` once something is written in them: bf16 [N], of each head those of its plan's directions."""
        sizes = np.diff(self.scale_starts).tolist()
        return torch.cat([scales[:size] for scales, size in zip(self.plan_scales, sizes, strict=True)])


@dataclass(frozen=True, slots=True)
class KindBasis:
    """Both sides of one token kind."""

    key: SideBasis
    value: SideBasis

    @property
    def sides(self) -> tuple[SideBasis, SideBasis]:
        return self.key, self.value


@dataclass(frozen=True, slots=True)
class PreparedLayer:
    """Everything one cache layer needs; immutable and shared by all caches of a model.

    bases: compute dtype, flat [N, H, D, D]: balanced decode matrices of all kinds and sides, by `SideBasis.number`; means: fp32, flat
    [N, H, D]. A segment that uses the calibrated basis names a place in them; they belong to no sequence.
    tokens_per_own: tokens for which the KV budget has room for one set of own means and scales; 0 without a budget.
    """

    geometry: LayerGeometry
    plan: tuple[HeadPlan, ...]
    kinds: dict[str, KindBasis]
    method: Method
    bases: Tensor
    means: Tensor
    tokens_per_own: float = 0.0

    def side(self, number: int) -> SideBasis:
        """The side with this number."""
        return next(side for kind in self.kinds.values() for side in kind.sides if side.number == number)

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
        from .rivals.registry import PROMISED_FROM, RIVALS, make_coder  # the rivals import this package's modules

        tokens = kept_tokens(PROMISED_FROM, method.token_keep_ratio)
        by_ratio = method.kv_budget is None and name in RIVALS and "keep_ratio" in RIVALS[name].settings
        ratio, state = method.keep_ratio if by_ratio else None, {"knockout": self.artifact.knockout()}
        return make_coder(name, self.artifact.geometry, kv_budget=method.kv_budget, keep_ratio=ratio, state=state, tokens=tokens)

    def plain_layer(self, index: int) -> PreparedLayer:
        """What a layer needs that a rival codes: geometry and window, no bases."""
        if self.shard.size > 1:
            raise RotateKError("rivals need all heads in one process; load the model without tensor parallelism to compare them")
        nothing = torch.empty(0)
        return PreparedLayer(self.artifact.geometry.layers[index], (), {}, self.artifact.method, nothing, nothing)

    def layer(self, index: int, device: torch.device, dtype: torch.dtype) -> PreparedLayer:
        key = (index, device, dtype)
        if key not in self._layers:
            self._layers[key] = self._prepare(index, device, dtype)
        return self._layers[key]

    @cached_property
    def tokens_per_own(self) -> float:
        """See `PreparedLayer`: means and scales of one segment, over what the budget leaves of each token beside codes and raw tokens."""
        escaping = self.artifact.method.escape_ratio
        budget, geometry, plan = self.artifact.method.kv_budget, self.artifact.geometry, self.artifact.plan()
        if budget is None:
            return 0.0
        parts = sum(own_part_bytes(head, geometry.layers[i].head_dim) for i, heads in plan.items() for head in heads)
        codes = sum(head.bytes_per_token for heads in plan.values() for head in heads)
        left = (budget - escaping) * geometry.dense_bytes_per_token() - (1 - escaping) * codes
        return parts / left if left > 0 else math.inf if parts else 0.0

    def _prepare(self, index: int, device: torch.device, dtype: torch.dtype) -> PreparedLayer:
        artifact = self.artifact
        geometry = artifact.geometry.layers[index]
        own = self.shard.heads(geometry.kv_heads)
        plan = tuple(artifact.plan()[index][own])
        made: dict[str, list[SideBasis]] = {}
        for kind in artifact.method.kinds:
            for side in SIDES:
                number = sum(len(sides) for sides in made.values())
                slabs = tuple(getattr(head, side) for head in plan)
                made.setdefault(kind, []).append(_side(artifact, f"layers.{index}.{kind}.{side}", own, slabs, number, device, dtype))
        sides = [side for pair in made.values() for side in pair]
        local = replace(geometry, query_heads=geometry.query_heads // self.shard.size, kv_heads=geometry.kv_heads // self.shard.size)
        return PreparedLayer(
            geometry=local,
            plan=plan,
            kinds={kind: KindBasis(*pair) for kind, pair in made.items()},
            method=artifact.method,
            bases=torch.cat([side.decode.reshape(-1) for side in sides]).to(dtype),
            means=torch.cat([side.mean.reshape(-1) for side in sides]),
            tokens_per_own=self.tokens_per_own,
        )


def _side(
    artifact: Artifact, prefix: str, own: slice, slabs: tuple[Slabs, ...], number: int, device: torch.device, dtype: torch.dtype
) -> SideBasis:
    # eigenvectors that were never written to a file lie column by column; kernels read rows
    encode = artifact.tensors[f"{prefix}_encode"][own].double().contiguous()
    # made here, not stored: exactly the inverse of what was stored (DESIGN.md §5)
    decode = torch.linalg.inv(encode).mT
    spectrum = artifact.tensors[f"{prefix}_spectrum"][own].double().cpu()
    scale = balance(spectrum.to(encode.device))
    expected = expected_errors(spectrum, slabs)
    known = (artifact.tensors.get(f"{prefix}_{name}") for name in ("tail_ratio", "code_ratio", "angle"))
    tails, codes, angles = (None if found is None else found[own] for found in known)
    scales = {bits: calibrated_scales(spectrum.to(encode.device), scale, bits).to(device) for bits in (8, 4)}
    return SideBasis(
        encode=(encode * scale.unsqueeze(-2)).to(device, torch.float32),
        decode=(decode / scale.unsqueeze(-2)).to(device, torch.float32),
        spectrum=spectrum,
        mean=artifact.tensors[f"{prefix}_mean"][own].to(device, torch.float32).contiguous(),
        balance=scale.to(device, torch.float32),
        slabs=slabs,
        plan_scales=merged_scales(scales, slabs),
        expected=tuple(expected.tolist()),
        number=number,
        usual=tuple(usual_ratios(spectrum, slabs, tails, codes)),
        angles=None if angles is None else legible(angles.double().cpu().numpy(), torch.finfo(dtype).eps),
    )
