"""What compressing costs at prefill: the same forward pass with a stock cache and with ours, at the geometry of LLaVA-NeXT-Mistral-7B.

    python benchmarks/bench_encode.py --output benchmarks/results            # on a GPU: 3 pages, 8.8 k tokens
    python benchmarks/bench_encode.py --small --output /tmp/small            # the same path with a small model, on a CPU

Weights are random, plans are given: native Keys at a quarter of the directions with raw Values, and codes of 8 and 4 bits in both. Bases
are calibrated on another prompt of the same kind, so that segments are like the calibration, as they are in use, and once on something
else, so that heads fall back; own bases are tried where heads discard more than is usual. The two passes alternate; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_full_size import llava_next, llava_page, random_model  # noqa: E402

from rotatek_compile.artifact import Artifact, Method
from rotatek_compile.bases import calibrated_basis
from rotatek_compile.geometry import Geometry, geometry_of
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.plan import HeadPlan, plan_tensors
from rotatek_compile.runtime.accounting import cache_bytes
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.recording import record
from rotatek_compile.runtime.segments import columns

BOUND = 0.05  # of the prefill
Seen = dict[int, tuple[Tensor, Tensor, Tensor]]  # by layer: Keys and Values of images [Hkv, S, D], queries [Hkv, G, T, D]


def plans(dim: int) -> dict[str, HeadPlan]:
    """Settings by name."""
    part = dim // 8
    return {
        "K D/4 native, V raw": HeadPlan(Slabs(dim // 4), Slabs(dim)),
        "K D/8 at 8 bit + 3D/8 at 4, V the same": HeadPlan(Slabs(0, part, 3 * part), Slabs(0, part, 3 * part)),
        "K D/4 at 4 bit, V D/4 at 4 bit": HeadPlan(Slabs(0, 0, 2 * part), Slabs(0, 0, 2 * part)),
    }


def calibrated_artifact(geometry: Geometry, seen: Seen, head: HeadPlan, budget: float | None) -> Artifact:
    """Bases from what each layer saw, with this plan in every head."""
    tensors: dict[str, Tensor] = {}
    for i, (keys, values, queries) in seen.items():
        query_moment = torch.einsum("hgtd,hgte->hde", queries.double(), queries.double()) / (queries.shape[1] * queries.shape[2])
        eye = torch.eye(keys.shape[-1], dtype=torch.float64, device=keys.device).expand_as(query_moment)
        for side, x, moment in (("key", keys, query_moment), ("value", values, eye)):
            x, prefix = x.double(), f"layers.{i}.visual.{side}"
            centred = x - x.mean(1, keepdim=True)
            made = calibrated_basis("two-sided", centred.mT @ centred / x.shape[1], moment)
            tensors[f"{prefix}_mean"] = x.mean(1).float().cpu()
            tensors[f"{prefix}_encode"], tensors[f"{prefix}_spectrum"] = made.encode.float().cpu(), made.spectrum.float().cpu()
    plan = {i: [head] * geometry.layers[i].kv_heads for i in geometry.compressible}
    return Artifact(geometry, Method(kv_budget=budget), tensors | plan_tensors(plan), {}, {})


@torch.inference_mode()
def seen_by_layers(model: Any, geometry: Geometry, inputs: dict[str, Tensor]) -> Seen:
    """What a calibration sees of one prompt, for `calibrated_artifact`."""
    raw = {i: [HeadPlan(Slabs(layer.head_dim), Slabs(layer.head_dim))] * layer.kv_heads for i, layer in enumerate(geometry.layers)}
    some = torch.eye(geometry.layers[0].head_dim)
    bases = {
        f"layers.{i}.visual.{side}_{name}": part.expand(layer.kv_heads, *part.shape).contiguous()
        for i, layer in enumerate(geometry.layers)
        for side in ("key", "value")
        for name, part in (("mean", torch.zeros_like(some[0])), ("encode", some), ("spectrum", torch.ones_like(some[0])))
    }
    with enable(model, Artifact(geometry, Method(), bases | plan_tensors(raw), {}, {})):
        recording = record(model, **inputs, logits_to_keep=1)
    images = [run for runs in recording.step.media(0) for run in runs]
    found = {}
    for i in geometry.compressible:
        layer = recording.layers[i]
        queries = layer.query[0].unflatten(0, (layer.keys.shape[1], -1))[:, :, ::8]
        found[i] = columns(layer.keys[0], images), columns(layer.values[0], images), queries
    return found


def prompt(config: Any, pages: int, device: torch.device, dtype: torch.dtype, seed: int = 1) -> dict[str, Tensor]:
    """Pages of noise with words around them."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    media: dict[str, list[Tensor]] = {}
    for _ in range(pages):
        page, placeholders = llava_page(config, generator)
        ids += torch.randint(10, 30000, (8,), generator=generator).tolist() + placeholders
        for name, value in page.items():
            media.setdefault(name, []).append(value)
    ids += torch.randint(10, 30000, (24,), generator=generator).tolist()
    parts = {name: torch.cat(values).to(device) for name, values in media.items()}
    parts["pixel_values"] = parts["pixel_values"].to(dtype)
    return {"input_ids": torch.tensor([ids], device=device), **parts}


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(model: Any, artifact: Artifact, inputs: dict[str, Tensor], name: str, repeats: int) -> dict[str, Any]:
    """Medians of alternating prefills."""
    device = inputs["input_ids"].device
    text = model.config.get_text_config(decoder=True)
    stock: list[float] = []
    ours: list[float] = []
    cache: Any = None
    prepared: Any = None
    for number in range(repeats + 2):
        plain = seconds(lambda: model(**inputs, past_key_values=DynamicCache(config=text), use_cache=True, logits_to_keep=1), device)
        cache = None
        with enable(model, artifact) as enabled:
            enabled.prepared = prepared = prepared or enabled.prepared  # bases move to the device in the first call of all
            cache = enabled.new_cache()
            coded = seconds(lambda: model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1), device)  # noqa: B023
        if number >= 2:
            stock.append(plain)
            ours.append(coded)
    counted = cache_bytes(cache)
    plain, coded = statistics.median(stock), statistics.median(ours)
    return {
        "plan": name,
        "tokens": inputs["input_ids"].shape[1],
        "prefill_seconds": plain,
        "with_coding_seconds": coded,
        "cost": coded / plain - 1,
        "span_mb": counted.span / 1e6,
        "span_dense_mb": counted.span_dense / 1e6,
        "own_basis_mb": counted.basis / 1e6,
        "fallback_heads": counted.fallback_heads,
    }


