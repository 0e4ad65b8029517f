"""Documents divided among processes: which batches a process takes, and the files of per-document values that are put together again.

Every process sees the same seeded sample in the same batches and takes each N-th of them, so what it finds of a batch is what one process
alone would find, and so is everything that is computed from all files together.

A file is JSON lines: a header that says what is measured, then one line for each batch, written when the batch is done.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rotatek_compile import journal
from rotatek_compile.errors import RotateKError
from rotatek_compile.outcomes import Outcome, Row

Found = dict[str, list[Outcome]]  # by label, in the order of a batch's documents


class Shard(journal.Shard):
    """Process `number` of `count`, from 1, and what it reads and writes."""

    def batches(self, documents: int, batch_size: int) -> Iterator[tuple[int, slice]]:
        """Numbers of this process's batches among all, and the documents of each."""
        for number in self.numbers(-(-documents // batch_size)):
            yield number, slice(number * batch_size, min((number + 1) * batch_size, documents))

    def file(self, folder: Path, name: str) -> Path:
        """Where this process writes."""
        return folder / f"{name}-{self.number}-of-{self.count}.jsonl"


@dataclass(slots=True)
class Values:
    """What was found, by number of the batch; `notes` are what a script wants to keep of a batch beside outcomes.

    header: what is measured; the same for every process of one run.
    """

    header: dict[str, Any]
    batches: dict[int, Found] = field(default_factory=dict)
    notes: dict[int, Any] = field(default_factory=dict)
    file: Path | None = None

    @classmethod
    def begin(cls, header: dict[str, Any], file: Path | None = None) -> Values:
        """Nothing yet; with `file`, every batch is written there as it is added."""
        values = cls(header, file=file)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"header": header}) + "\n", encoding="utf-8")
        return values

    def add(self, number: int, found: Found, note: Any = None) -> None:
        """Keep a batch."""
        self.batches[number], self.notes[number] = found, note
        if self.file is not None:
            rows = {label: [asdict(outcome) for outcome in outcomes] for label, outcomes in found.items()}
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"batch": number, "found": rows, "note": note}, ensure_ascii=False) + "\n")

    def row(self, label: str, method: str | None = None) -> Row:
        """One method over all documents, in the order of the data."""
        outcomes = [outcome for number in sorted(self.batches) for outcome in self.batches[number][label]]
        return Row(method if method is not None else label, outcomes)

    @property
    def documents(self) -> int:
        """How many were measured."""
        return sum(len(next(iter(found.values()))) for found in self.batches.values())


def read_values(files: Sequence[Path]) -> Values:
    """What several processes found, put together.

    Raises:
        RotateKError: a file that is missing or no such file, files of different runs, a batch that two of them hold, or none at all.
    """
    whole: Values | None = None
    owner: dict[int, Path] = {}
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line end was cut short
            header = json.loads(lines[0])["header"]
            batches = [json.loads(line) for line in lines[1:]]
            found = {b["batch"]: {k: [Outcome.from_json(o) for o in rows] for k, rows in b["found"].items()} for b in batches}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise RotateKError(f"{file} holds no per-document values ({error}); pass the .jsonl files that the shards wrote") from error
        whole = whole or Values(header)
        if header != whole.header:
            key = next(k for k in {**header, **whole.header} if header.get(k) != whole.header.get(k))
            raise RotateKError(f"{file} is of another run than {files[0]}: {key} differs; merge only shards of one run")
        if twice := found.keys() & owner.keys():
            raise RotateKError(f"{file} holds batch {min(twice)}, which {owner[min(twice)]} holds too; merge every shard once")
        owner |= dict.fromkeys(found, file)
        whole.batches |= found
        whole.notes |= {b["batch"]: b["note"] for b in batches}
    if whole is None or not whole.batches:
        raise RotateKError("the shards hold no finished batch; give them more time, or smaller batches")
    return whole


def by_run(files: Sequence[Path]) -> list[list[Path]]:
    """Files of one run beside each other, by their names without the shard."""
    runs: dict[str, list[Path]] = {}
    for file in sorted(files):
        runs.setdefault(re.sub(r"-\d+-of-\d+$", "", file.stem), []).append(file)
    for name, own in runs.items():
        wanted = int(own[0].stem.rpartition("-of-")[2]) if "-of-" in own[0].stem else len(own)
        if len(own) != wanted:
            print(f"{name}: {len(own)} of {wanted} shards", file=sys.stderr)
    return list(runs.values())
