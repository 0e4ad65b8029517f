"""What rotatek-inspect says of a pruned checkpoint: how many pairs and Value directions every layer keeps, and which pairs."""

from __future__ import annotations

from typing import Any

from .artifact import Artifact
from .errors import RotateKError
from .rap_artifact import pairs_of

COLUMNS = 64  # of the map of pairs; more of them share one


def summary(artifact: Artifact) -> dict[str, Any]:
    """Everything `rotatek-inspect --json` prints; `pairs` are those kept by layer and KV head."""
    assert artifact.rap is not None
    return {
        "artifact": str(artifact.path),
        "base_model": artifact.base_model,
        "method": {"method": "rap"} | artifact.rap.to_json(),
        "calibration": artifact.calibration,
        "pairs": {str(i): found.tolist() for i, found in pairs_of(artifact).items()},
        "kv_bytes_per_token": {"dense": _dense_bytes(artifact), "compressed": artifact.bytes_per_token()},
        "report": artifact.report,
    }


def describe(artifact: Artifact) -> str:
    """Header, one line per layer, and a map of the kept pairs of every KV head."""
    assert artifact.rap is not None
    dense, kept = _dense_bytes(artifact), artifact.bytes_per_token()
    lines = [
        f"smaller checkpoint of {artifact.base_model.get('id')} ({artifact.geometry.model_type}), {len(artifact.rap.layers)} text layers",
        artifact.rap.words,
        f"calibrated on {artifact.calibration.get('num_samples')} samples of {artifact.calibration.get('data')}",
        f"bytes of Keys and Values per token, all layers: {dense} dense, {kept:.0f} kept ({kept / dense:.3f})",
        *_counts(artifact),
        "",
        "layer  RoPE pairs     Value width    bytes per token",
    ]
    for i, (wide, shape) in enumerate(zip(artifact.rap.layers, artifact.geometry.layers, strict=True)):
        size = 2 * shape.kv_heads * (2 * wide.pairs + wide.value)
        lines.append(f"{i:5}  {f'{wide.pairs} of {shape.head_dim // 2}':13}  {f'{wide.value} of {shape.head_dim}':13}  {size:6}")
    return "\n".join([*lines, "", *_map(artifact)])


def compare(first: Artifact, second: Artifact) -> str:
    """Two artifacts side by side, both of `--method rap`.

    Raises:
        RotateKError: one of them is not, or they are of different models.
    """
    if first.rap is None or second.rap is None:
        raise RotateKError(
            "one of the artifacts is a smaller checkpoint (RAP), the other a sidecar; they keep different things, inspect each"
        )
    if reason := first.geometry.difference(second.geometry):
        raise RotateKError(f"the artifacts are of different models: {reason}")
    lines = [f"{first.rap.words} | {second.rap.words}"]
    a, b = first.bytes_per_token(), second.bytes_per_token()
    lines.append(f"bytes of Keys and Values per token: {a:.0f} | {b:.0f}")
    pairs = pairs_of(first), pairs_of(second)
    for i, (one, two) in enumerate(zip(first.rap.layers, second.rap.layers, strict=True)):
        own = [set(row.tolist()) for row in pairs[0][i]]
        shared = sum(len(row & set(other.tolist())) for row, other in zip(own, pairs[1][i], strict=True))
        lines.append(
            f"layer {i}: {one.pairs} | {two.pairs} pairs, {shared / len(own):.1f} of them the same in a head; "
            f"Values {one.value} | {two.value} wide"
        )
    return "\n".join(lines)


def _dense_bytes(artifact: Artifact) -> int:
    return 2 * sum(2 * layer.kv_heads * layer.head_dim for layer in artifact.geometry.layers)


def _counts(artifact: Artifact) -> list[str]:
    """Shares of parameters and FLOPs, and the KL, as the report has them."""
    from .card import checked_on

    words = {"attention_parameters": "attention parameters", "attention_flops": "attention FLOPs", "parameters": "parameters of all"}
    try:
        dense, kept = (artifact.report["counts"][name] for name in ("dense", "pruned"))
        shares = ", ".join(f"{said} {kept[name] / dense[name]:.3f}" for name, said in words.items())
        kl = float(artifact.report["plan_kl"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # a report that was edited, or is gone
        return []
    return [
        f"counted on the loaded models: {shares}",
        f"KL on {checked_on(artifact.calibration.get('kept_aside', 1))}: {kl:.2e} nats per scored token",
    ]


def _map(artifact: Artifact) -> list[str]:
    """A line per KV head, high frequencies first: `#` where all pairs of a column are kept, `+` where some are."""
    lines = ["kept pairs, from the highest frequency to the lowest", "layer head"]
    for i, heads in pairs_of(artifact).items():
        half = artifact.geometry.layers[i].head_dim // 2
        wide = -(-half // COLUMNS)
        for h, row in enumerate(heads.tolist()):
            counts = [sum(1 for p in row if p // wide == column) for column in range(-(-half // wide))]
            full = [min(wide, half - column * wide) for column in range(len(counts))]
            marks = "".join("#" if n == most else "+" if n else "." for n, most in zip(counts, full, strict=True))
            lines.append(f"{i:5} {h:4}  {marks}")
    return lines
