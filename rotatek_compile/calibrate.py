"""The calibration pass: stream documents through the model once and sum moments in a registered attention function.

No activation is kept: each layer's q, k, v are reduced to sums where attention is computed, then go on to the stock kernel.
Progress is saved in a cache directory, so a killed run resumes and another budget needs no second pass.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .batches import Encoded, merge_media, pad, positions
from .cached_tensors import cache_directory, save_cached
from .errors import RotateKError
from .geometry import Geometry
from .moments import Moments
from .placement import input_device
from .text_attention import Attending, attended_by

NAME = "rotatek_calibrate"
SAVE_SECONDS = 20.0
STORE_FORMAT = 2  # of saved moments: raised whenever the same documents would give other sums


@dataclass(frozen=True, slots=True)
class Places:
    """Tokens of a batch [B, T]: `rows` and `columns` int64 [N]."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, chosen: Tensor, device: torch.device) -> Places:
        """Where bool [B, T] is true."""
        rows, columns = chosen.nonzero(as_tuple=True)
        return cls(rows.to(device), columns.to(device))

    def take(self, x: Tensor) -> Tensor:
        """Those tokens of x [B, H, T, D]: [H, N, D]."""
        return x[self.rows.to(x.device), :, self.columns.to(x.device)].transpose(0, 1)  # layers may be spread over devices


