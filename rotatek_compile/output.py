"""Output directories that appear whole or not at all, also when the process is killed or the power fails."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import RotateKError

try:
    import fcntl
except ImportError:  # no file locks: what a killed run left behind stays
    fcntl = None  # type: ignore[assignment]

CONFIG_FILE = "rotatek_config.json"  # what makes a directory an artifact
LOCK_FILE = ".rotatek-staging"  # locked while its run is alive; marks a directory as ours to delete


@contextmanager
def atomic_directory(target: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place only if the block succeeds.

    What a killed run left beside `target` is cleared away first (see `recover`).

    Raises:
        RotateKError: `target` exists and is not empty without `overwrite`, or cannot be written (disk full, no permission).
    """
    refuse_existing(target, overwrite)
    target = target.resolve()  # "." has no name, and a link stays a link
    staging: Path | None = None
    lock = -1
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        lock = _locked(staging / LOCK_FILE)
        new, old = staging / "new", staging / "old"
        new.mkdir()
        yield new
        _sync(new)
        if target.exists():
            target.replace(old)  # moved aside, not deleted: the old artifact is whole until the new one is in place
        try:
            new.replace(target)
        except OSError:
            if old.exists():
                old.replace(target)
            raise
        _sync_directory(target.parent)
    except OSError as error:
        raise RotateKError(f"could not write {target}: {error.strerror or error}; free space or choose another --output") from error
    finally:
        if staging is not None:
            _remove(staging)
        if lock >= 0:
            os.close(lock)


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Refuse a target that would be lost, after `recover`.

    An existing artifact is replaced with `overwrite`; a directory that is no artifact never is.
    """
    recover(target)
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


def recover(target: Path) -> None:
    """Clear away what killed runs left beside `target`.

    A run that was killed between its two renames has moved the old artifact aside: it is put back, with a warning. Directories of runs
    that are still alive (on this machine, or on others where the file system has locks) are left alone.
    """
    if fcntl is None:
        return
    with suppress(OSError, RuntimeError, ValueError):  # nothing here is worth failing for
        target = target.resolve()
        ours = re.compile(rf"\.{re.escape(target.name)}-[a-z0-9_]{{8}}")  # as tempfile.mkdtemp names them
        for staging in [entry for entry in target.parent.iterdir() if ours.fullmatch(entry.name) and (entry / LOCK_FILE).is_file()]:
            lock = _locked(staging / LOCK_FILE)
            if lock < 0:
                continue
            try:
                if (staging / "old").exists() and not target.exists():
                    (staging / "old").replace(target)
                    warnings.warn(f"an earlier run was killed while it replaced {target}; the old artifact is back in place", stacklevel=3)
                _remove(staging)
            finally:
                os.close(lock)


def _locked(file: Path) -> int:
    """A descriptor that holds the lock of a file until it is closed or the process ends; -1 where somebody else holds it."""
    if fcntl is None:
        return -1
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # also file systems without locks
        os.close(handle)
        return -1
    return handle


def _remove(staging: Path) -> None:
    """Delete a staging directory; its lock file goes last, so that a run killed meanwhile leaves what `recover` knows."""
    for entry in ("new", "old"):
        shutil.rmtree(staging / entry, ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Have every file of a directory on the disk before a rename makes them visible."""
    for root, _, files in os.walk(directory):
        for name in files:
            with (Path(root) / name).open("rb") as stream:
                os.fsync(stream.fileno())
        _sync_directory(Path(root))


def _sync_directory(directory: Path) -> None:
    with suppress(OSError):  # not every system lets a directory be synced
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
