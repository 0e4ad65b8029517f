"""What RAP keeps: RoPE pairs of Keys and Queries, a low-rank factor of Values, as linear maps per head (RAP, arXiv 2602.02599).

Every map acts on what a projection puts out, so it folds into the weights: `W_k' = key @ W_k` for the rows of a head, `W_o' = W_o @ output`
for its columns. The pruned model then computes with the smaller weights alone; nothing is reconstructed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .artifact_config import AGAIN
from .errors import ArtifactError
from .geometry import Geometry, LayerGeometry

Option = str | int | float | bool | None
PAIR_STEP = 8  # pairs; Keys of a multiple of 16 channels keep attention kernels fast
VALUE_STEP = 8  # directions
MAPS = ("key", "query", "value", "output")


class Widths(NamedTuple):
    """What one layer keeps: m pairs and r Value channels per KV head; whether the mean correction gives its output projection a bias."""

    pairs: int
    value: int
    output_bias: bool = False


@dataclass(frozen=True, slots=True)
class RapLayer:
    """One text layer. D head_dim, m kept pairs per KV head, r Value width; pair p = channels p and p + D/2 (rotate-half layout).

    Query head h reads KV head h // G and has its pairs.
    """

    pairs: Tensor  # int64 [Hkv, m], ascending
    key: Tensor  # fp32 [Hkv, 2m, D]: k' = key @ k, before RoPE; channels j and j + m of k' are the pair pairs[h, j]
    query: Tensor  # fp32 [Hq, 2m, D]: q' = query @ q, before RoPE
    value: Tensor  # fp32 [Hkv, r, D]: v' = value @ v
    output: Tensor  # fp32 [Hq, D, r]: W_o'[:, head] = W_o[:, head] @ output
    bias: Tensor | None = None  # fp32 [hidden], added to the attention output (mean correction); None: none

    @property
    def kept_pairs(self) -> int:
        """m."""
        return self.pairs.shape[-1]

    @property
    def value_width(self) -> int:
        """r."""
        return self.value.shape[-2]

    @property
    def widths(self) -> Widths:
        """Both, and whether there is a bias."""
        return Widths(self.kept_pairs, self.value_width, self.bias is not None)


@dataclass(frozen=True, slots=True)
class RapPlan:
    """Every text layer of a model, a layer that is left as it is included (m = D/2, r = D, identities)."""

    layers: dict[int, RapLayer]
    options: dict[str, Option] = field(default_factory=dict)  # keep_ratio, score, budget, repair, recover: how it was made

    def keep_ratio(self, geometry: Geometry) -> float:
        """Share of the numbers of Keys and Values that are kept: sum of Hkv·(2m + r) over sum of Hkv·2D."""
        kept = sum(geometry.layers[i].kv_heads * (2 * layer.kept_pairs + layer.value_width) for i, layer in self.layers.items())
        return kept / sum(2 * layer.kv_heads * layer.head_dim for layer in geometry.layers)

    def tensors(self) -> dict[str, Tensor]:
        """By name: `layers.{i}.pairs` int64, `.key`, `.query`, `.value`, `.output` and, where there is one, `.bias` float32."""
        found: dict[str, Tensor] = {}
        for i, layer in self.layers.items():
            found[f"layers.{i}.pairs"] = layer.pairs.to(torch.int64).contiguous()
            for name in (*MAPS, *(("bias",) if layer.bias is not None else ())):
                found[f"layers.{i}.{name}"] = getattr(layer, name).to(torch.float32).contiguous()
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], options: Mapping[str, Option]) -> RapPlan:
        """Inverse of `tensors`; `check` says whether it fits a model.

        Raises:
            ArtifactError: a name that is none of a plan, or a layer that lacks one.
        """
        parts: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            head, _, rest = name.partition(".")
            index, _, part = rest.partition(".")
            if head != "layers" or not index.isdecimal() or part not in ("pairs", *MAPS, "bias"):
                raise ArtifactError(f"tensor {name[:80]!r} is none of a RAP plan's; {AGAIN}")
            parts.setdefault(int(index), {})[part] = tensor
        for i, found in parts.items():
            if missing := [part for part in ("pairs", *MAPS) if part not in found]:
                raise ArtifactError(f"tensor layers.{i}.{missing[0]} of the RAP plan is missing; {AGAIN}")
        return cls({i: RapLayer(**parts[i]) for i in sorted(parts)}, dict(options))

    def check(self, geometry: Geometry) -> None:
        """That the plan is one of this model.

        Raises:
            ArtifactError: one sentence naming the layer, the tensor, the value seen and what to do.
        """
        if list(self.layers) != list(range(len(geometry.layers))):
            raise ArtifactError(f"the RAP plan has layers {list(self.layers)[:8]}, the model {len(geometry.layers)}; {AGAIN}")
        for i, layer in self.layers.items():
            _check_layer(layer, geometry.layers[i], f"layer {i} of the RAP plan")


def _check_layer(layer: RapLayer, shape: LayerGeometry, where: str) -> None:
    check_pairs(layer.pairs, shape, where)
    dim, pairs, width = shape.head_dim, layer.kept_pairs, layer.value_width
    if not 1 <= width <= dim:
        raise ArtifactError(f"{where} keeps Values of width {width}, expected 1 to {dim}; {AGAIN}")
    expected = {
        "key": (shape.kv_heads, 2 * pairs, dim),
        "query": (shape.query_heads, 2 * pairs, dim),
        "value": (shape.kv_heads, width, dim),
        "output": (shape.query_heads, dim, width),
    }
    for name, wanted in expected.items():
        if (seen := tuple(getattr(layer, name).shape)) != wanted:
            raise ArtifactError(f"{where}: {name} has shape {list(seen)}, expected {list(wanted)}; {AGAIN}")
    if layer.bias is not None and layer.bias.dim() != 1:
        raise ArtifactError(f"{where}: bias has shape {list(layer.bias.shape)}, expected one number per hidden channel; {AGAIN}")
    for name in (*MAPS, "bias"):
        tensor = getattr(layer, name)
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{where}: {name} has numbers that are not finite; {AGAIN}")


def check_pairs(pairs: Tensor, shape: LayerGeometry, where: str) -> None:
    """That every KV head keeps the same number of pairs, each once, in ascending order.

    Args:
        pairs: int [Hkv, m].
        where: names the layer in messages.

    Raises:
        ArtifactError: one sentence.
    """
    half = shape.head_dim // 2
    if shape.head_dim % 2 or pairs.dim() != 2 or pairs.shape[0] != shape.kv_heads or not 1 <= pairs.shape[1] <= half:
        wanted = f"[{shape.kv_heads}, 1 to {half}]"
        raise ArtifactError(f"{where}: pairs has shape {list(pairs.shape)}, expected {wanted}; {AGAIN}")
    if pairs.is_floating_point() or pairs.dtype == torch.bool:
        raise ArtifactError(f"{where}: pairs is {str(pairs.dtype).removeprefix('torch.')}, expected whole numbers; {AGAIN}")
    low, high = int(pairs.min()), int(pairs.max())
    if low < 0 or high >= half:
        raise ArtifactError(f"{where}: pair {low if low < 0 else high} is out of range, expected 0 to {half - 1}; {AGAIN}")
    if bool((pairs.diff(dim=1) <= 0).any()):
        raise ArtifactError(f"{where}: the pairs of a head are doubled or not ascending; {AGAIN}")


def selection(pairs: Tensor, dim: int) -> Tensor:
    """Maps that keep pairs as they are, fp32 [H, 2m, D]: row j is channel pairs[h, j], row j + m channel pairs[h, j] + D/2."""
    return torch.nn.functional.one_hot(torch.cat([pairs, pairs + dim // 2], dim=1).to(torch.int64), dim).float()


def unpruned(shape: LayerGeometry) -> RapLayer:
    """A layer that stays as it is."""
    dim = shape.head_dim
    eye = torch.eye(dim)
    return RapLayer(
        pairs=torch.arange(dim // 2).repeat(shape.kv_heads, 1),
        key=eye.repeat(shape.kv_heads, 1, 1),
        query=eye.repeat(shape.query_heads, 1, 1),
        value=eye.repeat(shape.kv_heads, 1, 1),
        output=eye.repeat(shape.query_heads, 1, 1),
    )
