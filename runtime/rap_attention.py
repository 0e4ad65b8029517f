"""Attention with fewer RoPE pairs per KV head and narrower Values: what stands in place of a stock module (RAP, arXiv 2602.02599).

Its projections put out the kept channels only, so the stock cache holds Keys of 2m and Values of r channels per head and nothing is ever
rebuilt. RoPE turns every kept pair by its own frequency: the cosines and sines that the model passes, gathered at `pairs`. With all pairs
kept it computes what the stock module computes, bit for bit.

A coded cache, and whoever measures for one, gets whole heads instead: Queries, Keys and Values with zeros behind the kept channels, up to
the head_dim of the base model (`whole_heads`). Logits stay the same, and the first r channels of the output are what they were. So codec
and kernels know one width per head, and channels that are always zero have no energy that codes would be spent on.

On a GPU two Triton kernels may take part (`rap_kernels.py`): one turns Queries and Keys in one launch, the other is the attention of a
single new token under `sdpa`. Everything else is torch, and so are they where gradients are needed or a compiler traces. Where several
tokens arrive, cuDNN takes Keys and Values as they are, or the narrower side is padded (`rap_prefill.py`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RotateKError
from ..kernels.pairs_torch import of_pairs, rotate
from ..rap_plan import Widths
from . import rap_kernels, rap_prefill
from .cache_layer import RotateKLayer
from .rap_prefill import equal_widths, takes_different_widths

NORM = "q/k-norm divides by the length of the whole head, of which dropped pairs are a part"
TEXT_TYPES = ("llama", "mistral", "ministral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text")
"""`model_type` of the text configs whose attention this module computes: q, k, v, rotate-half RoPE on all channels, o, and nothing else."""
REFUSED = {
    **dict.fromkeys(("qwen3", "qwen3_vl_text", "qwen3_moe", "qwen3_vl_moe_text", "gemma3_text", "gemma3", "olmo2", "smollm3"), NORM),
    **dict.fromkeys(("cohere", "cohere2", "glm", "glm4"), "its RoPE pairs neighbouring channels (interleaved)"),
    **dict.fromkeys(("phi", "phi3", "stablelm", "gpt_neox", "nemotron"), "its RoPE turns a part of the channels only (partial rotary)"),
    "gpt_oss": "its softmax has attention sinks",
    "gemma2": "it caps its attention logits (soft-capping)",
}


def refuse_text(text: Any) -> None:
    """Refuse a text config whose attention this module does not compute.

    Raises:
        RotateKError: naming the model type and the reason.
    """
    kind = str(text.model_type)
    if kind in REFUSED:
        raise RotateKError(f"--method rap does not support text model {kind!r}: {REFUSED[kind]}")
    if kind not in TEXT_TYPES:
        raise RotateKError(f"--method rap does not support text model {kind!r}; it is validated with {', '.join(TEXT_TYPES)}")
    rope = getattr(text, "rope_parameters", None) or {}
    partial = rope.get("partial_rotary_factor", getattr(text, "partial_rotary_factor", None))
    if partial not in (None, 1, 1.0):
        raise RotateKError(f"--method rap does not support partial_rotary_factor {partial}: RoPE turns a part of the channels only")
    if getattr(text, "attn_logit_softcapping", None):
        raise RotateKError(f"--method rap does not support text model {kind!r}: it caps its attention logits (soft-capping)")


class PairPrunedAttention(nn.Module):
    """Drop-in for a stock attention module; made by `replace_attention`, never by itself.

    B sequences, S new tokens, Hq query heads, Hkv KV heads, m kept pairs per KV head, r Value width.

    pairs: int64 [Hkv, m], which of the D/2 pairs each KV head keeps, ascending; q_proj: hidden -> Hq·2m; k_proj: hidden -> Hkv·2m;
    v_proj: hidden -> Hkv·r; o_proj: Hq·r -> hidden. Channels j and j + m of a head are a pair. `scaling` stays that of the whole head.
    whole: hand over whole heads, whatever the cache is. used_width: channels of a whole head that are not zero in Keys or Values.
    """

    pairs: Tensor
    eager: Any
    config: Any
    layer_idx: Any
    scaling: Any

    def __init__(self, stock: nn.Module, widths: Widths) -> None:
        nn.Module.__init__(self)  # not the stock module's: it would make projections of the full width
        self.config, self.layer_idx = stock.config, stock.layer_idx
        self.head_dim, self.scaling = stock.head_dim, stock.scaling
        self.num_key_value_groups, self.attention_dropout = stock.num_key_value_groups, stock.attention_dropout
        self.is_causal, self.sliding_window = stock.is_causal, window_of(stock)
        self.widths, self.key_width, self.whole = widths, 2 * widths.pairs, False
        self.used_width = max(self.key_width, widths.value)
        dim: Any = self.head_dim
        # a stock bias that is there stays; the mean correction adds one where there is none
        self.q_proj = _narrow(stock.q_proj, rows=(dim, self.key_width))
        self.k_proj = _narrow(stock.k_proj, rows=(dim, self.key_width))
        self.v_proj = _narrow(stock.v_proj, rows=(dim, widths.value))
        self.o_proj = _narrow(stock.o_proj, columns=(dim, widths.value), bias=widths.output_bias)
        heads = self.k_proj.out_features // self.key_width
        empty = torch.empty(heads, widths.pairs, dtype=torch.int64, device=self.q_proj.weight.device)
        self.register_buffer("pairs", empty, persistent=False)  # its values come from the artifact, not from the checkpoint
        self.train(stock.training)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock module: hidden_states [B, S, hidden] to ([B, S, hidden], attention weights or None).

        Args:
            position_embeddings: cosines and sines, each [B, S, D], the second half of the channels repeating the first.
        """
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if position_embeddings is None:
            raise RotateKError("a RAP checkpoint needs the positions' cosines and sines, which this model did not pass")
        shape = hidden_states.shape[:-1]
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        # what a hook or a wrapper (adapters) may have kept must stay as it is
        ours = rap_kernels.plain(self.q_proj) and rap_kernels.plain(self.k_proj)
        turned = ours and rap_kernels.turn(query, key, *position_embeddings, self.pairs)
        query, key = (x.view(*shape, -1, self.key_width).transpose(1, 2) for x in (query, key))
        value = self.v_proj(hidden_states).view(*shape, -1, self.widths.value).transpose(1, 2)
        if not turned:
            cos, sin = (of_pairs(angles, self.pairs) for angles in position_embeddings)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        whole = self.whole or is_coded(past_key_values, self.layer_idx)
        if whole:
            query, key, value = (nn.functional.pad(x, (0, self.head_dim - x.shape[-1])) for x in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, type(self).eager)
        if not whole and attend is sdpa_attention_forward:
            narrow = self._narrow_attention(query, key, value, attention_mask, kwargs)
            if narrow is not None:
                return self.o_proj(narrow.flatten(2)), None
        if not whole and not takes_different_widths(name, query.shape[2]):
            query, key, value = equal_widths(query, key, value)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        output = output[..., : self.widths.value]  # [B, S, Hq, r]; wider where Values were padded
        return self.o_proj(output.reshape(*shape, -1)), weights

    def _narrow_attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, more: Mapping[str, Any]) -> Tensor | None:
        """What `sdpa` would compute, [B, S, Hq, r], at both widths as they are; None where it is to do it.

        Several tokens without a mask are a first prefill, of which transformers' `sdpa` takes only the first Keys of a static cache.
        """
        if self.training and self.attention_dropout:
            return None
        if any(more.get(name) is not None for name in ("position_bias", "cache", "softcap")) or more.get("output_attentions"):
            return None
        if query.shape[2] > 1:
            causal = more.get("is_causal")
            causal = mask is None and bool(self.is_causal if causal is None else causal)
            return rap_prefill.attend(query, key, value, mask, self.scaling, causal)
        if mask is not None or (self.sliding_window is not None and key.shape[2] > self.sliding_window):
            return None
        return rap_kernels.attend(query, key, value, self.scaling)


