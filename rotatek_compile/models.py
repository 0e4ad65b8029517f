"""Names of models, and how they are found and loaded: the one place that calls `from_pretrained`."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .aliases import ALIASES, refuse_unknown
from .carried_files import check_carried_files
from .errors import RotateKError, UsageError
from .families import not_validated
from .geometry import Geometry, geometry_of
from .placement import AUTO, tensor_parallel_arguments

BUNDLED = {"tiny-llava-next": "tiny_llava_next", "tiny-qwen3-vl": "tiny_qwen3_vl"}  # alias -> folder in calibration_data/
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FINGERPRINT_CHUNKS = 64  # pieces of 4 KiB hashed of each weight file


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a checkpoint comes from: `name` as it is recorded, `location` a Hub id or a local directory."""

    name: str
    location: str
    revision: str | None
    is_local: bool
    trust_remote_code: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        # False and not left out: without it transformers asks on a terminal whether to run a checkpoint's code
        trust = {"trust_remote_code": self.trust_remote_code}
        return trust if self.is_local else trust | {"revision": self.revision}


def bundled_path(alias: str) -> Path:
    """Directory of a bundled checkpoint, in a checkout as in an installation."""
    from . import calibration_data

    return Path(calibration_data.__path__[0]) / BUNDLED[alias]


def resolve(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Find a model by alias, local directory or Hub id.

    Raises:
        UsageError: neither an alias nor a Hub id.
        RotateKError: a path that does not exist or holds no config.json.
    """
    if revision is not None and (name in BUNDLED or (name not in ALIASES and Path(name).expanduser().is_dir())):
        what = "bundled" if name in BUNDLED else "a local directory"
        raise UsageError(f"--revision {revision} is for Hub models, but {name} is {what}; leave it out")
    if name in BUNDLED:
        return Source(name=name, location=str(bundled_path(name)), revision=None, is_local=True)
    if name in ALIASES:
        place = ALIASES[name].id
        return Source(name=place, location=place, revision=revision, is_local=False, trust_remote_code=trust_remote_code)
    refuse_unknown(name)
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "rotatek_config.json").is_file() and not (path / "config.json").is_file():
            raise RotateKError(f"{name} is an artifact, not a checkpoint; pass the checkpoint it was compiled from")
        if not (path / "config.json").is_file():
            raise RotateKError(f"{name} holds no config.json, so it is no transformers checkpoint; pass the checkpoint's directory")
        return Source(name=str(path.resolve()), location=str(path), revision=None, is_local=True)
    if path.exists():
        raise RotateKError(f"{name} is a file; pass the checkpoint's directory")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RotateKError(f"model path {name} does not exist; check the path")
    return Source(name=name, location=name, revision=revision, is_local=False, trust_remote_code=trust_remote_code)


def load_config(source: Source) -> Any:
    """The transformers config of a source.

    Raises:
        RotateKError: it cannot be fetched or read, or transformers does not know the architecture.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.location, **source.arguments)
    except Exception as error:  # a damaged config.json raises whatever its first wrong value breaks
        raise RotateKError(f"could not read the config of {source.name}: {_first_line(error)}") from error


def pinned(source: Source, config: Any) -> Source:
    """The source at the commit that its config was read from, so that weights and processor cannot be of another one."""
    commit = commit_of(source, config)
    return source if source.is_local or not commit else replace(source, revision=commit)


def commit_of(source: Source, config: Any) -> str | None:
    """The commit that a Hub model's config was read from: as transformers noted it, else (from 5.23 on) by its place in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if source.is_local:
        return None
    if commit := getattr(config, "_commit_hash", None):
        return str(commit)
    cached = try_to_load_from_cache(source.location, "config.json", revision=source.revision)
    return Path(cached).parent.name if isinstance(cached, str) else source.revision


def auto_class(config: Any) -> Any:
    """The transformers class that loads a model of this config: image-text-to-text if there is one, else text only.

    Raises:
        RotateKError: there is neither.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    choices: tuple[Any, ...] = (AutoModelForImageTextToText, AutoModelForCausalLM)
    for chosen in choices:
        if type(config) in chosen._model_mapping:
            return chosen
    raise RotateKError(
        f"model type {config.model_type!r} is not supported: transformers has no image-text-to-text and no causal language model for it"
    )


def text_only(config: Any) -> bool:
    """Whether the model reads no images."""
    return auto_class(config).__name__ == "AutoModelForCausalLM"


def checked_geometry(config: Any) -> Geometry:
    """Geometry of a model that can be compiled; an architecture that no test has run is warned of.

    Raises:
        RotateKError: no class that generates text, no image token, no pluggable attention, or nothing to compress.
    """
    geometry = geometry_of(config)
    model_class: Any = auto_class(config)._model_mapping[type(config)]
    if not getattr(model_class, "_supports_attention_backend", False):
        raise RotateKError(f"{model_class.__name__} is not supported: it does not use transformers' attention interface")
    if not geometry.visual_token_ids and not text_only(config):
        raise RotateKError(f"model type {config.model_type!r} is not supported: its config names no image token")
    if not geometry.compressible:
        kinds = sorted({layer.layer_type for layer in geometry.layers})
        raise RotateKError(f"nothing to compress: {config.model_type!r} has no full_attention layer, only {', '.join(kinds)}")
    for index in geometry.compressible:
        if geometry.layers[index].head_dim % 8:
            raise RotateKError(f"head_dim {geometry.layers[index].head_dim} of layer {index} is not a multiple of 8; it is not supported")
    if reason := not_validated(config):
        words = f"{reason}; compare with the stock cache (rotatek-eval, rotatek-run --compare-dense) before you rely on the artifact"
        warnings.warn(words, stacklevel=2)
    return geometry


