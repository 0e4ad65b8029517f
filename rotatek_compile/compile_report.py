"""report.json of an artifact: what was decided for every head, and what it is expected or measured to cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .artifact import Artifact
from .bases import Basis
from .cost_curves import SEGMENT, dense_bytes, distortions, plan_bytes
from .kernels.slabs import Slabs
from .knockout import diagnosis
from .moments import Moments
from .plan import SIDES


def report(
    artifact: Artifact, bases: Mapping[str, Mapping[int, Basis]], moments: Moments, checks: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    """What `rotatek-inspect` shows: per layer and head the plan, kept energy, expected errors and measured KL.

    Args:
        bases: by side and layer.
        checks: what checking the plan as a whole gave: kl, swaps, plan; and `coding`, where escape tokens and own bases were chosen.
    """
    knockouts = artifact.knockout()
    sensitivities = {side: artifact.sensitivity(side) for side in SIDES}
    layers = []
    for i, plan in artifact.plan().items():
        heads = []
        for h, head in enumerate(plan):
            entry: dict[str, Any] = {side: list(getattr(head, side)) for side in SIDES}
            for side in SIDES:
                entry |= _side(side, getattr(head, side), bases[side][i].spectrum[h], sensitivities[side].get(i), h)
            heads.append(entry | {"kl_when_knocked_out": float(knockouts[i][h]) if knockouts else None})
        layers.append({"layer": i, "heads": heads})
    geometry = artifact.geometry
    bytes_ = plan_bytes(geometry, artifact.plan(), escape_ratio=artifact.method.escape_ratio)
    return {
        "levels": [list(level) for level in artifact.method.levels],
        "plan_kl": checks["kl"],
        "plan_swaps": checks["swaps"],
        "plan_kind": checks["plan"],
        "coding": checks.get("coding"),
        "kv_bytes_per_token": {"dense": geometry.dense_bytes_per_token(), "compressed": artifact.bytes_per_token()},
        "segment": {"tokens": SEGMENT, "dense_bytes": dense_bytes(geometry), "bytes": bytes_},
        "calibration_tokens": {k: int(moments.sums[f"{geometry.compressible[0]}.{k}.count"]) for k in artifact.method.kinds},
        "seconds": seconds,
        "knockout": diagnosis(knockouts) if knockouts else None,
        "layers": layers,
    }


def _side(side: str, slabs: Slabs, spectrum: Tensor, sensitivity: Tensor | None, head: int) -> dict[str, Any]:
    """`energy_kept`: share of the spectrum in kept directions; `expected_squared_error`: whitened, coding errors included."""
    total = float(spectrum.sum())
    (lost,) = distortions(spectrum, [slabs]).tolist()
    return {
        f"{side}_energy_kept": float(spectrum[: slabs.rank].sum()) / total if total > 0 else 1.0,
        f"{side}_expected_squared_error": lost * total,
        f"{side}_kl_when_cut": [float(x) for x in sensitivity[head]] if sensitivity is not None else None,
    }
