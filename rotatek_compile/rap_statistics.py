"""What RAP is decided by: sums over calibration documents of what pairs and Values do in every layer, and of squared gradients.

A pair p of post-RoPE query q and Key k, as complex numbers, contributes Re(q_p conj k_p) to a logit. Softmax ignores what is the same for
all Keys, and to second order an error δ of the logits costs the variance of δ under the attention probabilities, half of it as KL. So
what is summed per query is the covariance over Keys, weighted by attention, of the real and imaginary parts of all pairs
(`logit`, [Hq, D, D], cross terms between pairs included); `flat` is the same with all Keys weighted alike, for what is unlikely now and
may not be once logits are wrong. All sums are fp64 and additive over documents; padding is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .batches import Encoded
from .geometry import Geometry
from .rap_reading import PROJECTIONS, SHARES, Read, attentions, heads_of, output_heads, read
from .text_attention import Attending, attended_by

NAME = "rotatek_rap_statistics"
QUERIES = 48  # of each document
ATTENDED = 128  # Keys of a query that its attention is summed over
CHUNK = 16  # queries whose Key covariances exist at once


@dataclass(slots=True)
class RapStatistics:
    """Sums by tensor name, fp64 on the CPU:

    {i}.logit, {i}.flat [Hq, D, D]: Σ over queries of scaling² times the covariance over Keys of the features
    (Re(q_p conj k_p) for p = 0 ... D/2-1, then Im), weighted by attention, and evenly; {i}.queries [1];
    {i}.out_sum [Hq, D], {i}.out_outer [Hq, D, D]: outputs of single heads before W_o, tokens weighted by `SHARES`;
    {i}.tokens [1];
    {i}.gram [Hkv, D, D]: Σ over the group of W_oᵀ W_o (set once);
    {i}.{q,k,v,o}_fisher and _fisher_weight [H, D]: Σ over documents and over the weights of a channel (rows of W_q, W_k, W_v, columns
    of W_o) of the squared gradient of the loss, and of that times the squared weight; only with gradients.

    `documents` are what was read; repairs and measured budgets read them again.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    documents: Sequence[Encoded] = ()
    batch_size: int = 1
    pad_id: int = 0
    quiet: bool = True

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum."""
        value = value.detach().double().cpu()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def merged(self, other: RapStatistics) -> RapStatistics:
        """Sums over both parts' documents, which are this one's."""
        out = RapStatistics(dict(self.sums), self.documents, self.batch_size, self.pad_id, self.quiet)
        for name, value in other.sums.items():
            if not name.endswith(".gram"):
                out.add(name, value)
        return out

    def logit(self, layer: int, flat: float = 0.0) -> Tensor:
        """Mean over queries of the features' covariance [Hq, D, D], with a share `flat` of the evenly weighted one."""
        mixed = (1 - flat) * self.sums[f"{layer}.logit"] + flat * self.sums[f"{layer}.flat"]
        return mixed / self.sums[f"{layer}.queries"].clamp_min(1)

    def outputs(self, layer: int) -> tuple[Tensor, Tensor]:
        """Mean [Hq, D] and covariance [Hq, D, D] of the heads' outputs."""
        count = self.sums[f"{layer}.tokens"].clamp_min(1)
        mean = self.sums[f"{layer}.out_sum"] / count
        return mean, self.sums[f"{layer}.out_outer"] / count - mean[:, :, None] * mean[:, None, :]


