"""Output maps fitted anew, layer by layer, to what the dense model puts out (no gradients: least squares in closed form).

Two streams of hidden states go through the layers side by side: the dense model's, and that of the layers pruned and repaired so far. In
each pruned layer the heads' outputs x' are what its narrower Keys and Values give; the target y is what the dense layer adds to its own
stream, plus what the pruned stream lacks by now. Per query head h the map O_h then minimises

    Σ_tokens | y - b - Σ_h W_o,h O_h x'_h |²

with W_o as it is and the bias b free: O_h = (W_hᵀ W_h)⁻¹ W_hᵀ C_h S_hh⁻¹, with S the covariance of the x' and C_h that of x'_h with what
the other heads leave of y, in turn for all heads. What errors of attention and of truncated Values have in common with x' is made up for.
Layer-wise reconstruction of this kind prunes weights in Frantar and Alistarh, arXiv 2208.11580 (OBC); here it fits maps between heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .batches import Encoded
from .geometry import Geometry, LayerGeometry
from .rap_measure import Layers
from .rap_plan import RapLayer
from .rap_reading import attentions, output_heads, patched, read

RIDGES = (1e-2, 1e-1, 1.0, 10.0)  # of the mean variance of x': how strongly maps are drawn to those before
KEPT_ASIDE = 4  # one document in so many says which ridge is best, and whether any is
SWEEPS = 4  # over the heads
CATCH_UP = 1.0  # share of the pruned stream's lag that a layer should make up for


@dataclass(slots=True)
class _Stream:
    """One batch: what entered the layer at hand in the dense model and in the pruned one, [B, T, hidden]."""

    dense: Tensor
    pruned: Tensor
    arguments: list[dict[str, Any]]
    weights: Tensor  # what tokens count for, [B, T]
    aside: Tensor  # bool [B, T]: documents that say which ridge is best
    ahead: Tensor | None = None  # what leaves the layer at hand in the dense model, once it is known


@dataclass(slots=True)
class _Sums:
    """Weighted Σ over tokens of x' and y and their products, fp64; x' has Hq·r channels."""

    count: float
    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor
    yy: float

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.count + other.count, self.x + other.x, self.y + other.y, self.xx + other.xx, self.yx + other.yx, self.yy + other.yy
        )


@torch.inference_mode()
def refit_outputs(
    model: Any,
    layers: Mapping[int, RapLayer],
    documents: Sequence[Encoded],
    geometry: Geometry,
    *,
    batch_size: int,
    pad_id: int,
    quiet: bool,
    catch_up: float = CATCH_UP,
) -> dict[int, RapLayer]:
    """These layers of a plan with `output` and `bias` fitted anew; everything else stays.

    A page has few answer tokens, and maps have many numbers, so every layer is fitted to three quarters of the documents first: the ridge
    that serves the last quarter best is used on all, and a layer that no ridge improves there stays as it is.

    Memory: hidden states of all documents twice, [tokens, hidden], where the model keeps them.
    """
    run, modules = Layers(model, geometry), attentions(model, geometry)
    streams = []
    for start in range(0, len(documents), batch_size):
        batch = read(model, documents[start : start + batch_size], geometry, pad_id)
        entries, arguments, _ = run.trace(batch)
        last = KEPT_ASIDE - 1 if len(documents) >= KEPT_ASIDE else len(documents) - 1
        aside = torch.tensor([(start + row) % KEPT_ASIDE == last for row in range(len(batch.real))])
        streams.append(_Stream(entries[0], entries[0], arguments, batch.weights(), aside[:, None].expand_as(batch.real)))
    done: dict[int, RapLayer] = {}
    for i, shape in enumerate(tqdm(geometry.layers, desc="repair", unit="layer", disable=None if not quiet else True, leave=False)):
        layer = layers.get(i)
        if layer is not None:
            parts: list[_Sums | None] = [None, None]
            for stream in streams:
                x, y, weights = _pairs_of(run, modules[i], i, layer, stream, geometry, catch_up)
                own = stream.aside[stream.weights > 0].to(x.device)
                for part in (0, 1):
                    if bool((own == part).any()):
                        parts[part] = _added(parts[part], x[own == part], y[own == part], weights[own == part])
            done[i] = layer = _best(layer, parts[0], parts[1], output_heads(modules[i], shape).double().cpu(), shape)
        for stream in streams:
            with patched(model, {} if layer is None else {i: layer}, geometry):
                stream.pruned = run.step(i, stream.pruned, stream.arguments[i])
            stream.dense = run.step(i, stream.dense, stream.arguments[i]) if stream.ahead is None else stream.ahead
            stream.ahead = None
    return done


def _pairs_of(
    run: Layers, module: Any, index: int, layer: RapLayer, stream: _Stream, geometry: Geometry, catch_up: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x' [n, Hq·r], y [n, hidden] and weights [n] of a batch's real tokens."""
    width, heads = layer.value_width, geometry.layers[index].query_heads
    caught: dict[str, Tensor] = {}
    with _noting(module, caught):
        stream.ahead = run.step(index, stream.dense, stream.arguments[index])
        target = caught["out"]
        with patched(run.model, {index: layer}, geometry):
            run.step(index, stream.pruned, stream.arguments[index])
    x = caught["in"].unflatten(-1, (heads, -1))[..., :width].flatten(-2)
    y = target + catch_up * (stream.dense - stream.pruned)
    if module.o_proj.bias is not None:
        y = y - module.o_proj.bias  # stays where it is
    weights = stream.weights.to(x.device)
    real = weights > 0
    return x[real].double(), y[real].double(), weights[real].double()


