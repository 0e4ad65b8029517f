"""What every number of directions and bits of a head's Keys or Values costs: bytes on one side, expected KL of the answers on the other.

Expected is the *distortion*, the energy of all errors in whitened coordinates (bases.py): dropped directions lose their spectrum, coded
ones a share of it that depends on their bits alone. KL was measured at a few distortions (sensitivity.py); between them log KL is
interpolated over log distortion, and below the smallest one KL is proportional to the distortion, as any smooth function of small errors
is that has its minimum at none. Above the largest one nothing lies: that is no direction at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .coding_error import discarded_by
from .geometry import Geometry
from .kernels.slabs import NIBBLE_UNIT, UNIT, Slabs
from .plan import SIDES, HeadPlan, Plan, escape_tokens
from .plan_words import promised_bytes, segment_bytes

SEGMENT = 512
"""Tokens over which scales and means are spread: a budget is a promise for coded spans of at least so many."""

TIE_WEIGHT = 1e-6  # KL per unit of relative distortion: orders heads whose measured KL is all zero
FLOOR = 1e-12
TRUST, SHRUNK = 0.75, 0.35
"""How the cuts of few documents (36) are read. Few documents see few of the ways in which answers go wrong: a head that none of them minds
is not one that costs nothing, so the mean over all heads has the weight `SHRUNK` in each head's log KL. And a mean is too hopeful about
cuts that no document minded: `TRUST` takes log KL part of the way to what the head would cost if its KL at nothing fell in proportion to
the distortion. Found on the bundled models: of fourteen readings at four points (1/8 to 1/32) this one's plans had 0.04 to 1.0 of the KL,
on 300 unseen documents, of those that take measured KL as it is (1, 0.2), and none did better at every point (docs/codec.md)."""

READINGS = ((1.0, 0.2), (1.0, 0.5), (0.5, 0.0))
"""Other readings, (trust, shrunk) of `curves_of`, for further starts of a search: measures as they are, spread further, not spread."""

UNMEASURED = 1e-9  # nats per answer token: far below what is measured

Pair = tuple[int, int]  # layer, KV head


class Options(tuple[Slabs, ...]):
    """What a side may keep, cheapest first; one object serves all heads of a width, so that its index is made once."""

    @classmethod
    def of(cls, some: Sequence[Slabs]) -> Options:
        """The same object if it is one already."""
        return some if isinstance(some, cls) else cls(some)

    @cached_property
    def numbers(self) -> dict[Slabs, int]:
        """Where each option stands."""
        return {slabs: number for number, slabs in enumerate(self)}

    @cached_property
    def ends(self) -> np.ndarray:
        """Directions up to the end of each slab, int64 [N, 3]."""
        return np.array(self, dtype=np.int64).reshape(-1, 3).cumsum(1)


@dataclass(frozen=True, slots=True)
class Curve:
    """One side of one head: N options. cost int64 [N], bytes of a 512-token segment; kl fp64 [N]."""

    options: Options
    cost: np.ndarray
    kl: np.ndarray

    def at(self, slabs: Slabs) -> int:
        """Number of an option."""
        return self.options.numbers[slabs]

    def of(self, slabs: Slabs) -> float:
        """KL of an option."""
        return float(self.kl[self.at(slabs)])

    def hull(self, allowed: Sequence[Slabs]) -> list[Slabs]:
        """The allowed options on the lower convex hull of KL over cost, from the cheapest to the best."""
        numbers = places(self.options, allowed)
        return [allowed[n] for n in lower_hull(self.cost[numbers], self.kl[numbers])]


@dataclass(frozen=True, slots=True)
class HeadCurve:
    """Both sides of one head; `value` is None where nothing is known of the Values, which then stay raw."""

    key: Curve
    value: Curve | None = None

    def kl(self, head: HeadPlan) -> float:
        """Expected KL of what a head keeps.

        Small errors of Keys and Values add. Large ones hide one another: where one side has lost all that the head contributes, the other
        has nothing left to lose.
        """
        return self.key.of(head.key) if self.value is None else float(self.together(self.key.of(head.key), self.value.of(head.value)))

    def together(self, key: Any, value: Any) -> Any:
        """KL of a head from those of its sides: numbers or arrays."""
        assert self.value is not None
        most = max(float(self.key.kl.max()), float(self.value.kl.max()))
        return key + value - key * value / most if most > 0 else key + value


Curves = dict[Pair, HeadCurve]


def lower_hull(cost: np.ndarray, kl: np.ndarray) -> list[int]:
    """Numbers of the points on the lower convex hull, from the cheapest to the best; of equal ones the first."""
    order = np.lexsort((kl, cost))
    best = np.minimum.accumulate(kl[order])
    order = order[np.concatenate([[True], best[1:] < best[:-1]])]  # the few that are better than all cheaper ones
    found: list[tuple[int, float, float]] = []

    def slope(first: tuple[int, float, float], second: tuple[int, float, float]) -> float:
        return (second[2] - first[2]) / (second[1] - first[1])

    for point in zip(order.tolist(), cost[order].tolist(), kl[order].tolist(), strict=True):
        while len(found) > 1 and slope(found[-2], point) <= slope(found[-2], found[-1]):
            found.pop()
        found.append(point)
    return [number for number, _, _ in found]


def places(options: Options, some: Sequence[Slabs]) -> np.ndarray:
    """Numbers of some options among all, int64 [N]."""
    return _places(options, some) if isinstance(some, Options) else np.array([options.numbers[s] for s in some], dtype=np.int64)


@cache
def _places(options: Options, some: Options) -> np.ndarray:
    return np.array([options.numbers[slabs] for slabs in some], dtype=np.int64)


@cache
def every_slabs(dim: int, bits: str = "auto") -> Options:
    """What a head of D channels can keep, by bytes: at one precision, or at any mixture of them (`auto`)."""
    native, byte, nibble = (bits in (name, "auto") for name in ("native", "8", "4"))
    found = [
        Slabs(n, b, q)
        for n in range(0, dim + 1 if native else 1, UNIT)
        for b in range(0, dim - n + 1 if byte else 1, UNIT)
        for q in range(0, dim - n - b + 1 if nibble else 1, NIBBLE_UNIT)
    ]
    return Options(sorted(found, key=lambda slabs: (segment_bytes(slabs, dim, SEGMENT), slabs)))


def distortions(spectrum: Tensor, options: Sequence[Slabs]) -> np.ndarray:
    """Relative distortion of each option, fp64 [N], of a spectrum [D] in descending order; 1 where nothing is kept."""
    energy = spectrum.double().cpu().numpy()
    return discarded_by(energy, Options.of(options).ends) / max(energy.sum(), 1e-30)


def curve_of(levels: Sequence[Slabs], measured: Tensor, spectrum: Tensor, options: Sequence[Slabs], trust: float = 1.0) -> Curve:
    """Bytes of a 512-token segment and expected KL of every option of one side of a head.

    Args:
        levels: what was measured, ascending, the first nothing.
        measured: KL at these levels [levels].
        spectrum: energies of the directions [D], descending.
        trust: 1 takes measured KL as it is, 0 its figure at nothing times the distortion.
    """
    dim, options = spectrum.numel(), Options.of(options)
    x = distortions(spectrum, options)
    known = measured.double().clamp_min(0).cpu().numpy()
    known = np.maximum.accumulate(known[::-1])[::-1]  # a larger level never costs more than a smaller one's measure
    at = distortions(spectrum, levels)
    up = np.argsort(at, kind="stable")
    log_kl = np.interp(np.log(x + FLOOR), np.log(at[up] + FLOOR), np.log(np.maximum.accumulate(known[up]) + FLOOR))
    small = x < at[up[0]]
    kl = np.where(small, known[up[0]] * x / max(at[up[0]], FLOOR), np.exp(log_kl) - FLOOR)
    kl = np.maximum(kl, 0.0) ** trust * (known[0] * x) ** (1 - trust) + TIE_WEIGHT * x
    return Curve(options, _costs(options, dim), kl)


@cache
def _costs(options: Options, dim: int) -> np.ndarray:
    return np.array([promised_bytes(slabs, dim, SEGMENT) for slabs in options], dtype=np.int64)


def curves_of(
    geometry: Geometry,
    levels: Sequence[Slabs],
    sensitivities: Mapping[str, Mapping[int, Tensor]],
    spectra: Mapping[str, Mapping[int, Tensor]],
    trust: float = TRUST,
    shrunk: float = SHRUNK,
) -> Curves:
    """A curve for every head, of its measured KL moved towards that of all heads: their geometric mean, side by side and level by level.

    What is moved is scaled so that the sum over heads is as measured: absolute figures stay those of nats.

    Args:
        sensitivities: by side and layer, fp32 [Hkv, levels]; those of the Values may be missing.
        spectra: by side and layer, [Hkv, D].
        trust: as of `curve_of`.
        shrunk: weight of that mean; 0 takes every head by itself.
    """
    logs = {side: {i: (kl.double().cpu() + UNMEASURED).log() for i, kl in found.items()} for side, found in sensitivities.items()}
    every = {side: torch.cat(list(found.values())) for side, found in logs.items() if found}
    pool = {side: found.mean(0) for side, found in every.items()}
    scale = {side: found.logsumexp(0) - torch.lerp(found, pool[side], shrunk).logsumexp(0) for side, found in every.items()}

    def curve(i: int, h: int, side: str) -> Curve:
        measured = (torch.lerp(logs[side][i][h], pool[side], shrunk) + scale[side]).exp() - UNMEASURED
        return curve_of(levels, measured, spectra[side][i][h], every_slabs(geometry.layers[i].head_dim), trust)

    known = bool(sensitivities.get("value"))
    return {(i, h): HeadCurve(curve(i, h, "key"), curve(i, h, "value") if known else None) for i, h in _pairs(geometry)}


def energy_curves(geometry: Geometry, spectra: Mapping[str, Mapping[int, Tensor]]) -> Curves:
    """Curves that know nothing but energies: relative distortion stands for KL."""

    def curve(i: int, h: int, side: str) -> Curve:
        options = every_slabs(dim := geometry.layers[i].head_dim)
        return Curve(options, _costs(options, dim), distortions(spectra[side][i][h], options))

    return {(i, h): HeadCurve(curve(i, h, "key"), curve(i, h, "value")) for i, h in _pairs(geometry)}


def predicted_kl(plan: Plan, curves: Curves) -> float:
    """Expected KL per answer token of a whole plan: the sum over heads, as if their errors did not know of each other."""
    return sum(curve.kl(plan[layer][head]) for (layer, head), curve in curves.items())


def _pairs(geometry: Geometry) -> list[Pair]:
    return [(i, h) for i in geometry.compressible for h in range(geometry.layers[i].kv_heads)]


def plan_bytes(geometry: Geometry, plan: Plan, tokens: int = SEGMENT, escape_ratio: float = 0.0) -> int:
    """A segment of so many tokens over all compressed layers, with the scales, means and escape tokens it has; shared bases are not its
    own."""
    raw = escape_tokens(tokens, escape_ratio)
    return raw * geometry.dense_bytes_per_token() + sum(
        segment_bytes(getattr(head, side), geometry.layers[i].head_dim, tokens - raw)
        for i, heads in plan.items()
        for head in heads
        for side in SIDES
    )


def needed_share(geometry: Geometry, plan: Plan, escape_ratio: float = 0.0, tokens: int = SEGMENT) -> float:
    """Of the dense bytes, the least that a budget must be for this plan and so many escape tokens, whatever their number is rounded to.

    Args:
        tokens: of a segment with its own means and scales.
    """
    codes = sum(head.bytes_per_token for heads in plan.values() for head in heads)
    return escape_ratio + (plan_bytes(geometry, plan, tokens) - escape_ratio * tokens * codes) / dense_bytes(geometry, tokens)


def dense_bytes(geometry: Geometry, tokens: int = SEGMENT) -> int:
    """The same tokens in a stock cache, native numbers at 2 bytes."""
    return geometry.dense_bytes_per_token() * tokens
