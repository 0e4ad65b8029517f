"""The suite `proof`: ours and every rival at the same bytes, of Keys and Values together and of the Keys beside equal Values.

Four axes, and a method is compared with others of its axis only:

- `kv`: Keys and Values at KV budgets from 1/2 to 1/32.
- `keys`: Keys at shares from 1/2 to 1/32 of the dense Keys, Values raw on both sides; rivals that code Keys alone.
- `keys+values4`: the same Keys with all Values at 4 bits in the same way on both sides. Ours are coded as our store codes them, without own
  bases and fallback.
- `values`: Keys raw, Values at 4 bits in each of the ways of `runtime/rivals/coded_values.py`: which one is best to add.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from .errors import RotateKError
from .key_plans import with_key_budget
from .methods import SUITE_BUDGETS, SUITE_KEEP_RATIOS, Entry, Methods
from .names import OURS
from .plan import SIDES
from .runtime.coder import Coder
from .runtime.rivals.base import RivalCoder
from .runtime.rivals.coded_values import WAYS, CodedValues
from .runtime.rivals.our_keys import Directions, OurKeysCoder
from .runtime.rivals.registry import RIVALS, Rival, largest_fitting, worst_share

KEYS, KEYS_VALUES4, VALUES = "keys", "keys+values4", "values"
RAW = "raw Keys"
NATIVE = "native"  # token selection alone
BEST_VALUES = "int4"  # of WAYS: what is added to both sides
"""The best of them on 45 documents of `mixed` on both bundled models, or as good as the best; the axis `values` measures it again."""

Axis = tuple[str, Callable[[RivalCoder], RivalCoder], float]
"""Its name, what is made of a coder of Keys, and the share of the dense bytes of Keys and Values that the Values take."""


def proof_entries(methods: Methods) -> list[Entry]:
    """All entries, dense first.

    Raises:
        UsageError: an artifact of another span than images, or without knock-outs.
    """
    methods.check_span("int8")
    entries = [methods.dense(), methods.compiled()]
    ours = not methods.artifact.method.rival
    if ours:
        entries += methods.own_in_suite()
    for name, rival in RIVALS.items():
        # what stores Values as they are meets no budget, and what stores everything is the dense model
        if (not rival.keys_only or rival.learned) and name != NATIVE:
            entries += methods.rival_in_suite(name)
    if not (ours and methods.artifact.method.levels and methods.artifact.sensitivity("value")):
        warnings.warn("Keys beside equal Values are left out: the artifact has no bases and sensitivities to plan them with", stacklevel=3)
        return entries
    entries += [methods.own_keys(budget, KEYS) for budget in SUITE_BUDGETS]
    entries += [replace(methods.own(ratio, every=True), axis=KEYS) for ratio in SUITE_KEEP_RATIOS]
    bases = {side: directions(methods, side) for side in SIDES}
    axes: list[Axis] = [(KEYS, _as_it_is, 1 / 2)]
    try:
        share = _coded_share(methods, bases["value"])
        entries += [_own_with_values(methods, budget, bases, budget / 2 + share) for budget in SUITE_BUDGETS]
        axes.append((KEYS_VALUES4, lambda coder: _with_values(coder, bases["value"]), share))
    except RotateKError as error:
        warnings.warn(f"left out of the suite: {error}", stacklevel=3)
    for axis in axes:
        for name, rival in RIVALS.items():
            if rival.keys_only:
                entries += _at_key_budgets(methods, name, rival, axis)
    for way in WAYS:
        try:
            coder = CodedValues(name=RAW, geometry=methods.artifact.geometry, setting=f"Values {way}", way=way, bases=bases["value"])
        except RotateKError as error:
            warnings.warn(f"left out of the suite: {error}", stacklevel=3)
            continue
        entries.append(methods.coded(RAW, coder, axis=VALUES))
    return entries


def directions(methods: Methods, side: str) -> dict[int, Directions]:
    """Of the Keys or the Values of images, by layer, as the artifact's own store uses them."""
    found = {}
    for i in methods.artifact.geometry.compressible:
        basis = getattr(methods.prepared.layer(i, torch.device("cpu"), torch.float32).kinds["visual"], side)
        found[i] = Directions(basis.mean, basis.encode, basis.decode, basis.balance)
    return found


def _own_with_values(methods: Methods, budget: float, bases: dict[str, dict[int, Directions]], share: float) -> Entry:
    """Our Keys at a share of the dense Keys, beside the Values that rivals have."""
    plan = with_key_budget(methods.artifact, budget).plan()
    slabs = {i: tuple(head.key for head in heads) for i, heads in plan.items()}
    words, geometry = f"Keys {budget:g}", methods.artifact.geometry
    keys = OurKeysCoder(name=OURS, geometry=geometry, setting=words, plan=slabs, bases=bases["key"])
    return methods.own_coded(_with_values(keys, bases["value"]), share, KEYS_VALUES4, budget)


def _as_it_is(coder: RivalCoder) -> RivalCoder:
    return coder


def _with_values(coder: RivalCoder, bases: dict[int, Directions]) -> RivalCoder:
    setting = f"{coder.setting}, Values 4 bit"
    return CodedValues(name=coder.name, geometry=coder.geometry, setting=setting, way=BEST_VALUES, inner=coder, bases=bases)


def _coded_share(methods: Methods, bases: dict[int, Directions]) -> float:
    """Of the dense bytes of Keys and Values, what Values at 4 bits take."""
    geometry = methods.artifact.geometry
    return worst_share(CodedValues(name=RAW, geometry=geometry, way=BEST_VALUES, bases=bases), geometry) - 0.5


def _at_key_budgets(methods: Methods, name: str, rival: Rival, axis: Axis) -> Iterable[Entry]:
    """A rival at every share of the Keys, or the smallest it can do with."""
    geometry, (where, wrap, value_share) = methods.artifact.geometry, axis

    def make(ratio: float) -> Coder:
        coder = rival.make(name, geometry, ratio, methods.state)
        assert isinstance(coder, RivalCoder)
        return wrap(coder)

    try:
        ratios = rival.ratios(geometry)
        if rival.learned and methods.state[rival.learned] is None:
            return []  # said for the axis of Keys and Values
        entries = []
        for share in SUITE_BUDGETS:
            wanted = share / 2 + value_share
            coder = largest_fitting(make, ratios, geometry, wanted) or make(ratios[0])
            given = wanted if worst_share(coder, geometry) <= wanted * (1 + 1e-9) else math.ceil(worst_share(coder, geometry) * 1e6) / 1e6
            entries.append(methods.coded(name, coder, wanted, given, axis=where, key_budget=share))
        return entries
    except RotateKError as error:
        warnings.warn(f"left out of the suite: {error}", stacklevel=4)
        return []
