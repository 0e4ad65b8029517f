"""From a method's setting to a plan: what may be chosen at which price, how much may be spent, and what every plan is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from . import allocate as allocation
from .allocate import Choice, Menus
from .artifact_config import Method
from .cost_curves import READINGS, SEGMENT, Curves, curves_of, dense_bytes, energy_curves, plan_bytes
from .errors import UsageError
from .geometry import Geometry
from .kernels.slabs import Slabs
from .plan import SIDES, Plan

DOUBTED, EVEN, NOISE = 24, 0.5, 1.5
"""Further starts of a search, and how far they part from what was measured (allocate.py). Cuts of single heads on 36 documents leave that
much open: of 60 such plans one had half the KL of what four readings gave, on 200 unseen documents (tiny-llava-next, 1/16)."""

MEANS = 0.125
"""Of a budget, what own means of short images may take: they cost as much as one raw token (two bytes a channel, Keys and Values)."""

Spectra = Mapping[str, Mapping[int, Tensor]]  # by side and layer, [Hkv, D]


@dataclass(frozen=True, slots=True)
class Search:
    """A budget to be spent. `budget` is in the unit of the menus' costs; `uniform` is the plan of that budget that treats heads alike."""

    menus: Menus
    budget: int
    uniform: Plan

    def best(self) -> Choice:
        """What measured costs suggest."""
        return allocation.spend(self.menus, self.budget)

    def plan(self, choice: Choice) -> Plan:
        """A choice as a plan."""
        return allocation.plan_from_choice(choice, self.menus)


@dataclass(frozen=True, slots=True)
class Costs:
    """What is known of the heads: expected KL by what they keep, the same read in other ways, relative distortion."""

    expected: Curves
    readings: tuple[Curves, ...]
    energy: Curves

    @classmethod
    def of(cls, geometry: Geometry, levels: tuple[Slabs, ...], sensitivities: Spectra, spectra: Spectra) -> Costs:
        """From measured sensitivities (those of the Values may be missing) and spectra, by side and layer."""
        expected = curves_of(geometry, levels, sensitivities, spectra)
        readings = tuple(curves_of(geometry, levels, sensitivities, spectra, *reading) for reading in READINGS)
        return cls(expected, readings, energy_curves(geometry, spectra))

    def by(self, name: str) -> tuple[Curves, ...]:
        """The currencies of an allocation, the most trusted first."""
        return (self.energy,) if name == "energy" else (self.expected, *self.readings)


def searches_for(geometry: Geometry, costs: Costs, method: Method) -> list[Search]:
    """The searches that a method's setting stands for, one for every way to read what was measured, the most trusted first.

    Raises:
        UsageError: a budget that cannot be met, with the smallest one that can.
    """
    if method.kv_budget is not None:
        return searches_of_bytes(geometry, costs, method, method.kv_budget)
    bits, values = method.key_bits, method.value_bits
    uniform = uniform_of(geometry, method)
    heads = [head for heads in uniform.values() for head in heads]
    budget = sum(2 * head.key.bytes_per_token() if bits == "auto" else head.key.rank for head in heads)
    menus = (allocation.menus_of_directions(geometry, curves, bits, values) for curves in costs.by(method.allocation))
    return [Search(menu, budget, uniform) for menu in menus]


def searches_of_bytes(geometry: Geometry, costs: Costs, method: Method, share: float) -> list[Search]:
    """Searches for the best plan whose segments take at most a share of the dense bytes, escape tokens included.

    Raises:
        UsageError: no plan is that small.
    """
    refuse_too_small(geometry, share, method.escape_ratio)
    tokens = tokens_to_pay(method, share)
    how = method.key_bits, method.value_bits, method.escape_ratio, tokens
    menus = (allocation.menus_of_bytes(geometry, curves, *how) for curves in costs.by(method.allocation))
    uniform = allocation.same_everywhere(geometry, costs.energy, share, *how)
    budget = int((share - method.escape_ratio) * dense_bytes(geometry, tokens) * (1 + 1e-12))
    return [Search(menu, budget, uniform) for menu in menus]


def doubted(searches: list[Search]) -> list[Search]:
    """Further searches of the same budget, in which heads cost a few times more or less than was measured; the same ones every time."""
    generator = np.random.default_rng(0)
    chosen = [searches[n % len(searches)] for n in range(DOUBTED)]
    return [replace(search, menus=allocation.doubted(search.menus, generator, EVEN, NOISE)) for search in chosen]


def tokens_to_pay(method: Method, share: float) -> int:
    """Tokens of the segments whose means and scales a budget has to pay for.

    As many as the short ones among the calibration images have, so that each page gets its own: the mean of another page is a poor one,
    above all of Keys, which RoPE turns with the page's place. Not more than a promise speaks of (`SEGMENT`), and not so few that means take
    over `MEANS` of what escape tokens leave of the budget.
    """
    return max(min(method.image_tokens, SEGMENT), min(math.ceil(1 / (MEANS * (share - method.escape_ratio))), SEGMENT))


def uniform_of(geometry: Geometry, method: Method) -> Plan:
    """The same slabs everywhere by keep ratio and bits; with Keys at any bits it is the native plan whose bytes they have."""
    bits = "native" if method.key_bits == "auto" else method.key_bits
    plan = allocation.uniform_plan(geometry, method.keep_ratio, bits)
    return {
        i: [head._replace(value=allocation.all_at_bits(geometry.layers[i].head_dim, method.value_bits)) for head in heads]
        for i, heads in plan.items()
    }


def smallest_share(geometry: Geometry, escape_ratio: float = 0.0) -> float:
    """The smallest budget: no direction at all, which still needs the means, and the tokens that stay raw."""
    nothing = allocation.same_slabs(geometry, Slabs(), Slabs())
    return plan_bytes(geometry, nothing) / dense_bytes(geometry) + escape_ratio


def refuse_too_small(geometry: Geometry, share: float, escape_ratio: float = 0.0) -> None:
    """Refuse a budget that no plan meets.

    Raises:
        UsageError: with the smallest budget that can be met.
    """
    if share < (least := smallest_share(geometry, escape_ratio)):
        what = "means and escape tokens" if escape_ratio else "means"
        raise UsageError(
            f"--kv-budget {share:g} is too small: the {what} of a segment of {SEGMENT} tokens alone take {least:.4g} of its dense bytes; "
            f"use at least {math.ceil(least * 1e5) / 1e5:g}"
        )


def key_share(geometry: Geometry, plan: Plan) -> float:
    """Fraction of Key directions kept, mean over heads."""
    kept = [head.key.rank / geometry.layers[i].head_dim for i, heads in plan.items() for head in heads]
    return round(sum(kept) / len(kept), 4)


def stated(method: Method, geometry: Geometry, plan: Plan) -> Method:
    """The method with the keep ratio that its plan came to, where a budget of bytes set it."""
    return replace(method, keep_ratio=key_share(geometry, plan)) if method.kv_budget is not None else method


def spectra_of(tensors: Mapping[str, Tensor], geometry: Geometry, kind: str) -> dict[str, dict[int, Tensor]]:
    """Spectra of an artifact by side and layer."""
    return {side: {i: tensors[f"layers.{i}.{kind}.{side}_spectrum"] for i in geometry.compressible} for side in SIDES}
