"""Output directories that appear whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import RotateKError

CONFIG_FILE = "rotatek_config.json"  # what makes a directory an artifact


@contextmanager
def atomic_directory(target: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place only if the block succeeds.

    Raises:
        RotateKError: `target` exists and is not empty without `overwrite`, or cannot be written (disk full, no permission).
    """
    refuse_existing(target, overwrite)
    target = target.resolve()  # "." has no name, and a link stays a link
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        new, old = staging / "new", staging / "old"
        new.mkdir()
        yield new
        if target.exists():
            target.replace(old)  # moved aside, not deleted: the old artifact is whole until the new one is in place
        try:
            new.replace(target)
        except OSError:
            if old.exists():
                old.replace(target)
            raise
    except OSError as error:
        raise RotateKError(f"could not write {target}: {error.strerror or error}; free space or choose another --output") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Refuse a target that would be lost.

    An existing artifact is replaced with `overwrite`; a directory that is no artifact never is.
    """
    try:
        if not target.exists():
            return
        if not target.is_dir():
            raise RotateKError(f"{target} is a file; choose another --output")
        if not any(target.iterdir()):
            return
    except OSError as error:
        raise RotateKError(f"--output {target} cannot be used: {error.strerror or error}; choose another one") from error
    if not overwrite:
        raise RotateKError(f"{target} is not empty; pass --overwrite to replace it, or choose another --output")
    if not (target / CONFIG_FILE).is_file():
        raise RotateKError(f"{target} holds no {CONFIG_FILE}, so --overwrite will not delete it; choose another --output")
