"""The rivals by name, and what they make of a budget.

A KV budget F is a promise: the coded images of all layers together take at most F times their dense bytes (2 bytes a number),
masks, scales and means included, for every segment of at least `PROMISED_FROM` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import UsageError
from ...geometry import Geometry
from ...kernels.slabs import UNIT
from ..coder import Coder
from .base import ChannelCoder, RankCoder, require_head_dim
from .fp8 import Fp8Coder
from .hadamard import HadamardCoder
from .head_drop import HeadDropCoder, most_important
from .kivi import GROUP, KiviCoder
from .kqsvd import KqSvdCoder
from .leank import STEP, LeanKCoder, lean_masks, width_words
from .leank_learned import NO_SCALES, LearnedScales
from .native import NativeCoder
from .palu import BITS, PaluCoder, palu_ranks, palu_ratios, rank_words
from .paper import PaperCoder
from .plain import PlainCoder
from .spark import SparkCoder
from .svdq import GROUPS, SHARES, SvdqCoder, schedule
from .think import ThinkCoder

PROMISED_FROM = 512
_PERIOD = 64  # every method's overhead repeats with the length within this many tokens
_LONG = 1 << 20

State = Mapping[str, Any]
Make = Callable[[str, Geometry, float, State], Coder]


@dataclass(frozen=True, slots=True)
class Rival:
    """A method that can be asked for by name.

    about: one sentence; learned: which state it needs from an artifact (a key of `State`), empty for none; settings: the options it takes;
    make: builds a coder at a keep ratio; ratios: every keep ratio that differs, ascending (methods without a knob have one);
    keys_only: it stores Values as they are, as its part `values`.
    """

    name: str
    about: str
    make: Make
    ratios: Callable[[Geometry], Sequence[float]]
    learned: str = ""
    settings: tuple[str, ...] = ("kv_budget",)
    keys_only: bool = False


def make_coder(
    name: str,
    geometry: Geometry,
    *,
    kv_budget: float | None = None,
    keep_ratio: float | None = None,
    state: State | None = None,
    tokens: int = PROMISED_FROM,
) -> Coder:
    """The coder called `name` for a model.

    Args:
        kv_budget: share of the dense bytes; methods with a knob take the largest setting that fits, others must fit as they are.
        keep_ratio: share kept of Key channels (think, spark, leank, leank-learned), directions (paper, kq-svd), Key bits (svdq),
            (layer, KV head) pairs (head-drop) or latent dimensions of Keys and Values (palu, palu4).
        state: learned state: {"knockout": {layer: fp32 [Hkv]}} for head dropping, {"energy": {layer: [Hkv, D]}} of the Key channels for
            leank, {"leank-learned": LearnedScales} for that, {"palu": Factors} for palu and palu4; others ignore it.
        tokens: of the shortest segment for which the budget has to hold: fewer where images keep a share of their tokens.

    Raises:
        UsageError: unknown name, an option the method does not take or misses, a number out of range, a budget it cannot meet
            (naming the smallest it can), a head dimension it cannot code, or missing state.
    """
    rival = _rival(name)
    _check_range("KV budget", kv_budget)
    _check_range("keep ratio", keep_ratio)
    state = state or {}
    ratios = rival.ratios(geometry)
    if "keep_ratio" not in rival.settings:
        if keep_ratio is not None:
            raise UsageError(f"{name} has no keep ratio; leave it out, or choose one of {', '.join(_with_knob())}")
        coder = rival.make(name, geometry, ratios[0], state)
        if kv_budget is not None and not _fits(coder, geometry, kv_budget, tokens):
            raise _too_small(name, geometry, kv_budget, tokens)
        return coder
    if (kv_budget is None) == (keep_ratio is None):
        raise UsageError(f"{name} takes a KV budget or a keep ratio, one of the two")
    if keep_ratio is not None:
        if keep_ratio < ratios[0] - 1e-9:
            raise UsageError(f"{name} cannot keep {keep_ratio:g}; the smallest keep ratio on this model is {ratios[0]:g}")
        return rival.make(name, geometry, keep_ratio, state)
    assert kv_budget is not None
    found = largest_fitting(lambda ratio: rival.make(name, geometry, ratio, state), ratios, geometry, kv_budget, tokens)
    if found is None:
        raise _too_small(name, geometry, kv_budget, tokens)
    return found


def largest_fitting(
    make: Callable[[float], Coder], ratios: Sequence[float], geometry: Geometry, kv_budget: float, tokens: int = PROMISED_FROM
) -> Coder | None:
    """The coder of the largest of some ascending ratios that meets a budget; bytes grow with the ratio. None if none does."""
    low, high = 0, len(ratios)  # ratios[:low] fit, ratios[high:] do not
    while low < high:
        middle = (low + high) // 2
        if _fits(make(ratios[middle]), geometry, kv_budget, tokens):
            low = middle + 1
        else:
            high = middle
    return make(ratios[low - 1]) if low else None


def smallest_budget(name: str, geometry: Geometry, tokens: int = PROMISED_FROM) -> float:
    """The smallest KV budget that holds for every segment of at least `tokens` tokens; no state is needed.

    Longer than `PROMISED_FROM` counts as that, so that `make_coder` always accepts the result.
    """
    rival = _rival(name)
    coder = rival.make(name, geometry, rival.ratios(geometry)[0], {})
    return worst_share(coder, geometry, min(tokens, PROMISED_FROM))


def worst_share(coder: Coder, geometry: Geometry, tokens: int = PROMISED_FROM) -> float:
    """The largest share of dense bytes that a segment of at least `tokens` tokens takes, all layers together.

    Bytes are linear in the length but for a fixed part and one that repeats, so the worst is among the first lengths or the limit.
    """
    lengths = [*range(tokens, tokens + _PERIOD), _LONG]
    dense = geometry.dense_bytes_per_token()
    return max(sum(coder.bytes_of(n, layer) for layer in geometry.compressible) / (dense * n) for n in lengths)


def _fits(coder: Coder, geometry: Geometry, budget: float, tokens: int = PROMISED_FROM) -> bool:
    return worst_share(coder, geometry, tokens) <= budget * (1 + 1e-12)


def _too_small(name: str, geometry: Geometry, budget: float, tokens: int = PROMISED_FROM) -> UsageError:
    least = math.ceil(smallest_budget(name, geometry, tokens) * 1e5) / 1e5
    return UsageError(f"{name} cannot meet a KV budget of {budget:g}; the smallest it can on this model is {least:g}")


def _rival(name: str) -> Rival:
    if name not in RIVALS:
        raise UsageError(f"unknown method {name!r}; choose one of {', '.join(RIVALS)}")
    return RIVALS[name]


def _check_range(words: str, number: float | None) -> None:
    if number is not None and not 0 < number <= 1:
        raise UsageError(f"a {words} of {number:g} is out of range; it must be above 0 and at most 1")


def _with_knob() -> list[str]:
    return [name for name, rival in RIVALS.items() if "keep_ratio" in rival.settings]


# -- makers -----------------------------------------------------------------------------------------------------------------------


def _once(geometry: Geometry) -> Sequence[float]:
    return (1.0,)


def _widest(geometry: Geometry) -> int:
    return max(geometry.layers[i].head_dim for i in geometry.compressible)


def _channel_ratios(geometry: Geometry) -> Sequence[float]:
    dim = _widest(geometry)
    return [n / dim for n in range(1, dim + 1)]


def _rank_ratios(geometry: Geometry) -> Sequence[float]:
    dim = _widest(geometry)
    return [n / dim for n in range(UNIT, dim + 1, UNIT)]


def _pairs(geometry: Geometry) -> int:
    return sum(geometry.layers[i].kv_heads for i in geometry.compressible)


def _head_ratios(geometry: Geometry) -> Sequence[float]:
    return [n / _pairs(geometry) for n in range(_pairs(geometry) + 1)]


def _plain(bits: int) -> Make:
    return lambda name, geometry, ratio, state: PlainCoder(name=name, geometry=geometry, bits=bits)


def _native(name: str, geometry: Geometry, ratio: float, state: State) -> Coder:
    return NativeCoder(name=name, geometry=geometry)


def _fp8(name: str, geometry: Geometry, ratio: float, state: State) -> Coder:
    return Fp8Coder(name=name, geometry=geometry)


def _kivi(bits: int) -> Make:
    def make(name: str, geometry: Geometry, ratio: float, state: State) -> Coder:
        require_head_dim(name, geometry, lambda dim: dim % GROUP == 0, f"a multiple of {GROUP}")
        return KiviCoder(name=name, geometry=geometry, bits=bits)

    return make


def _hadamard(bits: int) -> Make:
    def make(name: str, geometry: Geometry, ratio: float, state: State) -> Coder:
        require_head_dim(name, geometry, lambda dim: dim & (dim - 1) == 0, "a power of two")
        return HadamardCoder(name=name, geometry=geometry, bits=bits)

    return make


def _head_drop(bits: int | None) -> Make:
    def make(name: str, geometry: Geometry, ratio: float, state: State) -> Coder:
        count = int(ratio * _pairs(geometry) + 1e-6)
        kept = most_important(geometry, count, state.get("knockout"))
        return HeadDropCoder(name=name, geometry=geometry, kept=kept, bits=bits, setting=f"{count} of {_pairs(geometry)} heads")

    return make


def _of_channels(kind: Callable[..., ChannelCoder], **settings: Any) -> Make:
    def make(name: str, geometry: Geometry, ratio: float, state: State) -> Coder:
        dim, coder = _widest(geometry), kind(name=name, geometry=geometry, keep_ratio=ratio, **settings)
        return replace(coder, setting=f"{coder.channels(dim)} of {dim} channels")

    return make


def _of_directions(kind: Callable[..., RankCoder]) -> Make:
    def make(name: str, geometry: Geometry, ratio: float, state: State) -> Coder:
        dim, coder = _widest(geometry), kind(name=name, geometry=geometry, keep_ratio=ratio)
        return replace(coder, setting=f"{coder.rank(dim)} of {dim} directions")

    return make


def _lean_ratios(geometry: Geometry) -> Sequence[float]:
    return [n / LEAN_SHARES for n in range(LEAN_SHARES + 1)]


def _leank(name: str, geometry: Geometry, ratio: float, state: State) -> Coder:
    require_head_dim(name, geometry, lambda dim: dim % STEP == 0, f"a multiple of {STEP}")
    masks = lean_masks(geometry, ratio, state.get("energy"))
    return LeanKCoder(name=name, geometry=geometry, masks=masks, setting=width_words(masks, geometry))


def _leank_learned(name: str, geometry: Geometry, ratio: float, state: State) -> Coder:
    require_head_dim(name, geometry, lambda dim: dim % STEP == 0, f"a multiple of {STEP}")
    scales: LearnedScales | None = state.get(name)
    masks = lean_masks(geometry, ratio, scales.at(ratio) if scales is not None else None, NO_SCALES)
    return LeanKCoder(name=name, geometry=geometry, masks=masks, setting=width_words(masks, geometry))


def _bit_shares(geometry: Geometry) -> Sequence[float]:
    return SHARES


def _svdq(name: str, geometry: Geometry, ratio: float, state: State) -> Coder:
    require_head_dim(name, geometry, lambda dim: dim % GROUPS == 0, f"a multiple of {GROUPS}")
    bits = schedule(ratio)
    return SvdqCoder(name=name, geometry=geometry, bits=bits, setting=f"{sum(bits) / GROUPS:g} bits a number")


def _palu(bits: int | None) -> Make:
    def make(name: str, geometry: Geometry, ratio: float, state: State) -> Coder:
        factors = state.get("palu")
        ranks = palu_ranks(geometry, ratio, factors.fisher if factors is not None else None)
        return PaluCoder(name=name, geometry=geometry, ranks=ranks, factors=factors, bits=bits, setting=rank_words(ranks, geometry))

    return make


LEAN_SHARES = 64  # steps of the share that leank's threshold lets through, before widths are rounded
_KNOB = ("kv_budget", "keep_ratio")
RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        Rival("int8", "8-bit codes per token and head", _plain(8), _once),
        Rival("int4", "4-bit codes per token and head", _plain(4), _once),
        Rival("fp8", "e4m3 numbers, one scale per head and image", _fp8, _once),
        Rival("kivi4", "KIVI, 4 bit: Keys per channel, Values per token, groups of 32", _kivi(4), _once),
        Rival("kivi2", "KIVI, 2 bit: Keys per channel, Values per token, groups of 32", _kivi(2), _once),
        Rival("hadamard4", "Hadamard rotation, then 4-bit codes per token and head", _hadamard(4), _once),
        Rival("hadamard2", "Hadamard rotation, then 2-bit codes in groups of 32 channels", _hadamard(2), _once),
        Rival("head-drop", "the most important KV heads at 4 bit, the rest as means", _head_drop(4), _head_ratios, "knockout", _KNOB),
        Rival(
            "head-drop-native", "the most important KV heads native, the rest as means", _head_drop(None), _head_ratios, "knockout", _KNOB
        ),
        Rival(
            "think",
            "ThinK: Key channels that queries do not look at are dropped, Values native",
            _of_channels(ThinkCoder),
            _channel_ratios,
            settings=_KNOB,
            keys_only=True,
        ),
        Rival(
            "paper",
            "RotateK as published: one rotation per image, uniform rank, Values native",
            _of_directions(PaperCoder),
            _rank_ratios,
            settings=_KNOB,
            keys_only=True,
        ),
        Rival(
            "spark-sign",
            "SparK: a token's own Key channels, the rest by sign and size",
            _of_channels(SparkCoder, signs=True),
            _channel_ratios,
            settings=_KNOB,
            keys_only=True,
        ),
        Rival(
            "spark-mean",
            "SparK: a token's own Key channels, the rest as their mean",
            _of_channels(SparkCoder, signs=False),
            _channel_ratios,
            settings=_KNOB,
            keys_only=True,
        ),
        Rival("svdq", "SVDq: Keys along their singular vectors, more bits for larger ones", _svdq, _bit_shares, "", _KNOB, True),
        Rival(
            "kq-svd",
            "KQ-SVD: the Keys of a rank that come nearest in their logits",
            _of_directions(KqSvdCoder),
            _rank_ratios,
            settings=_KNOB,
            keys_only=True,
        ),
        Rival(
            "leank",
            "LeanK, from calibrated moments: a static mask of Key channels, widths in steps of 32",
            _leank,
            _lean_ratios,
            "energy",
            _KNOB,
            True,
        ),
        Rival(
            "leank-learned",
            "LeanK as published, from scales trained on answers: a static mask of Key channels, widths in steps of 32",
            _leank_learned,
            _lean_ratios,
            "leank-learned",
            _KNOB,
            True,
        ),
        Rival("palu", "Palu: latents of groups of heads before RoPE, native, learned offline", _palu(None), palu_ratios, "palu", _KNOB),
        Rival("palu4", "Palu: the same latents at 4 bits after a Hadamard rotation", _palu(BITS), palu_ratios, "palu", _KNOB),
        Rival("native", "Keys and Values as they are: what token selection alone keeps", _native, _once),
    )
}
