"""Coding one segment: in which coordinates, with which slabs, and the codes (DESIGN.md §4.5 to 4.7).

Two steps. `choose` looks at the segment and decides per head: the calibrated basis, or one corrected by what the segment shows; the plan's
slabs, or more where they would discard too much. `write` codes Keys or Values in the coordinates that were chosen; blocks of text that
come later can be written in the same ones. All energies are those of whitened coordinates (bases.py), where the squared error of a
direction is the squared error of a logit (Keys), or of the layer's output (Values).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..bases import balance
from ..kernels.codes import clipped_scales, rounded, sample
from ..kernels.encode import pack_heads
from ..kernels.slabs import NIBBLE_UNIT, UNIT, Slabs
from .online import corrected_directions, published_basis
from .prepared import SideBasis
from .rounding_error import ROUNDING, bound, discarded
from .scales import merged_scales, used_bits

LARGEST_MEAN = 6e4  # an own mean is stored in fp16


@dataclass(frozen=True, slots=True)
class Rules:
    """How far a segment may depart from the plan.

    prior_tokens: what the calibrated covariance counts for in an own basis; 0 means never an own one.
    factor: a head that discards more than this many times what calibration expects keeps more; 0 means never.
    own_parts: the segment may have its own mean and scales; if not, it is coded with `Given` ones, or with the artifact's.
    same_bytes: an own basis is paid for with directions.
    """

    prior_tokens: int
    factor: float
    own_parts: bool = True
    same_bytes: bool = False


@dataclass(frozen=True, slots=True)
class Given:
    """Mean and scales of an earlier segment of the same sequence: own_mean fp16 and scales bf16 [H, D], and their fields in the table."""

    own_mean: Tensor
    scales: Tensor
    fields: np.ndarray


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where one side of a segment is coded. H heads.

    slabs: per head. encode fp32 [H, D, D] and centre fp32 [H, D]: z = (x - centre) @ encode, of which a head uses its first directions.
    scales: bf16 [H, D], read at the coded directions; None until they are taken from the first tokens that are written.
    calibrated_scales: they are the artifact's, shared by all segments.
    own_mean: fp16 [H, D], the centre less the calibrated mean, or None. own: decode fp32 [D, R] of heads with their own basis.
    fallback: per head, whether the plan was not enough. error, expected: energy discarded per token, and what calibration expected;
    kept: share of the energy that the calibrated directions of the plan hold; by head.
    given: where mean and scales were taken from, if they are another segment's.
    planned: per head, what the plan alone would have discarded; empty if that was not looked at.
    """

    slabs: tuple[Slabs, ...]
    encode: Tensor
    centre: Tensor
    scales: Tensor | None
    calibrated_scales: bool
    own_mean: Tensor | None
    own: dict[int, Tensor]
    fallback: tuple[bool, ...]
    error: tuple[float, ...]
    expected: tuple[float, ...]
    kept: tuple[float, ...]
    given: Given | None = None
    planned: tuple[float, ...] = ()


