"""Coding one segment: in which coordinates, with which slabs, and the codes (DESIGN.md §4.5 to 4.7).

Three steps. `look` sends what was measured of a segment on the device (observed.py) to the host; `decide` decides with it per head: the
calibrated basis, or one corrected by what the segment shows; the plan's slabs, or more where they would discard too much. `write` codes
Keys or Values in the coordinates that were chosen; blocks of text that come later can be written in the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..bases import balance
from ..coding_error import ROUNDING, discarded
from ..kernels.codes import clipped_scales
from ..kernels.encode import Packing, pack_heads
from ..kernels.slabs import UNIT, Slabs
from .observed import Figures, Given, Observed, Rules, Shown, affordable, observe
from .online import published_basis
from .prepared import SideBasis
from .scales import merged_scales, used_bits


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


def look(sides: Sequence[Observed]) -> Figures:
    """Send what the decisions about the sides of one or several segments need to the host; does not wait for it."""
    return Figures([side.measured.figures for side in sides])


def decide(sides: Sequence[Observed], figures: Sequence[np.ndarray]) -> list[Coordinates]:
    """Coordinates of every side, from what `look` sent, one table each.

    Own bases are only tried where the plan discards more than is usual, because finding them takes a second look.
    """
    shown = [side.shown(table) for side, table in zip(sides, figures, strict=True)]
    asking = [n for n, (side, one) in enumerate(zip(sides, shown, strict=True)) if side.top and (one.error > one.usual).any()]
    captured = dict(zip(asking, Figures([sides[n].captured for n in asking]).arrive(), strict=True)) if asking else {}
    return [_decided(side, one, captured.get(n)) for n, (side, one) in enumerate(zip(sides, shown, strict=True))]


def choose(sides: Sequence[Observed]) -> list[Coordinates]:
    """`look` and `decide` at once."""
    return decide(sides, look(sides).arrive())


def _decided(side: Observed, shown: Shown, captured: np.ndarray | None) -> Coordinates:
    basis, (tokens, dim) = side.basis, side.x.shape[1:]
    slabs, error, own = list(basis.slabs), shown.error.copy(), set()
    unusual = np.flatnonzero(shown.error > shown.usual)
    for h, corrected in zip(unusual, captured[unusual], strict=True) if captured is not None else ():
        plan, energy = basis.slabs[h], shown.energy[h].tolist()
        cheaper = affordable(plan, dim, tokens) if side.rules.same_bytes else plan
        if cheaper is not None and 0 < cheaper.rank < dim:
            held = corrected[: cheaper.rank].tolist()
            after = discarded([*held, max(sum(energy) - sum(held), 0.0)], cheaper)
            # without a budget: against what the calibrated basis discards with as many bytes, D · R numbers against S for a direction more
            more = plan.rank if side.rules.same_bytes else min(plan.rank + -(-dim * plan.rank // tokens), dim)
            if after < error[h] - sum(energy[plan.rank : more]):
                slabs[h], error[h] = cheaper, after
                own.add(int(h))
    fallback = (error > shown.most) & (side.rules.factor > 0)
    for h in np.flatnonzero(fallback):
        slabs[h] = enough(shown.energy[h].tolist(), basis.slabs[h], float(shown.most[h]), dim)
        error[h] = discarded(shown.energy[h].tolist(), slabs[h])
        own.discard(int(h))
    return _coordinates(side, tuple(slabs), sorted(own), tuple(fallback.tolist()), tuple(error.tolist()), shown)


def _coordinates(
    side: Observed, slabs: tuple[Slabs, ...], own: Sequence[int], fallback: tuple[bool, ...], error: tuple[float, ...], shown: Shown
) -> Coordinates:
    basis, encode, decode = side.basis, side.basis.encode, {}
    if own:
        encode = encode.clone()
    for h in own:
        rank = slabs[h].rank
        v, scale = side.directions[h, :, :rank], balance(side.captured[h, :rank])
        encode[h] = 0  # its other directions are not used
        encode[h, :, :rank] = (basis.encode[h] / basis.balance[h]) @ v * scale
        decode[h] = (basis.decode[h] * basis.balance[h]) @ v / scale
    # what fell back is unlike the calibration data and the segments before, whose scales would clip it
    given = side.given if not any(fallback) else None
    shared = not side.rules.own_parts and not any(fallback) and given is None
    scales = basis.plan_scales if shared else None if given is None else given.scales
    if side.rules.own_parts and not own and slabs == basis.slabs:
        scales = side.measured.scales  # they were taken from this segment, for these slabs
    return Coordinates(
        slabs=slabs,
        encode=encode,
        centre=side.centre,
        scales=scales,
        calibrated_scales=shared,
        own_mean=side.own_mean,
        own=decode,
        fallback=fallback,
        error=error,
        expected=basis.expected,
        kept=tuple(shown.kept.tolist()),
        given=given,
        planned=tuple(shown.error.tolist()),
    )


def as_planned(side: Observed) -> Coordinates:
    """The plan's slabs in the calibrated directions, whatever the segment shows."""
    heads = len(side.basis.slabs)
    unknown = Shown(*(np.zeros(heads) for _ in range(5)))
    return _coordinates(side, side.basis.slabs, (), (False,) * heads, (0.0,) * heads, unknown)


