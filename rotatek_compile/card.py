"""The model card of an artifact."""

from __future__ import annotations

from typing import Any

from ._version import __version__
from .artifact import IMAGE_TOKENS


def model_card(artifact: Any) -> str:
    """README.md of an artifact: front matter the Hub reads, how to use it, what was measured, limits.

    `base_model` is written for Hub ids only: a local path would leak and mean nothing elsewhere.
    """
    base = artifact.base_model.get("id", "")
    hub_id = base if artifact.base_model.get("fingerprint") is None and base.count("/") == 1 else None
    method, report = artifact.method, artifact.report
    dense, compressed = report["kv_bytes_per_token"]["dense"], report["kv_bytes_per_token"]["compressed"]
    ours = method.rival is None
    bytes_of = "without per-image means" if ours else f"in an image of {IMAGE_TOKENS} tokens"
    front = ["---", "library_name: rotatek-compile", "pipeline_tag: image-text-to-text", "tags:", "- rotatek", "- kv-cache"]
    if hub_id:
        front.append(f"base_model: {hub_id}")
    front.append("---")
    name = hub_id or ("tiny-llava-next (bundled)" if base == "tiny-llava-next" else "a local checkpoint")
    return "\n".join(
        [
            *front,
            "",
            f"# RotateK artifact for {name}",
            "",
            f"{'Bases and head masks' if ours else 'Settings'} that let {artifact.geometry.model_type} decode from a compressed KV cache.",
            f"Made by rotatek-compile {__version__}.",
            "",
            "```python",
            "import rotatek_compile",
            'model, processor = rotatek_compile.load("THIS_DIRECTORY")',
            "model.generate(**inputs)",
            "```",
            "",
            f"- basis `{method.basis}`, {method.allocation} ranks, keep ratio {method.keep_ratio} of Key directions"
            if ours
            else f"- {method.words}",
            f"- span `{method.span}`, window {method.window} text tokens",
            f"- bytes per coded token, all layers: {compressed:.0f} of {dense} dense ({dense / compressed:.2f}x), {bytes_of}",
            f"- calibrated on {artifact.calibration.get('num_samples')} samples of {_data_name(artifact.calibration)}",
            *([f"- KL of the plan on calibration documents kept aside: {report['plan_kl']:.2e} nats per answer token"] if ours else []),
            "",
            *(["Limits: Values are stored raw."] if ours else []),
            "Accuracy holds for documents like the calibration data's; measure yours with rotatek-eval.",
            "",
        ]
    )


def _data_name(calibration: dict[str, Any]) -> str:
    return "local data" if calibration.get("split") == "local" else f"`{calibration.get('data')}`"
