"""The model `tiny-llava-next`: a stock LlavaNextForConditionalGeneration and its processor, small enough to ship (20 MB in bf16)."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from .checkpoint import character_tokenizer, random_model, write_checkpoint
from .documents import Vocabulary

TILE, PATCH, PAGE = 160, 16, 320  # pixels; a patch of a page's tiles is one character cell
SPECIAL = ("<pad>", "<unk>", "<eos>", "<|user|>", "<|assistant|>", "<image>")
PAD, UNKNOWN, EOS, USER, ASSISTANT, IMAGE = range(len(SPECIAL))
NEWLINE = len(SPECIAL)
FIRST_CHARACTER = NEWLINE + 1  # token of a space; the printable ASCII characters follow in order
VOCABULARY = FIRST_CHARACTER + 95
TOKENS = Vocabulary(pad=PAD, eos=EOS, user=USER, assistant=ASSISTANT, first_character=FIRST_CHARACTER)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}
{{- '<image>\\n' if item['type'] == 'image' else item['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{- '<eos>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and newline; anything else is <unk>."""
    names = {"image_token": "<image>", "user_token": "<|user|>", "assistant_token": "<|assistant|>"}
    return character_tokenizer(SPECIAL, names, 4096)


def build_processor() -> LlavaNextProcessor:
    """Processor of 320 x 320 pages: base tile, 2 x 2 tiles, newline tokens; runs without torchvision."""
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=[[PAGE, PAGE]],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(
    *,
    hidden: int = 256,
    layers: int = 5,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 128,
    feed_forward: int = 640,
    vision_hidden: int = 192,
    vision_layers: int = 4,
    vision_feed_forward: int = 576,
) -> LlavaNextConfig:
    """Geometry; the defaults are those of the bundled checkpoint."""
    vision = CLIPVisionConfig(
        image_size=TILE, patch_size=PATCH, hidden_size=vision_hidden, num_hidden_layers=vision_layers,
        num_attention_heads=max(1, vision_hidden // 64), intermediate_size=vision_feed_forward,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, intermediate_size=feed_forward, max_position_embeddings=4096,
        pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS, tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_grid_pinpoints=[[PAGE, PAGE]],
        vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip


def build_model(config: LlavaNextConfig, seed: int = 0) -> LlavaNextForConditionalGeneration:
    """The model with random fp32 weights."""
    return random_model(LlavaNextForConditionalGeneration, config, seed, EOS, PAD)


def save_checkpoint(model: LlavaNextForConditionalGeneration, folder: Path) -> None:
    """Write model (in bf16) and processor to `folder`; `model` itself is cast."""
    write_checkpoint(model, build_processor(), folder)