def as_published(keys: Tensor, queries: Tensor, basis: SideBasis) -> Coordinates:
    """Keys fp32 [H, S, D] in the basis of RotateK as published (`online.published_basis`): own bases, no fallback."""
    seen = observe([(keys, basis)], Rules(prior_tokens=0, factor=0))[0]
    columns = published_basis(keys - seen.centre.unsqueeze(1), queries)
    own = {h: columns[h, :, : one.rank] for h, one in enumerate(basis.slabs) if one.native != keys.shape[-1]}
    unknown = (0.0,) * keys.shape[0]
    no = (False,) * keys.shape[0]
    return Coordinates(basis.slabs, columns, seen.centre, None, False, seen.own_mean, own, no, unknown, basis.expected, unknown)


def calibrated(basis: SideBasis) -> Coordinates:
    """Coordinates in which everything is the artifact's, for blocks of text."""
    nothing = (0.0,) * len(basis.slabs)
    no = (False,) * len(basis.slabs)
    return Coordinates(
        basis.slabs, basis.encode, basis.mean, basis.plan_scales, True, None, {}, no, basis.expected, basis.expected, nothing
    )


def write(x: Tensor, where: Coordinates, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Codes of x [H, S, D]: the flat uint8 codes of every head, and the scales bf16 [H, D] they were made with.

    Scales are taken from x where the coordinates have none. Raw heads are written as they are.
    """
    job = _packing((x - where.centre.unsqueeze(1)) @ where.encode, x, where)
    return pack_heads([job], dtype)[0], job.scales


def packings(z: Tensor, x: Tensor, where: Coordinates) -> list[Packing]:
    """What is to be laid out of R rows that share coordinates: x [R, H, S, D] and its directions z.

    Raises:
        ValueError: several rows, and no scales that they could share.
    """
    if len(x) > 1 and where.scales is None:
        raise ValueError("rows without scales are written one by one: scales are taken from what is written")
    z = z.contiguous()
    return [_packing(z[row], x[row], where) for row in range(len(x))]


def write_observed(sides: Sequence[Observed], where: Sequence[Coordinates], dtype: torch.dtype) -> list[tuple[list[Tensor], Tensor]]:
    """`write` of what was observed, in the coordinates that were decided on: the product with the basis is not made twice."""
    jobs = []
    for side, at in zip(sides, where, strict=True):
        z = side.z
        if at.own:
            z = z.clone()
            for h in at.own:
                z[h] = (side.x[h] - at.centre[h]) @ at.encode[h]
        jobs.append(_packing(z, side.x, at))
    return [(codes, job.scales) for codes, job in zip(pack_heads(jobs, dtype), jobs, strict=True)]


def _packing(z: Tensor, x: Tensor, where: Coordinates) -> Packing:
    scales = where.scales
    if scales is None:
        found = {bits: clipped_scales(z, bits) for bits in sorted(used_bits(where.slabs))}
        scales = merged_scales(found, where.slabs) if found else z.new_zeros(z.shape[0], z.shape[2], dtype=torch.bfloat16)
    return Packing(z.contiguous(), x, scales.contiguous(), where.slabs)


def enough(energy: Sequence[float], plan: Slabs, most: float, dim: int) -> Slabs:
    """The fewest 8-bit directions above the plan's that discard at most `most`; raw if all D do not do."""
    tails = [sum(energy)]
    for value in energy:
        tails.append(max(tails[-1] - value, 0.0))
    for rank in range((plan.rank // UNIT + 1) * UNIT, dim + 1, UNIT):
        if tails[rank] + ROUNDING[8] * (tails[0] - tails[rank]) <= most:
            return Slabs(0, rank, 0)
    return Slabs(dim, 0, 0)
