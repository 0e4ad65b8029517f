"""Tiny random checkpoints of every family: config, weights, tokenizer, processor and chat template, all made here.

`build(name, folder)` writes what `from_pretrained` reads. Two to four text layers of 4 query heads of 32 channels; weights are
drawn so that attention is peaked and logits differ from token to token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TOOLS = str(Path(__file__).resolve().parents[2] / "tools")
if TOOLS not in sys.path:
    sys.path.append(TOOLS)

from tiny_training.checkpoint import character_tokenizer, write_checkpoint  # noqa: E402

HIDDEN, DIM, HEADS, KV_HEADS = 128, 32, 4, 2
NAMES = {
    "image_token": "<image>", "video_token": "<video>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
    "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>", "start_image_token": "<img>",
    "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
}  # fmt: skip
MARKERS = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]  # Idefics3 and SmolVLM name their tiles
SPECIAL = ["<pad>", "<unk>", "<eos>", "<bos>", "<|user|>", "<|assistant|>", *NAMES.values(), *MARKERS]
PAD, UNKNOWN, EOS, BOS = range(4)
VOCABULARY = len(SPECIAL) + 96
ID = {token: number for number, token in enumerate(SPECIAL)}
IMAGE, VIDEO = ID["<image>"], ID["<video>"]

TEMPLATE = """\
{%- for message in messages -%}
{{- '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}
{{- IMAGE if item['type'] == 'image' else VIDEO if item['type'] == 'video' else item['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{- '<eos>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def template(image: str, video: str = "<video>", bos: str = "") -> str:
    """A chat template that writes this text for each image and clip, and `bos` first."""
    return bos + TEMPLATE.replace("IMAGE", repr(image)).replace("VIDEO", repr(video))


def tokenizer(image_token: str = "<image>") -> Any:
    """One token per printable ASCII character; `image_token` is what a processor with a single name for it asks for."""
    return character_tokenizer(SPECIAL, NAMES | {"image_token": image_token}, 8192)


def text_config(**changes: Any) -> dict[str, Any]:
    """What all text configs share."""
    return {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": DIM, "max_position_embeddings": 8192, "pad_token_id": PAD, "eos_token_id": EOS,
        "bos_token_id": BOS, "tie_word_embeddings": False, **changes,
    }  # fmt: skip


def _random(model_class: Any, config: Any) -> Any:
    from transformers import GenerationConfig

    torch.manual_seed(5)
    model = model_class(config).float().eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and not any(part in name for part in ("vision", "visual")):
            peaked = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            torch.nn.init.normal_(weight, std=1.0 if "embed" in name else peaked * weight.shape[1] ** -0.5)
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS, do_sample=False, max_new_tokens=16)
    return model


def _pixels() -> dict[str, Any]:
    return {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _llava_next(text: Any) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    vision = CLIPVisionConfig(
        image_size=64, patch_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_grid_pinpoints=[[64, 128], [128, 64], [128, 128]],
        vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_grid_pinpoints=config.image_grid_pinpoints, **_pixels()
    )
    processor = LlavaNextProcessor(
        image_processor=pictures, tokenizer=tokenizer(), patch_size=16, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template("<image>\n"),
    )  # fmt: skip
    return _random(LlavaNextForConditionalGeneration, config), processor


def llava_next_mistral() -> tuple[Any, Any]:
    from transformers import MistralConfig

    return _llava_next(MistralConfig(**text_config(sliding_window=None)))


def llava_next_llama() -> tuple[Any, Any]:
    from transformers import LlamaConfig

    return _llava_next(LlamaConfig(**text_config()))


def llava_next_vicuna() -> tuple[Any, Any]:
    """Every query head has a KV head of its own."""
    from transformers import LlamaConfig

    return _llava_next(LlamaConfig(**text_config(num_key_value_heads=HEADS)))


def _siglip() -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model", "image_size": 64, "patch_size": 16, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "vision_use_head": False,
    }  # fmt: skip


def llava_onevision() -> tuple[Any, Any]:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    grid = [[64, 64], [64, 128], [128, 64], [128, 128]]
    config = LlavaOnevisionConfig(
        vision_config=_siglip(), text_config={"model_type": "qwen2", **text_config()}, image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=grid, vision_feature_layer=-1, tie_word_embeddings=False,
    )  # fmt: skip
    pictures = LlavaOnevisionImageProcessorPil(size={"height": 64, "width": 64}, image_grid_pinpoints=grid, **_pixels())
    section = {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": {"height": 64, "width": 64}, **_pixels()}
    processor = _processor(
        LlavaOnevisionProcessor, pictures, section, template("<image>\n", "<video>\n"), num_image_tokens=16,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    return _random(LlavaOnevisionForConditionalGeneration, config), processor


def _qwen(version: str) -> tuple[Any, Any]:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    newer = version == "Qwen3VL"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [6, 5, 5]}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_channels": 3, "patch_size": 8, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "out_hidden_size": HIDDEN,
    }  # fmt: skip
    if newer:
        rope["mrope_interleaved"] = True
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    else:
        vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
    config = getattr(transformers, f"{version}Config")(
        text_config=text_config(rope_parameters=rope), vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=ID["<|vision_start|>"], vision_end_token_id=ID["<|vision_end|>"], tie_word_embeddings=False,
    )  # fmt: skip
    size = {
        "size": {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}, "patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, **_pixels()
    }  # fmt: skip
    around = "<|vision_start|>{}<|vision_end|>".format
    section = {"video_processor_type": f"{'Qwen3VL' if newer else 'Qwen2VL'}VideoProcessor", **size}
    chat = template(around("<image>"), around("<video>"))
    processor = _processor(getattr(transformers, f"{version}Processor"), Qwen2VLImageProcessorPil(**size), section, chat)
    return _random(getattr(transformers, f"{version}ForConditionalGeneration"), config), processor


def internvl3() -> tuple[Any, Any]:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    vision = {
        "image_size": 64, "patch_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2
    }  # fmt: skip
    config = InternVLConfig(
        vision_config=vision, text_config={"model_type": "qwen2", **text_config()}, image_token_id=ID["<IMG_CONTEXT>"],
        image_seq_length=4, downsample_ratio=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    pictures = GotOcr2ImageProcessorPil(size={"height": 64, "width": 64}, crop_to_patches=True, min_patches=1, max_patches=6, **_pixels())
    section = {"video_processor_type": "InternVLVideoProcessor", "size": {"height": 64, "width": 64}, **_pixels()}
    processor = _processor(InternVLProcessor, pictures, section, template("<IMG_CONTEXT>\n", "<video>\n"), image_seq_length=4)
    return _random(InternVLForConditionalGeneration, config), processor


def _idefics(version: str) -> tuple[Any, Any]:
    import transformers
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    newer = version == "SmolVLM"
    config = getattr(transformers, f"{version}Config")(
        vision_config={
            "image_size": 64, "patch_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2
        },
        text_config={"model_type": "llama", **text_config()}, image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD,
    )  # fmt: skip
    size = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}, "do_image_splitting": True, **_pixels()}
    pictures = (SmolVLMImageProcessorPil if newer else Idefics3ImageProcessorPil)(**size)
    stock, chat = getattr(transformers, f"{version}Processor"), template("<image>")
    if newer:
        section = {"video_processor_type": "SmolVLMVideoProcessor", "num_frames": 8, "fps": 1, "size": {"longest_edge": 64}, **_pixels()}
        section["video_sampling"] = {"fps": 1, "max_frames": 8, "video_size": {"longest_edge": 64}}
        section["max_image_size"] = {"longest_edge": 64}
        processor = _processor(stock, pictures, section, chat, image_seq_len=4)
    else:
        processor = stock(image_processor=pictures, tokenizer=tokenizer(), image_seq_len=4, chat_template=chat)
    return _random(getattr(transformers, f"{version}ForConditionalGeneration"), config), processor


def gemma3() -> tuple[Any, Any]:
    """Layers 0, 2 and 3 slide over 24 tokens; an image's tokens see each other."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    config = Gemma3Config(
        vision_config=_siglip(), text_config=_gemma3_text(), image_token_index=ID["<image>"],
        boi_token_index=ID["<start_of_image>"], eoi_token_index=ID["<end_of_image>"], mm_tokens_per_image=16, tie_word_embeddings=False,
    )  # fmt: skip
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 64, "width": 64}, image_seq_length=16, **_pixels()),
        tokenizer=tokenizer(), chat_template=template("<start_of_image>", bos="<bos>"), image_seq_length=16,
    )  # fmt: skip
    return _random(Gemma3ForConditionalGeneration, config), processor


def _gemma3_text() -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    return text_config(num_hidden_layers=4, layer_types=kinds, sliding_window=24, query_pre_attn_scalar=16)


def gemma3_text() -> tuple[Any, Any]:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return _random(Gemma3ForCausalLM, Gemma3TextConfig(**_gemma3_text())), _chat_tokenizer("<bos>")


def _chat_tokenizer(bos: str = "") -> Any:
    made = tokenizer()
    made.chat_template = template("<image>", bos=bos)
    if bos:
        made.bos_token = bos
    return made


def llama() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _random(LlamaForCausalLM, LlamaConfig(**text_config())), _chat_tokenizer("<bos>")


def mistral() -> tuple[Any, Any]:
    from transformers import MistralConfig, MistralForCausalLM

    return _random(MistralForCausalLM, MistralConfig(**text_config(sliding_window=None))), _chat_tokenizer()


def mistral_sliding() -> tuple[Any, Any]:
    """Every layer slides: there is nothing to compress."""
    from transformers import MistralConfig, MistralForCausalLM

    return _random(MistralForCausalLM, MistralConfig(**text_config(sliding_window=24))), _chat_tokenizer()


def ministral() -> tuple[Any, Any]:
    """A Mistral in which full and sliding layers take turns."""
    from transformers import MinistralConfig, MinistralForCausalLM

    kinds = ["full_attention", "sliding_attention", "full_attention"]
    return _random(MinistralForCausalLM, MinistralConfig(**text_config(sliding_window=24, layer_types=kinds))), _chat_tokenizer()


def qwen3() -> tuple[Any, Any]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _random(Qwen3ForCausalLM, Qwen3Config(**text_config())), _chat_tokenizer()


def _processor(stock: Any, pictures: Any, video_section: dict[str, Any], chat: str, **settings: Any) -> Any:
    """A processor with a video part: the stock one where torchvision is there, else ours without that part."""
    from transformers.utils.import_utils import is_torchvision_available

    from rotatek_compile.processors import without_videos

    own = tokenizer("<IMG_CONTEXT>") if "IMG_CONTEXT" in chat else tokenizer()
    if is_torchvision_available():
        import transformers

        settings_of = dict(video_section)
        videos = getattr(transformers, settings_of.pop("video_processor_type"))(**settings_of)
        return stock(image_processor=pictures, tokenizer=own, video_processor=videos, chat_template=chat, **settings)
    processor = without_videos(stock)(
        image_processor=pictures, tokenizer=own, video_processor=None, chat_template=chat, **settings
    )  # fmt: skip
    processor.video_section = video_section
    return processor


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava-next-mistral": llava_next_mistral,
    "llava-next-llama": llava_next_llama,
    "llava-next-vicuna": llava_next_vicuna,
    "llava-onevision": llava_onevision,
    "qwen2.5-vl": lambda: _qwen("Qwen2_5_VL"),
    "qwen3-vl": lambda: _qwen("Qwen3VL"),
    "internvl3": internvl3,
    "idefics3": lambda: _idefics("Idefics3"),
    "smolvlm": lambda: _idefics("SmolVLM"),
    "gemma3": gemma3,
    "gemma3-text": gemma3_text,
    "llama": llama,
    "mistral": mistral,
    "mistral-sliding": mistral_sliding,
    "ministral": ministral,
    "qwen3": qwen3,
}
TEXT_ONLY = ("gemma3-text", "llama", "mistral", "ministral", "qwen3")  # compressible models without images
VISION = tuple(name for name in BUILDERS if name not in (*TEXT_ONLY, "mistral-sliding"))
WITH_VIDEO = ("llava-onevision", "qwen2.5-vl", "qwen3-vl", "internvl3", "smolvlm")


def missing(name: str) -> str | None:
    """The package without which this family's own processor does not load, or None."""
    from importlib.util import find_spec

    import transformers

    if name not in ("idefics3", "smolvlm"):
        return None
    if name == "smolvlm" and find_spec("num2words") is None:
        return "num2words"
    # before transformers 5.23 their picture processors are placeholders where torchvision is missing
    return "torchvision" if "torchvision" in getattr(transformers.Idefics3ImageProcessorPil, "_backends", ()) else None


def build(name: str, folder: Path) -> Path:
    """Write a checkpoint of family `name` to `folder` (weights in bf16) and return the folder."""
    model, processor = BUILDERS[name]()
    write_checkpoint(model, processor, folder)
    return folder