def unlike(seen: Seen) -> Seen:
    """What another kind of page might have shown: Keys and Values turned at random."""
    found, generator = {}, torch.Generator().manual_seed(3)
    for i, (keys, values, queries) in seen.items():
        turn = torch.linalg.qr(torch.randn(keys.shape[-1], keys.shape[-1], generator=generator)).Q.to(keys)
        found[i] = keys @ turn, values @ turn, queries
    return found


def table(record: dict[str, Any]) -> str:
    """The figures of a run as markdown."""
    lines = [
        f"Prefill of {record['rows'][0]['tokens']} tokens ({record['geometry']}), {record['device']}, torch {record['torch']}, "
        f"transformers {record['transformers']}; medians of alternating runs.",
        "",
        "| plan | stock cache | with coding | cost | coded span | heads that fell back |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        stock, ours = 1e3 * row["prefill_seconds"], 1e3 * row["with_coding_seconds"]
        span = row["span_mb"] / row["span_dense_mb"]
        lines.append(f"| {row['plan']} | {stock:.0f} ms | {ours:.0f} ms | {row['cost']:+.1%} | {span:.3f} | {row['fallback_heads']} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every plan, print it, save all; exit code 1 if the bound is missed at full size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--print", type=Path, dest="table", metavar="FILE", help="only print the table of this file")
    parser.add_argument("--pages", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="a small model of the same architecture")
    parser.add_argument("--device", help="default: a GPU if there is one")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))))
        return
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = random_model(llava_next(args.small), device)
    geometry = geometry_of(model.config)
    inputs = prompt(model.config, args.pages, device, model.dtype)
    seen = seen_by_layers(model, geometry, prompt(model.config, args.pages, device, model.dtype, seed=2))
    cases = [(name, head, seen) for name, head in plans(geometry.layers[0].head_dim).items()]
    cases.append((f"{cases[1][0]}; pages unlike the calibration", cases[1][1], unlike(seen)))
    rows = []
    for name, head, calibration in cases:
        artifact = calibrated_artifact(geometry, calibration, head, None if head.value.native else 0.5)
        rows.append(measure(model, artifact, inputs, name, args.repeats))
        print(f"{rows[-1]['cost']:+.1%} {name}", flush=True)
    text = model.config.get_text_config(decoder=True)
    record = {"device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()}
    record |= {"torch": torch.__version__, "transformers": transformers.__version__}
    record |= {"geometry": f"{text.num_hidden_layers} layers, {text.num_key_value_heads} KV heads of {geometry.layers[0].head_dim}"}
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"encode{'-small' if args.small else ''}.json"
    file.write_text(json.dumps(record | {"rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(table(record | {"rows": rows}))
    sys.exit(0 if args.small or all(row["cost"] <= BOUND for row in rows[:-1]) else 1)


if __name__ == "__main__":
    main()
