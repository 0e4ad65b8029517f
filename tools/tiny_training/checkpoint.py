"""What all bundled models share: a tokenizer of single characters, random weights to begin with, and how a checkpoint is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast


def character_tokenizer(special: Sequence[str], names: dict[str, str], longest: int) -> PreTrainedTokenizerFast:
    """Special tokens, newline and printable ASCII, one token each in this order; anything else is <unk>.

    `names` are the special tokens that a processor asks for, by attribute; `longest` is the length of a prompt in tokens.
    """
    vocabulary = {token: index for index, token in enumerate([*special, "\n", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        extra_special_tokens=names,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=longest,
    )


def random_model(model_class: Any, config: Any, seed: int, eos: int, pad: int) -> Any:
    """A model with random fp32 weights that generates greedily."""
    torch.manual_seed(seed)
    model = model_class(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=False, max_new_tokens=16)
    return model.float()


def write_checkpoint(model: Any, processor: Any, folder: Path) -> None:
    """Write model (in bf16) and processor to `folder`; `model` itself is cast."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
