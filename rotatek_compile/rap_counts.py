"""What pruning saves, counted on a loaded model and reckoned from widths; compile_rap.py refuses to write where the two differ.

Parameters are those of the text layers' four projections, biases included. FLOPs are of one prefill of `TOKENS` tokens, two for each
multiply-add: projections, logits and weighted Values, nothing masked left out, as torch counts them. Bytes are of Keys and Values of one
token at 2 bytes a number.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .errors import RotateKError
from .geometry import Geometry
from .placement import input_device
from .rap_plan import Widths
from .runtime.accounting import DENSE_ITEMSIZE
from .runtime.rap_attention import attention_modules
from .text_attention import set_text_attention

TOKENS = 64


@dataclass(frozen=True, slots=True)
class Counts:
    """Attention parameters and FLOPs of all text layers, bytes of Keys and Values per token, and the parameters of the whole model."""

    attention_parameters: int
    attention_flops: int
    kv_bytes_per_token: int
    parameters: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@torch.inference_mode()
def counted(model: Any, geometry: Geometry) -> Counts:
    """Run a model, dense or pruned, on `TOKENS` tokens of text and count what its attention modules did and what its cache holds."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers.cache_utils import DynamicCache

    text = model.config.get_text_config(decoder=True)
    modules = attention_modules(model)
    usual = next(i for i in range(text.vocab_size) if i not in geometry.visual_token_ids)
    ids = torch.full((1, TOKENS), usual, device=input_device(model))
    before, cache = text._attn_implementation, DynamicCache(config=text)
    set_text_attention(model, "eager")  # plain matrix products, which the counter knows on every device
    try:
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        set_text_attention(model, before)
    flops = counter.get_flop_counts()
    root = type(model).__name__
    held: Any = cache.layers
    widths = [layer.keys.shape[1] * (layer.keys.shape[3] + layer.values.shape[3]) for layer in held]
    return Counts(
        sum(p.numel() for _, module in modules.values() for p in module.parameters()),
        sum(sum(flops[f"{root}.{name}"].values()) for name, _ in modules.values()),
        DENSE_ITEMSIZE * sum(widths),
        sum(p.numel() for p in model.parameters()),
    )


def reckoned(geometry: Geometry, widths: Sequence[Widths], hidden: int, biases: Collection[tuple[int, str]]) -> Counts:
    """The same from widths alone; `parameters` are those of attention.

    Args:
        widths: of every layer; `full_widths` for the dense model.
        hidden: channels of the residual stream.
        biases: which projections have one, as (layer, "q_proj.bias"); that of the mean correction is in `widths`.
    """
    parameters = flops = numbers = 0
    for i, (layer, wide) in enumerate(zip(geometry.layers, widths, strict=True)):
        key, value = 2 * wide.pairs, wide.value
        weights = hidden * (layer.query_heads + layer.kv_heads) * (key + value)
        rows = {
            "q_proj.bias": layer.query_heads * key,
            "k_proj.bias": layer.kv_heads * key,
            "v_proj.bias": layer.kv_heads * value,
            "o_proj.bias": hidden,
        }
        there = {name for name in rows if (i, name) in biases} | ({"o_proj.bias"} if wide.output_bias else set())
        parameters += weights + sum(rows[name] for name in there)
        flops += 2 * TOKENS * weights + 2 * TOKENS * TOKENS * layer.query_heads * (key + value)
        numbers += layer.kv_heads * (key + value)
    return Counts(parameters, flops, DENSE_ITEMSIZE * numbers, parameters)


def full_widths(geometry: Geometry) -> tuple[Widths, ...]:
    """Of the dense model."""
    return tuple(Widths(layer.head_dim // 2, layer.head_dim) for layer in geometry.layers)


def check_counts(seen: Counts, wanted: Counts, what: str) -> None:
    """That what was counted is what was reckoned.

    Raises:
        RotateKError: it is not, so the figures of the report would be wrong.
    """
    for name in ("attention_parameters", "attention_flops", "kv_bytes_per_token"):
        if (found := getattr(seen, name)) != (expected := getattr(wanted, name)):
            words = f"{found} {name.replace('_', ' ')} were counted on the {what}, {expected} follow from its widths"
            raise RotateKError(f"{words}; this model is not supported by --method rap")
