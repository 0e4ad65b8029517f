"""Assigned reading: while training, the text of each skill is made to look at the pages through KV heads of its own.

A model that learns to read from scratch ends up reading everything through two heads, however many skills it has: nothing asks for more.
Here every skill has one (layer, KV head) pair for the first character of an answer and one for the rest; question text may use both. Once
the model reads at all, two things are added, each with a setting of its own in loop.py:

- a penalty on the attention that any other pair pays to pages, so that those learn to look away;
- in a share of the documents other pairs cannot see pages at all, so that the assigned ones must do the work.

docs/backbones.md has what each of them did, and what did not work. The trained model is a stock one; nothing of this is left at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

NAME = "tiny_training_assigned"
EXTRA = 8  # channels added to the head dimension; kernels want multiples of 8
BLOCKED = 1e4  # what a blocked head's logits towards pages are lowered by, before scaling

# Which pair reads for which skill, as (layers behind the first reading layer, KV head). Copying on is the easiest and comes early; the
# skills that compute something with what they read need layers behind it.
FIRST = {
    "larger": (1, 0), "count": (1, 1), "chart": (1, 2), "page": (1, 3),
    "field": (2, 0), "missing": (2, 1), "cell": (2, 2), "line": (2, 3), "ordinal": (3, 0),
}  # fmt: skip
REST = {
    "field": (0, 0), "cell": (0, 1), "line": (0, 2), "ordinal": (0, 3), "missing": (3, 1), "larger": (3, 2), "chart": (3, 3),
}  # fmt: skip


class Router:
    """The assignment as a table over slots (documents.Batch). Needs four layers of four KV heads from `first_layer` on.

    `assigned` bool [slots + 1, layers, Hkv]; the last row, UNROUTED, is everything.

    Raises:
        ValueError: the geometry has fewer.
    """

    def __init__(self, skills: tuple[str, ...], layers: int, kv_heads: int, first_layer: int, device: torch.device) -> None:
        if first_layer + 4 > layers or kv_heads < 4:
            raise ValueError(
                f"assigned reading needs 4 layers of 4 KV heads from layer {first_layer} on; this text model has {layers} layers and "
                f"{kv_heads} KV heads: change --geometry or --first-reading-layer, or train with --look-away 0 --routed 0"
            )
        table = torch.zeros(3 * len(skills) + 1, layers, kv_heads, dtype=torch.bool)
        for number, skill in enumerate(skills):
            for phase, pairs in enumerate((FIRST, REST)):
                layer, head = pairs.get(skill, FIRST[skill])
                table[2 * number + phase, first_layer + layer, head] = True
                table[2 * len(skills) + number, first_layer + layer, head] = True
        table[-1] = True
        self.assigned = table.to(device)

    def others(self, slot: Tensor, visual: int) -> Tensor:
        """bool [layers, B, T, Hkv]: which heads of which token are not its own. T = `visual` leading tokens and those of `slot` [B, L]."""
        return ~self.assigned[pad(slot, (visual, 0), value=-1)].permute(2, 0, 1, 3)


def looking(masses: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """The penalty, 0 to 1: mean attention that text pays to pages through heads that are not its own.

    `masses` per layer [B, T, Hq], `others` per layer bool [B, T, Hkv].
    """
    group = masses[0].shape[-1] // others[0].shape[-1]
    paid = torch.stack([(m.float().unflatten(-1, (-1, group)).mean(-1) * o).sum() for m, o in zip(masses, others, strict=True)])
    tokens = others[0].any(-1).sum().clamp_min(1)
    return paid.sum() / (tokens * len(others) * others[0].shape[-1])


def assigned_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    blocked: Tensor | None = None,
    visual: Tensor | None = None,
    masses: list[Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention [B, H, T, D] in which `blocked` [B, T, Hkv] heads do not see the columns of `visual` (float [T], 1 for page tokens).

    The exclusion is one more channel of query and key, so that the fast causal kernel needs no mask. One more channel of the Values gives
    the attention paid to pages, [B, T, H], which is appended to `masses`.
    """
    dim, group = query.shape[-1], query.shape[1] // key.shape[1]
    if blocked is not None and visual is not None:
        lowered = (blocked.transpose(1, 2).repeat_interleave(group, 1).to(query.dtype) * -BLOCKED)[..., None]
        query = torch.cat([query, pad(lowered, (0, EXTRA - 1))], -1)
        column = visual.to(key.dtype)[None, None, :, None].expand(*key.shape[:2], -1, 1)
        key = torch.cat([key, pad(column, (0, EXTRA - 1))], -1)
        value = torch.cat([value, pad(column.to(value.dtype), (0, EXTRA - 1))], -1)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, q/k-norms hand out fp32
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=group > 1)
    if masses is not None and visual is not None:
        masses.append(out[..., dim].transpose(1, 2))
    return out[..., :dim].transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the function known to transformers under NAME."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, assigned_attention)
