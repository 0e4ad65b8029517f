"""What Keys or Values are after they were coded and decoded again, segment by segment, with the codec of the cache (kernels/codes.py)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bases import Basis, balance
from .kernels.codes import clipped_scales, rounded
from .kernels.slabs import Slabs

Run = tuple[int, int, int]  # row of the batch, first column, column after the last


@dataclass(frozen=True, slots=True)
class CodingBasis:
    """A layer's calibrated basis of Keys or Values in balanced coordinates, fp32 [Hkv, D, D] each."""

    encode: Tensor
    decode: Tensor

    @classmethod
    def of(cls, basis: Basis, device: torch.device) -> CodingBasis:
        scale = balance(basis.spectrum).unsqueeze(-2)
        return cls((basis.encode * scale).to(device, torch.float32), (basis.decode / scale).to(device, torch.float32))


def recoded(
    x: Tensor, runs: Sequence[Run], basis: CodingBasis | None, wanted: Collection[tuple[int, Slabs]], errors: float = 1.0
) -> dict[tuple[int, Slabs], Tensor]:
    """Heads of x [B, Hkv, T, D] with every run rebuilt from its own mean and the codes of its directions: [B, T, D] by (head, slabs).

    Scales of a direction depend on its precision alone, so that all slabs wanted of a head share them.

    Args:
        runs: the segments.
        basis: may be None where no slabs have a direction.
        errors: the difference to x is so many times as large.
    """
    heads = sorted({head for head, _ in wanted})
    most = max((slabs.rank for _, slabs in wanted), default=0)
    bits = [size for size, used in ((8, any(s.byte for _, s in wanted)), (4, any(s.nibble for _, s in wanted))) if used]
    out = {(head, slabs): x[:, head].clone() for head, slabs in wanted}
    if basis is not None and most:
        encode, decode = (side[heads, :, :most].to(x.device) for side in (basis.encode, basis.decode))
    for row, start, end in runs:
        some = x[row, heads, start:end].float()
        mean = some.mean(1, keepdim=True)
        if most:
            z = (some - mean) @ encode
            codes = {16: z.to(x.dtype).float()}
            for size in bits:
                codes[size] = rounded(z, clipped_scales(z, size).float().unsqueeze(-2), size)
        for (head, slabs), rebuilt in out.items():
            place = heads.index(head)
            whole = mean[place].expand(end - start, -1)
            if slabs.rank:
                first, second = slabs.native, slabs.native + slabs.byte
                parts = ((16, 0, first), (8, first, second), (4, second, slabs.rank))
                kept = torch.cat([codes[size][place, :, a:b] for size, a, b in parts if a < b], -1)
                whole = whole + kept @ decode[place, :, : slabs.rank].mT
            if errors != 1:
                whole = some[place] + errors * (whole - some[place])
            rebuilt[row, start:end] = whole.to(x.dtype)
    return out


def runs_of(segments: Tensor) -> list[Run]:
    """Segments float32 [B, T, S], one-hot and each without a gap, as runs of columns."""
    found = []
    for row, columns in enumerate(segments.bool().cpu().unbind()):
        for segment in columns.unbind(-1):
            places = segment.nonzero().flatten()
            if len(places):
                found.append((row, int(places[0]), int(places[-1]) + 1))
    return found


def segment_means(x: Tensor, segments: Tensor) -> Tensor:
    """Each column's segment mean, fp32 [B, T, D], of x [B, T, D] and one-hot segments float32 [B, T, S]; 0 outside segments."""
    counts = segments.sum(1).clamp_min(1)[:, :, None]
    return segments @ ((segments.mT @ x.float()) / counts)


def to_means(x: Tensor, segments: Tensor) -> Tensor:
    """x [B, T, D] with the columns of every segment replaced by the segment's mean."""
    return torch.where(segments.any(-1, keepdim=True), segment_means(x, segments).to(x.dtype), x)


def segments_of(columns: Tensor) -> Tensor:
    """Runs of true columns of bool [B, T] as segments: float32 [B, T, S]."""
    starts = columns & ~torch.nn.functional.pad(columns, (1, 0))[:, :-1]
    index = starts.long().cumsum(1) * columns  # 0 outside, then 1, 2, ...
    return torch.nn.functional.one_hot(index)[..., 1:].float()
