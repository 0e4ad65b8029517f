"""What the page of `rotatek-inspect --html` predicts: errors of single cuts, and KL over budget as allocation expects it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from .allocate import Menu, menus_of_bytes, plan_from_choice, spend
from .artifact import Artifact
from .cost_curves import SEGMENT, Curves, curves_of, dense_bytes, distortions, lower_hull, plan_bytes, predicted_kl
from .geometry import Geometry
from .kernels.slabs import Slabs
from .plan import SIDES, HeadPlan, Plan

Map = dict[int, np.ndarray]  # by layer; the first axis is KV heads
HALVINGS = 7  # of the dense bytes: budgets down to 1/128 are predicted


@dataclass(frozen=True, slots=True)
class Budget:
    """KL in nats per answer token that is expected where Keys and Values together take a share of the dense bytes."""

    bytes: float
    kl: float


def _spectra_of(artifact: Artifact, side: str) -> dict[int, torch.Tensor]:
    """What budgets are spent by: spectra of the main kind [Hkv, D]."""
    main = artifact.method.kinds[0]
    return {i: artifact.tensors[f"layers.{i}.{main}.{side}_spectrum"] for i in artifact.geometry.compressible}


def readable(artifact: Artifact) -> bool:
    """Whether costs of other plans follow from the levels: the first keeps nothing, and none keeps more than there is."""
    levels, dims = artifact.method.levels, [artifact.geometry.layers[i].head_dim for i in artifact.geometry.compressible]
    return bool(levels) and levels[0].rank == 0 and max(level.rank for level in levels) <= min(dims)


def errors_of(artifact: Artifact, sides: Iterable[str]) -> dict[str, dict[Slabs, Map]]:
    """Energy of the errors, rounding included, when one head is cut to each level, by side; nothing if the levels are not readable."""
    if not readable(artifact):
        return {}
    levels, found = artifact.method.levels, {}
    for side in sides:
        spectra = _spectra_of(artifact, side)
        tables = {i: np.stack([distortions(s, levels) * float(s.double().sum()) for s in heads]) for i, heads in spectra.items()}
        found[side] = {level: {i: table[:, n] for i, table in tables.items()} for n, level in enumerate(levels)}
    return found


def budgets_of(artifact: Artifact) -> tuple[list[Budget], list[Budget], Budget | None]:
    """Expected KL at each budget, from everything raw down to what is possible: of what allocation spends, of the best plan that is the
    same in every head, and of the artifact's own plan.

    Values without sensitivities stay raw, then the second list is empty. The small weight that orders heads of no measured cost is part
    of every figure.
    """
    if not readable(artifact):
        return [], [], None
    geometry = artifact.geometry
    sensitivities = {side: found for side in SIDES if (found := artifact.sensitivity(side))}
    curves = curves_of(geometry, artifact.method.levels, sensitivities, {side: _spectra_of(artifact, side) for side in SIDES})
    menus, dense = {pair: _on_hull(menu) for pair, menu in menus_of_bytes(geometry, curves).items()}, dense_bytes(geometry)

    def budget(plan: Plan) -> Budget:
        return Budget(plan_bytes(geometry, plan) / dense, predicted_kl(plan, curves))

    best: list[Budget] = []
    same: list[Budget] = []
    for halvings in np.arange(0, HALVINGS + 0.1, 0.5):
        share = 2.0**-halvings
        with suppress(ValueError):  # not even the smallest plan fits
            best.append(budget(plan_from_choice(spend(menus, int(dense * share)), menus)))
            if "value" in sensitivities:
                same.append(budget(_same(geometry, curves, share)))
    return list(dict.fromkeys(best)), list(dict.fromkeys(same)), budget(artifact.plan())


def _on_hull(menu: Menu) -> Menu:
    """What budgets are mostly spent on; what fills the rest of a budget is left out here, where many are spent."""
    kept = lower_hull(menu.cost, menu.kl)
    return Menu(tuple(menu.options[n] for n in kept), menu.cost[kept], menu.kl[kept])


def _same(geometry: Geometry, curves: Curves, share: float) -> Plan:
    """As `allocate.same_everywhere` at any bits, from whole arrays: many shares are asked for here.

    Raises:
        ValueError: not even the smallest plan fits.
    """
    plan: Plan = {}
    for dim in {geometry.layers[i].head_dim for i in geometry.compressible}:
        some = [curve for (i, _), curve in curves.items() if geometry.layers[i].head_dim == dim]
        options, cost = some[0].key.options, some[0].key.cost
        keys, values = (np.sum([getattr(curve, side).kl for curve in some], axis=0) for side in SIDES)
        fits = cost[:, None] + cost[None, :] <= share * 4 * dim * SEGMENT
        if not fits.any():
            raise ValueError(f"no plan fits a share of {share}")
        total = np.where(fits, keys[:, None] + values[None, :], np.inf)
        key, value = np.unravel_index(int(total.argmin()), total.shape)
        head = HeadPlan(options[key], options[value])
        layers = [i for i in geometry.compressible if geometry.layers[i].head_dim == dim]
        plan |= {i: [head] * geometry.layers[i].kv_heads for i in layers}
    return plan
