"""Reading the text after the images again under many cuts at once, as `sensitivity.py` needs it.

N cuts of B documents are N·B rows of one forward call. The prefilled Keys and Values are stored once and shared by all rows: a registered
attention function multiplies them with the queries of every cut together, and only the heads that a cut touches are computed apart.
Layers below the first cut one compute nothing: what enters it is what entered it when the text was read without a cut.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, CacheLayerMixin

from .errors import RotateKError
from .text_attention import Attending, attended_by

NAME = "rotatek_reread"
UNSUPPORTED = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True, slots=True)
class Replaced:
    """One KV head's prefilled Keys, and Values where they change too, each [B, P, D], under cut number `cut`."""

    cut: int
    head: int
    keys: Tensor
    values: Tensor | None = None


class SharedLayer(CacheLayerMixin):
    """A full-attention layer whose prefix [B, Hkv, P, D] belongs to all rows; `update` hands back the new tokens alone."""

    is_sliding = False
    is_compileable = False

    def __init__(self, keys: Tensor, values: Tensor, replaced: Sequence[Replaced], cuts: int, masks: dict[torch.device, Tensor]) -> None:
        super().__init__()
        self.masks = masks  # of this forward call, the same for all layers
        self.prefix_keys, self.prefix_values, self.replaced, self.cuts = keys, values, replaced, cuts
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return self.prefix_keys.shape[2] + new, 0

    def get_seq_length(self) -> int:
        return int(self.prefix_keys.shape[2])

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def seen(self, mask: Tensor | None, group: int, new: int, device: torch.device) -> Tensor:
        """Which columns every query of a group sees (`_seen`), found once for all layers of a forward call."""
        found = self.masks.get(device)
        if found is None:
            batch, _, past, _ = self.prefix_keys.shape
            found = self.masks[device] = _seen(mask, self.cuts, batch, group, past, new, device)
        return found

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attention of query [N·B, Hq, T, D] over prefix and the rows' own new tokens [N·B, Hkv, T, D]; -> [N·B, T, Hq, D]."""
        batch, heads, past, dim = self.prefix_keys.shape
        cuts, new = self.cuts, query.shape[2]
        group = query.shape[1] // heads
        # [B, Hkv, N·G·T, D]: the queries of all cuts and of a group beside each other, so that the prefix is read once
        beside = query.reshape(cuts, batch, heads, -1, dim).permute(1, 2, 0, 3, 4)
        own = [x.unflatten(0, (cuts, batch)).permute(1, 2, 0, 3, 4) for x in (keys, values)]  # [B, Hkv, N, T, D]
        seen = self.seen(mask, group, new, query.device)
        all_keys, all_values = (
            torch.cat([old, x.flatten(2, 3)], 2) for old, x in zip((self.prefix_keys, self.prefix_values), own, strict=True)
        )
        out = scaled_dot_product_attention(beside.flatten(2, 3), all_keys, all_values, attn_mask=seen, scale=scaling)
        out = out.unflatten(2, (cuts, -1))
        for part in self.replaced:
            rows = beside[:, part.head, part.cut]  # [B, G·T, D]
            prefix = part.keys, part.values if part.values is not None else self.prefix_values[:, part.head]
            own_keys, own_values = (torch.cat([old, x[:, part.head, part.cut]], 1) for old, x in zip(prefix, own, strict=True))
            alone = _own_part(seen, cuts, past, new, part.cut)
            rows, own_keys, own_values = (x.unsqueeze(1) for x in (rows, own_keys, own_values))
            out[:, part.head, part.cut] = scaled_dot_product_attention(rows, own_keys, own_values, attn_mask=alone, scale=scaling).squeeze(
                1
            )
        return out.permute(2, 0, 1, 3, 4).reshape(query.shape).transpose(1, 2).contiguous()


