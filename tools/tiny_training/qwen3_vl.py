"""The model `tiny-qwen3-vl`: a stock Qwen3VLForConditionalGeneration and its processor, small enough to ship (20 MB in bf16).

Pages of 320 x 320 pixels are 40 x 40 patches, merged 2 x 2 into 400 visual tokens: one per character cell of 16 x 16 pixels.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from . import llava_next
from .checkpoint import character_tokenizer, random_model, write_checkpoint
from .documents import Vocabulary

PAGE, PATCH, MERGE, FRAMES = 320, 8, 2, 2  # pixels, pixels, patches, copies of a still image in a patch
SIDE = PAGE // PATCH  # patches
GRID = SIDE // MERGE  # visual tokens
NAMES = {
    "user_token": "<|user|>",
    "assistant_token": "<|assistant|>",
    "image_token": "<|image_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "video_token": "<|video_pad|>",
}
SPECIAL = ("<pad>", "<unk>", "<eos>", *NAMES.values())
PAD, UNKNOWN, EOS, USER, ASSISTANT, IMAGE, VISION_START, VISION_END, VIDEO = range(len(SPECIAL))
NEWLINE = len(SPECIAL)
FIRST_CHARACTER = NEWLINE + 1  # token of a space; the printable ASCII characters follow in order
VOCABULARY = FIRST_CHARACTER + 95
TOKENS = Vocabulary(pad=PAD, eos=EOS, user=USER, assistant=ASSISTANT, first_character=FIRST_CHARACTER)

CHAT_TEMPLATE = llava_next.CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and newline; anything else is <unk>."""
    return character_tokenizer(SPECIAL, NAMES, 8192)


def _pixels() -> dict[str, Any]:
    """What image and video processor share."""
    return {
        # The area decides the size: squares of any size become PAGE x PAGE. The slack of half a pixel a side is for rounding.
        "size": {"shortest_edge": PAGE * (PAGE - 1), "longest_edge": PAGE * (PAGE + 1)},
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }


def build_processor() -> Qwen3VLProcessor:
    """Processor of 320 x 320 pages, without its video part, so that it runs without torchvision; what it saves is complete."""
    image_processor = Qwen2VLImageProcessorPil(**_pixels())
    processor = _without_videos()(image_processor=image_processor, tokenizer=build_tokenizer(), chat_template=CHAT_TEMPLATE)
    processor.video_section = {"video_processor_type": "Qwen3VLVideoProcessor", **_pixels()}
    return processor


def _without_videos() -> type[Any]:
    """`processors.without_videos(Qwen3VLProcessor)` of this checkout, whether or not the package is installed (as bundled.py does)."""
    name = "tiny_training_compile"
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [str(Path(__file__).resolve().parents[2] / "rotatek_compile")]
        sys.modules[name] = package
    return importlib.import_module(f"{name}.processors").without_videos(Qwen3VLProcessor)


def build_config(
    *,
    hidden: int = 256,
    layers: int = 5,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 128,
    feed_forward: int = 640,
    rope_theta: float = 10000.0,
    vision_hidden: int = 128,
    vision_layers: int = 4,
    vision_heads: int = 4,
    vision_feed_forward: int = 448,
    deepstack: tuple[int, ...] = (1, 2),
) -> Qwen3VLConfig:
    """Geometry; the defaults are those of the bundled checkpoint.

    `deepstack` names the vision layers whose features are added behind text layers 0, 1, ... (DeepStack, arXiv 2406.04334).
    """
    axis = head_dim * 5 // 32  # frequencies of height, and of width: [24, 20, 20] at 128, as in the large models
    vision = {
        "depth": vision_layers, "hidden_size": vision_hidden, "num_heads": vision_heads, "intermediate_size": vision_feed_forward,
        "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": FRAMES, "out_hidden_size": hidden,
        "num_position_embeddings": SIDE * SIDE, "deepstack_visual_indexes": list(deepstack),
    }  # fmt: skip
    text = {
        "vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "intermediate_size": feed_forward, "max_position_embeddings": 8192,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": float(rope_theta), "mrope_section": [head_dim // 2 - 2 * axis, axis, axis],
            "mrope_interleaved": True,
        },
        "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS,
    }  # fmt: skip
    return Qwen3VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END, tie_word_embeddings=False,
    )  # fmt: skip


def build_model(config: Qwen3VLConfig, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """The model with random fp32 weights."""
    return random_model(Qwen3VLForConditionalGeneration, config, seed, EOS, PAD)


def save_checkpoint(model: Qwen3VLForConditionalGeneration, folder: Path) -> None:
    """Write model (in bf16) and processor to `folder`; `model` itself is cast."""
    write_checkpoint(model, build_processor(), folder)
