"""A compressed cache as one file, read strictly: compress once, ask many, also tomorrow and in another process.

A file is safetensors: the tensors of every layer (saved_layer.py), and in its metadata under `rotatek_cache` a SHA-256, a blank, and JSON:

    format_version, tool    2, who wrote it
    artifact                SHA-256 of what the codes mean: `calibration` (means, bases, spectra), `plan`, `method`, `geometry`
    weights                 SHA-256 of a few numbers of every weight of the model that read the tokens, or null
    dtype, length, tail     compute dtype; tokens seen, padding included; newest tokens that may still be cropped
    real                    real tokens of each row
    rope_deltas             what M-RoPE models (Qwen-VL) add to the position of a row's next token, or null
    layers                  the numbers of `LayerState`, by layer
    document                what a `Document` adds (document.py)

The SHA-256 is that of the JSON and of all tensors: it finds damage, not malice, and no other check relies on it.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .._version import __version__
from ..errors import ArtifactError, RotateKError, UsageError
from ..placement import input_device
from ..untrusted import parse_json, printable, shown
from .cache import RotateKCache, RotateKLayer
from .saved_checks import AGAIN, MAX_NUMBER, MAX_ROWS, Common, check_numbers, check_state, layer_shapes, refuse, whole
from .saved_identity import identity, layer_devices, weights_of, with_sum
from .saved_layer import LayerState, layer_state, restore_layer

if TYPE_CHECKING:
    from .enable import enable

FORMAT_VERSION = 2  # 2: fewer calibrated scales
KEY = "rotatek_cache"  # of the file's metadata
MAX_HEADER = 64 << 20  # bytes of JSON
MAX_BYTES = 64 << 30
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8"}
COMPUTE = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}


def save_cache(cache: RotateKCache, path: str | Path, *, document: dict[str, Any] | None = None, overwrite: bool = False) -> Path:
    """Write a cache to one file, whole or not at all; returns its path.

    Args:
        document: JSON that `load_cache` hands back.
        overwrite: replace a file that is there.

    Raises:
        RotateKError: the cache is empty, in the middle of an image, a rival's, of a model with sliding layers or spread over processes,
            lacks what an M-RoPE model keeps beside it, or the file cannot be written.
        UsageError: the file exists.
    """
    path = Path(os.path.realpath(path))
    layers = _saveable(cache)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; pass overwrite=True to replace it, or choose another path")
    states = {layer.index: layer_state(layer) for layer in layers}
    tensors = {f"layers.{i}.{name}": tensor for i, state in states.items() for name, tensor in state.tensors.items()}
    first = layers[0]
    described = {
        "format_version": FORMAT_VERSION,
        "tool": f"rotatek {__version__}",
        "artifact": identity(cache.artifact.artifact),
        "weights": cache.weights,
        "dtype": str(first.store.dtype).removeprefix("torch."),
        "length": first.logical_length,
        "tail": first.tail,
        "real": first.real.tolist(),
        "rope_deltas": None if cache.rope_deltas is None else cache.rope_deltas.flatten().tolist(),
        "layers": {str(i): state.numbers for i, state in states.items()},
        "document": document,
    }
    try:
        text = json.dumps(described, allow_nan=False)
    except ValueError as error:
        raise RotateKError(f"the cache counts an error that is no finite number ({error}) and cannot be saved") from error
    _write(tensors, {KEY: with_sum(text, tensors)}, path)
    return path


def load_cache(path: str | Path, enabled: enable) -> tuple[RotateKCache, dict[str, Any]]:
    """Read a cache that `save_cache` wrote, for the model on which `enabled` is in force. Nothing is used before it is checked.

    Memory is about twice the file.

    Returns:
        the cache, and the JSON of its file.

    Raises:
        RotateKError: one sentence naming the file, what was seen in it and what to do; so is a cache of another artifact, plan or model.
    """
    file = Path(path)
    data = _read(file)
    header, described, digest = _header(file, data)
    cache = enabled.new_cache()
    devices = layer_devices(enabled.model)
    common = _check_described(described, cache, enabled.model, str(file))
    prepared = {
        i: cache.artifact.layer(i, devices.get(i, input_device(enabled.model)), common.dtype)
        for i in cache.artifact.artifact.geometry.compressible
    }
    numbers = described["layers"]
    refuse(isinstance(numbers, dict) and set(numbers) == {str(i) for i in prepared}, str(file), f"layers are {shown(numbers)}")
    shapes: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {}
    for i, layer in prepared.items():
        check_numbers(numbers[str(i)], layer, common, f"{file}: layer {i}")
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer_shapes(numbers[str(i)], layer, common).items()}
    _check_header(file, header, shapes)
    tensors = _tensors(file, data)
    refuse(
        with_sum(described["text"], tensors).startswith(digest + " "),
        str(file),
        "was changed after it was written (its sha256 does not fit)",
    )
    for i, layer in prepared.items():
        prefix = f"layers.{i}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        state = LayerState(own, numbers[str(i)])
        check_state(state, layer, common, f"{file}: layer {i}")
        restored = cast("RotateKLayer", cache.layers[i])  # _check_described looked
        restore_layer(restored, state, devices.get(i, input_device(enabled.model)), common.dtype)
        restored.logical_length, restored.tail = common.length, described["tail"]
        restored.real = torch.tensor(common.real).numpy()
    cache.weights = described["weights"]
    deltas = described["rope_deltas"]
    cache.rope_deltas = None if deltas is None else torch.tensor(deltas, dtype=torch.int64, device=input_device(enabled.model)).view(-1, 1)
    return cache, described


def _saveable(cache: RotateKCache) -> list[RotateKLayer]:
    """The layers of a cache that can be saved.

    Raises:
        RotateKError: it cannot.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, RotateKLayer)]
    if len(layers) != len(cache.layers):
        raise RotateKError(
            "this model has sliding or other layers that keep their stock cache, which cannot be saved; fork() the cache instead"
        )
    if any(layer.coder is not None for layer in layers):
        raise RotateKError(f"the cache of rival method {layers[0].coder.name} cannot be saved; rivals are here to be compared")  # type: ignore[union-attr]
    if any(layer.kept is not None for layer in layers):
        raise RotateKError("a cache that dropped image tokens (--token-keep-ratio) cannot be saved; fork() it instead, or keep all tokens")
    if not layers or not all(layer.is_initialized and layer.logical_length for layer in layers):
        raise RotateKError("the cache holds no tokens, or a forward call on it did not finish; there is nothing to save")
    first = layers[0]
    if any((one.logical_length, one.tail, one.real.tolist()) != (first.logical_length, first.tail, first.real.tolist()) for one in layers):
        raise RotateKError("the layers of the cache hold different tokens: a forward call on it did not finish; start a new cache")
    if cache.artifact.shard.size > 1:
        raise RotateKError("the cache is spread over several processes (tensor parallelism) and cannot be saved; load the model in one")
    if cache.unfinished():
        raise RotateKError("the cache is in the middle of an image, or was just given one; cache.finish() says that it is complete")
    if cache.artifact.artifact.geometry.position_axes > 1 and cache.rope_deltas is None:
        raise RotateKError(
            "this model keeps the position of the next token beside the cache (rope_deltas), and this cache does not know it; "
            "make the cache with rotatek_compile.compress()"
        )
    return layers


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """A safetensors file that appears whole or not at all, also when the process is killed or the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if not path.parent.is_dir():
        raise RotateKError(f"could not write {path}: there is no folder {path.parent}; make it first")
    staged: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}-", dir=path.parent)
        staged = Path(name)
        os.close(handle)
        save_file(tensors, staged, metadata=metadata)
        staged.chmod(0o644)
        with staged.open("rb") as stream:
            os.fsync(stream.fileno())
        staged.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RotateKError(f"could not write {path}: {reason}; free space or choose another path") from error
    finally:
        if staged is not None:
            staged.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    with suppress(OSError):  # not every system lets a directory be synced
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# -- reading ----------------------------------------------------------------------------------------------------------------------


def _read(file: Path) -> bytes:
    """The bytes of a regular file, read once."""
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as stream:  # noqa: PTH123 - Path.open takes no flags
            size = os.fstat(handle).st_size if file.is_file() else -1
            refuse(0 <= size <= MAX_BYTES, str(file), f"is no regular file of at most {MAX_BYTES} bytes")
            return stream.read(size)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise RotateKError(
            f"{printable(str(file))} cannot be read ({getattr(error, 'strerror', None) or error}); check its path"
        ) from error


def _header(file: Path, data: bytes) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Tensors by name, the JSON of the cache (its own text as `text`) and the recorded SHA-256."""
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else -1
    inside = 0 < length <= min(MAX_HEADER, len(data) - 8)
    refuse(inside, str(file), f"is no saved cache, or damaged (header of {length} bytes in a file of {len(data)})")
    header = _json(data[8 : 8 + length], f"header of {file}")
    metadata = header.pop("__metadata__", None)
    value = metadata.get(KEY) if isinstance(metadata, dict) else None
    if not isinstance(value, str):
        raise RotateKError(f"{file} is no saved cache: its metadata names none")
    digest, _, text = value.partition(" ")
    described = _json(text.encode(), f"metadata of {file}", names=False)
    return header, described | {"text": text}, digest


