"""Artifacts of random bases for any family: everything kept, or about half."""

from __future__ import annotations

import torch

from rotatek_compile.artifact import Artifact, Method
from rotatek_compile.bases import calibrated_basis
from rotatek_compile.geometry import Geometry
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import SIDES, HeadPlan, plan_tensors

DIM = 32
FULL = [HeadPlan(Slabs(DIM), Slabs(DIM))] * 2
HALF = [  # about half of the directions, at all precisions, of Keys and of Values
    HeadPlan(Slabs(16), Slabs(DIM)),
    HeadPlan(Slabs(0, 8), Slabs(8, 8)),
    HeadPlan(Slabs(DIM), Slabs(0, 0, 16)),
    HeadPlan(Slabs(8, 0, 16), Slabs(0, 8, 16)),
]


def artifact(shape: Geometry, heads_of: list[HeadPlan], span: str) -> Artifact:
    """Random bases; text models have nothing but text to code."""
    method = Method(span=span, window=8, fallback_factor=0.0)
    generator, tensors, plan = torch.Generator().manual_seed(7), {}, {}
    for number, i in enumerate(shape.compressible):
        heads, dim = shape.layers[i].kv_heads, shape.layers[i].head_dim
        for kind in method.kinds:
            a, b = torch.randn(2, heads, dim, dim, generator=generator)
            made = calibrated_basis("two-sided", a @ a.mT / dim, b @ b.mT / dim)
            for side in SIDES:
                tensors[f"layers.{i}.{kind}.{side}_mean"] = torch.randn(heads, dim, generator=generator)
                tensors[f"layers.{i}.{kind}.{side}_encode"] = made.encode.float()
                tensors[f"layers.{i}.{kind}.{side}_spectrum"] = made.spectrum.float()
        assert dim == DIM
        plan[i] = [heads_of[(number * heads + h) % len(heads_of)] for h in range(heads)]
    return Artifact(shape, method, tensors | plan_tensors(plan), {}, {})