def _seen(mask: Tensor | None, cuts: int, batch: int, group: int, past: int, new: int, device: torch.device) -> Tensor:
    """Which columns (prefix, then every cut's T new tokens) every query sees: bool [B, 1, N·G·T, P + N·T]; a cut sees its own tokens only.

    `mask` is what transformers made for the N·B rows, bool [N·B, 1, T, P + T]; None stands for plain causality.
    """
    if mask is None:
        seen = torch.ones(new, past + new, dtype=torch.bool, device=device).tril(past).expand(batch, new, -1)
    else:
        seen = mask[:batch, 0, -new:, : past + new].expand(batch, -1, -1)  # cuts of a document are alike
    seen = seen | ~seen.any(-1, keepdim=True)  # padding that sees nothing would be NaN, and spread
    own = torch.zeros(batch, cuts, new, cuts, new, dtype=torch.bool, device=device)
    for number in range(cuts):
        own[:, number, :, number] = seen[:, :, past:]
    rows = torch.cat([seen[:, None, :, :past].expand(-1, cuts, -1, -1), own.flatten(3)], -1)  # [B, N, T, P + N·T]
    return rows.unsqueeze(2).expand(-1, -1, group, -1, -1).reshape(batch, 1, cuts * group * new, -1)


def _own_part(seen: Tensor, cuts: int, past: int, new: int, number: int) -> Tensor:
    """One cut's rows of `_seen`, with its own columns only: [B, 1, G·T, P + T]."""
    rows = seen.unflatten(2, (cuts, -1))[:, :, number]
    start = past + number * new
    return torch.cat([rows[..., :past], rows[..., start : start + new]], -1)


def _reading(cache: Cache, call: Attending) -> tuple[Tensor, Tensor | None]:
    layer = cache.layers[int(call.module.layer_idx)] if hasattr(call.module, "layer_idx") else None
    if not isinstance(layer, SharedLayer):
        return call.by_sdpa()
    for name in UNSUPPORTED:
        if call.options.get(name) is not None:
            raise RotateKError(
                f"this model's attention uses {name}, which measuring sensitivities does not support; use --allocation uniform"
            )
    return layer.attend(call.query, call.key, call.value, call.mask, call.scaling), None


@contextmanager
def rereading(model: Any, stored: Any, cuts: int, replaced: Mapping[int, Sequence[Replaced]]) -> Iterator[Cache]:
    """A cache for one forward call of `cuts` times as many rows (cut-major) as `stored` holds; `stored` stays as it is.

    Args:
        stored: the prefilled stock cache (DynamicCache) of B rows.
        replaced: by layer, what the cuts change.
    """
    layers: list[Any] = []
    masks: dict[torch.device, Tensor] = {}
    for index, layer in enumerate(stored.layers):
        if layer.is_sliding:
            twin = copy.copy(layer)
            twin.keys, twin.values = (x.repeat(cuts, 1, 1, 1) for x in (layer.keys, layer.values))
            layers.append(twin)
        else:
            layers.append(SharedLayer(layer.keys, layer.values, replaced.get(index, ()), cuts, masks))
    with reading_from(model, Cache(layers=layers)) as cache:
        yield cache


@contextmanager
def reading_from(model: Any, cache: Cache) -> Iterator[Cache]:
    """Let the `SharedLayer`s of a cache attend for the text part."""
    with attended_by(model, NAME, partial(_reading, cache)):
        yield cache


def decoder_layers(model: nn.Module, count: int) -> list[nn.Module] | None:
    """The text model's decoder layers in order, known by their attention's `layer_idx`; None where they are built differently."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            numbers = [getattr(getattr(layer, "self_attn", None), "layer_idx", None) for layer in module]
            if numbers == list(range(count)):
                return list(module)
    return None


@contextmanager
def noting_entries(layers: Sequence[nn.Module] | None, entries: dict[int, Tensor]) -> Iterator[None]:
    """Keep the hidden states [B, T, hidden] that enter every decoder layer during a forward call."""
    with ExitStack() as stack:
        for index, layer in enumerate(layers or ()):

            def note(module: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                entries[index] = args[0] if args else kwargs["hidden_states"]

            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield


@contextmanager
def starting_at(layers: Sequence[nn.Module] | None, entries: Mapping[int, Tensor], start: int, cuts: int) -> Iterator[None]:
    """Skip the layers below `start`, and let the noted states enter there, repeated for every cut."""
    if layers is None or start == 0 or start not in entries:
        yield
        return
    entry = entries[start].repeat(cuts, 1, 1)

    def pass_by(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def enter(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return ((entry, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": entry})

    saved = [layer.__dict__.get("forward") for layer in layers[:start]]
    hook = layers[start].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        for layer in layers[:start]:
            layer.forward = pass_by
        yield
    finally:
        hook.remove()
        for layer, own in zip(layers[:start], saved, strict=True):
            if own is None:
                del layer.__dict__["forward"]
            else:
                layer.forward = own
