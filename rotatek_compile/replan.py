"""Another budget for a compiled artifact: bases are ordered and ranks nest, so any plan can be cut from what is stored."""

from __future__ import annotations

import warnings
from dataclasses import replace

from .artifact import Artifact, Method
from .errors import UsageError
from .names import check_fraction
from .plan import SIDES, Plan, plan_tensors
from .planning import Costs, searches_for, spectra_of, stated, uniform_of
from .token_budget import of_kept_tokens, with_total

MOST_ESCAPED = 0.5  # of a budget that the escape tokens of another one may take
VALUE_SHARE = 0.5  # of the dense bytes, for Values that are stored as they are


def replanned(artifact: Artifact, keep_ratio: float | None = None, kv_budget: float | None = None) -> Artifact:
    """The same artifact with a plan for another budget, spent over heads by the stored sensitivities as at compile time.

    Unlike at compile time the plan as a whole is not checked on documents: single cuts hide redundancy (DESIGN.md §4.4), so measure a
    plan that you mean to keep with `rotatek-eval`, or compile for it.

    Args:
        keep_ratio: fraction of Key directions kept, mean over heads, in (0, 1]; at the precision the artifact was compiled for, or native
            where it was compiled for a budget of bytes.
        kv_budget: fraction of the dense bytes of Keys and Values that a segment of 512 tokens may take, scales, means and escape tokens
            included; the artifact's escape ratio stays, unless it would take over half of a smaller budget (a warning says so). For
            an artifact without sensitivities of the Values they stay raw and take half of it: b keeps 2 b - 1 of the native Key
            directions, means left out.

    Raises:
        UsageError: none or both of the two, out of range, or a budget that the artifact's method cannot meet.
    """
    if (keep_ratio is None) == (kv_budget is None):
        raise UsageError("--keep-ratio and --kv-budget say the same thing in two ways; give one of them")
    for name, value in (("--keep-ratio", keep_ratio), ("--kv-budget", kv_budget)):
        check_fraction(name, value)
    method, geometry = artifact.method, artifact.geometry
    if method.rival is not None:
        return _rival(artifact, keep_ratio, kv_budget)
    of_all = with_total(method, geometry, kv_budget) if kv_budget is not None else None  # of fewer tokens, more of each
    method = replace(method, token_budget=of_all.token_budget if of_all else None)
    kv_budget = of_all.kv_budget if of_all else None
    if kv_budget is not None and not (method.levels and artifact.sensitivity("value")):
        if kv_budget <= VALUE_SHARE:
            raise UsageError(
                f"--kv-budget {kv_budget:g} is too small: this artifact stores Values as they are, which takes {VALUE_SHARE:g}; "
                f"compile it again to code them"
            )
        keep_ratio, kv_budget = (kv_budget - VALUE_SHARE) / VALUE_SHARE, None
        method = replace(method, value_bits="native")
    wanted = _with_budget(method, keep_ratio, kv_budget)
    plan = _plan(artifact, wanted)
    return replace(artifact, method=stated(wanted, geometry, plan), tensors=artifact.tensors | plan_tensors(plan))


def _with_budget(method: Method, keep_ratio: float | None, kv_budget: float | None) -> Method:
    """The method with another budget; bits stay, but for those that only one kind of budget knows."""
    if kv_budget is not None:
        mixed = method.kv_budget is not None  # compiled for bytes: perhaps at chosen bits
        bits = (method.key_bits, method.value_bits) if mixed else ("auto", "auto")
        if method.escape_ratio > MOST_ESCAPED * kv_budget:
            warnings.warn(
                f"{method.escape_ratio:.4g} of the tokens raw would take most of --kv-budget {kv_budget:g}: this plan has no escape tokens",
                stacklevel=4,
            )
            method = replace(method, escape_ratio=0.0)
        return replace(method, kv_budget=kv_budget, max_kl=None, key_bits=bits[0], value_bits=bits[1])
    assert keep_ratio is not None
    if method.kv_budget is not None:
        method = replace(method, key_bits="native", value_bits="native")
    return replace(method, keep_ratio=keep_ratio, kv_budget=None, max_kl=None)


def _plan(artifact: Artifact, method: Method) -> Plan:
    geometry = artifact.geometry
    if method.kv_budget is None and (method.keep_ratio == 1 or method.allocation == "uniform"):
        return uniform_of(geometry, method)
    if not method.levels:
        warnings.warn("the artifact holds no sensitivities: every head keeps the same number of directions", stacklevel=3)
        return uniform_of(geometry, method)
    search = searches_for(geometry, costs_of(artifact), method)[0]
    return search.uniform if method.allocation == "uniform" else search.plan(search.best())


def costs_of(artifact: Artifact) -> Costs:
    """What an artifact knows of its heads."""
    geometry, method = artifact.geometry, artifact.method
    sensitivities = {side: artifact.sensitivity(side) for side in SIDES}
    return Costs.of(geometry, method.levels, sensitivities, spectra_of(artifact.tensors, geometry, method.kinds[0]))


def _rival(artifact: Artifact, keep_ratio: float | None, kv_budget: float | None) -> Artifact:
    """A rival's knob is set when its coder is made, which also says what it cannot do."""
    from .runtime.prepared import PreparedArtifact
    from .runtime.rivals.registry import RIVALS

    name = str(artifact.method.rival)
    if keep_ratio is not None and name in RIVALS and "keep_ratio" not in RIVALS[name].settings:
        raise UsageError(f"method {name} has no keep ratio; use --kv-budget")
    ratio = artifact.method.keep_ratio if keep_ratio is None else keep_ratio
    method = replace(artifact.method, keep_ratio=ratio, kv_budget=None, token_budget=None)
    changed = replace(artifact, method=method if kv_budget is None else with_total(method, artifact.geometry, kv_budget))
    with of_kept_tokens(changed.method):
        PreparedArtifact(changed).coder  # noqa: B018 - raises where the setting cannot be met
    return changed