class _Collector:
    def __init__(self, statistics: RapStatistics, geometry: Geometry) -> None:
        self.statistics, self.geometry = statistics, geometry
        self.rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # by document: real and sampled columns, and what each counts for

    def announce(self, batch: Read, draw: torch.Generator) -> None:
        weights = batch.weights()
        self.rows = []
        for row, real in enumerate(batch.real):
            columns, counts = sampled([group[row] for group in batch.groups], draw)
            self.rows.append((real.nonzero().flatten(), weights[row, real], columns, counts))

    def collect(self, module: Any, query: Tensor, key: Tensor, out: Tensor, mask: Tensor | None, scaling: float) -> None:
        layer = int(module.layer_idx)
        if len(query) != len(self.rows):
            return
        for row, (real, weights, columns, counts) in enumerate(self.rows):
            heads = out[row, real.to(out.device)].float().transpose(0, 1)  # [Hq, n, D]
            weighted = heads * weights.to(out.device)[:, None]
            self.statistics.add(f"{layer}.out_sum", weighted.sum(1))
            self.statistics.add(f"{layer}.out_outer", weighted.mT @ heads)
            self.statistics.add(f"{layer}.tokens", weights.sum()[None])
            totals: tuple[Any, Any] = (0, 0)
            for part, count in zip(columns.to(query.device).split(CHUNK), counts.to(query.device).split(CHUNK), strict=True):
                seen = visible(mask, row, part, key.shape[2])
                found = covariances(query[row, :, part], key[row], seen, real.to(key.device), scaling, count)
                totals = (totals[0] + found[0].double(), totals[1] + found[1].double())
            if len(columns):
                self.statistics.add(f"{layer}.queries", counts.sum()[None])
                self.statistics.add(f"{layer}.logit", totals[0])
                self.statistics.add(f"{layer}.flat", totals[1])


def sampled(groups: Sequence[Tensor], draw: torch.Generator, count: int = QUERIES) -> tuple[Tensor, Tensor]:
    """Columns of one document whose queries are looked at, and what each counts for (by `SHARES`), `count` together.

    Args:
        groups: bool [T] each.
    """
    chosen: list[Tensor] = []
    counts: list[Tensor] = []
    whole = sum(share for share, group in zip(SHARES, groups, strict=False) if bool(group.any()))
    for share, group in zip(SHARES, groups, strict=False):
        own = share / whole * count if whole else 0.0
        columns = group.nonzero().flatten()
        columns = columns[torch.randperm(len(columns), generator=draw)[: round(own)]]
        chosen.append(columns)
        counts.append(torch.full((len(columns),), own / max(len(columns), 1)))
    return torch.cat(chosen), torch.cat(counts)


def visible(mask: Tensor | None, row: int, columns: Tensor, length: int) -> Tensor:
    """Which Keys the queries at these columns see: bool [n, T]. `mask` as transformers makes it; None is plain causality."""
    if mask is None:
        return torch.arange(length, device=columns.device) <= columns[:, None]
    rows = mask[min(row, len(mask) - 1), 0, columns, :length]
    return rows if rows.dtype == torch.bool else rows >= 0


