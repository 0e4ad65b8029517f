"""What a reader may do while it reads, watched from inside its process: files, sockets and processes through Python's audit events
(PEP 578), memory through the kernel's peak of resident pages and a limit of address space, time through an alarm."""

from __future__ import annotations

import os
import resource
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

WRITES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.chown",
    "os.truncate",
    "os.utime",
    "shutil.",
)
ELSEWHERE = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.spawn",
    "urllib.",
    "ftplib.",
    "pty.",
    "ctypes.dlopen",
)
PYTHON = tuple({sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix)})  # modules may still be imported
SECONDS = 30  # by the clock: a busy machine takes ten times the 2 s of the largest JSON
SPACE = 512 << 20  # address space beyond what the process has when the limit is set


class Watch:
    """Collects what the guarded block did and may not: opening anything outside one directory, or anything for writing."""

    def __init__(self, code: Path) -> None:
        self.directory: str | None = None
        self.code = (*PYTHON, str(code))
        self.seen: list[str] = []
        sys.addaudithook(self._event)  # for the rest of the process

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.directory is None:
            return
        if event == "open":
            self._opened(*arguments)
        elif event.startswith(WRITES) or event.startswith(ELSEWHERE):
            self.seen.append(f"{event} {arguments!r:.200}")

    def _opened(self, path: Any, mode: Any, flags: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # a descriptor that is open already
        name = os.path.realpath(os.fsdecode(path))  # a link below the directory may lead out of it
        if (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or (
            isinstance(mode, str) and set(mode) & set("wax+")
        ):
            self.seen.append(f"open for writing {name!r:.200}")
        elif not f"{name}{os.sep}".startswith(f"{self.directory}{os.sep}") and not name.startswith(self.code):
            self.seen.append(f"open {name!r:.200}")

    @contextmanager
    def over(self, directory: Path) -> Any:
        """Watch the block; only files below `directory` may be opened, to read."""
        self.seen, self.directory = [], str(directory)
        try:
            yield self
        finally:
            self.directory = None


class TooSlow(Exception):
    """The block ran longer than SECONDS."""


@contextmanager
def alarm() -> Any:
    """Raise TooSlow in the block after SECONDS (a loop that never returns to Python is left to the parent process)."""

    def ring(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def limit_space() -> None:
    """Let this process map at most SPACE more than it has: what allocates beyond fails instead of swapping."""
    now = _status("VmSize") + SPACE
    resource.setrlimit(resource.RLIMIT_AS, (now, now))


def reset_peak() -> int:
    """Start a new peak of resident memory; returns the present size in bytes."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Most bytes resident since `reset_peak` (since the start, where the kernel cannot reset it)."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