@contextmanager
def _noting(module: Any, caught: dict[str, Tensor]) -> Any:
    """Keep what enters and what leaves the output projection."""

    def note(projection: Any, args: Any, out: Tensor) -> None:
        caught["in"], caught["out"] = args[0], out

    hook = module.o_proj.register_forward_hook(note)
    try:
        yield
    finally:
        hook.remove()


def _added(sums: _Sums | None, x: Tensor, y: Tensor, weights: Tensor) -> _Sums:
    weighted = x * weights[:, None]
    own = _Sums(
        float(weights.sum()),
        weighted.sum(0).cpu(),
        (weights @ y).cpu(),
        (weighted.mT @ x).cpu(),
        (y.mT @ weighted).cpu(),
        float(weights @ y.square().sum(1)),
    )
    return own if sums is None else sums + own


def _best(layer: RapLayer, seen: _Sums | None, aside: _Sums | None, weights: Tensor, shape: LayerGeometry) -> RapLayer:
    """The layer with the maps that serve what was kept aside best, fitted to everything; as it was if none does."""
    if seen is None or aside is None:
        return layer  # too few documents to know
    errors = {ridge: left_over(fitted(layer, seen, weights, shape, ridge), aside, weights) for ridge in RIDGES}
    ridge = min(errors, key=lambda r: errors[r])
    return fitted(layer, seen + aside, weights, shape, ridge) if errors[ridge] < left_over(layer, aside, weights) else layer


def left_over(layer: RapLayer, sums: _Sums, weights: Tensor) -> float:
    """Mean of |y - b - Σ_h W_o,h O_h x'_h|² over the tokens of these sums."""
    whole = torch.cat(list(weights @ layer.output.double()), dim=1)  # [hidden, Hq·r]
    bias = torch.zeros_like(sums.y) if layer.bias is None else layer.bias.double()
    linear = float((whole * sums.yx).sum()) + float(bias @ sums.y) - float(bias @ (whole @ sums.x))
    return (sums.yy - 2 * linear + float(((whole @ sums.xx) * whole).sum()) + sums.count * float(bias @ bias)) / sums.count


def fitted(layer: RapLayer, sums: _Sums, weights: Tensor, shape: LayerGeometry, ridge: float) -> RapLayer:
    """The layer with the best output maps and bias for these sums.

    Args:
        weights: W_o by query head, fp64 [Hq, hidden, D].
    """
    heads, width = shape.query_heads, layer.value_width
    mean_x, mean_y = sums.x / sums.count, sums.y / sums.count
    xx = (sums.xx / sums.count - mean_x[:, None] * mean_x).unflatten(0, (heads, width)).unflatten(2, (heads, width))  # [H, r, H, r]
    yx = (sums.yx / sums.count - mean_y[:, None] * mean_x).unflatten(1, (heads, width))  # [hidden, H, r]
    output = layer.output.double().clone()  # [Hq, D, r]
    blocks = [weights[h] @ output[h] for h in range(heads)]  # W_o,h O_h: [hidden, r]
    inverses = torch.linalg.pinv(weights)  # (WᵀW)⁻¹Wᵀ: [Hq, D, hidden]
    for _ in range(SWEEPS):
        for h in range(heads):
            left = yx[:, h] - torch.stack([blocks[g] @ xx[g, :, h] for g in range(heads) if g != h]).sum(0) if heads > 1 else yx[:, h]
            own = xx[h, :, h]
            weight = ridge * own.diagonal().mean().clamp_min(1e-30)
            wanted = inverses[h] @ left + weight * layer.output[h].double()
            output[h] = torch.linalg.solve(own + weight * torch.eye(width, dtype=torch.float64), wanted.mT).mT
            blocks[h] = weights[h] @ output[h]
    bias = mean_y - torch.stack([blocks[h] @ mean_x.view(heads, width)[h] for h in range(heads)]).sum(0)
    return replace(layer, output=output.float(), bias=bias.float())
