"""Samples out of a stream of rows, at any place: what has been read is kept, compressed, in a temporary file without a name."""

from __future__ import annotations

import hashlib
import io
import tempfile
import weakref
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .errors import DataError, EndOfData
from .local import open_image
from .quiet import quiet_datasets, reason_of
from .readers import Asked, Reader
from .sample import Sample

PATIENCE = 1000  # rows read without a single usable one, after which the split is given up


@dataclass(frozen=True, slots=True)
class Kept:
    """One sample: its name, what is asked, and where its pictures lie in the file (start, length)."""

    id: str
    asked: Asked
    pictures: tuple[tuple[int, int], ...]


class StreamedSamples:
    """Samples of one split in the order of its (shuffled) stream, read no further than asked for.

    Args:
        rows: a `datasets.IterableDataset`.
        reader: how its rows become questions.
        name: what messages and ids call the split.
        sparse: rows that lack a picture or an answer are left out; else they are given as they are.

    Raises:
        DataError: columns that the reader needs are missing.
    """

    def __init__(self, rows: Any, reader: Reader, name: str, metric: str, seed: int, buffer: int, sparse: bool) -> None:
        self.reader, self.name, self.metric, self.sparse = reader, name, metric, sparse
        self.kept: list[Kept] = []
        self.seen = 0
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the samples do
        self.end = 0
        self.stored: dict[bytes, tuple[int, int]] = {}  # a page with several questions is kept once
        self.rows = self._rows(rows, seed, buffer)
        weakref.finalize(self, self.rows.close)  # a stream left open can crash Arrow's threads when the interpreter ends

    def sample(self, number: int) -> Sample:
        """One sample, all of its images decoded to RGB.

        Raises:
            EndOfData: there are fewer.
            DataError: a row or picture that cannot be used, or the stream broke.
        """
        while len(self.kept) <= number:
            self._read_row()
        kept = self.kept[number]
        # harnesses whose scores are published show what is stored under transparent pixels
        stored = [io.BytesIO(self._picture(*place)) for place in kept.pictures]
        images = tuple(open_image(data, f"{kept.id}: its image", transparent_is_white=False) for data in stored)
        asked = kept.asked
        return Sample(
            id=kept.id, images=images, question=asked.question, answers=asked.answers, skill=asked.skill, metric=self.metric,
            details=asked.details,
        )  # fmt: skip

    def _rows(self, rows: Any, seed: int, buffer: int) -> Generator[dict[str, Any], None, None]:
        columns = columns_of(rows, self.name)
        if lacking := [name for name in (*self.reader.columns, self.reader.image) if name and name not in columns]:
            seen = ", ".join(sorted(columns)) or "none"
            raise DataError(f"{self.name} has no column {', '.join(lacking)}; it has {seen}; save its rows as local data with those names")
        # one file at a time: a set's row groups are large, and a few documents must not cost ten of them
        rows = rows.shuffle(seed=seed, buffer_size=buffer, max_buffer_input_shards=1)
        # pictures stay as they are stored: a broken one is reported with its row, and they are small
        return guarded(rows.decode(False) if rows.features is not None else rows, self.name)

    def _read_row(self) -> None:
        row = next(self.rows, None)
        if row is None:
            raise EndOfData
        where = f"{self.name} row {self.seen}"
        self.seen += 1
        pictures = self._pictures(row, where)
        if self.sparse and not pictures and self.reader.optional_image:
            return self._give_up()
        if self.sparse and not pictures:
            raise DataError(f"{where} has no image in column {self.reader.image}; this copy of the data set is damaged")
        try:
            asked = self.reader.ask(row, tuple(_header(data, where) for data in pictures))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise DataError(f"{where} does not hold what it should ({reason_of(error)}); this copy of the data set is damaged") from error
        if self.sparse:
            asked = [question for question in asked if question.answers]
        if not asked:
            return self._give_up()
        places = tuple(self._store(data) for data in pictures)
        identity = row.get(self.reader.identity)
        for number, question in enumerate(asked):
            name = str(identity) if identity is not None else _digest(question.question, pictures)
            suffix = f"-{number}" if len(asked) > 1 else ""
            self.kept.append(Kept(f"{self.name}/{name}{suffix}", question, places))
        return None

    def _give_up(self) -> None:
        if not self.kept and self.seen >= PATIENCE:
            raise DataError(f"{self.name}: none of the first {self.seen} rows has an image and an answer; use a split with public answers")

    def _pictures(self, row: dict[str, Any], where: str) -> list[bytes]:
        value = row[self.reader.image] if self.reader.image else None
        values = value if isinstance(value, (list, tuple)) else [value]
        return [_bytes(v, where, self.reader.image) for v in values if v is not None]

    def _store(self, data: bytes) -> tuple[int, int]:
        key = hashlib.sha256(data).digest()
        if key not in self.stored:
            self.file.seek(self.end)
            self.file.write(data)
            self.stored[key] = (self.end, len(data))
            self.end += len(data)
        return self.stored[key]

    def _picture(self, start: int, length: int) -> bytes:
        self.file.seek(start)
        return self.file.read(length)


def columns_of(rows: Any, name: str) -> set[str]:
    """Column names of a `datasets.IterableDataset`; where the repository does not state them, those of its first row."""
    return set(rows.column_names or next(guarded(rows, name), {}))


def guarded(rows: Any, name: str) -> Generator[dict[str, Any], None, None]:
    """Rows one after the other.

    Raises:
        DataError: reading stopped in the middle: the network, a damaged file.
    """
    seen = 0
    stream = iter(rows)
    while True:
        try:
            with quiet_datasets():
                row = next(stream)
        except StopIteration:
            return
        except Exception as error:  # its readers, file systems and http clients have error types of their own
            text = f"reading {name} stopped after {seen} rows ({reason_of(error)})"
            raise DataError(f"{text}; check the connection and run the command again") from error
        seen += 1
        yield row


def _bytes(value: Any, where: str, column: str) -> bytes:
    """A stored picture: its bytes, or the content of the file that it names."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict) and value.get("bytes"):
        return bytes(value["bytes"])
    if isinstance(value, dict) and value.get("path"):
        import fsspec

        try:
            with fsspec.open(value["path"], "rb") as stream:
                return bytes(stream.read())
        except Exception as error:  # file systems and networks have error types of their own
            raise DataError(f"{where}: image {value['path']} could not be read ({reason_of(error)}); run the command again") from error
    raise DataError(f"{where}: column {column} holds a {type(value).__name__}, expected an image; check the column")


def _header(data: bytes, where: str) -> Image.Image:
    """A picture of which only the header is read: for its size."""
    try:
        return Image.open(io.BytesIO(data))
    except Exception as error:  # damaged files make Pillow's readers raise many things
        raise DataError(f"{where}: its image does not open as an image ({error}); this copy of the data set is damaged") from error


def _digest(question: str, pictures: list[bytes]) -> str:
    content = hashlib.sha256(question.encode())
    for data in pictures:
        content.update(data)
    return content.hexdigest()[:12]
