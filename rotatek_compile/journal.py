"""documents.jsonl: every outcome of an evaluation as it is found, and what a killed run resumes from.

The first line says what is being measured, every further line is one document answered by one method. A batch is written at once
when all methods have answered it; on resuming, whatever follows the last whole batch is cut off.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import RotateKError
from .outcomes import Outcome

FILE = "documents.jsonl"
Batch = list[list[Outcome]]  # per method, per document


class Journal:
    """Outcomes of one evaluation on disk, in the order asks × batches × methods × documents.

    Args:
        directory: where `documents.jsonl` lies; made if missing.
        facts: what must be equal for outcomes to be comparable; JSON values only.
        asks: the modes, in the order in which they run.
        methods: labels, in order.
        sizes: documents per batch.
        resume: go on with what is there.

    Raises:
        RotateKError: there are outcomes already and `resume` is off, or they are of another evaluation, or the folder cannot be written.
    """

    def __init__(
        self, directory: Path, facts: dict[str, Any], asks: Sequence[str], methods: Sequence[str], sizes: Sequence[int], resume: bool
    ) -> None:
        self.file = directory / FILE
        self.methods, self.sizes = list(methods), list(sizes)
        self.finished: dict[str, list[Batch]] = {ask: [] for ask in asks}
        header = json.dumps({"evaluation": facts | {"asks": list(asks), "methods": self.methods}}) + "\n"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            there = self.file.read_bytes() if self.file.exists() else b""
            if there and not resume:
                raise RotateKError(f"{self.file} holds an evaluation already; pass --resume to go on with it, or another --output")
            if b"\n" not in there and not header.encode().startswith(there):
                raise RotateKError(f"{self.file} is no evaluation of rotatek-eval; move it away, or choose another --output")
            end = self._read(there, header) if b"\n" in there else 0
            self.stream = self.file.open("r+b" if there else "wb")
            self.stream.truncate(end)
            self.stream.seek(end)
            if resume and not there:
                warnings.warn(f"--resume: nothing saved in {directory}, starting anew", stacklevel=2)
            if not end:
                self._write(header)
        except OSError as error:
            raise RotateKError(f"--output {directory} cannot be used: {error.strerror or error}; choose another one") from error

    def add(self, ask: str, found: Batch) -> None:
        """Save the next batch of a mode."""
        number = len(self.finished[ask])
        self.finished[ask].append(found)
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

    def _read(self, data: bytes, header: str) -> int:
        """Take over the whole batches of an earlier run; returns where the last of them ends."""
        lines = data.split(b"\n")[:-1]  # what follows the last line end was cut short
        self._check_header(lines[0], header)
        at, end = 1, len(lines[0]) + 1
        for ask in self.finished:
            for number, size in enumerate(self.sizes):
                block = lines[at : at + size * len(self.methods)]
                found = self._batch(block, ask, number, size)
                if found is None:
                    return end
                self.finished[ask].append(found)
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
        return found if [part[0].method for part in found] == self.methods else None

    def _check_header(self, line: bytes, header: str) -> None:
        try:
            there, ours = json.loads(line)["evaluation"], json.loads(header)["evaluation"]
            different = next((key for key in [*ours, *there] if there.get(key) != ours.get(key)), None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RotateKError(f"{self.file} is not an evaluation of rotatek-eval; choose another --output") from error
        if different:
            words = f"{different} {_short(there.get(different))}, this run has {_short(ours.get(different))}"
            raise RotateKError(f"{self.file} was made with {words}; give the same options to --resume, or choose another --output")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
