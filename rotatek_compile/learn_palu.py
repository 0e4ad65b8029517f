"""What Palu needs of a model (runtime/rivals/palu.py): directions of its Keys before RoPE and of its Values, and gradients for the ranks.

Two passes over calibration documents with their reference answers. The first sums the uncentred second moment of what k_proj and v_proj put
out over the image tokens, by group of heads (fp64); its eigenvectors are the directions. The second, one document at a time, sums the
squared gradient of the answer's mean cross entropy with respect to the weights of both; a group's Fisher information is the mean over
its weights of the root of the mean over documents, as in Palu's released code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .batches import Encoded
from .errors import RotateKError, UsageError
from .geometry import Geometry
from .rap_reading import Read, heads_of, read
from .rap_statistics import loss_of
from .runtime.before_rope import key_projections
from .runtime.rivals.palu import SIDES, Place, head_groups, tensor_name, widths_of


def learn_palu(model: Any, items: Sequence[Encoded], geometry: Geometry, *, batch_size: int, pad_id: int, quiet: bool) -> dict[str, Tensor]:
    """The tensors of the learned file, fp32, as `palu.shapes_of` names them.

    Raises:
        UsageError: a model that the method cannot code, or no documents with images.
        RotateKError: statistics that are not finite.
    """
    modules = projections(model, geometry)
    moments = second_moments(model, modules, items, geometry, batch_size, pad_id, quiet)
    fisher = fisher_information(model, modules, items, geometry, pad_id, quiet)
    found = {}
    for place in widths_of(geometry):
        if not bool(moments[place].isfinite().all()) or not fisher[place] > 0:
            raise RotateKError(f"the statistics of layer {place[0]} ({place[1]}s) are not usable; try --dtype float32")
        found[tensor_name(place, "directions")] = leading(moments[place]).float()
        found[tensor_name(place, "fisher")] = torch.tensor([fisher[place]], dtype=torch.float32)
    return found


def leading(moment: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix [N, N] as columns, largest eigenvalue first."""
    return torch.linalg.eigh(moment).eigenvectors.flip(-1)


def projections(model: Any, geometry: Geometry) -> dict[tuple[int, str], Any]:
    """k_proj and v_proj of every compressed layer.

    Raises:
        UsageError: as `before_rope.key_projections`; Values without a plain projection; weights that are not there to be differentiated.
    """
    found = {}
    for layer, module in key_projections(model, geometry).items():
        width = geometry.layers[layer].kv_heads * geometry.layers[layer].head_dim
        for side, name in zip(SIDES, ("k_proj", "v_proj"), strict=True):
            own = getattr(module, name, None)
            weight = getattr(own, "weight", None)
            if weight is None or len(weight) != width or not weight.is_floating_point() or weight.is_meta:
                raise UsageError(f"palu needs a plain {name} in layer {layer}, and {type(module).__name__} has none; choose another method")
            found[layer, side] = own
    return found


def second_moments(
    model: Any, modules: dict[tuple[int, str], Any], items: Sequence[Encoded], geometry: Geometry, batch_size: int, pad_id: int, quiet: bool
) -> dict[Place, Tensor]:
    """Σ yᵀ y over image tokens of what the projections put out, by group, fp64 [g·D, g·D] on the CPU.

    Raises:
        UsageError: no image token in any document.
    """
    sums = {place: torch.zeros(width, width, dtype=torch.float64) for place, width in widths_of(geometry).items()}
    visual = torch.zeros(0, 0, dtype=torch.bool)

    def add(layer: int, side: str, out: Tensor) -> None:
        dim = geometry.layers[layer].head_dim
        for number, heads in enumerate(head_groups(geometry.layers[layer].kv_heads)):
            own = out[visual.to(out.device)][:, heads.start * dim : heads.stop * dim].float()  # [N, g·D]
            sums[layer, side, number] += (own.mT @ own).double().cpu()

    def hooked(layer: int, side: str) -> Any:
        return lambda module, args, out: add(layer, side, out)

    hooks = [module.register_forward_hook(hooked(*place)) for place, module in modules.items()]
    bar = tqdm(total=len(items), desc="moments", unit="doc", disable=None if not quiet else True, leave=False)
    tokens = 0
    try:
        with bar, torch.inference_mode():
            for start in range(0, len(items), batch_size):
                batch = read(model, items[start : start + batch_size], geometry, pad_id)
                visual = image_tokens(batch, geometry)
                tokens += int(visual.sum())
                model(**batch.inputs, logits_to_keep=1)
                bar.update(len(batch.real))
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise UsageError("palu learns from image tokens, and these documents have none; choose other --calib data")
    return sums


def image_tokens(batch: Read, geometry: Geometry) -> Tensor:
    """Which tokens of a batch are of images, bool [B, T] on the CPU."""
    ids = batch.inputs["input_ids"].cpu()
    return torch.isin(ids, torch.tensor(geometry.visual_token_ids, dtype=ids.dtype)) & batch.real


def fisher_information(
    model: Any, modules: dict[tuple[int, str], Any], items: Sequence[Encoded], geometry: Geometry, pad_id: int, quiet: bool
) -> dict[Place, float]:
    """Mean over the weights of a group of √(mean over documents of the squared gradient), by group."""
    squared = {place: torch.zeros_like(module.weight, dtype=torch.float32) for place, module in modules.items()}
    with differentiated(model, [module.weight for module in modules.values()]):
        for item in tqdm(items, desc="gradients", unit="doc", disable=None if not quiet else True, leave=False):
            batch = read(model, [item], geometry, pad_id, None)
            model.zero_grad(set_to_none=True)
            loss_of(model(**batch.inputs, logits_to_keep=batch.last).logits, batch).backward()
            for place, module in modules.items():
                squared[place] += module.weight.grad.float().square()
    found: dict[Place, float] = {}
    for (layer, side), total in squared.items():
        per_head = heads_of((total / len(items)).sqrt(), geometry.layers[layer].kv_heads)  # [Hkv, D, hidden]
        for number, heads in enumerate(head_groups(len(per_head))):
            found[layer, side, number] = float(per_head[heads].double().mean())
    return found


@contextmanager
def differentiated(model: Any, weights: Sequence[Tensor]) -> Iterator[None]:
    """Gradients for these weights alone; afterwards all parameters as they were, and no gradient left."""
    needed = {id(weight) for weight in weights}
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in needed)
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for p, wanted in before:
            p.requires_grad_(wanted)
