"""Spending a budget of Key directions over heads by what each head's answer KL loses (DESIGN.md §4.4)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .artifact import RANK_STEP
from .geometry import Geometry

Plan = dict[int, list[int]]  # directions kept per KV head, by layer
TIE_WEIGHT = 1e-6  # KL per unit of remaining energy share: orders heads whose measured KL is all zero
SWAP_ROUNDS = 6
SWAP_CANDIDATES = 6
GOOD_ENOUGH = 1e-4  # nats per token below which a plan needs no repair


def uniform_plan(geometry: Geometry, keep_ratio: float) -> Plan:
    """The same number of directions everywhere: keep_ratio · D rounded to a step of 8."""
    return {
        i: [min(_steps(keep_ratio * geometry.layers[i].head_dim) * RANK_STEP, geometry.layers[i].head_dim)] * geometry.layers[i].kv_heads
        for i in geometry.compressible
    }


def cost_curve(levels: tuple[int, ...], measured: Tensor, spectrum: Tensor) -> np.ndarray:
    """Expected KL of one head at ranks 0, 8, ... D: fp64 [D / 8 + 1], never rising.

    Between measured levels log KL is interpolated over log of the remaining energy; beyond the last one KL shrinks with the energy.

    Args:
        levels: ranks that were measured, ascending, the first 0.
        measured: KL at these ranks [levels].
        spectrum: energies of the directions [D], descending.
    """
    dim = spectrum.numel()
    ranks = np.arange(0, dim + 1, RANK_STEP)
    energy = spectrum.double().numpy()
    tail = np.concatenate([energy[::-1].cumsum()[::-1], [0.0]])[ranks] / max(energy.sum(), 1e-30)
    kl = np.maximum.accumulate(measured.double().numpy()[::-1])[::-1]  # a larger rank never costs more than a smaller one's measure
    at = np.array(levels) // RANK_STEP
    floor = 1e-12
    x, known = np.log(tail + floor), np.log(kl + floor)
    curve = np.empty(len(ranks))
    for n in range(len(ranks)):
        right = int(np.searchsorted(at, n))
        if right < len(at) and at[right] == n:
            curve[n] = kl[right]
        elif right == len(at):
            curve[n] = kl[-1] * tail[n] / max(tail[at[-1]], floor)
        else:
            left = right - 1
            span = x[at[right]] - x[at[left]]
            part = (x[n] - x[at[left]]) / span if span else 0.0
            curve[n] = np.exp(known[left] + part * (known[right] - known[left]))
    curve[-1] = 0.0
    return np.minimum.accumulate(curve + TIE_WEIGHT * tail)


def allocate(geometry: Geometry, curves: dict[int, list[np.ndarray]], keep_ratio: float) -> Plan:
    """Spend the uniform plan's directions where they lower expected KL most, along each curve's lower convex hull."""
    budget = sum(sum(ranks) for ranks in uniform_plan(geometry, keep_ratio).values()) // RANK_STEP
    offers = []
    for layer, heads in curves.items():
        for head, curve in enumerate(heads):
            n = 0
            while n < len(curve) - 1:
                gains = (curve[n] - curve[n + 1 :]) / np.arange(1, len(curve) - n)
                best = int(gains.argmax())
                offers.append((float(gains[best]), layer, head, best + 1))
                n += best + 1
    plan = {i: [0] * geometry.layers[i].kv_heads for i in geometry.compressible}
    # sorting keeps each head's own offers in order, because slopes along a convex hull only fall
    for _, layer, head, steps in sorted(offers, key=lambda offer: -offer[0]):
        taken = min(steps, budget)
        plan[layer][head] += taken * RANK_STEP
        budget -= taken
        if budget == 0:
            break
    return plan


def repair(plan: Plan, curves: dict[int, list[np.ndarray]], measure: Callable[[Plan], float], uniform: Plan) -> tuple[Plan, float, int]:
    """Check a plan as a whole on documents kept aside, and improve it by swaps of 8 directions while that helps.

    Single cuts hide redundancy: heads that each can go may not all go. If the uniform plan is better, it is taken.

    Returns:
        the plan, its measured KL, and the number of swaps made.
    """
    best, swaps = measure(plan), 0
    for _ in range(SWAP_ROUNDS):
        if best <= GOOD_ENOUGH:
            break
        donors = sorted(_moves(plan, curves, -1))[:2]
        takers = sorted(_moves(plan, curves, +1))[:SWAP_CANDIDATES]
        trials = [
            (measure(candidate), candidate)
            for _, give in donors
            for _, take in takers
            if give != take
            for candidate in [_moved(_moved(plan, give, -RANK_STEP), take, RANK_STEP)]
        ]
        if not trials:
            break
        value, candidate = min(trials, key=lambda trial: trial[0])
        if value >= best:
            break
        best, plan, swaps = value, candidate, swaps + 1
    reference = measure(uniform)
    if reference < best and best > GOOD_ENOUGH:
        return uniform, reference, swaps
    return plan, best, swaps


def _moves(plan: Plan, curves: dict[int, list[np.ndarray]], direction: int) -> list[tuple[float, tuple[int, int]]]:
    """Expected change of KL when a head gives (-1) or takes (+1) one step, for every head that can."""
    moves = []
    for layer, ranks in plan.items():
        for head, rank in enumerate(ranks):
            n, curve = rank // RANK_STEP, curves[layer][head]
            if 0 <= n + direction < len(curve):
                moves.append((float(curve[n + direction] - curve[n]), (layer, head)))
    return moves


def _moved(plan: Plan, place: tuple[int, int], change: int) -> Plan:
    copy = {layer: list(ranks) for layer, ranks in plan.items()}
    copy[place[0]][place[1]] += change
    return copy


def _steps(directions: float) -> int:
    return int(directions / RANK_STEP + 0.5)


def plan_tensor(ranks: list[int]) -> Tensor:
    """A layer's plan as the artifact stores it."""
    return torch.tensor(ranks, dtype=torch.int32)
