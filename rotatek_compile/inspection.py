"""An artifact in words and tables, from its files alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .artifact import Artifact
from .errors import RotateKError
from .knockout import diagnosis


def summary(artifact: Artifact) -> dict[str, Any]:
    """Everything `rotatek-inspect --json` prints."""
    return {
        "artifact": str(artifact.path),
        "base_model": artifact.base_model,
        "method": asdict(artifact.method),
        "calibration": artifact.calibration,
        "ranks": {str(i): ranks for i, ranks in artifact.ranks().items()},
        "kv_bytes_per_token": {"dense": artifact.geometry.dense_bytes_per_token(), "compressed": artifact.bytes_per_token()},
        "knockout": knockout_summary(artifact),
        "report": artifact.report,
    }


def knockout_summary(artifact: Artifact) -> dict[str, Any] | None:
    """Knock-out KL by layer and head, and what it says of the model; None for artifacts that have none."""
    table = artifact.knockout()
    return {"kl": {str(i): [float(x) for x in heads] for i, heads in table.items()}, **diagnosis(table)} if table else None


def describe(artifact: Artifact) -> str:
    """Header, one line per layer and head (rank, energy kept, expected squared logit error, KL when cut), and the map of knock-outs."""
    return "\n".join([*_header(artifact), *_heads(artifact), *_knockout_map(artifact)])


def _header(artifact: Artifact) -> list[str]:
    method, dense, compressed = artifact.method, artifact.geometry.dense_bytes_per_token(), artifact.bytes_per_token()
    return [
        f"base model {artifact.base_model.get('id')} ({artifact.geometry.model_type}), "
        f"{len(artifact.geometry.compressible)} layers compressed",
        f"{method.words}, span {method.span}, window {method.window}",
        f"calibrated on {artifact.calibration.get('num_samples')} samples of {artifact.calibration.get('data')}",
        f"bytes per coded token, all layers: {dense} dense, {compressed:.0f} compressed ({dense / compressed:.2f}x smaller)",
    ]


def _heads(artifact: Artifact) -> list[str]:
    if artifact.method.rival is not None:
        return []
    levels = " ".join(f"{level:>9}" for level in artifact.method.levels)
    # only this basis's spectrum is in squared logits (bases.py)
    cut_name = "logit error²" if artifact.method.basis == "two-sided" else "  energy cut"
    lines = ["", f"layer head  rank  energy kept  {cut_name}   KL when cut to rank {levels}"]
    for i, ranks in artifact.ranks().items():
        sensitivity = artifact.tensors[f"layers.{i}.sensitivity"]
        spectrum = artifact.tensors[f"layers.{i}.{artifact.method.kinds[0]}.key_spectrum"]
        for h, rank in enumerate(ranks):
            total = float(spectrum[h].sum())
            kept = float(spectrum[h, :rank].sum()) / total if total > 0 else 1.0
            error = float(spectrum[h, rank:].sum())
            cut = " ".join(f"{float(x):9.2e}" for x in sensitivity[h])
            lines.append(f"{i:5} {h:4} {rank:5} {kept:12.4f} {error:13.3e}   {'':19} {cut}")
    return lines


def _knockout_map(artifact: Artifact) -> list[str]:
    """KL per answer token, layers down and heads across, and one line of diagnosis; nothing without knock-outs."""
    table = artifact.knockout()
    if not table:
        return []
    found = diagnosis(table)
    heads = max(len(row) for row in table.values())
    return [
        "",
        "KL when the image Keys and Values of one head alone become their means (nats per answer token)",
        "layer " + " ".join(f"{f'head {h}':>8}" for h in range(heads)),
        *(f"{i:<5} " + " ".join(f"{float(x):8.3f}" for x in row) for i, row in table.items()),
        f"{found['share_above']:.0%} of {found['pairs']} (layer, head) pairs cost at least {found['threshold']} alone; "
        f"{found['pairs_for_90_percent']} of them carry 90 % of the sum",
    ]


def compare(first: Artifact, second: Artifact) -> str:
    """Two artifacts of one geometry side by side: what differs in method, bytes and ranks.

    Raises:
        RotateKError: different geometries.
    """
    if reason := first.geometry.difference(second.geometry):
        raise RotateKError(f"the artifacts are of different models: {reason}; --html FILE shows them side by side")
    lines = []
    other = asdict(second.method)
    for name, value in asdict(first.method).items():
        if value != other[name]:
            lines.append(f"{name}: {value} | {other[name]}")
    a, b = first.bytes_per_token(), second.bytes_per_token()
    lines.append(f"bytes per coded token: {a:.0f} | {b:.0f}")
    if first.method.rival is None and second.method.rival is None:
        lines.append("layer  ranks | ranks")
        ranks = second.ranks()
        lines.extend(f"{i:5}  {r} | {ranks[i]}" for i, r in first.ranks().items())
    return "\n".join(lines)