def _json(data: bytes, where: str, names: bool = True) -> dict[str, Any]:
    try:
        return parse_json(data, where, printable=names)
    except ArtifactError as error:
        raise RotateKError(str(error).replace("compile the artifact again", AGAIN)) from error


def _check_described(described: dict[str, Any], cache: RotateKCache, model: nn.Module, where: str) -> Common:
    version: Any = described.get("format_version")
    refuse(type(version) is int and version >= 1, where, f"format_version is {shown(version)}")
    if version < FORMAT_VERSION:
        raise RotateKError(f"{where}: format_version {version} is of an older rotatek-compile; read the document again and save it anew")
    if version > FORMAT_VERSION:
        raise RotateKError(f"{where}: format_version {version} is newer than {FORMAT_VERSION}; upgrade rotatek-compile")
    keys = ("artifact", "weights", "dtype", "length", "tail", "real", "rope_deltas", "layers", "document")
    refuse(not (missing := [key for key in keys if key not in described]), where, f"{', '.join(missing)} is missing")
    if any(not isinstance(layer, RotateKLayer) for layer in cache.layers) or cache.artifact.coder is not None:
        raise RotateKError(f"{where} cannot be read for this model: its cache is one that cannot be saved")
    own, seen = identity(cache.artifact.artifact), described["artifact"]
    refuse(isinstance(seen, dict), where, f"artifact is {shown(seen)}, expected sums")
    if other := [part for part in ("geometry", "calibration", "plan", "method") if seen.get(part) != own[part]]:
        words = " and ".join(other)
        raise RotateKError(f"{where} was compressed with another artifact or budget (another {words}); load that one, or compress again")
    weights = described["weights"]
    refuse(weights is None or isinstance(weights, str), where, f"weights is {shown(weights)}")
    if weights is not None and (now := weights_of(model)) is not None and now != weights:
        raise RotateKError(
            f"{where} was read by a model with other weights (or an adapter, or another precision); compress the document again"
        )
    dtype, length, tail, real = (described[key] for key in ("dtype", "length", "tail", "real"))
    refuse(isinstance(dtype, str) and dtype in COMPUTE, where, f"dtype is {shown(dtype)}, expected one of {', '.join(COMPUTE)}")
    if COMPUTE[dtype] != (seen := getattr(model, "dtype", None)):
        raise RotateKError(
            f"{where} holds {dtype} numbers, the model computes in {str(seen).removeprefix('torch.')}; load the model in {dtype}"
        )
    refuse(whole(length) and length > 0 and whole(tail, length), where, f"length is {shown(length)}, tail {shown(tail)}")
    rows = isinstance(real, list) and 0 < len(real) <= MAX_ROWS and all(whole(tokens, length) for tokens in real)
    refuse(rows, where, f"real is {shown(real)}, expected up to {length} tokens of each row")
    deltas = described["rope_deltas"]
    refuse(deltas is None or (isinstance(deltas, list) and len(deltas) == len(real)), where, f"rope_deltas is {shown(deltas)}")
    refuse(all(type(n) is int and abs(n) <= MAX_NUMBER for n in deltas or ()), where, f"rope_deltas is {shown(deltas)}")
    axes = cache.artifact.artifact.geometry.position_axes
    refuse((deltas is not None) == (axes > 1), where, f"rope_deltas is {shown(deltas)} for a model with {axes} position axes")
    return Common(len(real), length, tuple(real), COMPUTE[dtype])


