"""In which order a head's RoPE pairs are given up: the published Fisher score, Fisher times squared weights, and the logits themselves.

Every score becomes an order of pairs per KV head, most important first, so that any width m keeps the first m.

- `fisher` (RAP, arXiv 2602.02599): the empirical Fisher information of the pair's two columns of W_k and of the group's W_q, summed.
- `fisher-weight`: each weight's Fisher information times its square, which is what removing it costs to second order (Optimal Brain
  Damage, LeCun et al. 1990, eq. 5, without the half).
- `logit`: no gradients. Pairs are given up one by one, each time the one whose loss raises the expected variance of the logits' error
  least, given all that are gone already; with repair, the error that is left after the best complex factors of the kept pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import UsageError
from .geometry import Geometry
from .rap_statistics import RapStatistics

SCORES = ("logit", "fisher", "fisher-weight")
FLAT = 0.1  # share of evenly weighted Keys: what attention overlooks now may be looked at once logits are wrong
RIDGE = 1e-4  # of the mean variance of a feature, when factors are fitted


def orders(statistics: RapStatistics, geometry: Geometry, score: str, repair: bool) -> dict[int, Tensor]:
    """By layer, every KV head's pairs from the most to the least important: int64 [Hkv, D/2].

    Raises:
        UsageError: no such score.
    """
    if score not in SCORES:
        raise UsageError(f"unknown score {score!r}; choose one of {', '.join(SCORES)}")
    found = {}
    for i, shape in enumerate(geometry.layers):
        if score == "logit":
            moments = statistics.logit(i, FLAT).unflatten(0, (shape.kv_heads, shape.group))
            found[i] = torch.stack([(fitted_order if repair else removal_order)(head) for head in moments])
        else:
            found[i] = fisher_of_pairs(statistics, i, score).argsort(dim=-1, descending=True, stable=True)
    return found


def fisher_of_pairs(statistics: RapStatistics, layer: int, score: str) -> Tensor:
    """Score of every pair, fp64 [Hkv, D/2]: both columns of W_k and of the group's W_q."""
    kind = score.replace("-", "_")
    keys, queries = statistics.sums[f"{layer}.k_{kind}"], statistics.sums[f"{layer}.q_{kind}"]
    both = keys + queries.unflatten(0, (len(keys), -1)).sum(1)
    return both.unflatten(-1, (2, -1)).sum(-2)


def fisher_of_group(statistics: RapStatistics, layer: int, side: str, score: str) -> float:
    """The published score of a group: of all pairs of a layer, or of its Values (W_v and W_o)."""
    if side == "key":
        return float(fisher_of_pairs(statistics, layer, score).sum())
    kind = score.replace("-", "_")
    return float(statistics.sums[f"{layer}.v_{kind}"].sum() + statistics.sums[f"{layer}.o_{kind}"].sum())


def removal_order(moments: Tensor) -> Tensor:
    """Order of pairs by plain removal, int64 [D/2]: at every step the pair p least in 2 Σ_r A_pr + A_pp over what is gone already.

    Args:
        moments: covariance of the features [G, D, D]; the group's error is the sum of its heads'.
    """
    half = moments.shape[-1] // 2
    a = moments.sum(0)[:half, :half].double()
    own, cross = a.diagonal(), torch.zeros(half, dtype=torch.float64)
    gone = torch.zeros(half, dtype=torch.bool)
    order = []
    for _ in range(half):
        cost = (own + 2 * cross).masked_fill(gone, float("inf"))
        pair = int(cost.argmin())
        gone[pair] = True
        cross = cross + a[pair]
        order.append(pair)
    return torch.tensor(order[::-1])


def fitted_order(moments: Tensor) -> Tensor:
    """Order of pairs when what is kept is fitted anew after every removal, int64 [D/2].

    With the features' covariance B over kept pairs, their covariance c with the whole logits, and factors w = B⁻¹ c, giving up a pair
    costs w_pᵀ ((B⁻¹)_pp)⁻¹ w_p (Optimal Brain Surgeon, Hassibi and Stork 1993, for two weights at a time); B⁻¹ and w follow in closed form.
    """
    dim = moments.shape[-1]
    half = dim // 2
    b = moments.double()
    level = b.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    b = b + RIDGE * level[:, None, None] * torch.eye(dim, dtype=torch.float64)
    inverse = torch.linalg.inv(b)
    weights = torch.zeros(len(b), dim, dtype=torch.float64)
    weights[:, :half] = 1.0  # with everything kept the logits are the sum of the real parts
    pairs = torch.arange(half)
    gone = torch.zeros(half, dtype=torch.bool)
    order = []
    for _ in range(half):
        places = torch.stack([pairs, pairs + half], 1)  # [P, 2]
        blocks = inverse[:, places[:, :, None], places[:, None, :]]  # [G, P, 2, 2]
        own = weights[:, places]  # [G, P, 2]
        blocks = torch.where(gone[None, :, None, None], torch.eye(2, dtype=torch.float64), blocks)
        cost = (own * torch.linalg.solve(blocks, own)).sum(-1).sum(0).masked_fill(gone, float("inf"))
        pair = int(cost.argmin())
        place = places[pair]
        columns = inverse[:, :, place]  # [G, D, 2]
        solved = torch.linalg.solve(blocks[:, pair], columns.mT)  # [G, 2, D]
        weights = weights - (solved.mT @ weights[:, place, None])[..., 0]
        inverse = inverse - columns @ solved
        weights[:, place] = 0
        gone[pair] = True
        order.append(pair)
    return torch.tensor(order[::-1])


def factors(moments: Tensor, pairs: Tensor) -> Tensor:
    """The best complex factors of kept pairs, per query head: complex128 [G, m], w with Re(w_p q_p conj k_p) summed nearest the logits.

    Args:
        moments: covariance of the features [G, D, D].
        pairs: int64 [m].
    """
    dim = moments.shape[-1]
    half = dim // 2
    b = moments.double()
    kept = torch.cat([pairs, pairs + half])
    wanted = b[:, kept, :half].sum(-1)  # covariance with the whole logits
    level = b.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    eye = torch.eye(len(kept), dtype=torch.float64)
    ones = (torch.arange(len(kept)) < len(pairs)).double()  # where nothing is known the pair stays as it is
    ridge = RIDGE * level[:, None]
    found = torch.linalg.solve(b[:, kept][:, :, kept] + ridge[..., None] * eye, (wanted + ridge * ones)[..., None])[..., 0]
    real, imaginary = found.chunk(2, -1)
    return torch.complex(real, -imaginary)  # Re(w z) = Re w Re z - Im w Im z
