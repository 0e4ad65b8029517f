"""What a saved cache must hold before any of it is used: names, shapes, dtypes, then every number that later says where to read.

A sum is taken in Python's integers: no number of a file can overflow one. Every refusal is one sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import RotateKError
from ..kernels.codes import padded, pool_bytes
from ..kernels.slabs import UNIT, Slabs, check_slabs
from ..kernels.table import (
    BASIS,
    FIELDS,
    KEY,
    KIND,
    LENGTH,
    MEAN,
    NATIVE,
    NONE,
    OFFSET,
    OWN_MEAN,
    SCALES,
    STRIDE,
    VALUE,
    Kind,
    own_basis,
)
from ..untrusted import shown
from .prepared import PreparedLayer
from .saved_layer import MONITOR, SIDES, LayerState
from .window import most_slack

AGAIN = "save the cache again"
MAX_ROWS = 1 << 16  # sequences of one cache
MAX_NUMBER = 1 << 48  # of tokens, places and ids
POOL_STEP = 16  # bytes of the code pool between which segments begin
STARTS = (("key", KEY), ("value", VALUE))


@dataclass(frozen=True, slots=True)
class Common:
    """What all layers of a saved cache share: rows, tokens that were seen (padding included) and real ones of each row."""

    batch: int
    length: int
    real: tuple[int, ...]
    dtype: torch.dtype


Shapes = dict[str, tuple[torch.dtype, tuple[int | None, ...]]]
"""By tensor name its dtype and shape, None for a size that the file decides."""


def refuse(good: bool, where: str, words: str) -> None:
    """Raise RotateKError unless `good`."""
    if not good:
        raise RotateKError(f"{where}: {words}; {AGAIN}")


def whole(value: Any, most: int = MAX_NUMBER) -> bool:
    """Whether a value from JSON is a whole number from 0 to `most`."""
    return type(value) is int and 0 <= value <= most


def check_numbers(numbers: Any, prepared: PreparedLayer, common: Common, where: str) -> None:
    """The JSON part of a layer.

    Raises:
        RotateKError: a key is missing or holds what it cannot.
    """
    refuse(isinstance(numbers, dict), where, f"is {shown(numbers)}, expected an object")
    refuse(whole(last := numbers.get("last_id")), where, f"last_id is {shown(last)}")
    refuse(whole(slack := numbers.get("slack")), where, f"slack is {shown(slack)}")
    starts = numbers.get("calibrated")
    good = isinstance(starts, list) and all(isinstance(pair, list) and len(pair) == 2 and all(map(whole, pair)) for pair in starts)
    refuse(good and len(starts) <= 2 * len(prepared.kinds), where, f"calibrated is {shown(starts)}, expected pairs of matrix and place")
    first = numbers.get("first")
    pairs = isinstance(first, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in first)
    known = pairs and all(whole(row, common.batch - 1) and isinstance(kind, str) and kind in prepared.kinds for row, kind in first)
    refuse(known and len(set(map(tuple, first))) == len(first), where, f"first is {shown(first)}, expected rows and kinds of tokens")
    if "text" not in prepared.kinds:
        refuse("blocks" not in numbers, where, "blocks are there, but the artifact codes no text")
        return
    blocks = numbers.get("blocks")
    refuse(whole(opened := numbers.get("opened")), where, f"opened is {shown(opened)}")
    refuse(isinstance(blocks, list) and len(blocks) <= common.batch, where, f"blocks is {shown(blocks)}, expected a list")
    for written in blocks:
        refuse(isinstance(written, dict), where, f"blocks hold {shown(written)}, expected objects")
        _check_writing(written, prepared, common, f"{where}: blocks of row {shown(written.get('row'))}")
    rows = [written["row"] for written in blocks]
    refuse(len(set(rows)) == len(rows), where, f"blocks name the rows {shown(rows)}, each may come once")


def _check_writing(written: dict[str, Any], prepared: PreparedLayer, common: Common, where: str) -> None:
    heads, dim = prepared.geometry.kv_heads, prepared.geometry.head_dim
    refuse(whole(written.get("row"), common.batch - 1), where, f"there are {common.batch} rows")
    refuse(whole(tokens := written.get("tokens")), where, f"tokens is {shown(tokens)}")
    sums = written.get("discarded")
    good = isinstance(sums, list) and len(sums) in (0, 2) and all(_figures(part, heads) for part in sums)
    refuse(good, where, f"discarded is {shown(sums)}, expected sums of {heads} heads for Keys and Values")
    refuse((written["tokens"] > 0) == bool(sums), where, f"{shown(tokens)} tokens do not fit the sums {shown(sums)}")
    sides = written.get("sides")
    if sides is None:
        return
    refuse(isinstance(sides, list) and len(sides) == 2, where, f"sides is {shown(sides)}, expected Keys and Values")
    for side in sides:
        refuse(isinstance(side, dict), where, f"a side is {shown(side)}, expected an object")
        slabs, own, fell = side.get("slabs"), side.get("own"), side.get("fallback")
        triples = isinstance(slabs, list) and len(slabs) == heads and all(isinstance(one, list) and len(one) == 3 for one in slabs)
        refuse(
            triples and all(whole(n, dim) for one in slabs for n in one),
            where,
            f"slabs is {shown(slabs)}, expected triples of {heads} heads",
        )
        for one in slabs:
            _check_slabs(Slabs(*one), dim, where)
        sound = isinstance(own, list) and all(whole(h, heads - 1) for h in own) and own == sorted(set(own))
        refuse(
            sound and all(sum(slabs[h]) > 0 and slabs[h][0] < dim for h in own),
            where,
            f"own is {shown(own)}, expected heads with directions",
        )
        refuse(isinstance(fell, list) and len(fell) == heads and all(type(x) is bool for x in fell), where, f"fallback is {shown(fell)}")
        for name in ("error", "kept"):
            refuse(_figures(side.get(name), heads), where, f"{name} is {shown(side.get(name))}, expected numbers of {heads} heads")


def _figures(value: Any, count: int) -> bool:
    """Whether a value is a list of so many numbers from 0 on (parse_json has seen that they are finite)."""
    return isinstance(value, list) and len(value) == count and all(type(x) in (int, float) and x >= 0 for x in value)


def layer_shapes(numbers: dict[str, Any], prepared: PreparedLayer, common: Common) -> Shapes:
    """Every tensor of a layer whose numbers have been checked."""
    batch, dtype, heads, dim = common.batch, common.dtype, prepared.geometry.kv_heads, prepared.geometry.head_dim
    long, half = torch.int64, torch.float16
    shapes: Shapes = {
        "table": (long, (batch, heads, None, FIELDS)),
        "ids": (long, (batch, None)),
        "budgeted": (long, (batch, 2)),
        "codes": (torch.uint8, (None,)),
        "scales": (torch.bfloat16, (None,)),
        "own_means": (half, (None,)),
        "own_bases": (dtype, (None,)),
        "window": (dtype, (2, batch, heads, None, dim)),
        "window_lengths": (long, (batch,)),
    }
    for name in MONITOR:
        shapes[f"monitor.{name}"] = (torch.float64, (batch, heads, 2))
    shapes |= {"monitor.fallback": (long, (batch, heads)), "monitor.deviation": (torch.float64, (batch, None))}
    for row, kind in numbers["first"]:
        shapes |= {f"first.{row}.{kind}.{side}": (long, (heads, VALUE - KEY)) for side in SIDES}
    for written in numbers.get("blocks", []):
        for n, side in enumerate(SIDES):
            prefix = f"blocks.{written['row']}.{side}"
            shapes |= {f"{prefix}.fields": (long, (heads, VALUE - KEY)), f"{prefix}.scales": (torch.bfloat16, (heads, dim))}
            if written["sides"] is None:
                continue
            shapes |= {f"{prefix}.centre": (torch.float32, (heads, dim)), f"{prefix}.own_mean": (half, (heads, dim))}
            for h in written["sides"][n]["own"]:
                rank = sum(written["sides"][n]["slabs"][h])
                shapes |= {f"{prefix}.{part}.{h}": (torch.float32, (dim, rank)) for part in ("encode", "decode")}
    return shapes


def check_state(state: LayerState, prepared: PreparedLayer, common: Common, where: str) -> None:
    """The tensors of a layer, whose shapes have been checked: every place and length within its pool, every number finite.

    Raises:
        RotateKError: one sentence naming the layer, the tensor, the value seen and what to do.
    """
    tensors, numbers = state.tensors, state.numbers
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            refuse(bool(torch.isfinite(tensor).all()), where, f"tensor {name} holds NaN or infinity")
            refuse(not name.endswith("scales") or not bool((tensor < 0).any()), where, f"tensor {name} holds a negative scale")
        elif name != "codes" and tensor.numel():
            low, high = int(tensor.min()), int(tensor.max())
            refuse(low >= -MAX_NUMBER and high <= MAX_NUMBER, where, f"tensor {name} holds {low if low < -MAX_NUMBER else high}")
    for name in ("budgeted", "window_lengths", *(f"monitor.{name}" for name in MONITOR)):
        refuse(not bool((tensors[name] < 0).any()), where, f"tensor {name} holds a negative number")
    for name in ("scales", "own_means", "own_bases"):
        refuse(tensors[name].numel() % UNIT == 0, where, f"pool {name} has {tensors[name].numel()} numbers, no multiple of {UNIT}")
    size = tensors["codes"].numel()
    refuse(size % POOL_STEP == 0, where, f"pool codes has {size} bytes, no multiple of {POOL_STEP}")
    capacity, longest = tensors["window"].shape[3], int(tensors["window_lengths"].max())
    refuse(longest == capacity, where, f"the longest window holds {longest} tokens, its buffer {capacity}")
    slack = numbers["slack"]  # room that the file does not hold
    refuse(slack <= most_slack(longest), where, f"slack is {slack}, {most_slack(longest)} at most beside {longest} tokens")
    for number, start in numbers["calibrated"]:
        good = number in _numbers(prepared) and start % UNIT == 0
        good = good and start + prepared.side(number).scale_starts[-1] <= tensors["scales"].numel()
        refuse(good, where, f"calibrated scales stand at {start}")
    _check_table(state, prepared, common, where)
    for row, kind in numbers["first"]:
        for side in SIDES:
            for h, fields in enumerate(tensors[f"first.{row}.{kind}.{side}"].tolist()):
                _check_side(fields, side, h, state, prepared, f"{where}: tensor first.{row}.{kind}.{side}")
    for written in numbers.get("blocks", []):
        for side in SIDES:
            name = f"blocks.{written['row']}.{side}.fields"
            for h, fields in enumerate(tensors[name].tolist()):
                _check_side(fields, side, h, state, prepared, f"{where}: tensor {name}")
                refuse(fields[OFFSET] == 0, where, f"tensor {name} has OFFSET {fields[OFFSET]}, which blocks get when they are written")
                sides = written["sides"]
                slabs = sides[SIDES.index(side)]["slabs"][h] if sides is not None else list(getattr(prepared.kinds["text"], side).slabs[h])
                refuse(fields[NATIVE:BASIS] == slabs, where, f"tensor {name} has the slabs {fields[NATIVE:BASIS]} where {slabs} are kept")


def _check_table(state: LayerState, prepared: PreparedLayer, common: Common, where: str) -> None:
    table, ids = state.tensors["table"].tolist(), state.tensors["ids"].tolist()
    places = state.tensors["ids"].shape[1]
    refuse(state.tensors["table"].shape[2] == places, where, f"the table has {state.tensors['table'].shape[2]} places, ids has {places}")
    refuse(places <= common.length, where, f"the table has {places} places for {common.length} tokens")
    known: dict[int, list[list[int]]] = {}
    seen: set[tuple[int, int]] = set()
    for row, own in enumerate(ids):
        used = [number for number in own if number]
        good = min(own, default=0) >= 0 and len(set(used)) == len(used) and max(used, default=0) <= state.numbers["last_id"]
        refuse(good, where, f"row {row} has the segments {shown(used)}, expected different numbers up to {shown(state.numbers['last_id'])}")
        held = int(state.tensors["window_lengths"][row])
        for place, number in enumerate(own):
            entries = [heads[place] for heads in table[row]]
            spot = f"{where}: row {row}, place {place}"
            if number in known:
                refuse(known[number] == entries, spot, f"segment {number} is another one than in an earlier row")
                held += entries[0][LENGTH]
                continue
            if number == 0:
                refuse(not any(any(entry) for entry in entries), spot, "no segment stands there, but the table says one does")
                continue
            known[number] = entries
            held += entries[0][LENGTH]
            for h, entry in enumerate(entries):
                _check_entry(entry, entries[0], h, state, prepared, common, f"{spot}, head {h}", seen)
        refuse(held == common.real[row], where, f"row {row} holds {held} tokens, {common.real[row]} were read")


def _check_entry(
    entry: list[int],
    first: list[int],
    h: int,
    state: LayerState,
    prepared: PreparedLayer,
    common: Common,
    where: str,
    seen: set[tuple[int, int]],
) -> None:
    """One head of one segment. `seen`: ranges of native codes that are known to be finite."""
    kind, length = entry[KIND], entry[LENGTH]
    refuse(kind in (Kind.DENSE, Kind.CODED) and kind == first[KIND], where, f"KIND is {kind}")
    refuse(1 <= length <= common.length and length == first[LENGTH], where, f"LENGTH is {length} of {common.length} tokens")
    codes, itemsize, dim = state.tensors["codes"], common.dtype.itemsize, prepared.geometry.head_dim
    for side, start in STARTS:
        fields = entry[start : start + VALUE - KEY]
        _check_side(fields, side, h, state, prepared, f"{where}: {side}")
        slabs = Slabs(*fields[NATIVE:BASIS])
        refuse(kind == Kind.CODED or slabs.native == dim, where, f"a raw segment has the slabs {tuple(slabs)}")
        at, size = fields[OFFSET], pool_bytes(length, slabs, itemsize)
        inside = at >= 0 and at % POOL_STEP == 0 and at + size <= codes.numel()
        refuse(inside, where, f"{side} codes stand at {at} and take {size} bytes of {codes.numel()}")
        native = padded(length) * slabs.native * itemsize
        if native and (at, native) not in seen:
            seen.add((at, native))
            finite = bool(torch.isfinite(codes[at : at + native].view(common.dtype)).all())
            refuse(finite, where, f"{side} codes hold NaN or infinity")


def _check_side(fields: list[int], side: str, h: int, state: LayerState, prepared: PreparedLayer, where: str) -> None:
    """The fields of one side of one head: slabs that can be, and parts that lie in their pools."""
    dim, heads, slabs = prepared.geometry.head_dim, prepared.geometry.kv_heads, Slabs(*fields[NATIVE:BASIS])
    _check_slabs(slabs, dim, where)
    basis, stride, scales, mean, own_mean = (fields[field] for field in (BASIS, STRIDE, SCALES, MEAN, OWN_MEAN))
    if slabs.native == dim:
        raw = basis == mean == own_mean == NONE and stride == scales == 0
        refuse(raw, where, f"raw numbers have the fields {shown(fields[BASIS:])}, expected no basis, mean or scale")
        return
    shared = [(number * heads + h) * dim for number in _numbers(prepared, side)]
    refuse(mean in shared, where, f"MEAN is {mean}, expected one of {shown(shared)}")
    if basis < NONE:
        at, room = own_basis(basis), state.tensors["own_bases"].numel()
        good = at >= 0 and at % UNIT == 0 and stride == slabs.rank > 0 and at + dim * stride <= room
        refuse(good, where, f"an own basis of stride {stride} stands at {at} of {room}")
    else:
        refuse(basis == mean * dim and stride == dim, where, f"BASIS is {basis} with stride {stride}, expected {mean * dim} with {dim}")
    room = state.tensors["own_means"].numel()
    refuse(own_mean == NONE or (0 <= own_mean <= room - dim and own_mean % UNIT == 0), where, f"an own mean stands at {own_mean} of {room}")
    room = state.tensors["scales"].numel()
    good = 0 <= scales <= room - slabs.scaled and scales % UNIT == 0 if slabs.scaled else scales == 0
    refuse(good, where, f"{slabs.scaled} scales stand at {scales} of {room}")


def _check_slabs(slabs: Slabs, dim: int, where: str) -> None:
    try:
        check_slabs(slabs, dim)
    except ValueError as error:
        raise RotateKError(f"{where}: {error}; {AGAIN}") from error


def _numbers(prepared: PreparedLayer, side: str | None = None) -> set[int]:
    """Numbers of the layer's calibrated matrices, of one side or of both."""
    return {getattr(kind, name).number for kind in prepared.kinds.values() for name in ((side,) if side else SIDES)}
