"""What fewer RoPE pairs save in time: attention of one layer, and that layer with its feed-forward part, dense and pruned to a keep ratio.

    python benchmarks/bench_rap_latency.py --output benchmarks/results/rap_latency.csv  # on a GPU: LLaMA-3-8B's shape, 2 k to 64 k
    python benchmarks/bench_rap_latency.py --small --output /tmp/rap_latency.csv        # the same path with a small layer, on a CPU
    python benchmarks/bench_rap_latency.py --print benchmarks/results/rap_latency.csv

Weights and tokens are random, batch 1. "Attention" is the module: projections, RoPE, attention over the cache, output projection; decode
reads a cache that is full but for the new token and writes that in place, so that no copy of it is timed. Every setting is timed in
turns with the dense one; figures are medians. Where several tokens arrive the narrower of Keys and Values is padded with zeros, so that
flash kernels run; `padded` does so while decoding too. The padding is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import Rows, add_device_options, add_table_options, ended, show_table, versions  # noqa: E402

from rotatek_compile.rap_plan import Widths
from rotatek_compile.runtime.rap_attention import pruned_class

LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
SETTINGS = {  # at keep ratio 0.7 of 128 channels, steps of 8 pairs and directions; (2m + r) / 256
    "K 64, V 112": Widths(32, 112),
    "K 80, V 96": Widths(40, 96),
    "K 96, V 80": Widths(48, 80),
}
SMALL = {"K 16, V 24": Widths(8, 24)}
PADDED = "rotatek_padded_sdpa"


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


def layer_of(small: bool, device: torch.device, dtype: torch.dtype) -> Any:
    """A decoder layer with random weights, and its rotary embedding."""
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


def narrowed(stock: Any, widths: Widths) -> Any:
    """A pair-pruned module beside a stock one, with random weights and pairs."""
    module: Any = pruned_class(type(stock))(stock, widths)
    device = stock.q_proj.weight.device
    for p in module.parameters():
        nn.init.normal_(p, std=0.02)
    heads, half = module.pairs.shape[0], stock.head_dim // 2
    module.pairs = torch.stack([torch.randperm(half, device=device)[: widths.pairs].sort().values for _ in range(heads)])
    return module.eval()


def milliseconds(runs: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median time of each, timed in turns after a warm-up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat > 1:
                found[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in found.items()}


@torch.inference_mode()
def measure(small: bool, lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype, repeats: int) -> Rows:
    """One row per phase, length, setting and part: milliseconds, and their share of the dense layer's."""
    import transformers
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(PADDED, sdpa_attention_forward)
    layer, rope, config = layer_of(small, device, dtype)
    stock = layer.self_attn
    modules = {name: narrowed(stock, widths) for name, widths in (SMALL if small else SETTINGS).items()}
    kinds = [("dense", stock, "sdpa")]
    for name, module in modules.items():
        kinds += [(name, module, "sdpa"), (f"{name}, padded", module, PADDED)]
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    rows: Rows = []
    for length in lengths:
        for phase, tokens in (("prefill", length), ("decode", 1)):
            x = torch.randn(1, tokens, config.hidden_size, device=device, dtype=dtype)
            places = rope(x, torch.arange(length - tokens, length, device=device)[None])
            attention, whole = {}, {}
            for name, module, implementation in kinds:
                run = _run(layer, module, implementation, x, places, length if phase == "decode" else 0)
                attention[name], whole[name] = run
            for part, runs in (("attention", attention), ("layer", whole)):
                times = milliseconds(runs, device, repeats)
                rows += [
                    {
                        "phase": phase,
                        "tokens": length,
                        "part": part,
                        "setting": name,
                        "ms": round(ms, 4),
                        "share": round(ms / times["dense"], 4),
                    }
                    | about
                    for name, ms in times.items()
                ]
            del attention, whole
    return rows


def _run(
    layer: Any, module: Any, implementation: str, x: Tensor, places: tuple[Tensor, Tensor], cached: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The attention alone, and the whole layer with this attention in it."""
    heads = module.config.num_key_value_heads
    key = module.k_proj.out_features // heads
    value = module.v_proj.out_features // heads
    cache = Filled(x.new_ones(1, heads, cached, key), x.new_ones(1, heads, cached, value))

    def attention() -> Any:
        module.config._attn_implementation = implementation
        return module(x, position_embeddings=places, attention_mask=None, past_key_values=cache)

    def whole() -> Any:
        module.config._attn_implementation = implementation
        layer.self_attn = module
        return layer(x, position_embeddings=places, attention_mask=None, past_key_values=cache)

    return attention, whole


def table(rows: Rows) -> str:
    """Shares of the dense layer's time as markdown, lengths across."""
    lengths = list(dict.fromkeys(row["tokens"] for row in rows))
    lines = [f"{versions(rows[0])}; share of the dense time", ""]
    lines += [f"| phase | part | setting | {' | '.join(f'{int(n):,}' for n in lengths)} | mean |", f"|{'---|' * (len(lengths) + 4)}"]
    keys = dict.fromkeys((row["phase"], row["part"], row["setting"]) for row in rows if row["setting"] != "dense")
    for key in keys:
        shares = {row["tokens"]: float(row["share"]) for row in rows if (row["phase"], row["part"], row["setting"]) == key}
        cells = " | ".join(f"{shares[n]:.3f}" for n in lengths)
        lines.append(f"| {' | '.join(key)} | {cells} | {statistics.mean(shares.values()):.3f} |")
    return "\n".join(lines)


def measured(options: argparse.Namespace) -> Rows:
    """Rows of the settings that were asked for."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    lengths = (64, 128) if options.small else tuple(n for n in LENGTHS if n <= options.longest)
    return measure(options.small, lengths, device, dtype, options.repeats)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small layer and short texts")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="no longer texts than this")
    parser.add_argument("--repeats", type=int, default=20)
    add_device_options(parser)
    add_table_options(parser)
    show_table(parser.parse_args(arguments), measured, table)
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
