"""Checks of the whole runtime on the bundled model that are too long for the test suite; prints one line each, exits 1 on a failure.

    python benchmarks/check_model.py [--documents 100] [--output DIR]

identity    float32, every direction native, no fallback: greedy tokens equal to the stock cache, batch 1 and left-padded batch 4
bf16        (GPU) bfloat16, every direction native: KL to the dense model <= 1e-5 nats per answer token
backends    float32, a quarter of the Key directions, and mixed precisions of Keys and Values: all backends give the same logits to rounding
allocator   (GPU) a cache of >= 100 MB: reported bytes within 2 % of what the allocator holds
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from rotatek_compile.artifact import Artifact, Method
from rotatek_compile.batches import Encoded, encode, end_ids
from rotatek_compile.calibrate import MomentStore, calibrate
from rotatek_compile.calibration_data.bundled import BundledSet
from rotatek_compile.compiler import artifact_tensors, bases_of
from rotatek_compile.evaluate import Evaluator, evaluate
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.models import checked_geometry, load_config, load_model, load_processor, resolve
from rotatek_compile.plan import HeadPlan, Plan
from rotatek_compile.runtime.accounting import cache_bytes, cache_tensors, storage_bytes
from rotatek_compile.runtime.backends import choose_backend
from rotatek_compile.runtime.cache import RotateKCache
from rotatek_compile.runtime.enable import enable
from rotatek_compile.runtime.prepared import PreparedArtifact
from rotatek_compile.sensitivity import Sensitivities

MIXED = (  # for heads of 128, in turn
    HeadPlan(Slabs(), Slabs(0, 0, 64)),
    HeadPlan(Slabs(32), Slabs(128)),
    HeadPlan(Slabs(8, 16, 32), Slabs(0, 64)),
    HeadPlan(Slabs(128), Slabs(16, 0, 32)),
    HeadPlan(Slabs(0, 0, 32), Slabs()),
    HeadPlan(Slabs(0, 24), Slabs(0, 16, 16)),
    HeadPlan(Slabs(0, 0, 128), Slabs(0, 128)),
)


class Bench:
    """The bundled model in one dtype, with artifacts of any plan."""

    def __init__(self, dtype: torch.dtype, device: torch.device, scratch: Path) -> None:
        source = resolve("tiny-llava-next")
        self.config = load_config(source)
        self.geometry = checked_geometry(self.config)
        self.model, self.processor = load_model(source, dtype, device), load_processor(source)
        self.eos = end_ids(self.model)
        self.device = device
        items = self.items("calibration", 16)
        pad = self.processor.tokenizer.pad_token_id
        store = MomentStore({"check": str(dtype)}, scratch)
        self.moments = calibrate(self.model, items, self.geometry, store, 4, False, pad, quiet=True)
        self.bases = bases_of(self.moments, self.geometry, "two-sided", "visual")

    def items(self, split: str, count: int) -> list[Encoded]:
        return [encode(self.processor, s, self.geometry, self.eos[0]) for s in BundledSet("mixed", split).iterate(count)]

    def artifact(self, plan: Plan, fallback_factor: float = 0.0) -> Artifact:
        method = Method(fallback_factor=fallback_factor)
        none = {i: torch.zeros(len(heads), 0) for i, heads in plan.items()}
        knockouts = {i: torch.zeros(len(heads)) for i, heads in plan.items()}
        unmeasured = Sensitivities(none, none, 0.0)
        tensors = artifact_tensors(self.geometry, method, self.moments, {"visual": self.bases}, plan, unmeasured, knockouts)
        return Artifact(self.geometry, method, tensors, {}, {})

    def keys(self, share: float) -> Plan:
        """This share of every head's Key directions, native; Values raw."""
        shapes = {i: self.geometry.layers[i] for i in self.geometry.compressible}
        return {i: [HeadPlan(Slabs(int(s.head_dim * share)), Slabs(s.head_dim))] * s.kv_heads for i, s in shapes.items()}

    def mixed(self) -> Plan:
        """All precisions in turn, some sides with nothing."""
        count = 0
        plan: Plan = {}
        for i in self.geometry.compressible:
            shape = self.geometry.layers[i]
            if shape.head_dim != 128:
                raise SystemExit(f"the mixed plan is for heads of 128, layer {i} has {shape.head_dim}")
            plan[i] = [MIXED[(count + h) % len(MIXED)] for h in range(shape.kv_heads)]
            count += shape.kv_heads
        return plan


def generate(bench: Bench, batch: list[Encoded]) -> Any:
    from rotatek_compile.batches import merge_media, pad

    chunk = pad([item.prompt for item in batch], bench.processor.tokenizer.pad_token_id)
    media = merge_media(batch, bench.device, bench.model.dtype)
    return bench.model.generate(
        input_ids=chunk.ids.to(bench.device),
        attention_mask=chunk.mask.to(bench.device),
        max_new_tokens=24,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **media,
    )