def covariances(
    query: Tensor, key: Tensor, seen: Tensor, real: Tensor, scaling: float, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Σ over n queries of the features' covariance over Keys, by attention and evenly: two of [Hq, D, D].

    Of the Keys that a query attends to, the `ATTENDED` most likely ones count: the others have next to no probability, or are many and
    alike, which the even covariance (over all of the document's Keys) tells.

    Args:
        query: post-RoPE [Hq, n, D]. key: [Hkv, T, D]. seen: bool [n, T]. real: int64 columns of the document's tokens.
        counts: how often each query counts, [n]; None: once.
    """
    query, key = query.float() * scaling, key.float()
    group = len(query) // len(key)
    logits = (query @ key.repeat_interleave(group, 0).mT).masked_fill(~seen, float("-inf"))
    weights, columns = logits.softmax(-1).nan_to_num().topk(min(ATTENDED, key.shape[1]), dim=-1)  # [Hq, n, A]
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
    owner = torch.arange(len(query), device=key.device)[:, None, None] // group
    keys = key[owner, columns]  # [Hq, n, A, D]
    keys = keys - weights[..., None, :] @ keys
    sharp = (weights[..., None] * keys).mT @ keys
    centred = key[:, real] - key[:, real].mean(1, keepdim=True)
    even = (centred.mT @ centred / len(real)).repeat_interleave(group, 0)
    if counts is not None:
        query = query * counts.sqrt()[:, None]  # features are quadratic in it
    return features(sharp, query).sum(1), features_of(even, query.mT @ query)


def features(matrix: Tensor, query: Tensor) -> Tensor:
    """LᵀXL [..., D, D] for a quadratic form X of Keys, where kᵀL are the real, then imaginary parts of q_p conj k_p."""
    once = _times(matrix, query[..., None, :])
    return _times(once.mT, query[..., None, :]).mT


def features_of(matrix: Tensor, moment: Tensor) -> Tensor:
    """Σ over queries of `features` of one quadratic form X [..., D, D], from the queries' second moment [..., D, D]."""
    (x, s) = ([half.chunk(2, -1) for half in m.chunk(2, -2)] for m in (matrix, moment))
    (aa, ab), (ba, bb) = x
    (saa, sab), (sba, sbb) = s
    real = aa * saa + ab * sab + ba * sba + bb * sbb
    cross = aa * sab - ab * saa + ba * sbb - bb * sba
    imaginary = aa * sbb - ab * sba - ba * sab + bb * saa
    return torch.cat([torch.cat([real, cross], -1), torch.cat([cross.mT, imaginary], -1)], -2)


def _times(matrix: Tensor, query: Tensor) -> Tensor:
    """X L: columns f_p = q_a k_a + q_b k_b and g_p = q_b k_a - q_a k_b of the pair (a, b)."""
    (xa, xb), (qa, qb) = matrix.chunk(2, -1), query.chunk(2, -1)
    return torch.cat([xa * qa + xb * qb, xa * qb - xb * qa], -1)


def _collecting(collector: _Collector, call: Attending) -> tuple[Tensor, Tensor | None]:
    out, weights = call.by_sdpa()
    if hasattr(call.module, "layer_idx"):
        collector.collect(call.module, call.query, call.key, out, call.mask, call.scaling)
    return out, weights


def collect(
    model: Any, documents: Sequence[Encoded], geometry: Geometry, *, batch_size: int, pad_id: int, quiet: bool, gradients: bool
) -> RapStatistics:
    """Read the documents once (once more with `gradients`) and sum.

    Args:
        gradients: squared gradients too, which the published scores and budgets need and the others do not; one document at a time, with
            the memory of a training step without optimizer.

    Raises:
        RotateKError: attention that RAP does not know.
    """
    modules = attentions(model, geometry)
    statistics = RapStatistics({}, documents, batch_size, pad_id, quiet)
    for i, (module, shape) in enumerate(zip(modules, geometry.layers, strict=True)):
        per_head = output_heads(module, shape)
        statistics.add(f"{i}.gram", (per_head.mT @ per_head).unflatten(0, (shape.kv_heads, -1)).sum(1))
    collector, draw = _Collector(statistics, geometry), torch.Generator().manual_seed(0)
    bar = tqdm(total=len(documents), desc="pairs", unit="doc", disable=None if not quiet else True, leave=False)
    with bar, attended_by(model, NAME, partial(_collecting, collector)), torch.inference_mode():
        for start in range(0, len(documents), batch_size):
            batch = read(model, documents[start : start + batch_size], geometry, pad_id)
            collector.announce(batch, draw)
            model(**batch.inputs, logits_to_keep=1)
            bar.update(len(batch.real))
    if gradients:
        _add_gradients(model, modules, documents, geometry, statistics)
    return statistics


def loss_of(logits: Tensor, batch: Read) -> Tensor:
    """Mean cross entropy over scored tokens, of logits [B, L, V] of the last L columns."""
    last = logits.shape[1]
    scored = batch.scored[:, -last:].to(logits.device)
    return nn.functional.cross_entropy(logits[scored].float(), batch.targets[:, -last:].to(logits.device)[scored])


def _add_gradients(model: Any, modules: Sequence[Any], documents: Sequence[Encoded], geometry: Geometry, statistics: RapStatistics) -> None:
    needed = {id(getattr(module, name).weight) for module in modules for name in PROJECTIONS}
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in needed)
        for item in tqdm(documents, desc="gradients", unit="doc", disable=None if not statistics.quiet else True, leave=False):
            batch = read(model, [item], geometry, statistics.pad_id, None)
            model.zero_grad(set_to_none=True)
            loss_of(model(**batch.inputs, logits_to_keep=batch.last).logits, batch).backward()
            for i, module in enumerate(modules):
                for name in PROJECTIONS:
                    weight = getattr(module, name).weight
                    squared, own = weight.grad.float().square(), weight.detach().float().square()
                    heads = geometry.layers[i].kv_heads if name[0] in "kv" else geometry.layers[i].query_heads
                    for kind, x in (("fisher", squared), ("fisher_weight", squared * own)):
                        x = x.T if name == "o_proj" else x
                        statistics.add(f"{i}.{name[0]}_{kind}", heads_of(x, heads).sum(-1))
    finally:
        model.zero_grad(set_to_none=True)
        for p, wanted in before:
            p.requires_grad_(wanted)
