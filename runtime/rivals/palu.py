"""Palu (arXiv 2407.21118): W_k and W_v factored offline jointly over groups of heads, latents cached before RoPE, Keys rebuilt.

Formula: the projection W [hidden, g·D] of g = 4 KV heads (all of a layer that has fewer) is replaced by A B of rank r with the least
E|x W - x A B|², published as a truncated SVD of the whitened W. With y = x W its solution is A = W U, B = Uᵀ, U [g·D, r] the leading
eigenvectors of the uncentred moment E[yᵀ y] (a test compares the two). So a token's latent is y U, and what is rebuilt is (y U) Uᵀ;
Values are used as that, Keys go through the model's k-norm, where it has one, and RoPE. `palu` keeps latents native; `palu4` at 4 bits
per token and group, one fp16 scale and zero point, after a Hadamard rotation, which is folded into U.
Ranks, as in the released code: proportional to the mean over a group's weights of the root of their mean squared gradient, Keys and Values
apart, at most g·D; what full groups cannot take is spread evenly over the others; then rounded to a multiple of 32, at least 32. A keep
ratio is the share of all latent dimensions, before they are rounded. Ranks of groups of less than 256 channels are rounded to 8.
Bytes: the latents, and for `palu4` their scales. U belongs to the model and counts for no image, as our bases; nor does the rotation of
a token, which follows from its position (the published kernel computes it), so cosines and sines are kept beside the parts.
Where it differs: published U and gradients are of text; here U is of image tokens and gradients of answers, in the documents that our
bases are calibrated on. Text is not coded (no rival codes it here); published, all tokens are. Published, weights are replaced: exact
Keys are never there, and errors of a layer reach the next one while the prompt is read; here prefill is exact, which favours the method,
and weights stay whole. A bias of W is part of y. Published models have no k-norm; here the latent is of what is before it, as W_k is what
is factored. The published Hadamard matrix spans a whole latent; here r / p interleaved ones of the largest power of two p that divides
r. Latents at 3 bits, and training afterwards, are not here.
Limits: directions are the same for every page. RoPE that turns a part of the channels, or neighbouring ones, is refused. Attention reads
rebuilt Keys, so speed says nothing about Palu's kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ...geometry import Geometry
from ...kernels.slabs import UNIT
from ..before_rope import BeforeRope, Turning
from ..coder import NATIVE_BYTES, CodedSegment
from .base import RivalCoder
from .hadamard import walsh_hadamard
from .rounding import code_tokens, rebuild_tokens, token_code_bytes

GROUP_HEADS = 4  # published
STEP = 32  # published rounding of ranks
SIDES = ("key", "value")
BITS = 4

Place = tuple[int, str, int]
"""Layer, side and number of a group."""


@dataclass(frozen=True, slots=True)
class Factors:
    """What is learned of every group (rotatek_compile/learn_palu.py): `directions` fp32 [g·D, g·D], columns by falling energy, and
    `fisher`, what ranks are proportional to."""

    directions: Mapping[Place, Tensor]
    fisher: Mapping[Place, float]


@dataclass(frozen=True, kw_only=True)
class PaluCoder(RivalCoder):
    """Latents of `ranks[layer, side, group]` dimensions, native or at `bits` bits."""

    ranks: Mapping[Place, int] = field(repr=False)
    factors: Factors | None = field(repr=False)
    bits: int | None = None
    bases: dict[tuple[Place, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """As they are used, once made: every segment is rebuilt at every step."""

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        """Raises UsageError: Keys after RoPE are not what is coded."""
        raise UsageError(f"{self.name} codes Keys before RoPE (code_before), and these are after it")

    def code_before(self, layer: int, before: BeforeRope, values: Tensor) -> CodedSegment:
        """Code one image segment; see `runtime.coder.BeforeRopeCoder`.

        Raises:
            UsageError: nothing was learned.
        """
        parts: dict[str, Tensor] = {}
        for side, x in zip(SIDES, (before.keys, values), strict=True):
            for number, heads in enumerate(self._groups(layer)):
                latent = x[heads].transpose(0, 1).flatten(1).float() @ self._basis(layer, side, number, x.device)  # [S, r]
                if self.bits is None:
                    parts[f"{side}{number}"] = latent.to(x.dtype)
                else:
                    parts |= code_tokens(f"{side}{number}", latent.unsqueeze(0), self.bits, latent.shape[-1])
        native = frozenset(parts) if self.bits is None else frozenset()
        rebuilt = partial(_rebuild, coder=self, layer=layer, turning=before.turning.each(Tensor.clone))
        return CodedSegment(values.shape[1], parts, native, rebuilt)

    def bytes_of(self, tokens: int, layer: int) -> int:
        ranks = [rank for (i, _, _), rank in self.ranks.items() if i == layer]
        if self.bits is None:
            return NATIVE_BYTES * tokens * sum(ranks)
        return sum(token_code_bytes(tokens, rank, self.bits, rank) for rank in ranks)

    def side(self, layer: int, side: str, parts: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """Projections [Hkv, S, D] that a segment's parts rebuild to, fp32."""
        made = []
        for number, heads in enumerate(self._groups(layer)):
            name = f"{side}{number}"
            rank = self.ranks[layer, side, number]
            latent = parts[name].float() if self.bits is None else rebuild_tokens(name, parts, self.bits, rank)[0]
            whole = latent @ self._basis(layer, side, number, device).mT  # [S, g·D]
            made.append(whole.unflatten(1, (heads.stop - heads.start, -1)).transpose(0, 1))
        return torch.cat(made)

    def _groups(self, layer: int) -> list[slice]:
        return head_groups(self.shape(layer).kv_heads)

    def _basis(self, layer: int, side: str, number: int, device: torch.device) -> Tensor:
        """U [g·D, r] of a group, with the Hadamard rotation folded in where latents are coded."""
        if self.factors is None:
            raise missing(self.name)
        place = layer, side, number
        if (place, device) not in self.bases:
            basis = self.factors.directions[place][:, : self.ranks[place]].to(device)
            self.bases[place, device] = basis if self.bits is None else spread(basis)
        return self.bases[place, device]


