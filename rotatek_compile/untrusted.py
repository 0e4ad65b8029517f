"""Reading files that somebody else may have written: bounded, regular, inside their directory, and JSON without its loose ends.

Nothing here knows what a file should say. Every refusal is one sentence that names the file and what was seen in it.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import stat
from pathlib import Path
from typing import Any

from .errors import ArtifactError

MAX_DIGITS = 19  # 64-bit integers; longer ones overflow whatever they reach
MAX_DEPTH = 32  # our own files nest six deep
# characters that move a terminal's cursor, reverse its text or cannot be encoded; \n and \t are refused too: names hold none
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_printer = reprlib.Repr()
_printer.maxstring = _printer.maxother = 60
_printer.maxlong, _printer.maxlevel = 40, 2
_printer.maxlist = _printer.maxdict = _printer.maxtuple = 4


def shown(value: Any) -> str:
    """A value from a file as it may stand in a sentence: printable, and a line at most, however long or deep it is."""
    return _printer.repr(value)  # repr escapes what cannot be printed


def printable(text: str) -> str:
    """A text without the characters that `parse_json` refuses."""
    return _UNPRINTABLE.sub("?", text)


def read_file(directory: Path, name: str, limit: int, without: str = "is incomplete") -> bytes:
    """The bytes of `directory/name`, all read at once, so that what is checked is what is used.

    Args:
        limit: bytes.
        without: what a directory without this file is called.

    Links are followed within the directory, and from a snapshot of the Hub cache into its `blobs`, where huggingface_hub keeps the files.

    Raises:
        ArtifactError: no such directory or file, something else than a regular file, a link that leads out, more than `limit` bytes.
    """
    file = directory / name
    try:
        if not directory.exists():
            raise ArtifactError(f"artifact {directory} does not exist; make one with rotatek-compile")
        if not file.exists():
            raise ArtifactError(f"{directory} {without}: it has no {name}; make one with rotatek-compile, or download it again")
        if not inside(directory, file):
            raise ArtifactError(f"{file} is a link to {shown(os.path.realpath(file))}, outside the artifact; put the file itself there")
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as stream:  # noqa: PTH123 - Path.open takes no flags
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise ArtifactError(f"{file} is no regular file; compile the artifact again or download it again")
            if found.st_size > limit:
                raise ArtifactError(f"{file} has {found.st_size} bytes, at most {limit} are allowed; compile the artifact again")
            data = stream.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{shown(str(file))} cannot be read ({reason}); check its path and permissions") from error
    if len(data) > limit:
        raise ArtifactError(f"{file} grows while it is read; wait until it is written, then try again")
    return data


def inside(directory: Path, file: Path) -> bool:
    """Whether a file, links resolved, lies in the directory (or among the blobs of the Hub cache that the directory is a snapshot of)."""
    root, target = (Path(os.path.realpath(path)) for path in (directory, file))  # unlike resolve(), no error for a loop of links
    if target.is_relative_to(root):
        return True
    if root.parent.name != "snapshots":
        return False
    # from version 2 on huggingface_hub keeps large files once for all repositories, in `blobs` of the cache itself
    return any(target.is_relative_to(folder / "blobs") for folder in (root.parent.parent, root.parent.parent.parent))


def read_json(directory: Path, name: str, limit: int, without: str = "is incomplete") -> dict[str, Any]:
    """A JSON object of `directory/name` (see `parse_json`).

    Raises:
        ArtifactError: as `read_file` and `parse_json`.
    """
    return parse_json(read_file(directory, name, limit, without), str(directory / name))


def parse_json(data: bytes, where: str, *, printable: bool = True) -> dict[str, Any]:
    """A JSON object as RFC 8259 has it: UTF-8, finite numbers, integers of 64 bits, each key once, depth at most `MAX_DEPTH`.

    Args:
        where: names the text in messages.
        printable: refuse strings and keys with control characters, which would reach a terminal.

    Raises:
        ArtifactError: it is not that.
    """
    again = "compile the artifact again"
    try:
        found = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite, parse_int=_whole
        )
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not readable JSON ({str(error)[:200]}); {again}") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{where} holds a {type(found).__name__}, expected an object; {again}")
    level: list[Any] = [found]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        texts: list[str] = []
        for value in level:
            if isinstance(value, dict):
                texts.extend(value)
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
            elif isinstance(value, str):
                texts.append(value)
        if printable and (bad := next(filter(_UNPRINTABLE.search, texts), None)) is not None:
            raise ArtifactError(f"{where} holds the text {shown(bad)} with control characters; {again}")
        if not below:
            return found
        level = below
    raise ArtifactError(f"{where} nests more than {MAX_DEPTH} levels deep; {again}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(twice)} stands twice in one object")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"number {text[:20]} is too large")
    return number


def _whole(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"number {text[:20]}... has {len(text)} digits")
    return int(text)
