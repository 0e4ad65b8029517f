"""Compilations that can be killed: a tiny random checkpoint, documents, and runs in forked processes that die when they are told to."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # and a forked process has no threads of its parent


# imported once, here, and not in every forked process
import datasets  # noqa: F401

from rotatek_compile import CompileOptions, calibrate, compile_artifact
from rotatek_compile.artifact import read_artifact
from rotatek_compile.errors import RotateKError
from tiny_training import llava_next

with suppress(ImportError):
    pass

GEOMETRY = {
    "hidden": 64, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 32, "feed_forward": 96,
    "vision_hidden": 64, "vision_layers": 1, "vision_feed_forward": 96,
}  # fmt: skip
DOCUMENTS = 6
OWN_LINES = ("seconds",)  # of report.json: what may differ between two runs of one command
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


def prepare_inputs(folder: Path) -> tuple[Path, Path]:
    """A checkpoint with random weights and a file of questions about pictures, in `folder`."""
    from PIL import Image

    config = llava_next.build_config(**GEOMETRY)
    llava_next.save_checkpoint(llava_next.build_model(config, 0), folder / "checkpoint")
    rows = []
    for n in range(DOCUMENTS):
        Image.linear_gradient("L").rotate(90 * n).resize((96 + 8 * n, 80)).convert("RGB").save(folder / f"page{n}.png")
        rows.append(json.dumps({"question": f"What is {n}?", "answers": [f"word {n}"], "image": f"page{n}.png"}))
    (folder / "pages.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "checkpoint", folder / "pages.jsonl"


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a forked process: torch must not compute in the process that forks the others."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.write(writing, pickle.dumps(function(*arguments)))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as stream:  # noqa: PTH123 - a descriptor
        data = stream.read()
    os.waitpid(process, 0)
    return pickle.loads(data)


def readable(place: Path) -> list[Path]:
    """Every directory below a place that loads as an artifact."""
    found = []
    for config in sorted(place.rglob("rotatek_config.json")):
        try:
            read_artifact(config.parent)
        except RotateKError:
            continue
        found.append(config.parent)
    return found


@dataclass(frozen=True, slots=True)
class Command:
    """What every run compiles."""

    model: Path
    data: Path
    keep_ratio: float = 0.25

    def options(self, place: Path, *, resume: bool, overwrite: bool) -> CompileOptions:
        return CompileOptions(
            model=str(self.model), calib=str(self.data), output=place / "artifact", num_samples=DOCUMENTS, batch_size=1,
            keep_ratio=self.keep_ratio, device="cpu", resume=resume, overwrite=overwrite, quiet=True,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended: exit code (0 done, 1 refused or failed), None if it was killed; seconds; changes of files it was about to make."""

    code: int | None
    seconds: float
    words: str
    changes: int


def run(command: Command, place: Path, *, resume: bool, overwrite: bool, after: float | None = None, change: int | None = None) -> Ended:
    """Compile into `place/artifact`, moments in `place/cache`, in a process of its own that is killed with SIGKILL

    Args:
        after: so many seconds after its start,
        change: right before it changes the file system for this (1 = first) time: opens a file to write, renames, makes or removes one.
    """
    log = place / "log"
    process = os.fork()
    if process == 0:
        code = 1
        try:
            code = _child(command, place, resume, overwrite, change, log)
        finally:
            os._exit(code)
    started, killed = time.monotonic(), False
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            break
        if after is not None and not killed and time.monotonic() - started >= after:
            os.kill(process, signal.SIGKILL)
            killed = True
        time.sleep(0.001)
    words = log.read_text(encoding="utf-8") if log.exists() else ""
    log.unlink(missing_ok=True)
    changes = (place / "changes").stat().st_size if (place / "changes").exists() else 0
    (place / "changes").unlink(missing_ok=True)
    return Ended(None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), time.monotonic() - started, words, changes)


def _child(command: Command, place: Path, resume: bool, overwrite: bool, change: int | None, log: Path) -> int:
    os.environ["ROTATEK_CACHE"] = str(place / "cache")
    calibrate.SAVE_SECONDS = 0.0  # every batch is saved, so that a kill finds some saved and some not
    _count_changes(place, change)
    try:
        compile_artifact(command.options(place, resume=resume, overwrite=overwrite))
    except RotateKError as error:
        log.write_text(str(error), encoding="utf-8")
        return 1
    except BaseException:
        log.write_text(traceback.format_exc(), encoding="utf-8")
        return 2
    return 0


def _count_changes(place: Path, change: int | None) -> None:
    """Count what this process is about to change below `place`, one byte each in `place/changes`, and kill it at number `change`."""
    counter = os.open(place / "changes", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    below, seen = f"{place}{os.sep}", 0

    def event(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if name == "open":
            path, _, flags = arguments
            counts = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            counts, path = name in CHANGES, arguments[0] if arguments else None
        if not counts or not isinstance(path, (str, os.PathLike)) or not str(path).startswith(below):
            return
        seen += 1
        os.write(counter, b".")
        if seen == change:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(event)


def contents(artifact: Path) -> dict[str, bytes]:
    """Every file of an artifact by name; of report.json all but the timings."""
    found = {str(file.relative_to(artifact)): file.read_bytes() for file in sorted(artifact.rglob("*")) if file.is_file()}
    if report := found.get("report.json"):
        kept = {key: value for key, value in json.loads(report).items() if key not in OWN_LINES}
        found["report.json"] = json.dumps(kept, sort_keys=True).encode()
    return found


def choose_moment(rng: random.Random, seconds: float, changes: int) -> dict[str, Any]:
    """A random moment of a run: by the clock, or by its changes of the file system, half of each."""
    return {"after": rng.uniform(0, seconds)} if rng.random() < 0.5 else {"change": rng.randint(1, changes)}
