"""What a saved cache belongs to: the artifact and the weights it was made with, by SHA-256, and where a model's layers keep theirs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import Artifact

SAMPLED = 8  # numbers of each weight that identify it


def identity(artifact: Artifact) -> dict[str, str]:
    """What codes mean, as SHA-256 by part: calibration, plan, method and geometry."""
    method = asdict(artifact.method)
    for planned in ("levels", "image_tokens"):  # what a plan was made of: no code depends on it
        method.pop(planned)
    if artifact.method.token_method is None:  # not said of caches that hold all tokens, as before there were others
        for name in ("token_method", "token_keep_ratio", "token_budget"):
            method.pop(name)
    sums = {"calibration": hashlib.sha256(), "plan": hashlib.sha256()}
    for name in sorted(artifact.tensors):
        part = "plan" if name.endswith("_plan") else "calibration" if name.endswith(("_mean", "_encode", "_spectrum")) else None
        if part is not None:
            tensor = artifact.tensors[name]
            _add(sums[part], name, tensor.to(torch.int64 if part == "plan" else torch.float32))
    words = {"method": method, "geometry": artifact.geometry.to_json()}
    found = {part: hashlib.sha256(json.dumps(words[part], sort_keys=True).encode()).hexdigest() for part in words}
    return {part: digest.hexdigest() for part, digest in sums.items()} | found


def weights_of(model: nn.Module) -> str | None:
    """SHA-256 over a few numbers of every weight of a model; None where some lie on a disk or are spread over processes."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if weight.device.type == "meta" or hasattr(weight, "to_local"):
            return None
        _add(digest, name, weight.detach().reshape(-1)[:SAMPLED])
    return digest.hexdigest()


def layer_devices(model: Any) -> dict[int, torch.device]:
    """Where each text layer computes, which is where its part of the cache lies."""
    found: dict[int, torch.device] = {}
    for module in model.get_decoder().modules():
        index, weight = getattr(module, "layer_idx", None), next(module.parameters(), None)
        if type(index) is not int or weight is None:
            continue
        hooks = (getattr(part, "_hf_hook", None) for part in module.modules())  # accelerate keeps weights elsewhere between calls
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        device = next((device for device in devices if device is not None), weight.device)
        found[index] = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return found


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy())


def with_sum(text: str, tensors: dict[str, Tensor]) -> str:
    """The text behind the SHA-256 of itself and of names, dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    return f"{digest.hexdigest()} {text}"