def is_coded(cache: Any, layer: int) -> bool:
    """Whether a cache codes this layer, and so wants whole heads; sliding layers of a coded cache are stock ones."""
    layers = getattr(cache, "layers", ())
    return layer < len(layers) and isinstance(layers[layer], RotateKLayer)


@contextmanager
def whole_heads(model: nn.Module, layers: Collection[int]) -> Iterator[None]:
    """Let these layers of a pruned model hand over heads of head_dim channels, zeros behind the kept ones, to stock caches too."""
    modules = [module for i, (_, module) in attention_modules(model).items() if i in layers and isinstance(module, PairPrunedAttention)]
    for module in modules:
        module.whole = True
    try:
        yield
    finally:
        for module in modules:
            module.whole = False


def window_of(stock: nn.Module) -> int | None:
    """How many tokens a stock module's flash kernel is told to look back; None for all of them."""
    if hasattr(stock, "sliding_window"):  # the Qwen families
        return stock.sliding_window  # type: ignore[return-value]
    config: Any = stock.config
    return getattr(config, "sliding_window", None)  # Mistral reads its config at each step; Llama's has none


def attention_modules(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Name and module of every text layer's attention, by layer, stock or pruned.

    Raises:
        RotateKError: not one for every layer, or one that holds more than four projections.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if type(getattr(module, "config", None)) is type(text) and hasattr(module, "layer_idx") and hasattr(module, "o_proj"):
            layer: Any = module.layer_idx
            if layer in found:
                raise RotateKError(f"{type(model).__name__} has two attention modules for layer {layer}; --method rap does not support it")
            extra = sorted(n for n, _ in module.named_children() if n not in ("q_proj", "k_proj", "v_proj", "o_proj", "rotary_emb"))
            if extra:
                reason = f" ({NORM})" if "k_norm" in extra else ""
                raise RotateKError(f"--method rap does not support {type(module).__name__}: it has {', '.join(extra)}{reason}")
            found[layer] = (name, module)
    if sorted(found) != list(range(text.num_hidden_layers)):
        words = f"{len(found)} attention modules with q, k, v and o projections for {text.num_hidden_layers} layers"
        raise RotateKError(f"{type(model).__name__} has {words}; --method rap does not support it")
    return {i: found[i] for i in sorted(found)}


def replace_attention(model: nn.Module, widths: Mapping[int, Widths]) -> dict[int, PairPrunedAttention]:
    """Put pair-pruned modules in the place of all text attention modules; their weights and `pairs` are yet to be filled.

    New parameters are empty, of the dtype and on the device of those they replace (also on `meta`).

    Raises:
        RotateKError: as `attention_modules`.
    """
    made: dict[int, PairPrunedAttention] = {}
    for layer, (name, stock) in attention_modules(model).items():
        made[layer] = pruned_class(type(stock))(stock, widths[layer])  # type: ignore[arg-type]
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made[layer])
    return made


@functools.cache
def pruned_class(stock: type[nn.Module]) -> type[PairPrunedAttention]:
    """The pair-pruned module that is also one of the stock class, by which transformers finds attention weights to return."""
    eager = staticmethod(sys.modules[stock.__module__].eager_attention_forward)
    # readers of attention modules look for the stock eager function in the module that the class is from
    return type(f"PairPruned{stock.__name__}", (PairPrunedAttention, stock), {"eager": eager, "__module__": stock.__module__})


def _narrow(stock: Any, rows: tuple[int, int] = (1, 1), columns: tuple[int, int] = (1, 1), bias: bool = False) -> nn.Linear:
    """An empty projection like `stock` with (old, new) channels per head on its output or input side."""
    weight = stock.weight
    return nn.utils.skip_init(
        nn.Linear,
        stock.in_features // columns[0] * columns[1],
        stock.out_features // rows[0] * rows[1],
        bias=bias or stock.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
