"""From statistics to maps: which pairs are kept and with which factors, and low-rank factors of the Values (a `RapPlan`).

Everything here is linear algebra on sums over documents; nothing is trained. What is repaired by reading documents again is in
rap_repair.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .bases import two_sided
from .errors import RotateKError, UsageError
from .geometry import Geometry, LayerGeometry
from .plan import SIDES
from .rap_budget import MEASURED, TRIALS, Widths, widths_for
from .rap_measure import Measure
from .rap_plan import Option, RapLayer, RapPlan, selection, unpruned
from .rap_reading import attentions, output_heads
from .rap_repair import refit_outputs
from .rap_scores import FLAT, factors, fisher_of_group, orders
from .rap_statistics import RapStatistics

REPAIRS = ("factors", "values", "outputs")
"""Complex factors of kept pairs; Values predicted per query head, with a bias for their mean; outputs fitted to the dense model's."""
MEASURED_ON = 24  # documents that whole plans are measured on
FEW = 9  # the first of them, for single cuts and for what is plainly no better: one of each skill of `mixed`
VALUE_RIDGE = 1e-4  # of the mean variance, when what is left of a head's output is predicted from what is kept


def kept_pairs(order: Tensor, count: int) -> Tensor:
    """The first pairs of every head's order, ascending: int64 [Hkv, m]."""
    return order[:, :count].sort(-1).values


def key_maps(statistics: RapStatistics, layer: int, pairs: Tensor, shape: LayerGeometry, repair: bool) -> tuple[Tensor, Tensor]:
    """`key` [Hkv, 2m, D] and `query` [Hq, 2m, D]: the pairs as they are, or with the best complex factor of each in the queries.

    A factor w_p = a + ib turns and scales a pair, which commutes with RoPE, so q'_p = w_p q_p is a map of the projection's outputs.
    """
    dim, m = shape.head_dim, pairs.shape[1]
    key, query = selection(pairs, dim), selection(pairs.repeat_interleave(shape.group, 0), dim)
    if not repair or m == dim // 2:
        return key, query
    moments = statistics.logit(layer, FLAT).unflatten(0, (shape.kv_heads, shape.group))
    found = torch.cat([factors(moments[h], pairs[h]) for h in range(shape.kv_heads)])  # [Hq, m]
    real, imaginary = found.real.float()[..., None], found.imag.float()[..., None]
    first, second = query.split(m, 1)
    return key, torch.cat([real * first - imaginary * second, imaginary * first + real * second], 1)


