"""Whole decoding steps at full size: a model of the geometry of LLaVA-NeXT-Mistral-7B with random weights, dense and compressed caches.

    python benchmarks/bench_steps.py --output benchmarks/results           # on a GPU of 80 GB: two to three minutes
    python benchmarks/bench_steps.py --small --output /tmp/small            # the same path with a small model, on a CPU

Every cache is filled with random Keys and Values (nothing is prefilled), coded by the cache's own encoder. Rows:

- *stock*: transformers' DynamicCache, step by step as `generate` runs it.
- *dense, captured*: a cache of fixed length in a CUDA graph, attended by the faster of SDPA's flash and cuDNN kernels. It writes the new
  token but never grows, which is less than a real loop has to do.
- *ours* and *ours, captured*: plain calls of the enabled model, without and with `graphs`.

What bytes allow: (weights + dense cache) / (weights + compressed cache), each read once in a step.
"""

from __future__ import annotations

import argparse
import csv
import gc
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_full_size import llava_next, random_model  # noqa: E402
from print_decode import steps_table  # noqa: E402

from rotatek_compile.artifact import Artifact, Method
from rotatek_compile.geometry import Geometry, geometry_of
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import SIDES, HeadPlan, plan_tensors
from rotatek_compile.runtime.accounting import cache_bytes
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.recorder import CudaRecorder
from rotatek_compile.runtime.segments import IMAGE, TEXT
from rotatek_compile.text_attention import set_text_attention

GB = 1e9
PAGE, QUESTION = 2880, 24  # tokens
POINTS = ((1, 8192), (8, 8192), (32, 4096), (8, 32768))  # batch, tokens
PLANS = {"K 32x8, V 128x8": ((0, 32, 0), (0, 128, 0)), "K 32x4, V 128x4": ((0, 0, 32), (0, 0, 128))}
WARM, STEPS = 12, 40
DENSE = "dense_without_mask"
COLUMNS = ("batch", "tokens", "cache", "ms", "tokens_per_second", "cache_gb", "over_best_dense", "bytes_allow", "reached")
COLUMNS += ("device", "torch", "transformers")


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


