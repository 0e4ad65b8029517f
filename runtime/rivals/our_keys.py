"""Our own Keys as a coder, no rival: so that they can stand beside Values coded in any way (coded_values.py), the same on both sides.

Formula and bytes are those of our store (kernels/codes.py) for a segment with its own mean and scales: z = (k - mean) @ encode, of which a
head keeps its first directions native, at 8 and at 4 bits; all D native are raw Keys. Values stay native.
Limits: what the store adds is not here: own bases, fallback, escape tokens, padding of an odd number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.codes import pack, pool_bytes, unpack
from ...kernels.measure_torch import Job, measure_torch
from ...kernels.slabs import Slabs
from ..coder import NATIVE_BYTES, CodedSegment
from .base import RivalCoder

POOL_DTYPE = torch.float32  # of native numbers in a pool of codes, which holds none here


class Directions(NamedTuple):
    """Of one layer's Keys or Values: mean [H, D], encode, decode [H, D, D] and balance [H, D] as `runtime.prepared.SideBasis` has them."""

    mean: Tensor
    encode: Tensor
    decode: Tensor
    balance: Tensor

    def of(self, heads: tuple[int, ...], device: torch.device) -> Directions:
        """Of some heads, where they are needed."""
        return Directions(*(part[list(heads)].to(device) for part in self))


@dataclass(frozen=True, kw_only=True)
class OurKeysCoder(RivalCoder):
    """plan: slabs of the Keys of every head, by layer; bases: their calibrated directions."""

    plan: Mapping[int, tuple[Slabs, ...]] = field(repr=False)
    bases: Mapping[int, Directions] = field(repr=False)

    def code(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> CodedSegment:
        plan = self.plan[layer]
        basis = self.bases[layer].of(tuple(range(len(plan))), keys.device)
        seen = measure_torch(Job(keys, basis.mean, basis.encode, basis.balance, plan), own=True)
        assert seen.own_mean is not None
        parts, native = {"values": values}, {"values"}
        for h, slabs in enumerate(plan):
            if slabs.native:
                raw = slabs.native == keys.shape[-1]
                parts[f"native{h}"] = (keys[h] if raw else seen.z[h, :, : slabs.native]).to(keys.dtype)
                native.add(f"native{h}")
                if raw:
                    continue
            parts[f"mean{h}"] = seen.own_mean[h]
            if slabs.scaled:
                codes, coded = seen.z[h, :, slabs.native : slabs.rank], Slabs(0, slabs.byte, slabs.nibble)
                parts[f"scale{h}"] = seen.scales[h, slabs.native : slabs.rank]
                parts[f"codes{h}"] = pack(codes, parts[f"scale{h}"], coded, POOL_DTYPE)
        return CodedSegment(keys.shape[1], parts, frozenset(native), partial(_rebuild, plan=plan, basis=basis))

    def bytes_of(self, tokens: int, layer: int) -> int:
        dim = self.shape(layer).head_dim
        return sum(NATIVE_BYTES * tokens * dim + _key_bytes(slabs, tokens, dim) for slabs in self.plan[layer])


def _key_bytes(slabs: Slabs, tokens: int, dim: int) -> int:
    native = NATIVE_BYTES * tokens * slabs.native
    if slabs.native == dim:
        return native
    return native + pool_bytes(tokens, Slabs(0, slabs.byte, slabs.nibble), NATIVE_BYTES) + 2 * slabs.scaled + 2 * dim


def _rebuild(parts: Mapping[str, Tensor], tokens: int, plan: tuple[Slabs, ...], basis: Directions) -> tuple[Tensor, Tensor]:
    values, made = parts["values"].float(), []
    for h, slabs in enumerate(plan):
        known = parts.get(f"native{h}")
        if known is not None and slabs.native == basis.mean.shape[-1]:
            made.append(known.float())
            continue
        z = [known.float()] if known is not None else []
        if slabs.scaled:
            levels = unpack(parts[f"codes{h}"], tokens, Slabs(0, slabs.byte, slabs.nibble), POOL_DTYPE)
            z.append(levels * parts[f"scale{h}"].float())
        centre = basis.mean[h] + parts[f"mean{h}"]
        made.append(centre.expand(tokens, -1) + (torch.cat(z, -1) @ basis.decode[h, :, : slabs.rank].mT if z else 0))
    return torch.stack(made), values