def value_maps(
    statistics: RapStatistics, layer: int, width: int, shape: LayerGeometry, outputs: Tensor, repair: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`value` [Hkv, r, D], `output` [Hq, D, r] and `bias` [hidden]: the directions of the Values that W_o makes most of.

    What counts is the attention's output o of each head, so directions are those of the group's mean second moment of o, weighted by
    Σ W_oᵀ W_o (as for coded Values; here without a mean unless repaired). With `repair` the covariance takes the moment's place, each
    query head gets its own best linear prediction of o from the kept directions, and the mean of what is lost becomes a bias.

    Args:
        outputs: W_o by query head [Hq, hidden, D].
    """
    dim, heads = shape.head_dim, shape.query_heads
    if width == dim:
        eye = torch.eye(dim)
        return eye.repeat(shape.kv_heads, 1, 1), eye.repeat(heads, 1, 1), None
    mean, covariance = statistics.outputs(layer)
    if not repair:
        covariance = covariance + mean[:, :, None] * mean[:, None, :]
    basis = two_sided(covariance.unflatten(0, (shape.kv_heads, -1)).mean(1), statistics.sums[f"{layer}.gram"])
    encode, decode = basis.encode[..., :width], basis.decode[..., :width]  # [Hkv, D, r]
    if not repair:
        return encode.mT.float().contiguous(), decode.repeat_interleave(shape.group, 0).float().contiguous(), None
    own = encode.repeat_interleave(shape.group, 0)
    seen = own.mT @ covariance @ own
    level = seen.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)[:, None, None]
    ridge = VALUE_RIDGE * level * torch.eye(width, dtype=torch.float64)
    prior = decode.repeat_interleave(shape.group, 0)  # what the ridge draws to
    output = torch.linalg.solve(seen + ridge, own.mT @ covariance + ridge @ prior.mT).mT
    lost = mean - (output @ (own.mT @ mean[..., None]))[..., 0]
    bias = torch.einsum("hod,hd->o", outputs.double().cpu(), lost)
    return encode.mT.float().contiguous(), output.float().contiguous(), bias.float()


def layer_maps(
    statistics: RapStatistics,
    layer: int,
    order: Tensor,
    widths: tuple[int, int],
    shape: LayerGeometry,
    outputs: Tensor,
    repairs: Collection[str],
) -> RapLayer:
    """One layer with m pairs and Values of width r, `widths` = (m, r)."""
    pairs = kept_pairs(order, widths[0])
    key, query = key_maps(statistics, layer, pairs, shape, "factors" in repairs)
    return RapLayer(pairs, key, query, *value_maps(statistics, layer, widths[1], shape, outputs, "values" in repairs))


def make_plan(
    model: Any,
    statistics: RapStatistics,
    geometry: Geometry,
    *,
    keep_ratio: float,
    score: str = "logit",
    budget: str = "sensitivity",
    repair: bool | Collection[str] = True,
    measure: Callable[[Mapping[int, RapLayer]], float] | None = None,
) -> RapPlan:
    """Pairs, widths, factors and repairs of every layer.

    Args:
        statistics: of calibration documents, with gradients for Fisher scores and the published budget.
        keep_ratio: share of the numbers of Keys and Values that is kept, at most; 1 leaves everything as it is.
        repair: all of `REPAIRS` (the default), none, or some of them.
        measure: what layers of a plan cost (KL per token); None: measured on the first `MEASURED_ON` documents of the statistics.

    Raises:
        UsageError: an unknown score or budget, or a keep ratio that is none or too small.
        RotateKError: attention that RAP does not know, or statistics without what is asked of them.
    """
    if not 0 < keep_ratio <= 1:
        raise UsageError(f"--keep-ratio {keep_ratio:g} is no share; use a number above 0 and at most 1")
    repairs = (REPAIRS if repair else ()) if isinstance(repair, bool) else tuple(repair)
    if unknown := set(repairs) - set(REPAIRS):
        raise UsageError(f"unknown repair {min(unknown)!r}; choose among {', '.join(REPAIRS)}")
    options: dict[str, Option] = {"keep_ratio": keep_ratio, "score": score, "budget": budget, "repair": bool(repairs)}
    if keep_ratio == 1:
        return RapPlan({i: unpruned(shape) for i, shape in enumerate(geometry.layers)}, options)
    outputs = [output_heads(module, shape).cpu() for module, shape in zip(attentions(model, geometry), geometry.layers, strict=True)]
    if (score != "logit" or budget == "published") and "0.k_fisher" not in statistics.sums:
        raise RotateKError("Fisher scores and the published budget need squared gradients; collect the statistics with gradients")
    order = orders(statistics, geometry, score, "factors" in repairs)
    made: dict[tuple[int, int, int], RapLayer] = {}

    def layer_of(i: int, widths: tuple[int, int]) -> RapLayer:
        if (i, *widths) not in made:
            made[(i, *widths)] = layer_maps(statistics, i, order[i], widths, geometry.layers[i], outputs[i], repairs)
        return made[(i, *widths)]

    def layers_of(widths: Widths) -> dict[int, RapLayer]:
        full = {i: (shape.head_dim // 2, shape.head_dim) for i, shape in enumerate(geometry.layers)}
        found = {i: (widths.get((i, "key"), full[i][0]), widths.get((i, "value"), full[i][1])) for i in full}
        return {i: layer_of(i, found[i]) for i in found if found[i] != full[i]}

    cost = few = None
    hidden = True if statistics.quiet or budget == "published" else None
    bar = tqdm(desc="plans", unit="plan", disable=hidden, leave=False)
    if budget == "sensitivity":
        if measure is None:
            chosen = statistics.documents[:MEASURED_ON]
            measure = Measure(model, chosen, geometry, statistics.batch_size, statistics.pad_id, statistics.quiet)
        cost = counting(measure, layers_of, bar)
        if isinstance(measure, Measure) and measure.documents >= 2 * FEW:
            few = counting(measure.first(FEW), layers_of, bar)
        bar.reset(len(MEASURED) * len(SIDES) * len(geometry.layers) + TRIALS)  # about
    scores = None
    if budget == "published":
        kind = score if score != "logit" else "fisher"
        scores = {(i, side): fisher_of_group(statistics, i, side, kind) for i in order for side in SIDES}
    with bar:
        widths, kl = widths_for(budget, geometry, keep_ratio, scores, cost, few)
    found = layers_of(widths)
    if "outputs" in repairs:
        refit = refit_outputs(
            model,
            found,
            statistics.documents,
            geometry,
            batch_size=statistics.batch_size,
            pad_id=statistics.pad_id,
            quiet=statistics.quiet,
        )
        if measure is None:
            found = refit
        else:  # a repair that does not pay on the documents measured is left out
            kl, after = measure(found) if kl is None else kl, measure(refit)
            found, kl = (refit, after) if after < kl else (found, kl)
    layers = {i: found.get(i) or unpruned(shape) for i, shape in enumerate(geometry.layers)}
    return RapPlan(layers, options | ({"kl": kl} if kl is not None else {}))


def counting(
    measure: Callable[[Mapping[int, RapLayer]], float], layers_of: Callable[[Widths], dict[int, RapLayer]], bar: Any
) -> Callable[[Widths], float]:
    """What widths cost; the bar counts calls."""

    def cost(widths: Widths) -> float:
        found = measure(layers_of(widths))
        bar.update(1)
        return found

    return cost
