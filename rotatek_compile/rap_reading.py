"""What every step of RAP does with documents: read a batch, know which tokens it is scored on, and run the dense model as a plan would.

A plan is tried out without building a smaller model: its maps are multiplied out to weights of the old shapes (`patched`), so that the
model computes what the pruned one computes, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Encoded, merge_media, pad, positions
from .errors import RotateKError
from .geometry import Geometry, LayerGeometry
from .placement import input_device
from .rap_plan import RapLayer
from .rereading import decoder_layers

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
SHARES = (1 / 2, 1 / 4, 1 / 4)  # of tokens that predict an answer, of the rest of what follows the images, and of what is before
SCORED = 128  # newest tokens of a text that a text-only model is scored on; of a model that reads images, its answers


@dataclass(frozen=True, slots=True)
class Read:
    """A left-padded batch as the model takes it; masks are bool [B, T] on the CPU.

    scored: columns that predict a scored token; real: no padding; targets: int64 [B, T], the token behind each. groups: kinds of columns
    that count alike as a whole (`SHARES`), however many there are: an answer has a hundredth of a page's tokens.
    """

    inputs: dict[str, Any]
    scored: Tensor
    real: Tensor
    targets: Tensor
    groups: tuple[Tensor, ...]

    @property
    def last(self) -> int:
        """How many of the last columns hold all scored ones."""
        return self.scored.shape[1] - int(self.scored.any(0).nonzero()[0]) if bool(self.scored.any()) else 1

    def weights(self) -> Tensor:
        """What every token counts for, fp32 [B, T], 1 in the mean over a document's tokens: groups by `SHARES`, padding 0."""
        found = torch.zeros(self.real.shape)
        for row in range(len(found)):
            sizes = [int(group[row].sum()) for group in self.groups]
            whole = sum(share for share, size in zip(SHARES, sizes, strict=False) if size)
            for group, share, size in zip(self.groups, SHARES, sizes, strict=False):
                if size:
                    found[row, group[row]] = share / whole * int(self.real[row].sum()) / size
        return found


def read(model: Any, items: Sequence[Encoded], geometry: Geometry, pad_id: int, longest: int | None = SCORED) -> Read:
    """Prompts with their reference answers, ready for one forward pass.

    Args:
        longest: how many tokens of a text are scored at most; None: all of them.
    """
    device = input_device(model)
    chunk = pad([item.prompt + item.answer for item in items], pad_id)
    real = chunk.mask.bool()
    scored, after = torch.zeros_like(real), torch.zeros_like(real)
    for row, item in enumerate(items):
        count = len(item.answer)
        if geometry.text_only:
            count = len(item.prompt) + len(item.answer) - 1
            count = min(count, longest) if longest is not None else count
        scored[row, -1 - count : -1] = True
        after[row, chunk.ids.shape[1] - len(item.prompt) - len(item.answer) + item.visual_end :] = True
    inputs = {
        "input_ids": chunk.ids.to(device),
        "attention_mask": chunk.mask.to(device),
        "position_ids": positions(items, [0] * len(items), chunk.mask).to(device),
        "use_cache": False,
        **merge_media(items, device, model.dtype, chunk),
    }
    scored = scored & real
    groups = (real,) if geometry.text_only else (scored, after & real & ~scored, real & ~after & ~scored)
    return Read(inputs, scored, real, chunk.ids.roll(-1, 1), groups)


