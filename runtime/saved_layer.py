"""The state of one cache layer as tensors and a few numbers, and back: what a saved cache (saved.py) consists of.

Tensors of layer i, under `layers.{i}.`; B rows, H KV heads, N places of the table, L tokens of the longest window, D channels:

    table          int64    [B, H, N, FIELDS]    kernels/table.py; BASIS and MEAN at or above 0 name places in the artifact's matrices
    ids            int64    [B, N]               which segment stands in a place, 0 for none; rows (beams) may share segments
    codes          uint8    flat                 kernels/codes.py;  scales bf16, own_means float16, own_bases compute dtype: flat pools
    window         compute  [2, B, H, L, D]      raw Keys and Values of the newest text, zeros behind them;  window_lengths int64 [B]
    budgeted       int64    [B, 2]               what the KV budget has counted
    monitor.ratio  float64  [B, H, 2]            monitor.py; likewise monitor.angle; monitor.fallback int64 [B, H], monitor.deviation
                                                 float64 [B, M] of M images

`first.{r}.{kind}.{side}` int64 [H, SIDE_FIELDS]: fields of row r's first segment of a kind, whose mean and scales later ones may have;
and where old text is coded, for every row r that has written blocks and both sides (`key`, `value`), under `layers.{i}.blocks.{r}.{side}.`:

    fields         int64    [H, SIDE_FIELDS]     the coordinates' fields in the table;  scales bf16 [H, D]
    centre         float32  [H, D]               of own coordinates alone, as own_mean float16 [H, D] and, for heads h with an own basis
    encode.{h}     float32  [D, R]               of R directions, encode and decode
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import RotateKError
from ..kernels.slabs import Slabs
from .cache_layer import RotateKLayer
from .encode import Coordinates
from .monitor import Monitor
from .prepared import SideBasis
from .store import Store
from .text_blocks import TextBlocks, Writing
from .window import Window

POOLS = ("codes", "scales", "own_means", "own_bases")
MONITOR = tuple(field.name for field in fields(Monitor))
SIDES = ("key", "value")


@dataclass(frozen=True, slots=True)
class LayerState:
    """Tensors by name (without `layers.{i}.`), and numbers that fit JSON."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def layer_state(layer: RotateKLayer) -> LayerState:
    """The state of a layer between two calls, tensors on the CPU; nothing of it is shared with the layer.

    Raises:
        RotateKError: codes are still on their way to the pool.
    """
    store = layer.store
    if store._pending or store._released:
        raise RotateKError("a forward call on this cache did not finish; start a new cache")
    layer.share_text()  # as for a fork: all of them then go on alike, to the last bit
    tensors = {name: getattr(store, name) for name in POOLS}
    tensors |= {"table": torch.from_numpy(store.table), "ids": torch.from_numpy(store.ids), "budgeted": torch.from_numpy(store.budgeted)}
    tensors |= {f"monitor.{name}": torch.from_numpy(getattr(store.monitor, name)) for name in MONITOR}
    tensors["window"], tensors["window_lengths"] = _without_slack(store.window), torch.from_numpy(store.window.host)
    slack = store.window.buffer.shape[3] - tensors["window"].shape[3]  # at most `most_slack`, or no check would let it in again
    numbers: dict[str, Any] = {
        "last_id": store._last_id,
        "calibrated": [[number, at] for number, at in store.calibrated.items()],
        "slack": slack,
    }
    numbers["first"] = [list(place) for place in store.first]
    for (row, kind), pair in store.first.items():
        tensors |= {f"first.{row}.{kind}.{side}": torch.from_numpy(fields) for side, fields in zip(SIDES, pair, strict=True)}
    if layer.blocks is not None:
        numbers["opened"], numbers["blocks"] = layer.blocks.opened, []
        for row, now in sorted(layer.blocks.rows.items()):
            numbers["blocks"].append(_writing_numbers(row, now, own := now.where is not layer.blocks.shared))
            for side, where, placed, scales in zip(SIDES, now.where, now.fields, now.scales, strict=True):
                assert placed is not None and scales is not None, "a row has coordinates from its first block on"
                found = {"fields": torch.from_numpy(placed), "scales": scales} | (_coordinate_tensors(where) if own else {})
                tensors |= {f"blocks.{row}.{side}.{name}": tensor for name, tensor in found.items()}
    return LayerState({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, numbers)


def restore_layer(layer: RotateKLayer, state: LayerState, device: torch.device, dtype: torch.dtype) -> None:
    """Make a fresh layer what `layer_state` saw. The state must have been checked (saved_checks.py)."""
    tensors, numbers = state.tensors, state.numbers
    batch, heads = tensors["table"].shape[:2]
    empty = torch.empty(batch, heads, 0, tensors["window"].shape[-1], dtype=dtype, device=device)
    layer.lazy_initialization(empty, empty)
    store: Store = layer.store
    for name in POOLS:
        setattr(store, name, tensors[name].to(device))
    store.table, store.ids, store.budgeted = (tensors[name].numpy().copy() for name in ("table", "ids", "budgeted"))
    store.monitor = Monitor(**{name: tensors[f"monitor.{name}"].numpy().copy() for name in MONITOR})
    # as much slack as there was: the order in which a sum over the buffer is taken may depend on its size
    store.window.buffer = torch.nn.functional.pad(tensors["window"], (0, 0, 0, numbers["slack"])).to(device)
    store.window.lengths = tensors["window_lengths"].to(device, torch.int32)
    store.window.host = tensors["window_lengths"].numpy().copy()
    store.calibrated, store._last_id, store._end = dict(numbers["calibrated"]), numbers["last_id"], store.codes.numel()
    for row, kind in numbers["first"]:
        store.first[row, kind] = [tensors[f"first.{row}.{kind}.{side}"].numpy().copy() for side in SIDES]
    if layer.blocks is not None:
        layer.blocks.opened = numbers["opened"]
        for written in numbers["blocks"]:
            layer.blocks.rows[written["row"]] = _writing(written, tensors, layer.blocks, device)


def _without_slack(window: Window) -> Tensor:
    """The window's buffer up to its longest row, with zeros behind every row's tokens: what lies there is left over from others."""
    used = window.buffer[:, :, :, : int(window.host.max())]
    columns = torch.arange(used.shape[3], device=used.device)
    behind = columns[None, :] >= window.lengths[:, None]
    return used.masked_fill(behind[None, :, None, :, None], 0)


def _writing_numbers(row: int, now: Writing, own: bool) -> dict[str, Any]:
    sides = [
        {
            "slabs": [list(slabs) for slabs in where.slabs],
            "own": sorted(where.own),
            "fallback": list(where.fallback),
            "error": list(where.error),
            "kept": list(where.kept),
        }
        for where in now.where
    ]
    return {"row": row, "tokens": now.tokens, "discarded": now.discarded, "sides": sides if own else None}


def _coordinate_tensors(where: Coordinates) -> dict[str, Tensor]:
    assert where.own_mean is not None, "own coordinates of text have a mean of their own"
    found = {"centre": where.centre, "own_mean": where.own_mean}
    for h, decode in where.own.items():
        found |= {f"encode.{h}": where.encode[h, :, : where.slabs[h].rank], f"decode.{h}": decode}
    return found


def _writing(written: dict[str, Any], tensors: dict[str, Tensor], blocks: TextBlocks, device: torch.device) -> Writing:
    prefix = f"blocks.{written['row']}"
    where = blocks.shared
    if written["sides"] is not None:
        parts = zip(SIDES, written["sides"], blocks.basis.sides, strict=True)
        where = [_coordinates(numbers, basis, tensors, f"{prefix}.{side}", device) for side, numbers, basis in parts]
    return Writing(
        where=where,
        fields=[tensors[f"{prefix}.{side}.fields"].numpy().copy() for side in SIDES],
        scales=[tensors[f"{prefix}.{side}.scales"].to(device) for side in SIDES],
        discarded=[list(sums) for sums in written["discarded"]],
        tokens=written["tokens"],
    )


def _coordinates(numbers: dict[str, Any], basis: SideBasis, tensors: dict[str, Tensor], prefix: str, device: torch.device) -> Coordinates:
    encode = basis.encode.clone() if numbers["own"] else basis.encode
    own: dict[int, Tensor] = {}
    for h in numbers["own"]:
        part = tensors[f"{prefix}.encode.{h}"].to(device)
        encode[h] = 0  # its other directions are not used
        encode[h, :, : part.shape[1]] = part
        own[h] = tensors[f"{prefix}.decode.{h}"].to(device)
    return Coordinates(
        slabs=tuple(Slabs(*slabs) for slabs in numbers["slabs"]),
        encode=encode,
        centre=tensors[f"{prefix}.centre"].to(device),
        scales=None,  # those of the first block stand in the `Writing`
        calibrated_scales=False,
        own_mean=tensors[f"{prefix}.own_mean"].to(device),
        own=own,
        fallback=tuple(numbers["fallback"]),
        error=tuple(numbers["error"]),
        expected=basis.expected,
        kept=tuple(numbers["kept"]),
    )
