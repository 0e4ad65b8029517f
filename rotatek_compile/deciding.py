"""What a compilation decides once everything is measured: the plan for the method's budget, then escape tokens and own bases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .artifact import Artifact, Method
from .coding_choice import ESCAPE_RATIOS, PRIOR_TOKENS, CodingChoice
from .compile_options import CompileOptions
from .cost_curves import Curves, needed_share, predicted_kl
from .cutter import Cutter, Prefilled
from .geometry import Geometry
from .parallel import Processes
from .plan import Plan
from .planning import Costs, doubted, searches_for, searches_of_bytes, smallest_share, stated, tokens_to_pay
from .repair import repaired, smallest_within
from .sensitivity import JointCheck


@dataclass(frozen=True, slots=True)
class Cautious:
    """What plans are compared by: tempered KL on the documents of the check, plus what cuts of single heads make one expect.

    Where a plan is good, a hundred documents say little about it: what it costs on others is in few of them, and of the plans that these
    hundred do not mind some cost others dearly. At a higher temperature (sensitivity.TEMPERATURE) every document shows how near a plan has
    brought it to another answer. The sum is careful where there is still nothing to measure.
    """

    check: JointCheck
    expected: Curves

    def __call__(self, plan: Plan, most: float = math.inf) -> float:
        expected = predicted_kl(plan, self.expected)
        return self.check.tempered(plan, most - expected) + expected


def plan_from(geometry: Geometry, costs: Costs, check: JointCheck, method: Method) -> tuple[Plan, Method, dict[str, Any]]:
    """The plan for the method's budget, the method with what it came to, and what checking the whole plan gave.

    The main process decides for all.
    """
    found: tuple[Plan, Method, dict[str, Any]] = check.lead(lambda: _searched(geometry, costs, check, method))
    return found


def _searched(geometry: Geometry, costs: Costs, check: JointCheck, method: Method) -> tuple[Plan, Method, dict[str, Any]]:
    if method.max_kl is not None:
        plan, kl, swaps = smallest_within(
            lambda share: searches_of_bytes(geometry, costs, method, share),
            check,
            method.max_kl,
            smallest_share(geometry, method.escape_ratio),
            alike=method.allocation == "uniform",
            repair=method.allocation == "allocated",
        )
        share = needed_share(geometry, plan, method.escape_ratio)
        method = replace(method, kv_budget=needed_share(geometry, plan, method.escape_ratio, tokens_to_pay(method, share)))
        return plan, stated(method, geometry, plan), {"kl": kl, "swaps": swaps, "plan": method.allocation}
    searches = searches_for(geometry, costs, method)
    if method.allocation == "uniform" or (method.kv_budget is None and method.keep_ratio == 1):
        plan = searches[0].uniform
        return plan, stated(method, geometry, plan), {"kl": check(plan), "swaps": 0, "plan": "uniform"}
    if method.allocation == "energy":  # what knows of no measure is not repaired by one
        plan = searches[0].plan(searches[0].best())
        return plan, stated(method, geometry, plan), {"kl": check(plan), "swaps": 0, "plan": "energy"}
    plan, _, swaps = repaired([*searches, *doubted(searches)], Cautious(check, costs.expected), relief=check.relief)
    kl = check(plan)
    kind = "uniform" if plan == searches[0].uniform else "allocated"
    return plan, stated(method, geometry, plan), {"kl": kl, "swaps": swaps, "plan": kind}


def coding_chosen(
    artifact: Artifact,
    options: CompileOptions,
    cutter: Cutter,
    docs: Sequence[Prefilled],
    costs: Costs,
    checks: dict[str, Any],
    together: Processes,
) -> Artifact:
    """The artifact with escape tokens and own bases where these pay; what was measured joins `checks`."""

    def plan_for(method: Method) -> Plan:
        search = searches_for(artifact.geometry, costs, method)[0]
        return search.plan(search.best())

    choice = CodingChoice(cutter, docs, plan_for, together)
    ratios = ESCAPE_RATIOS if options.escape_ratio is None else ()
    chosen = choice.chosen(artifact, ratios, (PRIOR_TOKENS,) if options.prior_tokens is None else ())
    checks["coding"] = choice.report(chosen)
    if chosen is not artifact:
        checks["kl"] = choice.kl(chosen)
        chosen = replace(chosen, method=stated(chosen.method, chosen.geometry, chosen.plan()))
    return chosen