def attentions(model: Any, geometry: Geometry) -> list[Any]:
    """The text model's attention modules, in order.

    Raises:
        RotateKError: they are not four plain projections each, or they normalise Queries and Keys.
    """
    layers = decoder_layers(model, len(geometry.layers))
    found: list[Any] = [layer.self_attn for layer in layers] if layers is not None else []
    for module in found:
        if not all(isinstance(getattr(module, name, None), nn.Linear) for name in PROJECTIONS):
            name = type(module).__name__
            raise RotateKError(f"RAP needs separate q, k, v and o projections, and {name} has others; use --method rotatek")
        if getattr(module, "q_norm", None) is not None:
            raise RotateKError(
                f"RAP cannot prune {type(module).__name__}: its q/k-norm divides by the length of the whole head, dropped pairs included; "
                "use --method rotatek"
            )
        if any(getattr(module, name).weight.is_meta for name in PROJECTIONS):
            raise RotateKError("RAP needs the text layers' weights where they are computed, and some wait elsewhere; use --device cpu")
    if not found:
        raise RotateKError(f"RAP does not know how {type(model).__name__} builds its layers; use --method rotatek")
    return found


def heads_of(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection [H·D, hidden] by head: [H, D, hidden]."""
    return weight.unflatten(0, (heads, -1))


def output_heads(module: Any, shape: LayerGeometry) -> Tensor:
    """W_o by query head, fp32 [Hq, hidden, D]."""
    weight: Tensor = module.o_proj.weight.detach().float()
    return weight.unflatten(1, (shape.query_heads, -1)).transpose(0, 1)


def widened(layer: RapLayer, shape: LayerGeometry) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The maps as [H, D, D]: kept pairs at their old places, zeros at the others; Values in the first r channels.

    The old RoPE then turns each kept pair by its own frequency, and the dot product over D channels is that over 2m.
    """
    dim, m, r = shape.head_dim, layer.kept_pairs, layer.value_width
    places = torch.cat([layer.pairs, layer.pairs + dim // 2], 1)  # [Hkv, 2m]
    keys, queries = (torch.zeros(h, dim, dim) for h in (shape.kv_heads, shape.query_heads))
    values, outputs = (torch.zeros(h, dim, dim) for h in (shape.kv_heads, shape.query_heads))
    keys.scatter_(1, places[:, :, None].expand(-1, -1, dim), layer.key.float().cpu())
    group = places.repeat_interleave(shape.group, 0)
    queries.scatter_(1, group[:, :, None].expand(-1, -1, dim), layer.query.float().cpu())
    values[:, :r], outputs[:, :, :r] = layer.value.cpu(), layer.output.cpu()
    assert keys.shape[1] >= 2 * m
    return queries, keys, values, outputs


@contextmanager
def patched(model: Any, layers: Mapping[int, RapLayer], geometry: Geometry) -> Iterator[None]:
    """The dense model computing what these layers of a plan would; afterwards as it was."""
    modules = attentions(model, geometry)
    before: list[tuple[Any, nn.Parameter, nn.Parameter | None]] = []
    try:
        for index, layer in layers.items():
            module, shape = modules[index], geometry.layers[index]
            queries, keys, values, outputs = widened(layer, shape)
            for name, maps in (("q_proj", queries), ("k_proj", keys), ("v_proj", values)):
                own = getattr(module, name)
                before.append((own, own.weight, own.bias))
                _set(own, "weight", _mapped(maps, own.weight))
                if own.bias is not None:
                    _set(own, "bias", _mapped(maps, own.bias[:, None])[:, 0])
            own = module.o_proj
            before.append((own, own.weight, own.bias))
            weight = torch.einsum("hod,hde->ohe", output_heads(module, shape), outputs.to(own.weight.device)).flatten(1)
            if layer.bias is not None:
                bias = layer.bias.to(own.weight.device) + (0 if own.bias is None else own.bias.detach().float())
                _set(own, "bias", bias.to(own.weight.dtype))
            _set(own, "weight", weight.to(own.weight.dtype))
        yield
    finally:
        for own, weight_, bias_ in reversed(before):
            own.weight, own.bias = weight_, bias_


def _mapped(maps: Tensor, weight: Tensor) -> Tensor:
    """maps [H, D, D] times a projection's rows [H·D, X], in fp32, in the projection's dtype."""
    rows = heads_of(weight.detach().float(), len(maps))
    return (maps.to(weight.device) @ rows).flatten(0, 1).to(weight.dtype)


def _set(module: Any, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=False))
