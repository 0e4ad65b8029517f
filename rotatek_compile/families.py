"""What is particular about each family of models: one row each, read by whoever needs it, and never a copy of modelling code.

Most families need nothing: the geometry is read from the config, Keys are taken where transformers' attention interface has them (after
q/k-norm, RoPE, M-RoPE or one of several RoPE bases), and layers that do not attend to everything keep their stock cache layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row.

    model_types: `config.model_type` of whole models; text_types: of their text parts, as far as the tests have run them.
    visual_tokens: config keys of the ids that stand for image and video tokens; empty for text-only models.
    token_types: argument of `forward` (and output of the processor) that says which tokens are images, where the model needs it to see
    an image's tokens from both sides; None where ids and positions are enough.
    particular: what the compressed cache meets here, in words.
    """

    name: str
    model_types: tuple[str, ...]
    text_types: tuple[str, ...]
    visual_tokens: tuple[str, ...] = ("image_token_id", "video_token_id")
    token_types: str | None = None
    particular: str


FAMILIES = (
    Family(
        name="LLaVA-NeXT",
        model_types=("llava_next",),
        text_types=("mistral", "llama"),
        visual_tokens=("image_token_id",),
        particular="an image is its reduced picture, its tiles and a newline token per row: one run of image tokens",
    ),
    Family(
        name="LLaVA-OneVision",
        model_types=("llava_onevision",),
        text_types=("qwen2",),
        particular="as LLaVA-NeXT, one picture without tiles where there are several; image and video tokens have ids of their own",
    ),
    Family(
        name="Qwen2.5-VL",
        model_types=("qwen2_5_vl",),
        text_types=("qwen2_5_vl_text",),
        particular="M-RoPE: positions along time, height and width; biases in q, k, v",
    ),
    Family(
        name="Qwen3-VL",
        model_types=("qwen3_vl",),
        text_types=("qwen3_vl_text",),
        particular="M-RoPE, q/k-norm, DeepStack; a clip's frames have their times as text between them",
    ),
    Family(
        name="InternVL3",
        model_types=("internvl",),
        text_types=("qwen2",),
        visual_tokens=("image_token_id",),
        particular="frames of a clip are written with the image token, each between tokens of its own",
    ),
    Family(
        name="Idefics3",
        model_types=("idefics3",),
        text_types=("llama",),
        visual_tokens=("image_token_id",),
        particular="every tile is a run of its own, with its row and column as text before it",
    ),
    Family(
        name="SmolVLM",
        model_types=("smolvlm",),
        text_types=("llama",),
        visual_tokens=("image_token_id",),
        particular="as Idefics3; frames of a clip are written with the image token; the processor needs the package num2words",
    ),
    Family(
        name="Gemma 3",
        model_types=("gemma3",),
        text_types=("gemma3_text",),
        visual_tokens=("image_token_id",),
        token_types="token_type_ids",
        particular="sliding and full layers with a RoPE base each, q/k-norm, a scaling of its own; an image's tokens see each other",
    ),
    Family(
        name="text only",
        model_types=("llama", "mistral", "ministral", "qwen3", "gemma3_text"),
        text_types=("llama", "mistral", "ministral", "qwen3", "gemma3_text"),
        visual_tokens=(),
        particular="nothing but text: --span all codes what is older than the window",
    ),
)

# Seen by no config key that other models share: said before hours of calibration, not at the first token.
REFUSED = {
    **dict.fromkeys(("gpt_oss", "flint", "granite_swa", "granitemoe_swa", "mimo_v2_flash"), "its softmax has attention sinks"),
    **dict.fromkeys(("diffllama", "doge", "jetmoe"), "it changes Keys or Values between the cache and its attention"),
    "mllama": "its images enter by cross-attention and not as tokens",
}

# Their configs have `is_decoder`, False unless set, and their models attend causally all the same.
CAUSAL = ("gpt_neox", "gpt_neox_japanese")

UNKNOWN = Family(name="unknown", model_types=(), text_types=(), particular="")


def family_of(model_type: str) -> Family:
    """The family of a whole model's `model_type`; `UNKNOWN`, which assumes nothing particular, for one that is in no row."""
    return next((family for family in FAMILIES if model_type in family.model_types), UNKNOWN)


def visual_token_ids(config: Any) -> tuple[int, ...]:
    """Ids of image and video placeholder tokens of a whole model's config; none for a text-only model."""
    ids = (getattr(config, key, None) for key in family_of(config.model_type).visual_tokens)
    return tuple(i for i in ids if isinstance(i, int))


def not_validated(config: Any) -> str | None:
    """Why a model is outside of what was tested, in words; None if it is inside."""
    family, text = family_of(config.model_type), config.get_text_config(decoder=True).model_type
    if family is UNKNOWN:
        return f"model type {config.model_type!r} was never validated"
    if text not in family.text_types:
        return f"{family.name} was validated with text models {', '.join(family.text_types)}, not with {text!r}"
    return None
