"""What tests of RAP share: a small random Llama, its geometry, and documents of random tokens."""

from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rotatek_compile.batches import Encoded
from rotatek_compile.geometry import geometry_of

SIZES = {
    "vocab_size": 48, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def small_llama(seed=0, **changes):
    """A model with weights large enough that attention is sharp and pairs differ, and its geometry."""
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES | changes)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                weight = getattr(layer.self_attn, name).weight
                weight.normal_(0, 0.35).mul_(torch.linspace(0.4, 1.6, weight.shape[0])[torch.randperm(weight.shape[0])][:, None])
            if layer.self_attn.q_proj.bias is not None:
                for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    getattr(layer.self_attn, name).bias.normal_(0, 0.5)
    return model, geometry_of(config)


def document(length, seed=0, answer=6):
    """Random tokens; the last of them are the answer."""
    ids = torch.randint(3, SIZES["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    sample = SimpleNamespace(id=str(seed), images=())
    return Encoded(sample, ids[:-answer], ids[-answer:], 0, {})


def documents(count, shortest=12, longest=30):
    """Of different lengths."""
    return [document(shortest + (7 * n) % (longest - shortest + 1), seed=n) for n in range(count)]
