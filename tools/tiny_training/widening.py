"""Begin with another model's weights: every attention head copied, so that a wider model computes the same function, or without a layer.

The order of Net2Net (arXiv 1511.05641, section 3.1, with copies in place of random picks): queries, Keys and Values of a copy are those of
its original, and each of n copies adds 1/n of the original's output. What the copies then come to do apart is routing.py's matter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def widen_heads(narrow: dict[str, Tensor], model: Any) -> int:
    """Load the weights `narrow` of a model with fewer heads but otherwise of one geometry into `model`; returns how often each head stands.

    Copy c of KV head i becomes KV head `c * narrow heads + i`, with the query heads that read it behind it in the same order.

    Raises:
        ValueError: the widths are not a multiple of each other, or query and KV heads not the same one.
    """
    wide = model.state_dict()
    grown = {name for name, tensor in narrow.items() if tensor.shape != wide[name].shape}
    copies = {_copies(name, narrow[name], wide[name]) for name in grown} or {1}
    if len(copies) > 1:
        raise ValueError(f"query and KV heads must grow by one factor, not by {sorted(copies)}: change --geometry of one of the two models")
    (number,) = copies
    for name in grown:
        tensor = narrow[name]
        narrow = narrow | {name: tensor.repeat(number, 1) if _rows(name) else tensor.repeat(1, number) / number}
    model.load_state_dict(narrow)
    return number


def _rows(name: str) -> bool:
    return any(f"self_attn.{projection}." in name for projection in PROJECTIONS)


def _copies(name: str, narrow: Tensor, wide: Tensor) -> int:
    """How many times `narrow` fits into `wide` along the dimension of heads."""
    axis = 0 if _rows(name) else 1
    known = _rows(name) or "self_attn.o_proj." in name
    times, rest = divmod(wide.shape[axis], narrow.shape[axis])
    if not known or rest or narrow.shape[1 - axis] != wide.shape[1 - axis]:
        raise ValueError(f"{name} is {tuple(narrow.shape)} in the narrow model and {tuple(wide.shape)} here; only head counts may differ")
    return times


def without_layer(weights: dict[str, Tensor], gone: int) -> dict[str, Tensor]:
    """The weights of a text model without layer `gone`; later layers move down by one."""
    kept = {}
    for name, tensor in weights.items():
        before, found, after = name.partition("language_model.layers.")
        if found:
            number, rest = after.split(".", 1)
            if int(number) == gone:
                continue
            name = f"{before}{found}{int(number) - (int(number) > gone)}.{rest}"
        kept[name] = tensor
    return kept


def load_weights(path: Path, device: torch.device) -> dict[str, Tensor]:
    """The model's weights from a state.pt of loop.py, or from a checkpoint's folder."""
    if path.is_dir():
        return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).to(device).state_dict()
    return torch.load(path, map_location=device, weights_only=True)["model"]
