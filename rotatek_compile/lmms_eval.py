"""The entry point by which lmms-eval finds our model (group `lmms_eval.models`, lmms-eval 0.7): `--model rotatek`.

    lmms-eval --model rotatek --model_args artifact=org/name,batch_size=4 --tasks docvqa_val

lmms-eval is no dependency of ours; it asks for this function where both are installed. The model is in lmms_eval_model.py.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval registers: a `ModelManifest` with a chat model.

    Raises:
        ImportError: lmms-eval is not installed, or older than its registry of manifests (0.7).
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="rotatek", chat_class_path="rotatek_compile.lmms_eval_model.RotateK")
