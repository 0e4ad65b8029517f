"""LeanK (arXiv 2508.02215) without its training: one static mask of Key channels per head, whose widths are multiples of 32.

Formula: score of channel d of a head, E[q_d²] · E[k_d²] over calibration documents (queries of the group summed, Keys of images after RoPE,
not centred): its expected squared share of a logit. Of the Keys an artifact has the variance within images and the mean of all, so E[k_d²]
is here their sum, without the variance of the images' means. The ratio · all channels of largest score are kept, one threshold for the
whole model; then each head's number is rounded to the nearest multiple of 32 (0, 32, ... D) and that many of its best channels stay,
native. Others are zero. Values stay native. The mask belongs to the artifact, as our bases do, and counts for no image.
Where it differs: published masks are learned, 2,000 steps through the loss of hidden states on answer tokens and 200 with the mask binary;
this one is what calibrated moments say, so it shows the structure (static, head-wise, steps of 32) and not the learning. There a head of
width 0 leaves the softmax, Keys and Values; a coder returns a Key and a Value for every token, so here it keeps the mean Key and the mean
Value of each image (fp32, counted): equal Keys weigh all tokens alike, of which the mean Value is the exact result.
Limits: the mask cannot follow a page. Published ratios are 0.3 to 0.4; at 1/8 most heads round to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ...errors import UsageError
from ...geometry import Geometry
from ..coder import NATIVE_BYTES, CodedSegment
from .base import RivalCoder
from .head_drop import MEAN_BYTES

STEP = 32  # published rounding of a head's width

NO_ENERGY = "leank needs calibrated energies of the channels and layer {layer} has none; evaluate it beside an artifact of basis two-sided"

Mask = tuple[int, ...]  # channels kept, ascending


@dataclass(frozen=True, kw_only=True)
class LeanKCoder(RivalCoder):
    """Keeps `masks[layer][head]`."""

    masks: Mapping[int, tuple[Mask, ...]] = field(repr=False)

    def value_heads(self, layer: int) -> tuple[int, ...]:
        return tuple(h for h, mask in enumerate(self.masks[layer]) if mask)

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        masks = self.masks[layer]
        off = [h for h, mask in enumerate(masks) if not mask]
        parts = {f"keys{h}": keys[h][:, list(mask)] for h, mask in enumerate(masks) if mask}  # [S, C]
        native = frozenset({*parts, "values"})
        parts |= {"values": values[list(self.value_heads(layer))]}
        parts |= {"key_mean": keys[off].float().mean(1), "value_mean": values[off].float().mean(1)}
        return CodedSegment(keys.shape[1], parts, native, partial(_rebuild, masks=masks))

    def bytes_of(self, tokens: int, layer: int) -> int:
        dim, masks = self.shape(layer).head_dim, self.masks[layer]
        return sum(NATIVE_BYTES * tokens * (len(mask) + dim) if mask else MEAN_BYTES * dim for mask in masks)


def lean_masks(
    geometry: Geometry, ratio: float, energy: Mapping[int, Tensor] | None, missing: str = NO_ENERGY
) -> dict[int, tuple[Mask, ...]]:
    """Channels that each head keeps of a share `ratio` of all.

    Args:
        energy: by layer, the score of every channel, [Hkv, D]; may be missing only where nothing is kept.
        missing: what is said then, of a `{layer}`.

    Raises:
        UsageError: scores are missing, of another shape or not finite.
    """
    layers = {i: geometry.layers[i] for i in geometry.compressible}
    total = sum(shape.kv_heads * shape.head_dim for shape in layers.values())
    count = int(ratio * total + 1e-6)
    if not count:
        return {i: ((),) * shape.kv_heads for i, shape in layers.items()}
    scores = {i: _checked(energy, i, (shape.kv_heads, shape.head_dim), missing) for i, shape in layers.items()}
    found = {}
    for (i, score), mask in zip(scores.items(), largest(list(scores.values()), count), strict=True):
        widths = (mask.sum(-1) + STEP // 2) // STEP * STEP
        best = score.argsort(dim=-1, descending=True, stable=True)
        found[i] = tuple(tuple(sorted(row[: min(width, len(row))])) for row, width in zip(best.tolist(), widths.tolist(), strict=True))
    return found


def largest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """The `count` largest numbers of all tensors together: bool of the same shapes; of equal ones the first."""
    order = torch.cat([score.flatten() for score in scores]).argsort(descending=True, stable=True)
    kept = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    kept[order[:count]] = True
    return [mask.view_as(score) for score, mask in zip(scores, kept.split([score.numel() for score in scores]), strict=True)]


def width_words(masks: Mapping[int, tuple[Mask, ...]], geometry: Geometry) -> str:
    """How many channels of how many are kept, over all heads."""
    kept = sum(len(mask) for heads in masks.values() for mask in heads)
    return f"{kept} of {sum(geometry.layers[i].kv_heads * geometry.layers[i].head_dim for i in masks)} channels"


def _checked(energy: Mapping[int, Tensor] | None, layer: int, shape: tuple[int, int], missing: str) -> Tensor:
    if energy is None or layer not in energy:
        raise UsageError(missing.format(layer=layer))
    score = energy[layer].double().cpu()
    if score.shape != shape or not bool(score.isfinite().all()):
        raise UsageError(f"the energies of layer {layer} must be finite numbers {list(shape)}, got {list(score.shape)}; compile it again")
    return score


def _rebuild(parts: Mapping[str, Tensor], tokens: int, masks: tuple[Mask, ...]) -> tuple[Tensor, Tensor]:
    dim, device = parts["value_mean"].shape[-1], parts["value_mean"].device
    keys, values = (torch.zeros(len(masks), tokens, dim, device=device) for _ in range(2))
    on, off = ([h for h, mask in enumerate(masks) if bool(mask) == wanted] for wanted in (True, False))
    for h in on:
        keys[h][:, list(masks[h])] = parts[f"keys{h}"].float()
    values[on] = parts["values"].float()
    keys[off], values[off] = parts["key_mean"].unsqueeze(1), parts["value_mean"].unsqueeze(1)
    return keys, values
