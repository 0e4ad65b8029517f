"""Where a model's parts lie: on one device, or spread by accelerate over GPUs, main memory and disk (`--device auto`)."""

from __future__ import annotations

from typing import Any

import torch

from .parallel import launched

AUTO = "auto"


def tensor_parallel_arguments() -> dict[str, Any]:
    """Arguments of `from_pretrained` with which the processes of this launch share the model's heads."""
    from transformers.distributed.configuration_utils import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=launched()[1])}


def input_device(model: Any) -> torch.device:
    """Where token ids go: the device that computes the embedding, also while its weights wait on the CPU or on disk."""
    embedding = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    if device.type != "meta":
        return device
    where = getattr(getattr(embedding, "_hf_hook", None), "execution_device", "cpu")
    return torch.device("cuda", where) if isinstance(where, int) else torch.device(where)
