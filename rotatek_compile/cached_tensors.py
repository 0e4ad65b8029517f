"""Files of the cache directory: tensors that a later run goes on with, written whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from .errors import RotateKError

STALE_SECONDS = 3600.0  # after which a temporary file is taken for a killed run's


def cache_directory() -> Path:
    """ROTATEK_CACHE, or `rotatek` in the user's cache directory."""
    if chosen := os.environ.get("ROTATEK_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rotatek"


def save_cached(file: Path, tensors: Mapping[str, Tensor], what: str, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically, and delete what runs that were killed while they did left beside it.

    Args:
        what: the tensors are, for a message.

    Raises:
        RotateKError: the cache directory cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for left in file.parent.glob(f"{file.stem}.*.tmp"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    left.unlink()
        save_file(dict(tensors), temporary, metadata=dict(metadata) if metadata else None)
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # where even deleting fails, the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise RotateKError(f"could not save {what} to {file}: {error}; free space or set ROTATEK_CACHE") from error
