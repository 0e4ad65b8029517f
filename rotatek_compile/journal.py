"""documents.jsonl: every outcome of an evaluation as it is found, and what a killed run resumes from.

The first line says what is being measured, every further line is one document answered by one method. A batch is written at once
when all methods have answered it; on resuming, whatever follows the last whole batch is cut off.

Several processes may share an evaluation: process I of N takes each N-th batch and writes documents-I-of-N.jsonl beside it. A run without
`--shard` takes over what it finds there, in the order of the documents, so that its files are those of one process.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from .errors import RotateKError, UsageError
from .outcomes import Outcome

if TYPE_CHECKING:
    from typing_extensions import Self

FILE = "documents.jsonl"
SHARDS = "documents-*-of-*.jsonl"
SHARD = re.compile(r"documents-([1-9][0-9]{0,5})-of-([1-9][0-9]{0,5})\.jsonl")
Batch = list[list[Outcome]]  # per method, per document


@dataclass(frozen=True, slots=True)
class Shard:
    """Process `number` of `count`, from 1: it takes each `count`-th batch, from the `number`-th."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """From I/N.

        Raises:
            UsageError: no such thing.
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UsageError(f"--shard {text!r} is not I/N with 1 <= I <= N; pass 1/4, 2/4, 3/4 and 4/4 to four processes")
        return cls(int(found[1]), int(found[2]))

    def numbers(self, batches: int) -> range:
        """Of this process's batches."""
        return range(self.number - 1, batches, self.count)

    @property
    def journal(self) -> str:
        """Name of its journal."""
        return FILE if self.count == 1 else f"documents-{self.number}-of-{self.count}.jsonl"


class Journal:
    """Outcomes of one evaluation on disk, in the order asks × batches × methods × documents.

    finished: by ask and number of the batch, what its file holds. shared: what files of other processes hold beside that.

    Args:
        directory: where `documents.jsonl` lies; made if missing.
        facts: what must be equal for outcomes to be comparable; JSON values only.
        asks: the modes, in the order in which they run.
        methods: labels, in order.
        sizes: documents per batch.
        resume: go on with what is there.
        shard: which of several processes this is.

    Raises:
        RotateKError: there are outcomes already and `resume` is off, or they are of another evaluation, or the folder cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        facts: dict[str, Any],
        asks: Sequence[str],
        methods: Sequence[str],
        sizes: Sequence[int],
        resume: bool,
        shard: Shard | None = None,
    ) -> None:
        shard = shard or Shard()
        self.file = directory / shard.journal
        self.methods, self.sizes, self.numbers = list(methods), list(sizes), shard.numbers(len(sizes))
        self.finished: dict[str, dict[int, Batch]] = {ask: {} for ask in asks}
        self.shared: dict[str, dict[int, Batch]] = {ask: {} for ask in asks}
        header = json.dumps({"evaluation": facts | {"asks": list(asks), "methods": self.methods}}) + "\n"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            there = self.file.read_bytes() if self.file.exists() else b""
            others = sorted(directory.glob(SHARDS)) if shard.count == 1 else []
            parts = {other: _shard_of(other) for other in others}
            if (there or others) and not resume:
                held = self.file if there else others[0]
                raise RotateKError(f"{held} holds an evaluation already; pass --resume to go on with it, or another --output")
            if b"\n" not in there and not header.encode().startswith(there):
                raise RotateKError(f"{self.file} is no evaluation of rotatek-eval; move it away, or choose another --output")
            end = self._read(self.file, there, header, self.numbers, self.finished) if b"\n" in there else 0
            for other in others:
                if b"\n" in (data := other.read_bytes()):
                    self._read(other, data, header, parts[other].numbers(len(self.sizes)), self.shared)
            self.stream = self.file.open("a+b")
            _lock(self.stream, self.file, there)
            self.stream.truncate(end)
            self.stream.seek(end)
            if resume and not there and not others:
                warnings.warn(f"--resume: nothing saved in {directory}, starting anew", stacklevel=2)
            if not end:
                self._write(header)
        except OSError as error:
            raise RotateKError(f"--output {directory} cannot be used: {error.strerror or error}; choose another one") from error

    def add(self, ask: str, number: int, found: Batch) -> None:
        """Save the next batch of a mode."""
        self.finished[ask][number] = found
        rows = [{"ask": ask, "batch": number} | asdict(outcome) for outcomes in found for outcome in outcomes]
        self._write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def close(self) -> None:
        self.stream.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _write(self, text: str) -> None:
        self.stream.write(text.encode())
        self.stream.flush()
        os.fsync(self.stream.fileno())  # a batch that counts as done must survive a power cut

    def _read(self, file: Path, data: bytes, header: str, numbers: Sequence[int], into: dict[str, dict[int, Batch]]) -> int:
        """Take over the whole batches of an earlier run; returns where the last of them ends."""
        lines = data.split(b"\n")[:-1]  # what follows the last line end was cut short
        self._check_header(file, lines[0], header)
        at, end = 1, len(lines[0]) + 1
        for ask in into:
            for number in numbers:
                block = lines[at : at + self.sizes[number] * len(self.methods)]
                found = self._batch(block, ask, number, self.sizes[number])
                if found is None:
                    return end
                into[ask][number] = found
                at, end = at + len(block), end + sum(len(line) + 1 for line in block)
        return end

    def _batch(self, block: list[bytes], ask: str, number: int, size: int) -> Batch | None:
        if len(block) < size * len(self.methods):
            return None
        try:
            rows = [json.loads(line) for line in block]
            outcomes = [Outcome.from_json(row) for row in rows]
            if any((row["ask"], row["batch"]) != (ask, number) for row in rows):
                return None
        except (ValueError, KeyError, TypeError):
            return None  # damaged: it is measured again
        found = [outcomes[start : start + size] for start in range(0, len(outcomes), size)]
        asked = [outcome.id for outcome in found[0]]  # a line that stands twice would give one method another document
        whole = all([outcome.id for outcome in part] == asked for part in found)
        named = all(outcome.method == name for part, name in zip(found, self.methods, strict=True) for outcome in part)
        return found if whole and named else None

    def _check_header(self, file: Path, line: bytes, header: str) -> None:
        try:
            there, ours = json.loads(line)["evaluation"], json.loads(header)["evaluation"]
            different = next((key for key in [*ours, *there] if there.get(key) != ours.get(key)), None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RotateKError(f"{file} is not an evaluation of rotatek-eval; choose another --output") from error
        if different:
            words = f"{different} {_short(there.get(different))}, this run has {_short(ours.get(different))}"
            raise RotateKError(f"{file} was made with {words}; give the same options to --resume, or choose another --output")


def _shard_of(file: Path) -> Shard:
    """Which process wrote a file, by its name.

    Raises:
        RotateKError: none has such a name.
    """
    found = SHARD.fullmatch(file.name)
    if found is None or int(found[1]) > int(found[2]):
        raise RotateKError(f"{file} is not what a process I of N writes, documents-I-of-N.jsonl; move it away, or choose another --output")
    return Shard(int(found[1]), int(found[2]))


def _lock(stream: IO[bytes], file: Path, there: bytes) -> None:
    """Keep other processes from the same file until it is closed, also by a crash.

    Raises:
        RotateKError: one has it, or has written to it since it was read.
    """
    busy = f"another rotatek-eval is writing {file}; wait for it, or choose another --output"
    try:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise RotateKError(busy) from error
    except (ImportError, OSError):  # Windows, and file systems without locks
        return
    stream.seek(0)
    if stream.read() != there:
        stream.close()
        raise RotateKError(busy)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
