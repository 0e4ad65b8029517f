"""What bench_rival_speed.py times of rivals: random Keys and Values coded by their own coders, and what attention over them must give."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rival_kernels import Stored
from torch import Tensor

from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.runtime.coder import CodedSegment
from rotatek_compile.runtime.rivals.registry import make_coder

GROUP, DIM = 4, 128
METHODS = ("think", "spark-mean", "spark-sign", "kivi4", "kivi2")


def geometry_of(heads: int, dim: int = DIM) -> Geometry:
    """One layer with so many KV heads."""
    layer = LayerGeometry(layer_type="full_attention", query_heads=GROUP * heads, kv_heads=heads, head_dim=dim)
    return Geometry(model_type="made", layers=(layer,), visual_token_ids=(5,))


def drawn(heads: int, tokens: int, device: str, dtype: torch.dtype, dim: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and Values [N, S, D] and queries [N, G, D]; channels differ in size as they do in models."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = torch.logspace(0.5, -1, dim, device=device)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    return (rand(heads, tokens, dim) * sizes).to(dtype), rand(heads, tokens, dim).to(dtype), rand(heads, GROUP, dim).to(dtype)


def coded(name: str, kept: int, keys: Tensor, values: Tensor, query: Tensor) -> tuple[Stored, CodedSegment]:
    """A rival's segment and the same for the kernels.

    Args:
        kept: channels of think and spark; of no meaning for others.
    """
    heads, tokens, dim = keys.shape
    by_channels = name in ("think", "spark-mean", "spark-sign")
    coder = make_coder(name, geometry_of(heads, dim), keep_ratio=kept / dim if by_channels else None)
    segment = coder.code(0, keys, values, query.unsqueeze(2))
    parts = dict(segment.parts)
    if name == "think":
        mask = parts.pop("channels")
        bits = (mask.unsqueeze(-1) >> torch.arange(8, device=mask.device, dtype=torch.uint8)) & 1
        parts["channels"] = bits.flatten(1)[:, :dim].sort(dim=-1, descending=True, stable=True).indices[:, :kept].int().contiguous()
    kind = "kivi" if name.startswith("kivi") else name
    return Stored(kind, parts, tokens, kept if by_channels else dim, int(name[-1]) if kind == "kivi" else 4), segment


def dense(keys: Tensor, values: Tensor) -> Stored:
    """Keys and Values as they are, for the skeleton's own speed."""
    return Stored("dense", {"keys": keys, "values": values}, keys.shape[1], keys.shape[2])


def expected(query: Tensor, rebuild: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over rebuilt Keys and Values, fp64 [N, G, D]."""
    keys, values = (x.double() for x in rebuild())
    weights = (query.double() @ keys.mT * query.shape[-1] ** -0.5).softmax(-1)
    return weights @ values
