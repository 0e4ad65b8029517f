"""Local data: parquet, JSONL or CSV with columns `question`, `answers` or `answer`, and `image` or `images`; paths beside the file.

Questions and answers are what the file says: `0012`, `1.50`, `NA` and `2026-01-02` stay text, where readers of tables guess types.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import DataError
from .pictures import upright_rgb
from .quiet import quiet_datasets
from .readers import texts
from .sample import Sample

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
IMAGE_COLUMNS = ("images", "image", "file_name")  # the last as in the metadata.jsonl of a `datasets` image folder
AS_WRITTEN = {"question": str, "answer": str, "answers": str}  # of a CSV file
LISTS = ("answers", "images")  # columns whose CSV cells may hold a JSON list


@dataclass(frozen=True, slots=True)
class LocalData:
    """Rows of local files; image paths in them are relative to `folder`."""

    path: Path
    folder: Path
    rows: Any  # datasets.Dataset, or a list of dictionaries
    digest: str

    def sample(self, number: int) -> Sample:
        """One row.

        Raises:
            DataError: an image that does not open, no question, or an answer that is no text.
        """
        row, where = self.rows[number], f"{self.path} row {number}"
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{where}: the question is {question!r}, expected text; remove the row or fill it in")
        answers = row["answers"] if row.get("answers") is not None else row.get("answer")
        try:
            answers = texts(answers)
        except ValueError as error:
            raise DataError(f"{where}: {error}; write it as text") from error
        images = next((row[name] for name in IMAGE_COLUMNS if row.get(name) is not None), None)
        images = list(images) if isinstance(images, (list, tuple)) else [images] if images is not None else []
        opened = tuple(self._image(where, image) for image in images)
        # pictures lie outside the data file, so its digest does not cover them; the id does
        content = hashlib.sha256()
        for page in opened:
            content.update(f"{page.size}".encode() + page.tobytes())
        name = f"{self.path.name}/{number}-{content.hexdigest()[:12]}"
        return Sample(id=name, images=opened, question=question, answers=answers)

    def _image(self, where: str, value: Any) -> Image.Image:
        if isinstance(value, Image.Image):
            return upright_rgb(value)
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
            return open_image(io.BytesIO(value["bytes"]), f"{where}: image bytes")
        name = value.get("path") if isinstance(value, dict) else value
        if not isinstance(name, str):
            raise DataError(f"{where}: image is a {type(value).__name__}, expected a path or an image; check the column")
        return open_named(name, self.folder, f"{where}: image {name if is_address(name) else self.folder / name}")


def is_address(name: str) -> bool:
    """Whether a name is of something on the web, not of a file."""
    return name.lower().startswith(("http://", "https://"))


def open_named(name: str, folder: Path, where: str) -> Image.Image:
    """Open the image file of this name; relative names are of files in `folder`.

    Raises:
        DataError: a web address, or what `open_image` refuses.
    """
    if is_address(name):
        raise DataError(f"{where} is a web address, and nothing is fetched from there; download it and pass the file")
    return open_image(folder / name, where)


def open_image(source: Any, where: str, transparent_is_white: bool = True) -> Image.Image:
    """Open an image file or stream as upright RGB (pictures.py), fully decoded.

    Raises:
        DataError: missing, a folder, damaged, no image, or one of 32-bit numbers.
    """
    try:
        with Image.open(source) as image:
            return upright_rgb(image, transparent_is_white)
    except FileNotFoundError as error:
        raise DataError(f"{where} does not exist; check the path") from error
    except IsADirectoryError as error:
        raise DataError(f"{where} is a folder; name a picture in it") from error
    except Exception as error:  # damaged files make Pillow's readers raise struct.error, zlib.error, IndexError and more
        raise DataError(f"{where} does not open as an image ({error}); replace or remove it") from error


def open_local(path: Path, images: bool = True) -> LocalData:
    """Open one data file, or a folder that holds some; `images` says whether a column of images is wanted.

    Raises:
        DataError: no data file, unreadable, no rows, or columns missing.
    """
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in BUILDERS)
    suffixes = {f.suffix for f in files}
    if not files or not suffixes <= BUILDERS.keys():
        raise DataError(f"{path} holds no data file; expected one of {', '.join(sorted(BUILDERS))}")
    if len(suffixes) > 1:
        raise DataError(f"{path} mixes {', '.join(sorted(suffixes))} files; keep one kind in the folder, or pass one file")
    folder = path if path.is_dir() else path.parent
    builder = BUILDERS[files[0].suffix]
    try:
        rows = _json_rows(files) if builder == "json" else _table(builder, files)
    except Exception as error:  # its readers raise what their parsers raise, and StopIteration for an empty file
        reason = (str(error.__cause__ or error).splitlines() or ["it is empty"])[0]
        if "corresponds to no data" in reason:
            raise DataError(f"{path} holds no rows; add samples with question, answers and image") from error
        raise DataError(f"{path} could not be read as {builder} ({reason}); check the file") from error
    columns = {name for row in rows for name in row} if isinstance(rows, list) else set(rows.column_names)
    wanted = {"question": {"question"}, "answers (or answer)": {"answers", "answer"}, "image (or images)": set(IMAGE_COLUMNS)}
    if not images:
        del wanted["image (or images)"]  # a text-only model reads rows without
    lacking = [words for words, names in wanted.items() if not names & columns]
    if lacking:
        raise DataError(f"{path} has no column {', '.join(lacking)}; it has {', '.join(sorted(columns)) or 'none'}; rename or add them")
    if not len(rows):
        raise DataError(f"{path} holds no rows; add samples with question, answers and image")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return LocalData(path, folder, rows, digest.hexdigest()[:16])


def _json_rows(files: list[Path]) -> list[dict[str, Any]]:
    """Rows of JSON lines, or of one list of objects; `datasets` would turn texts that look like dates into times.

    Raises:
        ValueError: no JSON, or something else than objects.
    """
    rows: list[Any] = []
    for file in files:
        text = file.read_text(encoding="utf-8-sig")
        try:
            found = [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError as error:
            try:
                found = [json.loads(text)]  # one object or list over several lines
            except ValueError:
                raise error from None
        found = found[0] if len(found) == 1 and isinstance(found[0], list) else found
        if not found:
            raise ValueError("it is empty")
        if other := [row for row in found if not isinstance(row, dict)]:
            raise ValueError(f"a row is {json.dumps(other[0])[:40]}, expected an object")
        json.dumps(found, ensure_ascii=False).encode()  # halves of characters are no text
        rows += found
    return rows


def _table(builder: str, files: list[Path]) -> Any:
    """Rows of parquet or CSV files; images are left undecoded, so that a broken one is reported with its row."""
    from datasets import Dataset, Features, load_dataset

    more: dict[str, Any] = {"converters": AS_WRITTEN, "keep_default_na": False, "na_values": [""]} if builder == "csv" else {}
    # escaped: datasets takes names for glob patterns
    with quiet_datasets():
        rows = load_dataset(builder, data_files=[glob.escape(str(f.resolve())) for f in files], split="train", **more)
    assert isinstance(rows, Dataset)
    if builder == "csv":
        return [{name: _listed(cell) if name in LISTS else cell for name, cell in row.items()} for row in rows]
    undecoded = Features({name: _undecoded(feature) for name, feature in rows.features.items()})
    return rows.cast(undecoded) if undecoded != rows.features else rows


def _listed(cell: Any) -> Any:
    """The list of texts that a CSV cell holds as JSON; any other cell as it is."""
    if not isinstance(cell, str) or not cell.startswith("["):
        return cell
    try:
        found = json.loads(cell)
    except ValueError:
        return cell
    return found if all(isinstance(text, str) for text in found) else cell


def _undecoded(feature: Any) -> Any:
    """The feature with images left as bytes and path, also inside lists."""
    from datasets import Image as ImageFeature
    from datasets import LargeList, List

    if isinstance(feature, ImageFeature):
        return ImageFeature(decode=False)
    if isinstance(feature, (List, LargeList)):
        return type(feature)(_undecoded(feature.feature))
    return feature
