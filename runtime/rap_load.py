"""Loading a pruned checkpoint: the stock model class with pair-pruned attention in it, filled by transformers' own `from_pretrained`.

The class is made anew for each checkpoint, because transformers builds a model before it reads weights; so renamed tensors, dtypes,
`device_map` and tied weights are its business as ever. From then on the model is an ordinary one with the stock cache.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact import Artifact
from ..carried_files import check_carried_files
from ..errors import ArtifactError, RotateKError
from ..geometry import geometry_of
from ..models import auto_class
from ..placement import AUTO
from ..rap_artifact import dense_channels, pairs_of
from ..rap_checkpoint import read_config
from ..rap_plan import Widths
from ..rap_tensors import check_checkpoint
from .accounting import DENSE_ITEMSIZE, CacheBytes, cache_bytes
from .cache_layer import RotateKLayer
from .rap_attention import PairPrunedAttention, attention_modules, refuse_text, replace_attention

_ARTIFACT = "_rotatek_pruned"


def load_pruned(artifact: Artifact, directory: Path, dtype: torch.dtype, device: torch.device, spread: bool = False) -> Any:
    """The pruned model in eval mode.

    Args:
        artifact: one of `--method rap` or `rap+rotatek`.
        directory: where its weights are.
        spread: over all GPUs, then main memory, as accelerate finds room.

    Raises:
        ArtifactError: config, weights and artifact do not belong together, or a file is damaged.
        RotateKError: this version of transformers cannot load it.
    """
    from transformers.utils import logging

    assert artifact.rap is not None
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    check_carried_files(directory)
    config = read_config(directory)
    if reason := artifact.geometry.difference(geometry_of(config)):
        raise ArtifactError(f"{directory / 'config.json'} does not fit the artifact: {reason}; compile the artifact again")
    refuse_text(config.get_text_config(decoder=True))
    check_checkpoint(directory, artifact.geometry, artifact.rap.layers)
    chosen = pruned_model_class(auto_class(config)._model_mapping[type(config)], dict(enumerate(artifact.rap.layers)))
    placed: dict[str, Any] = {"device_map": AUTO} if spread else {}
    try:
        both: Any = chosen.from_pretrained(
            str(directory), config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False, **placed
        )
        model, loaded = both
    except RotateKError:
        raise
    except Exception as error:  # safetensors and torch have error types of their own for damaged files
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise RotateKError(f"could not load the weights of {directory}: {words[0]}; compile the artifact again") from error
    if missing := sorted(loaded["missing_keys"]):
        raise ArtifactError(
            f"the weights of {directory} lack {len(missing)} tensors, the first is {missing[0]}; compile the artifact again"
        )
    set_pairs(model, pairs_of(artifact))
    setattr(model, _ARTIFACT, artifact)
    return (model if spread else model.to(device)).eval()


def pruned_model_class(stock: type[Any], widths: Mapping[int, Widths]) -> type[Any]:
    """A model class that is the stock one but for its text attention."""

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        replace_attention(self, widths)

    def refuse_save(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RotateKError(
            "a RAP checkpoint is not saved by save_pretrained, which would write a config that fits full heads; copy its directory"
        )

    # transformers looks things up by the class's name and module
    own = {"__init__": build, "save_pretrained": refuse_save, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), own)


def set_pairs(model: Any, pairs: Mapping[int, Tensor]) -> None:
    """Tell every layer which pairs its heads have: int64 [Hkv, m] by layer."""
    for layer, (_, module) in attention_modules(model).items():
        if not isinstance(module, PairPrunedAttention):
            raise RotateKError(f"layer {layer} of {type(model).__name__} has stock attention; it was not loaded as a RAP checkpoint")
        module.pairs = pairs[layer].to(module.k_proj.weight.device)


def pruned_artifact(model: Any) -> Artifact | None:
    """The artifact that a model was loaded from as a pruned checkpoint, if it was."""
    found = getattr(model, _ARTIFACT, None)
    return found if isinstance(found, Artifact) else None


def same_pruning(first: Artifact, second: Artifact) -> bool:
    """Whether two artifacts are of one pruned checkpoint, as far as widths, pairs and the base model tell."""
    bases = [{name: artifact.base_model.get(name) for name in ("id", "revision", "fingerprint")} for artifact in (first, second)]
    if first.rap is None or first.rap != second.rap or bases[0] != bases[1]:
        return False
    one, other = pairs_of(first), pairs_of(second)
    return all(torch.equal(pairs, other[i]) for i, pairs in one.items())


def bytes_of(model: Any, cache: Any, tokens: int) -> CacheBytes:
    """`cache_bytes`, but `dense` of a pruned model's cache is what its base would hold of the same tokens."""
    found, artifact = cache_bytes(cache, tokens), pruned_artifact(model)
    if artifact is None:
        return found
    dense = 0
    for channels, layer in zip(dense_channels(artifact.geometry), cache.layers, strict=True):
        if isinstance(layer, RotateKLayer):
            dense += DENSE_ITEMSIZE * channels * (tokens if layer.is_initialized else 0)
            continue
        held = layer.keys.shape[0] * layer.keys.shape[2] if layer.is_initialized else 0
        dense += DENSE_ITEMSIZE * channels * min(tokens, held)  # a sliding layer holds the newest tokens only
    return replace(found, dense=dense)
