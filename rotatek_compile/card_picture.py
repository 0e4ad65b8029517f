"""The picture of a model card: which heads keep how much at which precision, beside what they matter; layers down, KV heads across."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .artifact import Artifact
from .plan import SIDES
from .plan_words import channel_bits, level_words

FLOOR = 1e-6  # nats; a logarithmic colour scale has no zero, and less than this is rounding


def draw_heads(artifact: Artifact, file: Path) -> bool:
    """Write the picture as PNG; equal artifacts give equal files. False, and no file, where matplotlib is missing or nothing is known.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = _panels(artifact)
    if not panels:
        return False
    layers, heads = panels[0][1].shape
    figure = Figure(figsize=(1.6 + len(panels) * max(2.4, 0.3 * heads + 1.4), max(2.2, 0.17 * layers + 1.1)), layout="constrained")
    indices = artifact.geometry.compressible
    for axes, (title, table, logarithmic) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        image = axes.imshow(table.clamp_min(FLOOR) if logarithmic else table, **_scale(table, logarithmic))
        step = max(1, len(indices) // 16)
        axes.set_yticks(range(0, layers, step), [indices[row] for row in range(0, layers, step)])
        axes.set_xticks(range(0, heads, max(1, heads // 8)))
        axes.set_title(title, fontsize="small")
        axes.set(xlabel="KV head", ylabel="layer")
        figure.colorbar(image, ax=axes, shrink=0.9)
    figure.savefig(file, dpi=120, metadata={"Software": None})
    return True


def _panels(artifact: Artifact) -> list[tuple[str, Any, bool]]:
    """Title, table [layers, heads] (NaN where a layer has fewer heads) and whether colours are logarithmic."""
    panels = []
    plan, layers = artifact.plan(), artifact.geometry.layers
    for side in SIDES if plan else ():
        slabs = {i: [getattr(head, side) for head in heads] for i, heads in plan.items()}
        if side == "value" and all(one.native == layers[i].head_dim for i, heads in slabs.items() for one in heads):
            continue  # raw everywhere
        name = f"{side.capitalize()}s"
        panels.append((f"{name}: directions kept", _table([[one.rank for one in heads] for heads in slabs.values()]), False))
        if any(one.scaled for heads in slabs.values() for one in heads):
            bits = [[channel_bits(one, layers[i].head_dim) for one in heads] for i, heads in slabs.items()]
            panels.append((f"{name}: bits per channel", _table(bits), False))
    if knockouts := artifact.knockout():
        panels.append(("KL when the head's images are\nreplaced by their mean (nats)", _table(knockouts.values()), True))
    elif (measured := artifact.sensitivity("key")) and artifact.method.levels:
        title = f"KL when Keys are cut to {level_words(artifact.method.levels[0])} (nats)"
        panels.append((title, _table([table[:, 0] for table in measured.values()]), True))
    return panels


def _table(rows: Iterable[Sequence[float] | torch.Tensor]) -> torch.Tensor:
    filled = [torch.as_tensor(row, dtype=torch.float32) for row in rows]
    table = torch.full((len(filled), max(len(row) for row in filled)), torch.nan)
    for place, row in zip(table, filled, strict=True):
        place[: len(row)] = row
    return table


def _scale(table: torch.Tensor, logarithmic: bool) -> dict[str, Any]:
    from matplotlib.colors import LogNorm, Normalize

    top = float(table.nan_to_num().max())
    norm = LogNorm(FLOOR, max(top, 10 * FLOOR)) if logarithmic else Normalize(0, max(top, 1.0))
    return {"norm": norm, "cmap": "viridis", "aspect": "auto", "interpolation": "nearest"}
