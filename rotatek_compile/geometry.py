"""What the compressed cache must know of a model: one row per text layer, and how image tokens are marked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .errors import RotateKError
from .families import CAUSAL, REFUSED, visual_token_ids

FULL_ATTENTION = "full_attention"
SHORT_ATTENTION = ("sliding_attention", "chunked_attention")  # these keep their stock cache layers


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGeometry:
    """Attention shape of one text layer: Hq query heads, Hkv KV heads, D channels per head."""

    layer_type: str
    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """G = Hq / Hkv, query heads that share one KV head."""
        return self.query_heads // self.kv_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """All text layers of a model, and the token ids that stand for image and video tokens."""

    model_type: str
    layers: tuple[LayerGeometry, ...]
    visual_token_ids: tuple[int, ...]
    position_axes: int = 1  # 3 with M-RoPE: time, height, width

    @property
    def text_only(self) -> bool:
        """The model reads no images: only text can be coded."""
        return not self.visual_token_ids

    @property
    def compressible(self) -> tuple[int, ...]:
        """Indices of the layers whose Keys can be coded: full attention; sliding layers are short already."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.layer_type == FULL_ATTENTION)

    @property
    def hybrid(self) -> bool:
        """Some layers do not attend to everything: they count columns, so that no padding may stand between a row's tokens."""
        return len(self.compressible) < len(self.layers)

    def rows_at_once(self, batch_size: int) -> int:
        """Documents that may be read in pieces side by side: pieces of different length are padded in between, which `hybrid` forbids."""
        return 1 if self.hybrid else batch_size

    def dense_bytes_per_token(self) -> int:
        """Stock cache bytes of one token over the compressible layers, at 2 bytes a number (DESIGN.md §3)."""
        return sum(4 * self.layers[i].kv_heads * self.layers[i].head_dim for i in self.compressible)

    def to_json(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "visual_token_ids": list(self.visual_token_ids),
            "position_axes": self.position_axes,
            "layers": [asdict(layer) for layer in self.layers],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Geometry:
        """Inverse of `to_json`; KeyError, TypeError or ValueError for anything that is not its output."""
        return cls(
            model_type=str(data["model_type"]),
            visual_token_ids=tuple(int(i) for i in data["visual_token_ids"]),
            layers=tuple(
                LayerGeometry(
                    layer_type=str(layer["layer_type"]),
                    query_heads=int(layer["query_heads"]),
                    kv_heads=int(layer["kv_heads"]),
                    head_dim=int(layer["head_dim"]),
                )
                for layer in data["layers"]
            ),
            position_axes=int(data.get("position_axes", 1)),  # artifacts before M-RoPE do not have it
        )

    def difference(self, other: Geometry) -> str | None:
        """First difference to `other` that makes artifacts of one unusable on the other, in words; None if equal."""
        if len(self.layers) != len(other.layers):
            return f"{len(self.layers)} text layers against {len(other.layers)}"
        words = {"layer_type": "type", "query_heads": "query heads", "kv_heads": "KV heads", "head_dim": "head_dim"}
        for index, (a, b) in enumerate(zip(self.layers, other.layers, strict=True)):
            for field, word in words.items():
                if getattr(a, field) != getattr(b, field):
                    return f"layer {index} has {word} {getattr(a, field)} against {getattr(b, field)}"
        if set(self.visual_token_ids) != set(other.visual_token_ids):
            return f"image token ids {list(self.visual_token_ids)} against {list(other.visual_token_ids)}"
        return None


def position_axes(text: Any) -> int:
    """Axes along which a text config's RoPE numbers tokens: 1, or one per section of M-RoPE (Qwen2-VL, arXiv 2409.12191, §2.1)."""
    rope = getattr(text, "rope_parameters", None) or {}
    return len(rope.get("mrope_section") or (0,))


def geometry_of(config: Any) -> Geometry:
    """Read the geometry from a transformers config (of the whole model).

    Raises:
        RotateKError: encoder-decoder models, latent (MLA) attention and configs without attention heads.
    """
    from transformers.cache_utils import get_layer_types_and_kwargs

    text = config.get_text_config(decoder=True)
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise RotateKError(f"model type {name!r} is an encoder-decoder; only decoder-only text models can be compiled")
    if getattr(text, "is_decoder", True) is False and name not in CAUSAL:  # only models that can be either say so
        raise RotateKError(f"model type {name!r} is not supported: as configured it attends in both directions and generates no text")
    if name in REFUSED:
        raise RotateKError(f"model type {name!r} is not supported: {REFUSED[name]}")
    if getattr(text, "is_heterogeneous", False):  # said first: reading a key that differs by layer raises
        raise RotateKError(f"model type {name!r} is not supported: its layers differ in more than how far they attend")
    if getattr(text, "attn_logit_softcapping", None):
        raise RotateKError(f"model type {name!r} caps its attention logits (soft-capping), which the compressed cache does not compute")
    if getattr(text, "num_kv_shared_layers", None):
        raise RotateKError(f"model type {name!r} shares Keys between layers, which the compressed cache does not know")
    if getattr(text, "kv_lora_rank", None):
        raise RotateKError(f"model type {name!r} caches latent attention (MLA) already; there are no Keys to compress")
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or not isinstance(getattr(text, "num_hidden_layers", None), int):
        raise RotateKError(f"model type {name!r} is not supported: its text config names no attention heads or layers")
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    layer_types, _ = get_layer_types_and_kwargs(text)
    if other := sorted(set(layer_types) - {FULL_ATTENTION, *SHORT_ATTENTION}):
        raise RotateKError(f"model type {name!r} is not supported: it has layers of type {', '.join(other)}")
    layers = tuple(LayerGeometry(layer_type=kind, query_heads=heads, kv_heads=kv_heads, head_dim=head_dim) for kind in layer_types)
    return Geometry(model_type=name, layers=layers, visual_token_ids=visual_token_ids(config), position_axes=position_axes(text))
