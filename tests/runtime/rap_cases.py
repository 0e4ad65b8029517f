"""Plans, pruned checkpoints and families that the tests of RAP share. Plans are drawn at random: their quality is not tested."""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

sys.path.append(str(Path(__file__).parents[1] / "families"))
import builders  # noqa: E402

from rotatek_compile.artifact import Artifact  # noqa: E402
from rotatek_compile.geometry import geometry_of  # noqa: E402
from rotatek_compile.models import load_config, load_model, resolve  # noqa: E402
from rotatek_compile.rap_artifact import RapSection, pair_tensors  # noqa: E402
from rotatek_compile.rap_checkpoint import write_checkpoint  # noqa: E402
from rotatek_compile.rap_plan import RapLayer, RapPlan, selection, unpruned  # noqa: E402
from rotatek_compile.runtime.rap_attention import pruned_class  # noqa: E402
from rotatek_compile.runtime.rap_load import load_pruned  # noqa: E402

CPU = torch.device("cpu")
SMALLER = ((8, 16), (12, 8), (8, 24), (16, 32))  # pairs and Value widths of layers 0, 1, ...


def drawn_layer(shape, pairs, width, seed=0, bias=None):
    """A layer with these widths: random pairs, each with a complex factor in its Queries, random Value maps."""
    draw = torch.Generator().manual_seed(seed)
    dim, heads = shape.head_dim, shape.query_heads
    kept = torch.stack([torch.randperm(dim // 2, generator=draw)[:pairs].sort().values for _ in range(shape.kv_heads)])
    key = selection(kept, dim)
    first, second = selection(kept.repeat_interleave(shape.group, 0), dim).split(pairs, 1)
    real, imaginary = (torch.rand(heads, pairs, 1, generator=draw) + 0.5 for _ in range(2))
    query = torch.cat([real * first - imaginary * second, imaginary * first + real * second], 1)
    value = torch.randn(shape.kv_heads, width, dim, generator=draw) / dim**0.5
    output = torch.randn(heads, dim, width, generator=draw) / width**0.5
    return RapLayer(kept, key, query, value, output, None if bias is None else torch.randn(bias, generator=draw) / 10)


def drawn_attention(query_heads, kv_heads, dim, widths):
    """A pruned attention module with random weights and pairs, for `sdpa`."""
    config = LlamaConfig(hidden_size=32, num_attention_heads=query_heads, num_key_value_heads=kv_heads, head_dim=dim, num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    made = pruned_class(LlamaAttention)(LlamaAttention(config, 0), widths).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    made.pairs = torch.stack([torch.randperm(dim // 2)[: widths.pairs].sort().values for _ in range(kv_heads)])
    return made.requires_grad_(False)


def drawn_plan(geometry, widths=SMALLER, hidden=None):
    """A plan with these widths; with `hidden` its layers of even number correct the mean."""
    layers = {}
    for i, shape in enumerate(geometry.layers):
        layers[i] = drawn_layer(shape, *widths[i % len(widths)], seed=i, bias=hidden if i % 2 == 0 else None)
    return RapPlan(layers)


def whole_plan(geometry):
    """A plan that keeps everything."""
    return RapPlan({i: unpruned(shape) for i, shape in enumerate(geometry.layers)})


def artifact_of(geometry, plan, ratio=0.7):
    """An artifact in memory."""
    section = RapSection.of(plan, keep_ratio=ratio, score="logit", budget="sensitivity", repair=True, recover=0)
    return Artifact(geometry, section.method(), pair_tensors(plan), {}, {}, rap=section)


def dense_of(folder):
    """Config, geometry and dense model of a checkpoint."""
    source = resolve(str(folder))
    config = load_config(source)
    return config, geometry_of(config), load_model(source, torch.float32, CPU)


def pruned_of(folder, target, geometry, plan):
    """Write and load what a plan makes of a checkpoint."""
    target.mkdir()
    write_checkpoint(folder, "the checkpoint", target, geometry, plan)
    return load_pruned(artifact_of(geometry, plan), target, torch.float32, CPU)


def prompts(rows=2, length=20, padding=7, seed=1):
    """Ids [rows, length] of ordinary characters, the first row with padding on its left."""
    ids = torch.randint(60, builders.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = builders.PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def said(model, tokens=6, **inputs):
    """Token ids [B, tokens] and logits [B, tokens, V] of a greedy answer, and the cache."""
    greedy = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": builders.PAD}
    out = model.generate(**greedy, return_dict_in_generate=True, output_logits=True, **inputs)
    return out.sequences[:, -tokens:], torch.stack(out.logits, 1), out.past_key_values
