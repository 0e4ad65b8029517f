"""The weights of a checkpoint as files: found, measured, and put beside an artifact one by one, never loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from .errors import RotateKError
from .hub import check_space, existing, hub_errors, remote_sizes
from .models import Source

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
PATTERNS = (CONFIG, GENERATION, INDEX, "model*.safetensors")
"""What an artifact takes over of a checkpoint; nothing else of it is ever read, copied or pushed."""


def has_weights(directory: Path) -> bool:
    """Whether a directory is a checkpoint as well: a config and weights, or the index of weights."""
    return (directory / CONFIG).is_file() and any((directory / name).is_file() for name in (WEIGHTS, INDEX))


def checkpoint_files(directory: Path, name: str | None = None) -> list[Path]:
    """Config, generation config and weights of a checkpoint, as transformers would read them.

    Args:
        name: what to call the checkpoint in an error.

    Raises:
        RotateKError: there are no safetensors weights, or not all that the index names.
    """
    name = name or str(directory)
    files = [directory / file for file in (CONFIG, GENERATION) if (directory / file).is_file()]
    if not files or files[0].name != CONFIG:
        raise RotateKError(f"{name} holds no {CONFIG}, so it is no transformers checkpoint")
    if (directory / WEIGHTS).is_file():
        return [*files, directory / WEIGHTS]
    if not (directory / INDEX).is_file():
        raise RotateKError(f"{name} has no {WEIGHTS} and no {INDEX}; weights in other formats are not copied, save them as safetensors")
    return [*files, directory / INDEX, *(directory / shard for shard in _shards(directory, name))]


def _shards(directory: Path, name: str) -> list[str]:
    try:
        shards = sorted(set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise RotateKError(f"{name}: {INDEX} is not readable ({error}); get the checkpoint again") from error
    for shard in shards:
        if Path(shard).name != shard or not (shard.startswith("model") and shard.endswith(".safetensors")):
            raise RotateKError(f"{name}: {INDEX} names {shard!r}, expected names like model-00001-of-00002.safetensors")
        if not (directory / shard).is_file():
            raise RotateKError(f"{name}: {INDEX} names {shard}, which is missing; get the checkpoint again")
    return shards


def checkpoint_directory(source: Source) -> Path:
    """Where the files of a checkpoint are; those of a Hub model are fetched into the Hub's cache if they are not there.

    Raises:
        RotateKError: they cannot be had.
    """
    if source.is_local:
        return Path(source.location)
    from huggingface_hub import snapshot_download

    with hub_errors(source.location, source.revision):
        return Path(snapshot_download(source.location, revision=source.revision, allow_patterns=list(PATTERNS)))


def check_include(source: Source, target: Path) -> None:
    """Before hours of work: are there safetensors weights to include, and is there room for them below `target`?

    Raises:
        RotateKError: one of the two is not so.
    """
    if source.is_local:
        files = checkpoint_files(Path(source.location), source.name)
        linked = _device(target) == files[-1].stat().st_dev
        needed = 0 if linked else sum(file.stat().st_size for file in files)
    else:
        sizes = remote_sizes(source.location, source.revision, PATTERNS)
        if sizes is not None and not any(name.endswith(".safetensors") for name in sizes):
            raise RotateKError(f"{source.name} has no safetensors weights; weights in other formats are not copied")
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE)
        check_space(cache, 0 if sizes is None else sum(sizes.values()), "the weights of the base model in the Hub's cache")
        needed = 0 if sizes is None or _device(cache) == _device(target) else sum(sizes.values())
    check_space(target, needed, "a copy of the weights")


def include_weights(source: Source, target: Path) -> list[str]:
    """Put the checkpoint's files into a directory: hard links where they can be, else copies; returns their names.

    Raises:
        RotateKError: no weights that can be included.
        OSError: the file system refused.
    """
    directory = checkpoint_directory(source)
    names = []
    for file in checkpoint_files(directory, source.name):
        place = target / file.name
        try:
            os.link(file.resolve(), place)  # the Hub's cache holds links to blobs
        except OSError:
            shutil.copyfile(file, place)
        names.append(file.name)
    return names


def _device(path: Path) -> int:
    return existing(path).stat().st_dev
