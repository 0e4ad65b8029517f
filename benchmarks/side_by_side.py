"""Commands in processes of their own, several at a time: what `evidence.py` runs.

A command names the file that is there once it is done, and is not run again where it is; and the files that it needs, and waits for them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

GIGABYTES = 7  # of memory that one command may take: training LeanK, compiling


@dataclass(frozen=True, slots=True)
class Command:
    """What one process does.

    words: that say it. minutes: that it may take alone. made: what is there once it is done, if anything is. needs: what is there before.
    """

    words: str
    command: list[str]
    minutes: float
    made: Path | None = None
    needs: tuple[Path, ...] = ()


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usual_jobs() -> int:
    """As many as there are cores, and memory for."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else GIGABYTES
    return max(1, min(cores(), int(memory / GIGABYTES)))


def together(commands: Iterable[Command], jobs: int, logs: Path) -> None:
    """Run what is not there yet, `jobs` at a time, the longest first of those that can begin; what they print goes to files in `logs`.

    Raises:
        SystemExit: one fails, or needs what none has made; those beside it end first.
    """
    wanted = [command for command in commands if command.made is None or not command.made.exists()]
    waiting = sorted(wanted, key=lambda one: -one.minutes)
    running: dict[Future[str], Command] = {}
    failed: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            ready = [one for one in waiting if not failed and all(path.exists() for path in one.needs)]
            for one in ready[: jobs - len(running)]:
                waiting.remove(one)
                running[pool.submit(run, one, jobs, logs)] = one
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            failed += [said for future in done if running.pop(future) and (said := future.result())]
    if waiting and not failed:
        failed.append(f"{waiting[0].words} cannot begin: {next(path for path in waiting[0].needs if not path.exists())} is missing")
    if failed:
        raise SystemExit(f"error: {'; '.join(failed)}; what is finished is kept, run again to go on")


def run(command: Command, jobs: int, logs: Path) -> str:
    """One command, with its share of the cores as threads. Returns what went wrong, in words."""
    log = logs / f"{''.join(c if c.isalnum() else '-' for c in command.words)}.txt"
    expected = f" (about {command.minutes:.0f} minutes on a quiet core)" if command.minutes >= 1 else ""
    say(f"{command.words}{expected} ...")
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // jobs))} | os.environ
    start = time.monotonic()
    try:
        with log.open("w") as shown:
            status = subprocess.run(command.command, check=False, stdout=shown, stderr=subprocess.STDOUT, env=threads).returncode
    except OSError as error:
        return f"{command.words} cannot run: {error.strerror or error} ({command.command[0]})"
    say(f"{command.words}: {time.monotonic() - start:.0f} s" + (f", status {status}" if status else ""))
    if not status:
        missing = command.made is not None and not command.made.exists()
        return f"{command.words} ended without making {command.made}, {log} says why" if missing else ""
    said = log.read_text(errors="replace").strip().rsplit("\n", 1)[-1]
    return f"{command.words} ended with status {status}" + (f": {said}" if said else "")


def say(words: str) -> None:
    """A line, whole where several threads write."""
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()
