"""Another budget for a compiled artifact: bases are ordered and ranks nest, so any plan can be cut from what is stored."""

from __future__ import annotations

import warnings
from dataclasses import replace

from .allocate import allocate, cost_curve, plan_tensor, uniform_plan
from .artifact import Artifact
from .errors import UsageError
from .names import check_fraction

VALUE_SHARE = 0.5  # of the dense bytes: Values are stored as they are


def replanned(artifact: Artifact, keep_ratio: float | None = None, kv_budget: float | None = None) -> Artifact:
    """The same artifact with ranks for another budget, spent over heads by the stored sensitivities as at compile time.

    Unlike at compile time the plan as a whole is not checked on documents: single cuts hide redundancy (DESIGN.md §4.4), so measure a
    plan that you mean to keep with `rotatek-eval`, or compile for it.

    Args:
        keep_ratio: fraction of Key directions kept, mean over heads, in (0, 1].
        kv_budget: fraction of the dense bytes of Keys and Values that a coded token may take, means and tables left out. For our own
            method Values take half of it: a budget b keeps 2 b - 1 of the Key directions.

    Raises:
        UsageError: none or both of the two, out of range, or a budget that the artifact's method cannot meet.
    """
    if (keep_ratio is None) == (kv_budget is None):
        raise UsageError("--keep-ratio and --kv-budget say the same thing in two ways; give one of them")
    for name, value in (("--keep-ratio", keep_ratio), ("--kv-budget", kv_budget)):
        check_fraction(name, value)
    method = artifact.method
    if method.rival is not None:
        return _rival(artifact, keep_ratio, kv_budget)
    if kv_budget is not None:
        if kv_budget <= VALUE_SHARE:
            raise UsageError(
                f"--kv-budget {kv_budget:g} is too small: this artifact stores Values as they are, which takes {VALUE_SHARE:g}"
            )
        keep_ratio = (kv_budget - VALUE_SHARE) / VALUE_SHARE
    assert keep_ratio is not None
    geometry, plan = artifact.geometry, uniform_plan(artifact.geometry, keep_ratio)
    if method.allocation == "allocated" and keep_ratio < 1:
        if method.levels:
            curves = {}
            for i in geometry.compressible:
                measured, spectra = (
                    artifact.tensors[f"layers.{i}.sensitivity"],
                    artifact.tensors[f"layers.{i}.{method.kinds[0]}.key_spectrum"],
                )
                curves[i] = [cost_curve(method.levels, measured[h], spectra[h]) for h in range(geometry.layers[i].kv_heads)]
            plan = allocate(geometry, curves, keep_ratio)
        else:
            warnings.warn("the artifact holds no sensitivities: every head keeps the same number of directions", stacklevel=2)
    ranks = {f"layers.{i}.key_rank": plan_tensor(ranks) for i, ranks in plan.items()}
    return replace(artifact, method=replace(method, keep_ratio=keep_ratio), tensors=artifact.tensors | ranks)


def _rival(artifact: Artifact, keep_ratio: float | None, kv_budget: float | None) -> Artifact:
    """A rival's knob is set when its coder is made, which also says what it cannot do."""
    from .runtime.prepared import PreparedArtifact
    from .runtime.rivals.registry import RIVALS

    name = str(artifact.method.rival)
    if keep_ratio is not None and name in RIVALS and "keep_ratio" not in RIVALS[name].settings:
        raise UsageError(f"method {name} has no keep ratio; use --kv-budget")
    ratio = artifact.method.keep_ratio if keep_ratio is None else keep_ratio
    changed = replace(artifact, method=replace(artifact.method, keep_ratio=ratio, kv_budget=kv_budget))
    PreparedArtifact(changed).coder  # noqa: B018 - raises where the setting cannot be met
    return changed
