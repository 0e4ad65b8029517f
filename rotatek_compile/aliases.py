"""Short names of models: one table from name to Hub id, family and licence. Any Hub id or local path may stand in their place."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from .calibration_data.errors import did_you_mean
from .errors import UsageError

BUNDLED_ID = "bundled with this package"


@dataclass(frozen=True, slots=True)
class Alias:
    """`id` on the Hub (or `BUNDLED_ID`), family (families.py) and licence tag, as the model's card has them."""

    id: str
    family: str
    licence: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


ALIASES = {
    "tiny-llava-next": Alias(BUNDLED_ID, "LLaVA-NeXT", "apache-2.0"),
    "tiny-qwen3-vl": Alias(BUNDLED_ID, "Qwen3-VL", "apache-2.0"),
    "llava-next": Alias("llava-hf/llava-v1.6-mistral-7b-hf", "LLaVA-NeXT", "apache-2.0"),
    "llava-next-llama3": Alias("llava-hf/llama3-llava-next-8b-hf", "LLaVA-NeXT", "llama3"),
    "llava-next-vicuna": Alias("llava-hf/llava-v1.6-vicuna-7b-hf", "LLaVA-NeXT", "llama2"),
    "llava-onevision": Alias("llava-hf/llava-onevision-qwen2-7b-ov-hf", "LLaVA-OneVision", "apache-2.0"),
    "qwen2.5-vl": Alias("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL", "apache-2.0"),
    "qwen3-vl": Alias("Qwen/Qwen3-VL-8B-Instruct", "Qwen3-VL", "apache-2.0"),
    "internvl3": Alias("OpenGVLab/InternVL3-8B-hf", "InternVL3", "qwen"),
    "idefics3": Alias("HuggingFaceM4/Idefics3-8B-Llama3", "Idefics3", "apache-2.0"),
    "smolvlm": Alias("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "SmolVLM", "apache-2.0"),
    "gemma3": Alias("google/gemma-3-4b-it", "Gemma 3", "gemma"),
    "llama": Alias("meta-llama/Llama-3.1-8B-Instruct", "text only", "llama3.1"),
    "mistral": Alias("mistralai/Mistral-7B-Instruct-v0.3", "text only", "apache-2.0"),
    "qwen3": Alias("Qwen/Qwen3-8B", "text only", "apache-2.0"),
}


def refuse_unknown(name: str) -> None:
    """Refuse a name that no model can have; nothing is read.

    Raises:
        UsageError: neither an alias, nor something that exists here, nor the form of a path or Hub id.
    """
    if name in ALIASES or "/" in name or name.startswith((".", "~")) or (name.strip() and Path(name).exists()):
        return
    choices = f"{', '.join(ALIASES)}, a local directory, or a Hub id like org/name"
    raise UsageError(f"unknown model {name!r}; use one of {choices}{did_you_mean(name, ALIASES)}")


def table() -> str:
    """The aliases as lines of columns under a heading."""
    rows = [("name", "model", "family", "licence"), *((name, a.id, a.family, a.licence) for name, a in ALIASES.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