def identity(bench: Bench, documents: int, backend: str) -> dict[str, Any]:
    """Documents whose greedy tokens differ from the stock cache's, batch 1 and left-padded batch 4."""
    items = bench.items("evaluation", documents)
    artifact = bench.artifact(bench.keys(1.0))
    result: dict[str, Any] = {"documents": documents, "backend": backend}
    for size in (1, 4):
        different, largest = 0, 0.0
        for start in range(0, documents, size):
            batch = items[start : start + size]
            dense = generate(bench, batch)
            with enable(bench.model, artifact, backend=backend):
                ours = generate(bench, batch)
            same = dense.sequences.shape == ours.sequences.shape and bool((dense.sequences == ours.sequences).all())
            different += 0 if same else len(batch)
            if same:
                largest = max(largest, *(float((a - b).abs().max()) for a, b in zip(dense.logits, ours.logits, strict=True)))
        result[f"different_batch_{size}"], result[f"max_logit_difference_batch_{size}"] = different, largest
    result["ok"] = result["different_batch_1"] == result["different_batch_4"] == 0
    return result


def bf16(bench: Bench, documents: int, backend: str) -> dict[str, Any]:
    """KL with every direction native, both ways of asking."""
    items = bench.items("evaluation", documents)
    result: dict[str, Any] = {"documents": documents, "backend": backend}
    with enable(bench.model, bench.artifact(bench.keys(1.0)), backend=backend) as active:
        for ask in ("after", "with"):
            evaluator = Evaluator(bench.model, bench.processor, ask, bench.eos, 24)
            rows = evaluate(evaluator, items, {"dense": evaluator.dense_cache, "ours": active.new_cache}, 25)
            result[f"kl_{ask}"] = rows[1].to_json()["kl"]
            result[f"exact_{ask}"] = rows[1].to_json()["exact_match"], rows[0].to_json()["exact_match"]
    result["ok"] = max(result["kl_after"], result["kl_with"]) <= 1e-5
    return result


def backends(bench: Bench, documents: int) -> dict[str, Any]:
    """Largest difference of answer log-probabilities between backends, per plan."""
    names = ["torch", "reconstruct"] + (["triton"] if bench.device.type == "cuda" else [])
    items = bench.items("evaluation", documents)
    evaluator = Evaluator(bench.model, bench.processor, "after", bench.eos, 24)
    result: dict[str, Any] = {"documents": documents, "backends": names}
    for label, plan in (("quarter", bench.keys(0.25)), ("mixed", bench.mixed())):
        artifact, outcomes = bench.artifact(plan), []
        for name in names:
            with enable(bench.model, artifact, backend=name) as active:
                outcomes.append([evaluator.answer(items[n : n + 8], active.new_cache()) for n in range(0, documents, 8)])
        tokens = all([a.generated for a in o] == [a.generated for a in outcomes[0]] for o in outcomes)
        worst = max(
            float((p.exp() - q.exp()).abs().max())
            for other in outcomes[1:]
            for a, b in zip(outcomes[0], other, strict=True)
            for p, q in zip(a.logprobs, b.logprobs, strict=True)
        )
        result[label] = {"same_tokens": tokens, "max_probability_difference": worst}
    result["ok"] = all(result[k]["same_tokens"] and result[k]["max_probability_difference"] < 1e-3 for k in ("quarter", "mixed"))
    return result


def allocator(bench: Bench, backend: str, documents: int = 64) -> dict[str, Any]:
    """Reported bytes of one large batch against the allocator's."""
    items = bench.items("evaluation", documents)
    prepared = PreparedArtifact(bench.artifact(bench.keys(0.25)))
    chosen = choose_backend(backend, bench.device)
    evaluator = Evaluator(bench.model, bench.processor, "after", bench.eos, 8)
    with enable(bench.model, prepared.artifact, backend=backend):
        evaluator.answer(items[:2], RotateKCache(bench.config, prepared, chosen))  # bases and kernels are brought in before counting
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        cache = RotateKCache(bench.config, prepared, chosen)
        evaluator.answer(items, cache)
    gc.collect()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    reported, summed = cache_bytes(cache).stored, storage_bytes(cache_tensors(cache))
    result = {"reported": reported, "summed_storages": summed, "allocator": held, "ratio": reported / held}
    return result | {"ok": reported == summed and reported >= 100e6 and abs(reported / held - 1) <= 0.02}


def main() -> int:
    """Run all checks that this machine can run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    results |= {"torch": torch.__version__, "transformers": transformers.__version__}
    scratch = tempfile.TemporaryDirectory()
    exact = Bench(torch.float32, device, Path(scratch.name))
    jobs = [("identity", lambda: identity(exact, args.documents, "auto")), ("backends", lambda: backends(exact, min(args.documents, 16)))]
    if device.type == "cuda":
        half = Bench(torch.bfloat16, device, Path(scratch.name))
        jobs += [("bf16", lambda: bf16(half, args.documents, "auto")), ("allocator", lambda: allocator(half, "auto"))]
    for name, job in jobs:
        results[name] = job()
        print(name, json.dumps(results[name]), flush=True)
    (args.output / f"checks-{device.type}.json").write_text(json.dumps(results, indent=2) + "\n")
    scratch.cleanup()
    return 0 if all(r["ok"] for r in results.values() if isinstance(r, dict)) else 1


if __name__ == "__main__":
    sys.exit(main())
