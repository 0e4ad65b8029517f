"""What bench_steps.py decodes over: caches that are filled without a prefill, and a dense step that can be captured.

Keys and Values are random numbers. Ours are coded by the cache's own encoder; of a large batch a few rows are, and these are written out
as often as the batch needs, each copy at a place of its own, so that a step reads as many bytes as if all rows had been prefilled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import CacheLayerMixin

from rotatek_compile.artifact import Artifact, Method
from rotatek_compile.geometry import Geometry
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.kernels.table import KEY, OFFSET, OWN_MEAN, SCALES, VALUE
from rotatek_compile.plan import SIDES, HeadPlan, plan_tensors
from rotatek_compile.runtime.segments import IMAGE, TEXT
from rotatek_compile.runtime.store import Store
from rotatek_compile.text_attention import Attending

PAGE, QUESTION = 2880, 24  # tokens
DENSE = "dense_without_mask"


def artifact_of(geometry: Geometry, keys: Slabs, values: Slabs) -> Artifact:
    """Random orthonormal bases, one plan in every head, nothing that falls back."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for i in geometry.compressible:
        layer = geometry.layers[i]
        for side in SIDES:
            basis = torch.linalg.qr(torch.randn(layer.kv_heads, layer.head_dim, layer.head_dim, generator=generator))[0]
            tensors[f"layers.{i}.visual.{side}_encode"] = basis.contiguous()
            tensors[f"layers.{i}.visual.{side}_mean"] = torch.zeros(layer.kv_heads, layer.head_dim)
            tensors[f"layers.{i}.visual.{side}_spectrum"] = torch.logspace(0, -2, layer.head_dim).repeat(layer.kv_heads, 1)
    plan = {i: [HeadPlan(keys, values)] * geometry.layers[i].kv_heads for i in geometry.compressible}
    return Artifact(geometry, Method(fallback_factor=0.0, prior_tokens=0), tensors | plan_tensors(plan), {}, {})


def with_text(artifact: Artifact) -> Artifact:
    """The same artifact for `--span all`: text is coded in the bases of images."""
    tensors = {name.replace(".visual.", ".text."): x.clone() for name, x in artifact.tensors.items() if ".visual." in name}
    return replace(artifact, method=replace(artifact.method, span="all"), tensors=artifact.tensors | tensors)


def random_kv(geometry: Geometry, index: int, batch: int, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and Values [B, Hkv, T, D] of a layer, different in every head and row."""
    layer = geometry.layers[index]
    generator = torch.Generator(like.device).manual_seed(index)
    shape = (2, batch, layer.kv_heads, tokens, layer.head_dim)
    made = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    return made[0], made[1]


def dense_token_bytes(geometry: Geometry, itemsize: int) -> int:
    """Bytes of one token in a dense cache, all layers together."""
    return sum(2 * layer.kv_heads * layer.head_dim * itemsize for layer in geometry.layers)


def fill_ours(cache: Any, geometry: Geometry, batch: int, tokens: int, like: Tensor) -> None:
    """Pages of `PAGE` tokens and a question after them, in every row, through the layers' own path."""
    pages = tokens - QUESTION
    kinds = np.full((batch, tokens), IMAGE, dtype=np.int8)
    kinds[:, pages:] = TEXT
    lengths = [min(PAGE, pages - start) for start in range(0, pages, PAGE)]
    cache.state.begin((batch, tokens), kinds, {IMAGE: lengths * batch})
    for index, layer in enumerate(cache.layers):
        keys, values = random_kv(geometry, index, batch, tokens, like)
        handle, _ = layer.update(keys, values)
        handle.commit(like.new_empty(1).expand(batch, geometry.layers[index].query_heads, tokens, geometry.layers[index].head_dim))
    cache.state.end()


def fill_many(cache: Any, geometry: Geometry, batch: int, tokens: int, like: Tensor, coded: int = 4) -> None:
    """As `fill_ours`, for a multiple of `coded` rows: so many are coded, the others are copies of them at places of their own."""
    fill_ours(cache, geometry, coded, tokens, like)
    cache.batch_repeat_interleave(batch // coded)
    for layer in cache.layers:
        written_out(layer.store, batch // coded)


def written_out(store: Store, copies: int) -> None:
    """Every `copies` rows of a store share what they read, as beams do; give each its own."""
    copy = np.arange(store.batch)[:, None, None] % copies
    for side in (KEY, VALUE):
        for field, pool in ((OFFSET, store.codes), (SCALES, store.scales), (OWN_MEAN, store.own_means)):
            fields = store.table[..., side + field]
            store.table[..., side + field] = np.where(fields >= 0, fields + copy * pool.numel(), fields)
    for name in ("codes", "scales", "own_means"):
        setattr(store, name, getattr(store, name).repeat(copies))
    store.ids = np.where(store.ids > 0, store.ids + copy[..., 0] * store._last_id, 0)
    store._last_id *= copies
    store.table_on_device = store._view = None
    store._end = store.codes.numel()


class FixedLayer(CacheLayerMixin):
    """Keys and Values of a fixed number of tokens; the newest one overwrites the last."""

    is_compileable = is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2]) - 1

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return int(self.keys.shape[2]), 0

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])

    get_max_cache_shape = get_max_length


def dense_attention(call: Attending) -> tuple[Tensor, Tensor | None]:
    """SDPA over everything there is. No mask: in a captured step transformers would make one, which the fast kernels do not take."""
    out = scaled_dot_product_attention(call.query, call.key, call.value, scale=call.scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None