class Observed:
    """What one side of a segment shows in the calibrated coordinates: x [H, S, D] in any floating dtype."""

    def __init__(self, x: Tensor, basis: SideBasis, rules: Rules, given: Given | None = None) -> None:
        self.x, self.basis, self.rules = x, basis, rules
        self.given = None if rules.own_parts else given
        self.own_mean = self.given.own_mean if self.given is not None else None
        self.centre = basis.mean
        if rules.own_parts:
            self.own_mean = (x.mean(1, dtype=torch.float32) - basis.mean).clamp(-LARGEST_MEAN, LARGEST_MEAN).half()
        if self.own_mean is not None:
            self.centre = basis.mean + self.own_mean.float()
        self.z = (x - self.centre.unsqueeze(1)) @ basis.encode  # balanced, fp32 [H, S, D]
        self.weight = basis.balance.square().reciprocal()  # from balanced to whitened energies
        self.energy = torch.linalg.vector_norm(self.z, dim=1).square() / x.shape[1] * self.weight  # [H, D]

    @cached_property
    def bits(self) -> tuple[int, ...]:
        """Precisions with scales that some head of the plan uses."""
        return tuple(sorted(used_bits(self.basis.slabs)))

    @cached_property
    def scales(self) -> dict[int, Tensor]:
        """bf16 [H, D] for each of `bits`."""
        if self.rules.own_parts:
            return {bits: clipped_scales(self.z, bits) for bits in self.bits}
        return {bits: self.given.scales if self.given is not None else self.basis.scales[bits] for bits in self.bits}

    @cached_property
    def top(self) -> int:
        """Most directions that an own basis would have, 0 for none."""
        tokens, dim = self.x.shape[1:]
        if not self.rules.prior_tokens or not self.rules.own_parts:
            return 0
        fitting = (affordable(one, dim, tokens) if self.rules.same_bytes else one for one in self.basis.slabs)
        return max((one.rank for one in fitting if one is not None and 0 < one.rank < dim), default=0)

    @cached_property
    def directions(self) -> Tensor:
        """Corrected directions [H, D, top] in whitened coordinates."""
        whitened = self.z * self.basis.balance.reciprocal().unsqueeze(1)
        self.moment = whitened.mT @ whitened / whitened.shape[1]
        spectrum = self.basis.spectrum.to(whitened.device, torch.float32)
        return corrected_directions(self.moment, spectrum, whitened.shape[1], self.rules.prior_tokens, self.top)

    @cached_property
    def captured(self) -> Tensor:
        """Energy of each corrected direction [H, top]."""
        directions = self.directions
        return ((self.moment @ directions) * directions).sum(-2).clamp_min(0)

    def figures(self) -> Tensor:
        """What the decisions need, to be copied to the host: fp32 [H, D · (1 + len(bits)) + top]. Coding errors are those of a sample."""
        parts = [self.energy]
        some = sample(self.z)
        for bits in self.bits:
            scale = self.scales[bits].float().unsqueeze(1)
            parts.append((rounded(some, scale, bits) - some).square().mean(1) * self.weight)
        if self.top:
            parts.append(self.captured)
        return torch.cat(parts, -1)

    def as_planned(self) -> Coordinates:
        """The plan's slabs in the calibrated directions, whatever the segment shows."""
        unknown = (0.0,) * len(self.basis.slabs)
        return self._coordinates(self.basis.slabs, {}, (False,) * len(unknown), unknown, unknown)

    def decide(self, figures: list[list[float]]) -> Coordinates:
        """Coordinates and slabs of every head, from `figures` on the host."""
        basis, dim = self.basis, self.x.shape[-1]
        slabs, own, fallback, errors, kept, planned = [], {}, [], [], [], []
        sums = basis.spectrum.sum(1).tolist()
        for h, (row, plan) in enumerate(zip(figures, basis.slabs, strict=True)):
            energy, rest = row[:dim], row[dim:]
            error_of = {bits: rest[n * dim : (n + 1) * dim] for n, bits in enumerate(self.bits)}
            captured = rest[len(self.bits) * dim :]
            chosen, error, total = plan, discarded(energy, plan, error_of.get(8), error_of.get(4)), sum(energy)
            kept.append(sum(energy[: plan.rank]) / total if total > 0 else 1.0)
            cheaper = affordable(plan, dim, self.x.shape[1]) if self.rules.same_bytes else plan
            if captured and cheaper is not None and 0 < cheaper.rank < dim:
                corrected = captured[: cheaper.rank] + [max(total - sum(captured[: cheaper.rank]), 0.0)]
                after = discarded(corrected, cheaper)
                if after < self._at_the_price(energy, plan, error_of, error):
                    chosen, error, own[h] = cheaper, after, torch.empty(0)
            planned.append(error)
            most = bound(basis.expected[h], sums[h], self.rules.factor)
            fell = self.rules.factor > 0 and error > most
            if fell:
                chosen = enough(energy, plan, most, dim)
                error = discarded(energy, chosen)
                own.pop(h, None)
            slabs.append(chosen)
            fallback.append(fell)
            errors.append(error)
        chosen_ones = self._coordinates(tuple(slabs), own, tuple(fallback), tuple(errors), tuple(kept))
        return replace(chosen_ones, planned=tuple(planned))

    def _at_the_price(self, energy: list[float], plan: Slabs, error_of: dict[int, list[float]], error: float) -> float:
        """What the calibrated basis would discard with the bytes that an own one costs: D · R numbers against S for each direction more."""
        if self.rules.same_bytes:
            return error  # the own basis was given fewer directions instead
        dim, tokens = len(energy), self.x.shape[1]
        more = min(plan.rank + -(-dim * plan.rank // tokens), dim)
        return error - sum(energy[plan.rank : more])

    def _coordinates(
        self,
        slabs: tuple[Slabs, ...],
        own: dict[int, Tensor],
        fallback: tuple[bool, ...],
        errors: tuple[float, ...],
        kept: tuple[float, ...],
    ) -> Coordinates:
        basis, encode = self.basis, self.basis.encode
        if own:
            encode = encode.clone()
            for h in own:
                v, scale = self.directions[h, :, : slabs[h].rank], balance(self.captured[h, : slabs[h].rank])
                encode[h] = 0  # its other directions are not used
                encode[h, :, : slabs[h].rank] = (basis.encode[h] / basis.balance[h]) @ v * scale
                own[h] = (basis.decode[h] * basis.balance[h]) @ v / scale
        # what fell back is unlike the calibration data and the segments before, whose scales would clip it
        given = self.given if not any(fallback) else None
        shared = not self.rules.own_parts and not any(fallback) and given is None
        scales = basis.plan_scales if shared else None if given is None else given.scales
        if self.rules.own_parts and not own and self.bits and used_bits(slabs) <= set(self.bits):
            scales = merged_scales(self.scales, slabs)  # they were taken from this segment
        return Coordinates(slabs, encode, self.centre, scales, shared, self.own_mean, own, fallback, errors, basis.expected, kept, given)

    def coded(self, where: Coordinates, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        """`write` of what was observed, in the coordinates that were decided on: the product with the basis is not made twice."""
        z = self.z
        if where.own:
            z = z.clone()
            for h in where.own:
                z[h] = (self.x[h] - where.centre[h]) @ where.encode[h]
        return _codes(z, self.x, where, dtype)


def as_published(keys: Tensor, queries: Tensor, basis: SideBasis) -> Coordinates:
    """Keys fp32 [H, S, D] in the basis of RotateK as published (`online.published_basis`): own bases, no fallback."""
    rules = Rules(prior_tokens=0, factor=0)
    seen = Observed(keys, basis, rules)
    columns = published_basis(keys - seen.centre.unsqueeze(1), queries)
    own = {h: columns[h, :, : one.rank] for h, one in enumerate(basis.slabs) if one.native != keys.shape[-1]}
    unknown = (0.0,) * keys.shape[0]
    no = (False,) * keys.shape[0]
    return Coordinates(basis.slabs, columns, seen.centre, None, False, seen.own_mean, own, no, unknown, basis.expected, unknown)


def choose(sides: Sequence[Observed]) -> list[Coordinates]:
    """Decide for Keys and Values of one segment, with one copy to the host."""
    figures = [side.figures() for side in sides]
    host = torch.cat(figures, -1).tolist()
    widths = [part.shape[-1] for part in figures]
    starts = [sum(widths[:n]) for n in range(len(widths))]
    places = zip(sides, starts, widths, strict=True)
    return [side.decide([row[start : start + width] for row in host]) for side, start, width in places]


def write(x: Tensor, where: Coordinates, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Codes of x [H, S, D]: the flat uint8 codes of every head, and the scales bf16 [H, D] they were made with.

    Scales are taken from x where the coordinates have none. Raw heads are written as they are.
    """
    return _codes((x - where.centre.unsqueeze(1)) @ where.encode, x, where, dtype)


def _codes(z: Tensor, x: Tensor, where: Coordinates, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    scales = where.scales
    if scales is None:
        found = {bits: clipped_scales(z, bits) for bits in sorted(used_bits(where.slabs))}
        scales = merged_scales(found, where.slabs) if found else z.new_zeros(z.shape[0], z.shape[2], dtype=torch.bfloat16)
    return pack_heads(z, x, scales, where.slabs, dtype), scales


def calibrated(basis: SideBasis) -> Coordinates:
    """Coordinates in which everything is the artifact's, for blocks of text."""
    nothing = (0.0,) * len(basis.slabs)
    no = (False,) * len(basis.slabs)
    return Coordinates(
        basis.slabs, basis.encode, basis.mean, basis.plan_scales, True, None, {}, no, basis.expected, basis.expected, nothing
    )


def affordable(slabs: Slabs, dim: int, tokens: int) -> Slabs | None:
    """The slabs that an own basis of D · R numbers leaves of a head's bytes over S tokens; None if it leaves nothing.

    The least important directions go first.
    """
    native, byte, nibble = slabs
    had = slabs.bytes_per_token() * tokens
    while True:
        left = Slabs(native, byte, nibble)
        if left.rank == 0:
            return None
        if left.bytes_per_token() * tokens + 2 * dim * left.rank <= had:
            return left
        if nibble:
            nibble -= NIBBLE_UNIT
        elif byte:
            byte -= UNIT
        else:
            native -= UNIT


def enough(energy: Sequence[float], plan: Slabs, most: float, dim: int) -> Slabs:
    """The fewest 8-bit directions above the plan's that discard at most `most`; raw if all D do not do."""
    tails = [sum(energy)]
    for value in energy:
        tails.append(max(tails[-1] - value, 0.0))
    for rank in range((plan.rank // UNIT + 1) * UNIT, dim + 1, UNIT):
        if tails[rank] + ROUNDING[8] * (tails[0] - tails[rank]) <= most:
            return Slabs(0, rank, 0)
    return Slabs(dim, 0, 0)