def _check_header(file: Path, header: dict[str, Any], shapes: dict[str, tuple[torch.dtype, tuple[int | None, ...]]]) -> None:
    """Names, dtypes and shapes before any tensor is made."""
    few = _few(set(shapes) ^ set(header))
    refuse(not few, str(file), f"tensors are missing or unknown ({few})")
    for name, (dtype, shape) in shapes.items():
        entry = header[name]
        seen: Any = entry.get("shape") if isinstance(entry, dict) else None
        refuse(isinstance(seen, list) and all(map(whole, seen)), str(file), f"tensor {name} is {shown(entry)}")
        fits = len(seen) == len(shape) and all(want in (None, have) for want, have in zip(shape, seen, strict=True))
        wanted = [size if size is not None else "any" for size in shape]
        refuse(fits, str(file), f"tensor {name} has shape {shown(seen)}, expected {wanted}")
        refuse(entry.get("dtype") == DTYPES[dtype], str(file), f"tensor {name} is {shown(entry.get('dtype'))}, expected {DTYPES[dtype]}")


def _few(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(name[:60] for name in found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _tensors(file: Path, data: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # copies: pools may go on sharing memory with nothing that is only lent
        return {name: tensor.clone() for name, tensor in load(data).items()}
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise RotateKError(f"{file} is damaged or truncated ({str(error)[:200]!r}); {AGAIN}") from error
