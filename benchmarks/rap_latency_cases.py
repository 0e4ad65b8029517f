"""What bench_rap_latency.py times: a decoder layer of random weights, pruned attention modules beside its own, caches that are full but for
the newest token, and the ways that attention is computed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rotatek_compile.rap_plan import Widths
from rotatek_compile.runtime import rap_kernels
from rotatek_compile.runtime.rap_attention import pruned_class

SETTINGS = {  # of 128 channels, steps of 8 pairs and directions; the keep ratio is (2m + r) / 256
    "K 64, V 112": Widths(32, 112),  # 0.6875, as the next four
    "K 80, V 96": Widths(40, 96),
    "K 96, V 80": Widths(48, 80),
    "K 112, V 64": Widths(56, 64),
    "K 128, V 48": Widths(64, 48),  # all pairs kept, as measured budgets choose in the bundled models
    "K 88, V 88": Widths(44, 88),  # not one of the steps: what equal widths would give
    "K 96, V 96": Widths(48, 96),  # 0.75
}
SMALL = {"K 16, V 24": Widths(8, 24), "K 16, V 16": Widths(8, 16)}
PADDED = "rotatek_padded_sdpa"
COPIES = 4  # modules with weights and a cache each: a dense one alone is larger than an H100's L2, and half a pruned one is not


class Filled:
    """A cache of one layer that is full but for the newest token."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put the new token in the last place; a prefill is its own cache."""
        if key.shape[2] > 1:
            return key, value
        self.keys[:, :, -1:], self.values[:, :, -1:] = key, value
        return self.keys, self.values


class Kind(NamedTuple):
    """One way to compute attention: the name of its rows, its setting (None: dense), the attention implementation, with our kernels or not.

    with_layer: the whole layer is timed too.
    """

    name: str
    setting: str | None
    implementation: str = "sdpa"
    kernels: bool = True
    with_layer: bool = True


def kinds_of(settings: dict[str, Widths]) -> list[Kind]:
    """Dense, then every setting: by torch alone, as the product computes it, and with padding where Keys and Values differ in width."""
    found = [Kind("dense", None)]
    for name, widths in settings.items():
        found += [Kind(f"{name}, torch", name, kernels=False, with_layer=False), Kind(name, name)]
        if 2 * widths.pairs != widths.value:
            found.append(Kind(f"{name}, padded", name, PADDED, with_layer=False))
    return found


def register() -> None:
    """Make the attention implementation `PADDED` known to transformers."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(PADDED, sdpa_attention_forward_padded(sdpa_attention_forward))


def sdpa_attention_forward_padded(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The stock function as another object, so that neither our kernel nor cuDNN at two widths stands in for it."""
    return lambda *args, **kwargs: stock(*args, **kwargs)


def layer_of(small: bool, device: torch.device, dtype: torch.dtype) -> Any:
    """A decoder layer with random weights, its rotary embedding and its config."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    if small:
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = LlamaConfig(**shape, max_position_embeddings=131072, num_hidden_layers=1)  # type: ignore[arg-type]
    config._attn_implementation = "sdpa"
    with torch.device(device):
        layer, rope = LlamaDecoderLayer(config, 0).to(dtype).eval(), LlamaRotaryEmbedding(config)
    return layer, rope, config


def beside(stock: Any, widths: Widths | None) -> Any:
    """A module like a stock one, or pair-pruned, with random weights and pairs."""
    weight = stock.q_proj.weight
    if widths is None:
        with torch.device(weight.device):
            module: Any = type(stock)(stock.config, 0).to(weight.dtype)
    else:
        module = pruned_class(type(stock))(stock, widths)
        heads, half = module.pairs.shape[0], stock.head_dim // 2
        module.pairs = torch.stack([torch.randperm(half, device=weight.device)[: widths.pairs].sort().values for _ in range(heads)])
    for p in module.parameters():
        nn.init.normal_(p, std=0.02)
    return module.eval()


def caches_of(module: Any, count: int, batch: int, tokens: int, like: Tensor) -> list[Filled]:
    """Random caches [B, Hkv, tokens, width] for a module."""
    heads = module.config.num_key_value_heads
    widths = [projection.out_features // heads for projection in (module.k_proj, module.v_proj)]
    drawn = [[torch.randn(batch, heads, tokens, w, device=like.device, dtype=like.dtype) for w in widths] for _ in range(count)]
    return [Filled(*pair) for pair in drawn]


def steps_of(
    kind: Kind, layer: Any, modules: list[Any], caches: list[Filled], x: Tensor, places: tuple[Tensor, Tensor]
) -> dict[str, list[Callable[[], Any]]]:
    """Per part ("attention", "layer") a call for every module with its cache."""

    def surroundings() -> AbstractContextManager[None]:
        return nullcontext() if kind.kernels else rap_kernels.left_out()

    def attention(module: Any, cache: Filled) -> Any:
        module.config._attn_implementation = kind.implementation
        with surroundings():
            return module(x, position_embeddings=places, attention_mask=None, past_key_values=cache)[0]

    def whole(module: Any, cache: Filled) -> Any:
        module.config._attn_implementation = kind.implementation
        layer.self_attn = module
        with surroundings():
            return layer(x, position_embeddings=places, attention_mask=None, past_key_values=cache)

    def calls(run: Callable[[Any, Filled], Any]) -> list[Callable[[], Any]]:
        return [lambda module=module, cache=cache: run(module, cache) for module, cache in zip(modules, caches, strict=True)]  # type: ignore[misc]

    return {"attention": calls(attention)} | ({"layer": calls(whole)} if kind.with_layer else {})