def _rebuild(parts: Mapping[str, Tensor], tokens: int, coder: PaluCoder, layer: int, turning: Turning) -> tuple[Tensor, Tensor]:
    device = turning.cos.device
    return turning.of(coder.side(layer, "key", parts, device)), coder.side(layer, "value", parts, device)


def spread(latent: Tensor) -> Tensor:
    """Latents [..., r] after Hadamard rotations of the largest power of two p that divides r, each of every (r/p)-th dimension, so that
    leading and trailing ones are mixed. An orthogonal map."""
    rank = latent.shape[-1]
    power = rank & -rank
    return (walsh_hadamard(power, latent.device) @ latent.unflatten(-1, (power, rank // power))).flatten(-2)


def head_groups(kv_heads: int) -> list[slice]:
    """KV heads that are factored jointly; the last group has what is left."""
    return [slice(start, min(start + GROUP_HEADS, kv_heads)) for start in range(0, kv_heads, GROUP_HEADS)]


def widths_of(geometry: Geometry) -> dict[Place, int]:
    """Channels g·D of every group of the compressed layers, Keys before Values."""

    def places() -> Iterator[tuple[Place, int]]:
        for layer in geometry.compressible:
            shape = geometry.layers[layer]
            for side in SIDES:
                for number, heads in enumerate(head_groups(shape.kv_heads)):
                    yield (layer, side, number), (heads.stop - heads.start) * shape.head_dim

    return dict(places())


def step_of(width: int) -> int:
    """What the ranks of a group of `width` channels are multiples of."""
    return STEP if width >= 8 * STEP else UNIT


def palu_ranks(geometry: Geometry, ratio: float, fisher: Mapping[Place, float] | None) -> dict[Place, int]:
    """Ranks of all groups at a share `ratio` of all dimensions; they never fall where it grows.

    Args:
        fisher: may be missing only where every group has its smallest rank.

    Raises:
        UsageError: it is missing.
    """
    widths = widths_of(geometry)
    target = ratio * sum(widths.values())
    if target <= sum(map(step_of, widths.values())) + 1e-6:
        return {place: step_of(width) for place, width in widths.items()}
    if fisher is None:
        raise missing("palu")
    whole = sum(fisher[place] for place in widths)
    shares = {place: min(float(width), target * fisher[place] / whole) for place, width in widths.items()}
    while (left := target - sum(shares.values())) > 1e-6 * target:
        room = {place: widths[place] - share for place, share in shares.items() if share < widths[place]}
        if not room:
            break
        more = min(left / len(room), *room.values())
        shares |= {place: widths[place] if space == more else shares[place] + more for place, space in room.items()}
    return {place: _rounded(share, widths[place]) for place, share in shares.items()}


def _rounded(share: float, width: int) -> int:
    step = step_of(width)
    return min(max(1, round(share / step)) * step, width)


def palu_ratios(geometry: Geometry) -> Sequence[float]:
    """Keep ratios from the smallest ranks to all dimensions, by 8 dimensions."""
    widths = widths_of(geometry)
    least, total = sum(map(step_of, widths.values())), sum(widths.values())
    return [n / total for n in range(least, total, UNIT)] + [1.0]


def rank_words(ranks: Mapping[Place, int], geometry: Geometry) -> str:
    """How many dimensions of how many are kept, Keys and Values together."""
    return f"{sum(ranks.values())} of {sum(widths_of(geometry).values())} dimensions"


def missing(name: str) -> UsageError:
    """That nothing was learned."""
    return UsageError(f"{name} needs learned factors; make them with benchmarks/learn_palu.py and name the file with --learned")


# -- the learned file -------------------------------------------------------------------------------------------------------------


def shapes_of(geometry: Geometry, training: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of the learned file, by name: `layers.{i}.{side}.{group}_directions` [g·D, g·D] and `_fisher` [1]."""
    found: dict[str, tuple[int, ...]] = {}
    for place, width in widths_of(geometry).items():
        found |= {tensor_name(place, "directions"): (width, width), tensor_name(place, "fisher"): (1,)}
    return found


def state_of(tensors: Mapping[str, Tensor], geometry: Geometry, training: Mapping[str, Any]) -> Factors:
    """What the coder is made with, of a learned file's tensors.

    Raises:
        UsageError: directions that are not orthonormal, or Fisher information that is not positive.
    """
    directions, fisher = {}, {}
    for place, width in widths_of(geometry).items():
        basis, own = tensors[tensor_name(place, "directions")], float(tensors[tensor_name(place, "fisher")])
        if float((basis.mT @ basis - torch.eye(width)).abs().amax()) > 1e-3:
            raise UsageError(f"tensor {tensor_name(place, 'directions')} is not orthonormal; learn it again")
        if own <= 0:
            raise UsageError(f"tensor {tensor_name(place, 'fisher')} is {own:g}, expected a number above 0; learn it again")
        directions[place], fisher[place] = basis, own
    return Factors(directions, fisher)


def tensor_name(place: Place, what: str) -> str:
    """Of a group's tensor in the learned file."""
    layer, side, number = place
    return f"layers.{layer}.{side}.{number}_{what}"
