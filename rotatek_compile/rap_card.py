"""The model card of a pruned checkpoint, with a coded cache or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._version import __version__
from .artifact import Artifact
from .card import IMAGE_TASK, PLACE, TEXT_TASK, base_name, checked_on, kept_by_codes, picture_line
from .rap_artifact import pruned_part


def stacked_card(artifact: Artifact, picture: bool = False) -> str:
    """README.md of an artifact of `--method rap+rotatek`.

    Args:
        picture: whether the picture of its heads lies beside it.
    """
    method, report = artifact.method, artifact.report
    sizes, checked = report["kv_bytes_per_token"], checked_on(artifact.calibration.get("kept_aside", 1))
    lines = [
        f"- coded for these smaller heads: {method.words}",
        f"- span `{method.span}`, window {method.window} text tokens; raw text takes the bytes of whole heads",
        f"- bytes per coded token, all layers: {sizes['compressed']:.0f} of {sizes['dense']}, codes alone",
        *kept_by_codes(artifact),
        f"- KL of the plan to the pruned model on {checked}: {report['plan_kl']:.2e} nats per answer token",
        *(["", picture_line(artifact)] if picture else []),
    ]
    return rap_card(pruned_part(artifact), lines, "with the compressed cache")


def rap_card(artifact: Artifact, coded: Sequence[str] = (), cache: str = "with the stock cache") -> str:
    """README.md of an artifact of `--method rap`, front matter first; as `card.model_card`, but these are weights of their own.

    Args:
        coded: further lines on what is kept, of a coded cache; `cache` says which one `generate` uses.
    """
    from huggingface_hub import ModelCardData

    assert artifact.rap is not None
    hub_id, name = base_name(artifact)
    visual, found, data = bool(artifact.geometry.visual_token_ids), artifact.report, artifact.calibration.get("repository")
    dense, compact, sizes = found["counts"]["dense"], found["counts"]["pruned"], found["kv_bytes_per_token"]
    front = ModelCardData(
        library_name="rotatek-compile",
        pipeline_tag=IMAGE_TASK if visual else TEXT_TASK,
        tags=["rotatek", "rap", "pruned", "kv-cache", *(["kv-cache-compression"] if coded else [])],
        base_model=hub_id,
        datasets=[data] if data else None,
    )

    def share(key: str) -> str:
        return f"{compact[key] / dense[key]:.3f} of the base model's ({compact[key]:,} of {dense[key]:,})"

    return "\n".join(
        [
            "---",
            front.to_yaml().strip(),
            "---",
            "",
            f"# {name} with fewer RoPE pairs",
            "",
            f"A smaller {artifact.geometry.model_type} checkpoint: whole RoPE pairs of Keys and Queries and directions of Values are gone",
            "from its weights (RAP, arXiv 2602.02599), so that KV cache, attention parameters and attention FLOPs shrink alike.",
            *(["The KV cache of this smaller model is coded as well, in bases that were calibrated for it."] if coded else []),
            f"Made by rotatek-compile {__version__}. The licence of the base model applies.",
            "",
            "## Use",
            "",
            "```bash",
            "pip install rotatek-compile",
            f'rotatek-run {PLACE} {"--image page.png " if visual else ""}--prompt "What is the total?"',
            "```",
            "",
            "```python",
            "import rotatek_compile",
            "",
            f'model, processor = rotatek_compile.load("{PLACE}")  # model.generate(**inputs) {cache}',
            "```",
            "",
            "`AutoModel` cannot load it: its attention modules are narrower than transformers makes them.",
            "",
            "## What it keeps",
            "",
            f"- {artifact.rap.words}",
            f"- bytes of Keys and Values per token, all layers: {sizes['compressed']} of {sizes['dense']}",
            f"- attention parameters: {share('attention_parameters')}",
            f"- attention FLOPs of a prefill of 64 tokens: {share('attention_flops')}",
            f"- parameters of the whole model: {share('parameters')}",
            f"- calibrated on {artifact.calibration.get('num_samples')} samples of {_data_name(artifact.calibration)}",
            f"- KL to the base model on {checked_on(artifact.calibration.get('kept_aside', 1))}: {found['plan_kl']:.2e} nats per token",
            *coded,
            "",
            "## Limits",
            "",
            "Accuracy holds for documents like the calibration data's; measure yours with",
            f"`rotatek-eval {PLACE} --data YOUR_DATA`, which needs the base model to compare with.",
            "",
        ]
    )


def _data_name(calibration: dict[str, Any]) -> str:
    return "local data" if calibration.get("split") == "local" else f"`{calibration.get('data')}`"