def random_kv(geometry: Geometry, index: int, batch: int, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and Values [B, Hkv, T, D] of a layer, different in every head and row."""
    layer = geometry.layers[index]
    generator = torch.Generator(like.device).manual_seed(index)
    shape = (2, batch, layer.kv_heads, tokens, layer.head_dim)
    made = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    return made[0], made[1]


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


def dense_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **unused: Any) -> Any:
    """SDPA over everything there is, in transformers' attention interface."""
    out = scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def attended_by(model: Any) -> Iterator[None]:
    """The text model attends by `dense_attention`: in a captured step transformers makes a mask, which the fast kernels do not take."""
    AttentionInterface.register(DENSE, dense_attention)
    before = model.config.get_text_config(decoder=True)._attn_implementation
    set_text_attention(model, DENSE)
    try:
        yield
    finally:
        set_text_attention(model, before)


def timed(step: Callable[[int], Any], device: torch.device, steps: int, warm: int = WARM) -> float:
    """Seconds of a step, mean over `steps` after `warm` others; `step` is told its number."""
    for number in range(warm):
        step(number)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for number in range(warm, warm + steps):
        step(number)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


class Bench:
    """One model at one point."""

    def __init__(self, model: Any, batch: int, tokens: int, steps: int) -> None:
        self.model, self.batch, self.tokens, self.steps = model, batch, tokens, steps
        self.geometry = geometry_of(model.config)
        self.like = next(model.parameters())
        self.device = self.like.device
        self.ids = torch.randint(10, 30000, (batch, 1), device=self.device)

    def call(self, cache: Any, number: int) -> Any:
        """One step as `generate` asks for it, the next token chosen on the device."""
        places = torch.full((self.batch, 1), self.tokens + number, device=self.device)
        logits = self.model(input_ids=self.ids, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        self.ids = logits[:, -1].argmax(-1, keepdim=True)

    def stock(self) -> tuple[float, int]:
        """Seconds of a step and bytes of the cache."""
        cache = DynamicCache(config=self.model.config.get_text_config())
        for index in range(len(self.geometry.layers)):
            cache.update(*random_kv(self.geometry, index, self.batch, self.tokens, self.like), index)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return timed(lambda number: self.call(cache, number), self.device, self.steps // 2, warm=4), held

    def dense_captured(self) -> tuple[float, int]:
        """The faster of two attention kernels, which get no mask: every token is seen."""
        filled = [FixedLayer(*random_kv(self.geometry, i, self.batch, self.tokens, self.like)) for i in range(len(self.geometry.layers))]
        cache = Cache(layers=filled)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in filled)
        places = torch.full((self.batch, 1), self.tokens, device=self.device)
        given = {"position_ids": places, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        found = []
        with attended_by(self.model):
            for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                with sdpa_kernel(kernel):
                    for _ in range(3):
                        self.model(input_ids=self.ids, **given)
                    torch.cuda.synchronize()
                    recorder, ids = CudaRecorder(self.device), self.ids.clone()

                    def step(ids: Tensor = ids) -> None:
                        ids.copy_(self.model(input_ids=ids, **given).logits[:, -1].argmax(-1, keepdim=True))

                    recorder.record(step)
                found.append(timed(lambda number, one=recorder: one.replay(), self.device, self.steps))
                del recorder
        return min(found), held

    def ours(self, plan: tuple[Any, Any], graphs: bool) -> tuple[float, int]:
        """Through `enable`."""
        with enable(self.model, artifact_of(self.geometry, Slabs(*plan[0]), Slabs(*plan[1])), graphs=graphs) as enabled:
            cache = enabled.new_cache()
            fill_ours(cache, self.geometry, self.batch, self.tokens, self.like)
            seconds = timed(lambda number: self.call(cache, number), self.device, self.steps)
            held = cache_bytes(cache).stored  # afterwards: a captured stretch makes room
            if graphs and self.device.type == "cuda":
                assert any(history.captured for history in enabled.graphs.histories.values()), "nothing was captured"
        return seconds, int(held)


def rows_at(model: Any, batch: int, tokens: int, plans: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """All rows of one point; what does not fit in memory is left out, and said."""
    bench, weights = Bench(model, batch, tokens, steps), sum(p.nbytes for p in model.model.language_model.parameters())
    cuda = bench.device.type == "cuda"
    ways: dict[str, Callable[[], tuple[float, int]]] = {"stock": bench.stock}
    if cuda:
        ways["dense, captured"] = bench.dense_captured
    for name, plan in plans.items():
        ways[f"ours {name}"] = lambda plan=plan: bench.ours(plan, graphs=False)
        if cuda:
            ways[f"ours {name}, captured"] = lambda plan=plan: bench.ours(plan, graphs=True)
    rows: list[dict[str, Any]] = []
    for name, way in ways.items():
        try:
            seconds, held = way()
        except torch.OutOfMemoryError:
            print(f"B {batch}, T {tokens}, {name}: does not fit in memory")
            continue
        finally:
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
        row = {"ms": seconds * 1e3, "tokens_per_second": batch / seconds, "cache_gb": held / GB}
        rows.append({"batch": batch, "tokens": tokens, "cache": name, **row})
    dense = [row for row in rows if not row["cache"].startswith("ours")]
    for row in rows:
        if row not in dense and dense:
            row["over_best_dense"] = min(one["ms"] for one in dense) / row["ms"]
            row["bytes_allow"] = (weights + dense[0]["cache_gb"] * GB) / (weights + row["cache_gb"] * GB)
            row["reached"] = row["over_best_dense"] / row["bytes_allow"]
    return rows


@torch.no_grad()
def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model and short caches, to try the path")
    parser.add_argument("--points", nargs="+", default=[f"{b}x{t}" for b, t in POINTS], help="batch x tokens")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.small else "cpu")
    model = random_model(llava_next(args.small), device)
    plans = {"K 16x8, V 32x8": ((0, 16, 0), (0, 32, 0))} if args.small else PLANS
    points = [(2, 192)] if args.small else [tuple(int(n) for n in point.split("x")) for point in args.points]
    rows = [row for batch, tokens in points for row in rows_at(model, batch, tokens, plans, args.steps)]
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    record = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
    rows = [row | record for row in rows]
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "steps.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print("\n".join(steps_table(rows)))


if __name__ == "__main__":
    main()
