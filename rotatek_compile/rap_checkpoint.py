"""The smaller checkpoint: maps of a plan folded into the attention weights, shard by shard; every other tensor is copied bit for bit.

A tensor is read, mapped in float32 and stored in its own dtype; what is in memory is one shard of the result. config.json gets a model
type that transformers does not know, so that nobody loads narrow weights into full modules.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .carried_files import MAX_CARRIED
from .errors import ArtifactError, RotateKError
from .geometry import Geometry
from .rap_plan import RapLayer, RapPlan
from .rap_tensors import SIZES, attention_tensors, stored_tensors
from .untrusted import read_json, shown
from .weights import CONFIG, GENERATION, INDEX

MODEL_TYPE = "rotatek_rap, which rotatek_compile.load() reads"
"""`model_type` of the written config.json: transformers' refusal quotes it, "... has model type `rotatek_rap, which rotatek_compile.load()
reads` but Transformers does not recognize this architecture"."""
BASE_TYPE = "rotatek_base_model_type"  # the base's own model type, in the same file
MAX_SHARD = "5GB"  # as transformers saves


def refuse_quantised(config: Any, name: str) -> None:
    """Refuse a checkpoint whose weights stand for others.

    Raises:
        RotateKError: saying so.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise RotateKError(f"{name} is quantised, and quantised weights cannot be pruned; pass the checkpoint it was made from")


def fold(layer: RapLayer, projection: str, part: str, tensor: Tensor) -> Tensor:
    """A projection's weight or bias after the maps of its layer, computed in float32, in the tensor's dtype.

    Args:
        projection: `q_proj`, `k_proj`, `v_proj` or `o_proj`.
        part: `weight`, [H·D, hidden] and for `o_proj` [hidden, Hq·D], or `bias`, [H·D] and for `o_proj` [hidden].

    Returns:
        rows (of `o_proj` columns) of the kept channels: H·2m for Queries and Keys, H·r for Values and the output.
    """
    exact = tensor.to(torch.float32)
    if projection == "o_proj":
        if part == "bias":
            return (exact if layer.bias is None else exact + layer.bias.to(exact.device)).to(tensor.dtype)
        maps = layer.output.to(exact.device)  # [Hq, D, r]
        return torch.einsum("nhd,hdr->nhr", exact.unflatten(1, maps.shape[:2]), maps).flatten(1).to(tensor.dtype)
    maps = {"q_proj": layer.query, "k_proj": layer.key, "v_proj": layer.value}[projection].to(exact.device)  # [H, kept, D]
    heads = exact.unflatten(0, (maps.shape[0], maps.shape[2]))
    return torch.einsum("hkd,hd...->hk...", maps, heads).flatten(0, 1).to(tensor.dtype)


class PrunedWeights:
    """The tensors of the smaller checkpoint by name, computed when they are asked for.

    Args:
        directory: of the dense checkpoint.
        plan: what is kept.
        trained: attention tensors that recovery has changed, by (layer, "q_proj.weight" and the like); they stand for the folded ones.
    """

    def __init__(self, directory: Path, name: str, geometry: Geometry, plan: RapPlan, trained: Mapping[tuple[int, str], Tensor]) -> None:
        self.plan, self.trained, self.geometry = plan, trained, geometry
        self.stored = stored_tensors(directory, name)
        self.attention = attention_tensors(self.stored, geometry)
        own = {place: key for key, place in self.attention.items()}
        # the mean correction gives an output projection a bias that it did not have
        self.added = {
            own[i, "o_proj.weight"].removesuffix("weight") + "bias": i
            for i, layer in plan.layers.items()
            if layer.bias is not None and (i, "o_proj.bias") not in own
        }

    def shards(self) -> Iterator[tuple[str, list[str]]]:
        """File names and the tensors in them, as transformers would split and name them."""
        from huggingface_hub import split_state_dict_into_shards_factory

        sizes = {name: self.bytes_of(name) for name in (*self.stored, *self.added)}
        order = sorted(sizes, key=lambda name: (str(self._file(name)), name))  # tensors of one file stay together
        split = split_state_dict_into_shards_factory(
            {name: sizes[name] for name in order},
            get_storage_size=lambda size: size,
            get_storage_id=lambda size: None,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=MAX_SHARD,
        )
        yield from split.filename_to_tensors.items()

    def bytes_of(self, name: str) -> int:
        """Size of a tensor of the result."""
        if name in self.added:
            return self.stored[self._beside(name)].shape[0] * SIZES[self.stored[self._beside(name)].dtype]
        stored = self.stored[name]
        if name not in self.attention:
            return stored.bytes
        (i, own), layer = self.attention[name], self.geometry.layers[self.attention[name][0]]
        kept = self.plan.layers[i]
        if own == "o_proj.bias":
            return stored.bytes
        width = kept.value_width if own.startswith(("v_proj", "o_proj")) else 2 * kept.kept_pairs
        return stored.bytes // layer.head_dim * width

    def read(self, name: str, opened: Callable[[Path], Any]) -> Tensor:
        """A tensor of the result; `opened` gives the open safetensors file of a path."""
        if name in self.added:
            i = self.added[name]
            bias = self.trained.get((i, "o_proj.bias"), self.plan.layers[i].bias)
            assert bias is not None
            like: Tensor = opened(self._file(name)).get_tensor(self._beside(name))
            return bias.to(like.dtype)
        if name not in self.attention:
            tensor: Tensor = opened(self._file(name)).get_tensor(name)
            return tensor
        i, own = self.attention[name]
        dense: Tensor = opened(self._file(name)).get_tensor(name)
        if (trained := self.trained.get((i, own))) is not None:
            return trained.to(dense.dtype)
        projection, _, part = own.partition(".")
        return fold(self.plan.layers[i], projection, part, dense)

    def _beside(self, name: str) -> str:
        return name.removesuffix("bias") + "weight"

    def _file(self, name: str) -> Path:
        return self.stored[self._beside(name) if name in self.added else name].file


def write_checkpoint(
    source: Path, name: str, target: Path, geometry: Geometry, plan: RapPlan, trained: Mapping[tuple[int, str], Tensor] | None = None
) -> None:
    """Write the pruned weights and the config of a checkpoint into an existing (staging) directory.

    Args:
        source: directory of the dense checkpoint, `name` what to call it in an error.
        trained: see `PrunedWeights`.

    Raises:
        RotateKError: the checkpoint has no safetensors weights, or they are not those of this geometry.
        OSError: the file system refused.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    weights, total = PrunedWeights(source, name, geometry, plan, trained or {}), 0
    places: dict[str, str] = {}
    for file, names in weights.shards():
        with ExitStack() as stack:
            files: dict[Path, Any] = {}

            def opened(path: Path, files: dict[Path, Any] = files, stack: ExitStack = stack) -> Any:
                if path not in files:
                    files[path] = stack.enter_context(safe_open(path, framework="pt"))
                return files[path]

            tensors = {key: weights.read(key, opened).contiguous().cpu() for key in names}
            try:
                save_file(tensors, target / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(str(error)) from error
        (target / file).chmod(0o644)
        places |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(places.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    config = {"model_type": MODEL_TYPE, BASE_TYPE: config["model_type"]} | {k: v for k, v in config.items() if k != "model_type"}
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, target / GENERATION)


def read_config(directory: Path) -> Any:
    """The transformers config of the base model, out of a pruned checkpoint's config.json.

    Raises:
        ArtifactError: it is not one that `write_checkpoint` wrote, or transformers does not know the base's model type.
    """
    from transformers import CONFIG_MAPPING

    data, where = read_json(directory, CONFIG, MAX_CARRIED), str(directory / CONFIG)
    kind = data.pop(BASE_TYPE, None)
    if data.pop("model_type", None) != MODEL_TYPE or not isinstance(kind, str):
        raise ArtifactError(f"{where} is not that of a RAP checkpoint ({BASE_TYPE} is {shown(kind)}); compile the artifact again")
    if kind not in CONFIG_MAPPING:
        raise ArtifactError(f"{where}: {BASE_TYPE} is {shown(kind)}, which this version of transformers does not know; upgrade it")
    try:
        return CONFIG_MAPPING[kind].from_dict(data | {"model_type": kind})
    except Exception as error:  # a damaged config.json raises whatever its first wrong value breaks
        raise ArtifactError(f"{where} is no config of {kind} ({str(error).splitlines()[0][:200]}); compile the artifact again") from error