def choose_dtype(name: str | None, config: Any, device: torch.device) -> torch.dtype:
    """`--dtype` by name; by default the checkpoint's on a GPU and float32 on a CPU."""
    if name is not None:
        if name not in DTYPES:
            raise UsageError(f"unknown dtype {name!r}; choose one of {', '.join(DTYPES)}")
        return DTYPES[name]
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    stored = DTYPES.get(stored) if isinstance(stored, str) else stored
    return (stored or torch.bfloat16) if device.type == "cuda" else torch.float32


def choose_device(name: str | None) -> torch.device:
    """`--device` by name; by default the first GPU if there is one. `auto` spreads a model and begins there too.

    Raises:
        RotateKError: the device does not exist here.
    """
    if name in (None, AUTO):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; use cpu, cuda, cuda:N or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported; use cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise RotateKError(f"device {name} is not available: this machine has {torch.cuda.device_count()} CUDA GPUs; use --device cpu")
    return device


def load_model(source: Source, dtype: torch.dtype, device: torch.device, spread: bool = False, tensor_parallel: bool = False) -> Any:
    """The model in eval mode, on the device; with `spread` wherever accelerate finds room, over all GPUs, then in main memory;
    with `tensor_parallel` this process's part of it, as transformers splits it between the launched ones.

    Raises:
        RotateKError: the weights cannot be fetched or read, or transformers has no class for them.
    """
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    config = load_config(source)
    chosen = auto_class(config)
    try:
        # a quantiser places the weights while it reads them, and some kinds cannot be moved afterwards
        quantised = getattr(config, "quantization_config", None) is not None
        placed: dict[str, Any] = {"device_map": AUTO if spread else {"": str(device)}} if quantised or spread else {}
        if tensor_parallel:
            placed = tensor_parallel_arguments()
        both: Any = chosen.from_pretrained(source.location, dtype=dtype, output_loading_info=True, **placed, **source.arguments)
        model, loaded = both
    except ImportError as error:  # a quantised checkpoint whose library is not installed
        raise RotateKError(f"the weights of {source.name} need a package that is missing: {_first_line(error)}; install it") from error
    except Exception as error:  # safetensors and torch have error types of their own for damaged files
        raise RotateKError(f"could not load the weights of {source.name}: {_first_line(error)}; check or download them again") from error
    if missing := sorted(loaded["missing_keys"]):
        # transformers would go on with random numbers in their place
        raise RotateKError(f"the weights of {source.name} lack {len(missing)} tensors, the first is {missing[0]}; download them again")
    return (model if placed else model.to(device)).eval()


def load_processor(source: Source, directory: Path | None = None, config: Any = None) -> Any:
    """The processor, from `directory` (an artifact that carries its files) or from the source.

    Where torchvision is missing, a processor that also takes videos is loaded for images and text alone; a text-only model has a
    tokenizer, which is given the calls of a processor (both: processors.py).

    Args:
        config: of the model; read from the source unless given (a pruned checkpoint's is not transformers').

    Raises:
        RotateKError: it cannot be read, or a model that reads images has no image processor or chat template.
    """
    location: str | Path = source.location
    arguments = source.arguments
    no_images = text_only(load_config(source) if config is None else config)
    files = ("tokenizer_config.json",) if no_images else ("processor_config.json", "preprocessor_config.json")
    if directory is not None and any((directory / name).is_file() for name in files):
        check_carried_files(directory)
        location, arguments = directory, {"trust_remote_code": False}  # left out, transformers would ask
    try:
        if no_images:
            from transformers import AutoTokenizer

            from .processors import TextProcessor

            with _no_word_on_types():
                return TextProcessor(AutoTokenizer.from_pretrained(location, **arguments))
        with _no_word_on_types():
            processor = _stock_processor(location, arguments)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise RotateKError(f"could not load the processor of {source.name}: {_first_line(error)}") from error
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise RotateKError(f"{source.name} has a {type(processor).__name__} but no image processor; add its processor files")
    if not getattr(processor, "chat_template", None):
        raise RotateKError(f"the processor of {source.name} has no chat template; add chat_template.jinja to the checkpoint")
    return processor


@contextmanager
def _no_word_on_types() -> Iterator[None]:
    """transformers looks into config.json for the tokenizer's class, and warns of the model type of a pruned checkpoint, not its own."""
    logger = logging.getLogger("transformers.configuration_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _stock_processor(location: str | Path, arguments: dict[str, Any]) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(location, **arguments)
    except (ImportError, ValueError):  # which of the two depends on how the checkpoint names its video processor
        from .processors import load_without_videos

        processor = load_without_videos(location, **arguments)
        if processor is None:
            raise
        return processor


def identity(source: Source, config: Any) -> dict[str, Any]:
    """What an artifact records of its base: id and commit of a Hub model, id and fingerprint of a local one."""
    if source.is_local:
        return {"id": source.name, "revision": None, "fingerprint": fingerprint(Path(source.location))}
    return {"id": source.name, "revision": commit_of(source, config), "fingerprint": None}


def fingerprint(directory: Path) -> str:
    """A hash of a local checkpoint: its config, and names, sizes and 64 spread-out pieces of its weight files."""
    digest = hashlib.sha256()
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        if file.name == "rotatek.safetensors":
            continue  # an artifact that carries its base weights
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for piece in range(FINGERPRINT_CHUNKS):
                stream.seek(size * piece // FINGERPRINT_CHUNKS)
                digest.update(stream.read(4096))
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
