"""KL of many whole plans on prefilled documents: all of them are rows of one forward call over a cache that each plan has rewritten.

`Cutter.kl_each` shares the prefilled cache between cuts, which pays where a cut touches one head. A whole plan touches all of them, so
here every plan has Keys and Values of its own, and each segment is coded once at every precision for all plans together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .batches import join, positions
from .cutter import Cutter, Prefilled
from .kernels.codes import clipped_scales, rounded
from .kernels.slabs import Slabs
from .plan import SIDES, Plan
from .recoding import CodingBasis, Run

ROOM = {"cpu": 2**28, "cuda": 2**33}  # bytes of Keys and Values that the plans of one forward call may have


@torch.inference_mode()
def kl_of_plans(cutter: Cutter, doc: Prefilled, plans: Sequence[Plan]) -> Tensor:
    """KL(dense || plan) of each plan, summed over each document's answer tokens: fp64 [N, B] on the CPU, up to rounding `kl_each`'s."""
    step = max(1, ROOM[cutter.device.type] // max(1, doc.bytes()))
    return torch.cat([_some(cutter, doc, plans[start : start + step]) for start in range(0, len(plans), step)])


def _some(cutter: Cutter, doc: Prefilled, plans: Sequence[Plan]) -> Tensor:
    count, rest = len(plans), cutter.rest(doc)
    where = positions(doc.items, doc.prefix.mask.sum(1).tolist(), rest.mask)
    logits = cutter.model(
        input_ids=rest.ids.repeat(count, 1).to(cutter.device),
        attention_mask=join(doc.prefix, rest).mask.repeat(count, 1).to(cutter.device),
        position_ids=where.repeat(*(1,) * (where.dim() - 2), count, 1).to(cutter.device),
        past_key_values=_rewritten(cutter, doc, plans),
        use_cache=True,
        logits_to_keep=doc.scored.shape[1],
    ).logits
    found = torch.zeros(count, len(doc.items), dtype=torch.float64)
    for number, part in enumerate(logits.to(cutter.device).chunk(count)):
        found[number] = doc.kl_from(part.double().log_softmax(-1))
    return found


def _rewritten(cutter: Cutter, doc: Prefilled, plans: Sequence[Plan]) -> Cache:
    """The prefilled cache once for every plan, as the plan would store it: N·B rows, plan-major."""
    layers: list[Any] = []
    for index, layer in enumerate(doc.cache.layers):
        twin = copy.copy(layer)
        stored = {"key": layer.keys, "value": layer.values}
        if index in plans[0]:
            for side in SIDES:
                slabs = [[getattr(head, side) for head in plan[index]] for plan in plans]
                stored[side] = recoded_plans(stored[side], doc.runs, cutter.bases[side].get(index), slabs)
        else:
            stored = {side: x.repeat(len(plans), 1, 1, 1) for side, x in stored.items()}
        twin.keys, twin.values = stored["key"], stored["value"]
        layers.append(twin)
    return Cache(layers=layers)


def recoded_plans(x: Tensor, runs: Sequence[Run], basis: CodingBasis | None, plans: Sequence[Sequence[Slabs]]) -> Tensor:
    """x [B, Hkv, T, D] once for every plan, with its runs coded and decoded as `recoding.recoded` does: [N·B, Hkv, T, D].

    Args:
        plans: for each plan the slabs of every head.
        basis: may be None where no slabs but raw ones have a direction.
    """
    batch, heads, tokens, dim = x.shape
    out = x.expand(len(plans), -1, -1, -1, -1).clone()
    slabs = torch.tensor([[list(some) for some in plan] for plan in plans])  # [N, Hkv, 3]
    raw = (slabs[..., 0] == dim)[:, :, None, None].to(x.device)
    ends = torch.where(slabs[..., :1] == dim, 0, slabs.cumsum(-1))  # where each slab ends; of raw heads nothing is coded
    most = int(ends.max())
    where = torch.arange(most)
    below = where < ends.unsqueeze(-1)  # [N, Hkv, 3, most]
    kept = [below[:, :, 0], below[:, :, 1] & ~below[:, :, 0], below[:, :, 2] & ~below[:, :, 1]]
    for row, start, end in runs:
        some = x[row, :, start:end].float()
        mean = some.mean(1, keepdim=True)
        rebuilt = mean.expand(len(plans), -1, end - start, -1)
        if most:
            assert basis is not None
            z = (some - mean) @ basis.encode[..., :most].to(x.device)
            codes = torch.zeros(len(plans), heads, end - start, most, device=x.device)
            for size, mask in zip((16, 8, 4), kept, strict=True):
                if not mask.any():
                    continue
                same = z.to(x.dtype).float() if size == 16 else rounded(z, clipped_scales(z, size).float().unsqueeze(-2), size)
                codes += same * mask.unsqueeze(2).to(x.device)
            rebuilt = rebuilt + codes @ basis.decode[..., :most].to(x.device).mT
        out[:, row, :, start:end] = torch.where(raw, x[row, :, start:end], rebuilt.to(x.dtype))
    return out.view(-1, heads, tokens, dim)
