"""An artifact in words and tables, from its files alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .artifact import Artifact
from .errors import RotateKError


def summary(artifact: Artifact) -> dict[str, Any]:
    """Everything `rotatek-inspect --json` prints."""
    return {
        "artifact": str(artifact.path),
        "base_model": artifact.base_model,
        "method": asdict(artifact.method),
        "calibration": artifact.calibration,
        "ranks": {str(i): ranks for i, ranks in artifact.ranks().items()},
        "kv_bytes_per_token": {"dense": artifact.geometry.dense_bytes_per_token(), "compressed": artifact.bytes_per_token()},
        "report": artifact.report,
    }


def describe(artifact: Artifact) -> str:
    """Header and one line per layer and head: rank, energy kept, expected squared logit error, KL when cut."""
    method, dense, compressed = artifact.method, artifact.geometry.dense_bytes_per_token(), artifact.bytes_per_token()
    levels = " ".join(f"{level:>9}" for level in method.levels)
    lines = [
        f"base model {artifact.base_model.get('id')} ({artifact.geometry.model_type}), {len(artifact.ranks())} layers compressed",
        f"basis {method.basis}, {method.allocation} ranks, keep ratio {method.keep_ratio}, span {method.span}, window {method.window}",
        f"calibrated on {artifact.calibration.get('num_samples')} samples of {artifact.calibration.get('data')}",
        f"bytes per coded token, all layers: {dense} dense, {compressed:.0f} compressed ({dense / compressed:.2f}x smaller)",
        "",
        f"layer head  rank  energy kept  logit error²   KL when cut to rank {levels}",
    ]
    for i, ranks in artifact.ranks().items():
        sensitivity = artifact.tensors[f"layers.{i}.sensitivity"]
        spectrum = artifact.tensors[f"layers.{i}.visual.key_spectrum"]
        for h, rank in enumerate(ranks):
            total = float(spectrum[h].sum())
            kept = float(spectrum[h, :rank].sum()) / total if total > 0 else 1.0
            error = float(spectrum[h, rank:].sum())  # a spectrum is in squared logits
            cut = " ".join(f"{float(x):9.2e}" for x in sensitivity[h])
            lines.append(f"{i:5} {h:4} {rank:5} {kept:12.4f} {error:13.3e}   {'':19} {cut}")
    return "\n".join(lines)


def compare(first: Artifact, second: Artifact) -> str:
    """Two artifacts of one geometry side by side: what differs in method, bytes and ranks.

    Raises:
        RotateKError: different geometries.
    """
    if reason := first.geometry.difference(second.geometry):
        raise RotateKError(f"the artifacts are of different models: {reason}")
    lines = []
    other = asdict(second.method)
    for name, value in asdict(first.method).items():
        if value != other[name]:
            lines.append(f"{name}: {value} | {other[name]}")
    a, b = first.bytes_per_token(), second.bytes_per_token()
    lines.append(f"bytes per coded token: {a:.0f} | {b:.0f}")
    lines.append("layer  ranks | ranks")
    ranks = second.ranks()
    lines.extend(f"{i:5}  {r} | {ranks[i]}" for i, r in first.ranks().items())
    return "\n".join(lines)
