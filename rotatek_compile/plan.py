"""A plan: which directions of Keys and of Values every KV head keeps, and at which precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.slabs import Slabs


class HeadPlan(NamedTuple):
    """What one KV head keeps of its Keys and of its Values."""

    key: Slabs
    value: Slabs

    @property
    def bytes_per_token(self) -> int:
        """Of one coded token, native numbers at 2 bytes; means and scales of its segment apart."""
        return self.key.bytes_per_token() + self.value.bytes_per_token()


Plan = dict[int, list[HeadPlan]]
"""By compressed layer, one `HeadPlan` per KV head."""

SIDES = ("key", "value")


def plan_tensors(plan: Plan) -> dict[str, Tensor]:
    """The plan as the artifact stores it: `layers.{i}.{side}_plan` int32 [Hkv, 3], native, 8-bit and 4-bit directions."""
    return {
        f"layers.{i}.{side}_plan": torch.tensor([tuple(getattr(head, side)) for head in heads], dtype=torch.int32).view(-1, 3)
        for i, heads in plan.items()
        for side in SIDES
    }


def plan_of(tensors: dict[str, Tensor], layers: tuple[int, ...]) -> Plan:
    """Inverse of `plan_tensors`."""
    sides = {i: [tensors[f"layers.{i}.{side}_plan"].tolist() for side in SIDES] for i in layers}
    return {i: [HeadPlan(Slabs(*key), Slabs(*value)) for key, value in zip(*both, strict=True)] for i, both in sides.items()}


def escape_tokens(tokens: int, ratio: float) -> int:
    """How many of a segment's tokens stay raw in every head: an even number, because stored segments are padded to one."""
    return int(tokens * ratio) // 2 * 2


def own_part_bytes(head: HeadPlan, dim: int) -> int:
    """Of one head of one segment beside its codes: fp16 means of coded sides and bf16 scales."""
    return sum(2 * (dim + slabs.scaled) for slabs in head if slabs.native != dim)
