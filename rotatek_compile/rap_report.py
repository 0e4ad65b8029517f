"""What a pruned checkpoint costs and saves: its KL to the dense model, report.json, and the summary of `rotatek-compile`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .artifact import Artifact
from .batches import Encoded
from .compile_options import CompileOptions
from .geometry import Geometry
from .names import RAP
from .rap_counts import Counts
from .rap_plan import RapPlan
from .rap_reading import read


@torch.inference_mode()
def logprobs(model: Any, items: Sequence[Encoded], geometry: Geometry, pad_id: int) -> Tensor:
    """Log-probabilities of the scored tokens, fp32 [tokens, vocabulary] on the CPU (rap_reading.py says which are scored)."""
    batch = read(model, items, geometry, pad_id)
    logits = model(**batch.inputs, logits_to_keep=batch.last).logits
    return logits[batch.scored[:, -batch.last :].to(logits.device)].double().log_softmax(-1).float().cpu()


def divergence(model: Any, items: Sequence[Encoded], reference: Sequence[Tensor], geometry: Geometry, pad_id: int) -> float:
    """Mean KL(dense || pruned) per scored token, nats."""
    total, tokens = 0.0, 0
    for item, dense in zip(items, reference, strict=True):
        own, exact = logprobs(model, [item], geometry, pad_id).double(), dense.double()
        total += float((exact.exp() * (exact - own)).sum(-1).clamp_min(0).sum())
        tokens += len(exact)
    return total / max(tokens, 1)


def report(artifact: Artifact, plan: RapPlan, dense: Counts, compact: Counts, kl: float, seconds: dict[str, float]) -> dict[str, Any]:
    """report.json: what was saved, what it costs, and what every layer keeps."""
    assert artifact.rap is not None
    return {
        "kv_bytes_per_token": {"dense": dense.kv_bytes_per_token, "compressed": compact.kv_bytes_per_token},
        "counts": {"dense": dense.to_json(), "pruned": compact.to_json()},
        "keep_ratio": plan.keep_ratio(artifact.geometry),
        "plan_kl": kl,
        "seconds": seconds,
        "layers": [
            {"layer": i, "pairs": wide.pairs, "of_pairs": shape.head_dim // 2, "value_width": wide.value, "of_channels": shape.head_dim}
            for i, (wide, shape) in enumerate(zip(artifact.rap.layers, artifact.geometry.layers, strict=True))
        ],
    }


def summary(options: CompileOptions, artifact: Artifact) -> dict[str, Any]:
    """What `--json` prints."""
    found, rap = artifact.report, artifact.rap
    assert rap is not None
    return {
        "artifact": str(options.output),
        "model": artifact.base_model["id"],
        "method": RAP,
        "layers": len(rap.layers),
        "kv_bytes_per_token": found["kv_bytes_per_token"],
        "counts": found["counts"],
        "seconds": {name: round(value, 2) for name, value in found["seconds"].items()},
        "plan": {
            "setting": rap.words,
            "keep_ratio": found["keep_ratio"],
            "predicted_kl": found["plan_kl"],
            "kept_aside": artifact.calibration["kept_aside"],
            "widths": {str(i): {"pairs": wide.pairs, "value_width": wide.value} for i, wide in enumerate(rap.layers)},
        },
    }


def words(done: dict[str, Any]) -> str:
    """A summary for people."""
    from .card import checked_on

    sizes, plan, seconds = done["kv_bytes_per_token"], done["plan"], done["seconds"]
    dense, compact = done["counts"]["dense"], done["counts"]["pruned"]
    share = {name: compact[name] / dense[name] for name in ("attention_parameters", "attention_flops", "parameters")}
    return (
        f"wrote {done['artifact']}: a checkpoint of {compact['parameters']:,} parameters ({share['parameters']:.3f} of the dense model)\n"
        f"{plan['setting']}; {sizes['dense']} -> {sizes['compressed']} bytes of Keys and Values per token "
        f"({sizes['compressed'] / sizes['dense']:.3f}), attention parameters {share['attention_parameters']:.3f}, "
        f"FLOPs {share['attention_flops']:.3f}\n"
        f"KL on {checked_on(plan['kept_aside'])}: {plan['predicted_kl']:.2e} nats per scored token\n"
        "seconds: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in seconds.items())
    )