class Collector:
    """What the attention function reads and writes during one batch; one is active at a time.

    Columns are found once per batch, in main memory: asking the device in every layer would make it wait each time. Only images are
    summed one by one, because each has a mean of its own; many small sums would cost a GPU as much as the forward pass.
    """

    def __init__(self, geometry: Geometry, moments: Moments) -> None:
        self.geometry, self.moments = geometry, moments
        self.length = 0
        self.images: list[tuple[int, slice]] = []  # row and columns
        self.text = self.readers = Places(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))

    def announce(self, visual: Tensor, real: Tensor, readers: Sequence[int], device: torch.device) -> None:
        """The next batch: image and real tokens, bool [B, T] on the CPU, and the first column of every row that reads the images."""
        self.length = visual.shape[1]
        self.images = [(row, columns) for row in range(len(visual)) for columns in _image_columns(visual[row])]
        self.text = Places.of(real & ~visual, device)
        self.readers = Places.of(torch.arange(self.length) >= torch.tensor(list(readers))[:, None], device)

    def collect(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """Add one layer's batch: query [B, Hq, T, D], key and value [B, Hkv, T, D]."""
        layer = getattr(module, "layer_idx", None)
        if layer not in self.geometry.compressible or key.shape[2] != self.length:
            return
        if f"{layer}.output_gram" not in self.moments.sums:
            self.moments.add(f"{layer}.output_gram", output_gram(module, self.geometry.layers[layer]))
        for row, columns in self.images:
            self.moments.add_segment(layer, "visual", key[row, :, columns], value[row, :, columns])
        if self.text.rows.numel():
            self.moments.add_segment(layer, "text", self.text.take(key), self.text.take(value))
        if self.readers.rows.numel():
            self.moments.add_queries(layer, self.readers.take(query).unflatten(0, (key.shape[1], -1)), scaling)


def _collecting(collector: Collector, call: Attending) -> tuple[Tensor, Tensor | None]:
    collector.collect(call.module, call.query, call.key, call.value, call.scaling)
    return call.by_sdpa()


def calibrate(
    model: Any, items: Sequence[Encoded], geometry: Geometry, store: MomentStore, batch_size: int, resume: bool, pad_id: int, quiet: bool
) -> Moments:
    """Moments of all items; finished or (with `resume`) partial earlier sums are continued.

    Raises:
        RotateKError: interrupted (after saving what was done), or the statistics are unusable.
    """
    moments = store.load()
    if moments.documents < len(items) and not resume:
        moments = Moments()
    if moments.documents > len(items):
        raise RotateKError(f"the saved moments in {store.file} cover {moments.documents} documents, not {len(items)}; delete that file")
    if moments.documents == len(items):
        return moments
    collector = Collector(geometry, moments)
    device, dtype = input_device(model), model.dtype
    saved, whole = time.monotonic(), Moments(dict(moments.sums), moments.documents)
    bar = tqdm(total=len(items), initial=moments.documents, desc="moments", unit="doc", disable=None if not quiet else True, leave=False)
    try:
        with bar, attended_by(model, NAME, partial(_collecting, collector)), torch.inference_mode():
            while moments.documents < len(items):
                batch = list(items[moments.documents : moments.documents + batch_size])
                run_batch(model, batch, collector, pad_id, device, dtype)
                moments.documents += len(batch)
                bar.update(len(batch))
                whole = Moments(dict(moments.sums), moments.documents)  # adding never changes a tensor in place
                if time.monotonic() - saved > SAVE_SECONDS:
                    store.save(moments)
                    saved = time.monotonic()
    except KeyboardInterrupt:
        store.save(whole)  # a batch cut short would count layers unevenly
        raise RotateKError(
            f"interrupted; {whole.documents} of {len(items)} documents are saved, run the same command with --resume to go on"
        ) from None
    store.save(moments)
    return moments.on_cpu()


def run_batch(model: Any, batch: Sequence[Encoded], collector: Collector, pad_id: int, device: torch.device, dtype: torch.dtype) -> None:
    """One forward pass over prompts with their reference answers."""
    chunk = pad([item.prompt + item.answer for item in batch], pad_id)
    length = chunk.ids.shape[1]
    visual = torch.zeros_like(chunk.ids, dtype=torch.bool)
    for token in collector.geometry.visual_token_ids:
        visual |= chunk.ids == token
    readers = [length - len(item.prompt) - len(item.answer) + item.visual_end for item in batch]
    collector.announce(visual & chunk.mask.bool(), chunk.mask.bool(), readers, device)
    mask = chunk.mask.to(device)
    model(
        input_ids=chunk.ids.to(device),
        attention_mask=mask,
        position_ids=positions(batch, [0] * len(batch), chunk.mask).to(device),
        use_cache=False,
        logits_to_keep=1,
        **merge_media(batch, device, dtype, chunk),
    )


def output_gram(module: nn.Module, shape: Any) -> Tensor:
    """Σ over the group of W_oᵀ W_o [Hkv, D, D] of an attention module; the identity if its output projection is not a plain matrix.

    Zero where a pruned head has no Value channels: the output projection does not see the zeros that stand there (`whole_heads`).
    """
    heads, group, dim = shape.kv_heads, shape.group, shape.head_dim
    width: int = getattr(getattr(module, "widths", None), "value", dim)  # `widths` is what a pruned module has (runtime/rap_attention.py)
    for name in ("o_proj", "out_proj", "dense"):
        projection: Any = getattr(module, name, None)
        weight = getattr(projection, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.shape[-1] == heads * group * width:
            with _loaded(projection):
                per_head = projection.weight.detach().float().unflatten(1, (heads, group, width))  # [hidden, Hkv, G, D]
                product = torch.einsum("ohgd,ohge->hde", per_head, per_head)
                product = nn.functional.pad(product, (0, dim - width, 0, dim - width))
                return (product + product.mT) / 2  # as exactly symmetric as the rest
    return torch.eye(dim).expand(heads, dim, dim).clone()


def _loaded(module: Any) -> Any:
    """A context in which the weight of a module that accelerate keeps on the CPU or on disk is where it is used."""
    if not module.weight.is_meta:
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _image_columns(visual: Tensor) -> list[slice]:
    """Runs of image tokens in one row, bool [T]."""
    columns = visual.nonzero().flatten().tolist()
    runs: list[slice] = []
    for column in columns:
        if runs and runs[-1].stop == column:
            runs[-1] = slice(runs[-1].start, column + 1)
        else:
            runs.append(slice(column, column + 1))
    return runs


class MomentStore:
    """Saved moments of one (model, data, options), in the user's cache directory.

    Other versions of the libraries round differently, so theirs are other moments. Every file carries a checksum of its sums.
    """

    def __init__(self, key: dict[str, Any], directory: Path | None = None) -> None:
        from .artifact import library_versions

        key = key | {"store_format": STORE_FORMAT, "libraries": library_versions()}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        self.file = (directory or cache_directory()) / f"moments-{digest}.safetensors"

    def load(self) -> Moments:
        """What was saved, or empty moments; a damaged file counts as nothing saved."""
        from safetensors import SafetensorError, safe_open

        if not self.file.is_file():
            return Moments()
        try:
            with safe_open(self.file, "pt") as stored:
                sums = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - safe_open is no mapping
                facts = stored.metadata() or {}
            count, checksum = facts["moments"].split()
            return Moments.unpacked(sums, int(count)) if checksum == _checksum(sums, int(count)) else Moments()
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError):
            return Moments()

    def save(self, moments: Moments) -> None:
        """Write atomically.

        Raises:
            RotateKError: the cache directory cannot be written.
        """
        sums = moments.packed()
        # one entry: safetensors writes several in an order of its own each time, and equal moments should be equal files
        save_cached(self.file, sums, "moments", {"moments": f"{moments.documents} {_checksum(sums, moments.documents)}"})


def _checksum(sums: dict[str, Tensor], documents: int) -> str:
    digest = hashlib.sha256(str(documents).encode())
    for name in sorted(sums):
        value = sums[name].contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()
