"""Assigned reading: while training, the text of each skill is made to look at the pages through KV heads of its own.

A model that learns to read from scratch ends up reading everything through two heads, however many skills it has: nothing asks for more.
Here the KV heads of every layer are divided among groups of skills, and the layers between finding the first character of an answer and
copying on. Two things ask for that division, each with a setting in loop.py:

- a penalty on the attention that other pairs pay to pages;
- in a share of the documents those pairs cannot see pages at all.

Both come once the model reads. Heads that never learned to find anything do not learn it under a penalty (docs/backbones.md), so the heads
are best copies of ones that have (widening.py). The trained model is a stock one; nothing of this is left at inference.
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

QUESTION = 0.5  # weight of question tokens in the penalty beside answers; what a question is about shows only while it is read

# Skills that share heads: those that look up keys, follow a label to a value, work on tables, copy lines.
GROUPS = (("field", "missing", "larger"), ("page", "chart"), ("cell", "count"), ("line", "ordinal"))


class Router:
    """The assignment as a table over slots (documents.Batch).

    `assigned` bool [slots + 1, layers, Hkv]; the last row, UNROUTED, is everything. Questions and first characters are read for in layers
    before `rest_from`, the rest of an answer from there on; with 0 all of it in every layer.

    Raises:
        ValueError: the KV heads cannot be divided among the groups, or there is no layer on one side of `rest_from`.
    """

    def __init__(self, skills: tuple[str, ...], layers: int, kv_heads: int, rest_from: int, device: torch.device) -> None:
        if not 0 <= rest_from < layers:
            raise ValueError(f"--rest-from {rest_from} is no layer of this text model; it has {layers}, and 0 divides none")
        if kv_heads % len(GROUPS):
            raise ValueError(
                f"assigned reading divides the KV heads among {len(GROUPS)} groups of skills; this text model has {kv_heads}: "
                "change --geometry, or train with --look-away 0 --routed 0"
            )
        self.answers, share = 2 * len(skills), kv_heads // len(GROUPS)
        table = torch.zeros(3 * len(skills) + 1, layers, kv_heads, dtype=torch.bool)
        first, rest = (slice(0, rest_from), slice(rest_from, layers)) if rest_from else (slice(0, layers), slice(0, layers))
        for number, skill in enumerate(skills):
            (group,) = (number for number, members in enumerate(GROUPS) if skill in members)
            for slot, where in ((2 * number, first), (2 * number + 1, rest), (self.answers + number, first)):
                table[slot, where, group * share : (group + 1) * share] = True
        table[-1] = True
        self.assigned = table.to(device)

    def others(self, slot: Tensor, visual: int) -> Tensor:
        """bool [layers, B, T, Hkv]: which heads are not a token's own. T = `visual` leading tokens and those of `slot` [B, L]."""
        return ~self.assigned[pad(slot, (visual, 0), value=-1)].permute(2, 0, 1, 3)

    def weights(self, slot: Tensor, visual: int) -> Tensor:
        """float32 [B, T]: what tokens count in the penalty. Answers add up to 1, questions to QUESTION, the rest to 0."""
        slot = pad(slot, (visual, 0), value=-1)
        answer, question = ((slot >= 0) & (slot < self.answers)).float(), (slot >= self.answers).float()
        return answer / answer.sum().clamp_min(1) + QUESTION * question / question.sum().clamp_min(1)


def looking(masses: Sequence[Tensor], others: Tensor, weights: Tensor) -> Tensor:
    """The penalty: attention that text pays to pages through heads that are not its own, summed over layers, mean over heads and tokens.

    `masses` per layer [B, T, Hq], `others` bool [layers, B, T, Hkv], `weights` of tokens [B, T].
    """
    paid = torch.stack(list(masses)).float().unflatten(-1, (others.shape[-1], -1)).mean(-1)
    return (paid * others * weights[..., None]).sum() / others.shape[-1]


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
