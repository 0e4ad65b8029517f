"""A whole evaluation: entries × modes over the same documents, resumed where it was killed, as rows of one table.

`results.csv` has one row per mode, method and setting, and skill (first `all`), with intervals, bytes, device and versions; it is made
from `documents.jsonl` (journal.py) alone, so a resumed run and an uninterrupted one give the same file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._version import __version__
from .artifact import Artifact
from .batches import Encoded, processor_hash
from .calibration_data.registry import DataSource
from .comparison import Against, against_rivals
from .errors import RotateKError
from .evaluate import Evaluator, evaluate
from .journal import Journal
from .methods import Entry
from .models import Source, fingerprint
from .outcomes import Outcome, Row, exact_match_loss, pooled

RESULTS = "results.csv"
QUICK_DOCUMENTS = 12  # 40 methods in two modes: 6 minutes on one core with the bundled model
ALL = "all"


@dataclass(frozen=True, slots=True)
class Measured:
    """One entry in one mode, beside the dense model on the same documents, and beside the best rivals for what is ours at a budget."""

    ask: str
    entry: Entry
    row: Row
    dense: Row
    against: Against | None = None

    def to_json(self) -> dict[str, Any]:
        """The row of DESIGN.md §7, and what it was asked for."""
        found = {"ask": self.ask} | self._about() | self.row.to_json() | self._loss(self.row, self.dense)
        return found | {"against": self.against.to_json() if self.against else None}

    def table_rows(self) -> list[dict[str, Any]]:
        """Flat rows for the CSV: all documents, then every skill."""
        groups = [(ALL, self.row, self.dense)]
        groups += [(skill, self.row.of_skill(skill), self.dense.of_skill(skill)) for skill in self.row.skills]
        rows = []
        for skill, row, dense in groups:
            about = {"ask": self.ask, "method": self.row.method} | self._about() | {"skill": skill}
            against = self.against if self.against and skill == ALL else Against()
            rows.append(about | _flat(row.accuracy() | self._loss(row, dense)) | row.sizes() | against.to_json())
        return rows

    def _about(self) -> dict[str, Any]:
        names = ("setting", "requested_budget", "kv_budget", "keep_ratio", "axis", "key_budget")
        return {name: getattr(self.entry, name) for name in names} | {"calibrations": self.row.calibrations}

    def _loss(self, row: Row, dense: Row) -> dict[str, Any]:
        loss, interval = exact_match_loss(dense, row)
        return {"exact_match_loss": loss, "exact_match_loss_interval": list(interval)}


def run_entries(
    evaluators: Sequence[Evaluator],
    entries: Sequence[Entry],
    items: Sequence[Encoded],
    batch_size: int,
    quiet: bool = True,
    journal: Journal | None = None,
) -> list[Measured]:
    """Measure entries (the first must be the dense one) in the mode of every evaluator.

    Args:
        journal: takes every batch as it is done, and gives those that earlier runs have done; says which batches are this process's.
    """
    labels = {entry.label: entry for entry in entries}
    measured = []
    for evaluator in evaluators:
        ask = evaluator.ask
        finished = journal.shared[ask] | journal.finished[ask] if journal else {}

        def keep(number: int, found: list[list[Outcome]], ask: str = ask) -> None:
            if journal and number not in journal.finished[ask]:
                journal.add(ask, number, found)

        makers = {label: entry.make for label, entry in labels.items()}
        rows = evaluate(evaluator, items, makers, batch_size, quiet, finished, keep, journal.numbers if journal else None)
        for row in rows:
            entry, row.method = labels[row.method], labels[row.method].method
            measured.append(Measured(ask, entry, row, rows[0]))
    measured = over_calibrations(measured)
    return [replace(one, against=against_rivals(one, measured)) for one in measured]


def over_calibrations(measured: Sequence[Measured]) -> list[Measured]:
    """Entries that differ in their calibration alone as one, whose interval is over documents and calibrations.

    What not every calibration has (settings that one of them makes equal are measured once) is given of the first that has it.
    """
    groups: dict[tuple[Any, ...], list[Measured]] = {}
    for one in measured:
        entry = one.entry
        wanted = (entry.requested_budget, entry.key_budget, entry.keep_ratio) if entry.calibrated else (entry.setting,)
        groups.setdefault((one.ask, entry.method, entry.axis, *wanted), []).append(one)
    most = max((len(_calibrations(same)) for same in groups.values()), default=1)
    found: list[Measured] = []
    for same in groups.values():
        numbers = _calibrations(same)
        if len(numbers) < len(same):  # one calibration has several: they differ in more
            found += same
        else:
            found.append(_together(same) if len(numbers) == most > 1 else same[0])
    return found


def _calibrations(same: Sequence[Measured]) -> set[int]:
    return {one.entry.calibration for one in same}


def _together(same: Sequence[Measured]) -> Measured:
    settings = " / ".join(dict.fromkeys(one.entry.setting for one in same))
    return replace(same[0], entry=replace(same[0].entry, setting=settings), row=pooled([one.row for one in same]))


def batch_sizes(documents: int, batch_size: int) -> list[int]:
    """Documents in every batch."""
    return [min(batch_size, documents - start) for start in range(0, documents, batch_size)]


def facts_of(
    artifact: Artifact,
    weights: Source,
    evaluator: Evaluator,
    source: DataSource,
    ids: Sequence[str],
    options: dict[str, Any],
    also: Sequence[Artifact] = (),
) -> dict[str, Any]:
    """What must be equal for two runs to be one evaluation; `options` are those that change outcomes, `also` other calibrations.

    Local files are named by their last part and a hash of their content: results are for publishing, paths are not.
    """
    import transformers

    device = evaluator.device
    return {
        "data": source.name if source.split != "local" else Path(source.name).name,
        "data_revision": source.revision,
        **({"data_repository": source.repository, "data_split": source.split} if source.repository else {}),
        "documents": len(ids),
        "document_ids": source.hash_ids(list(ids)),
        "artifact": artifact_hash(artifact),
        **({"also": [artifact_hash(other) for other in also]} if also else {}),
        "model": Path(weights.name).name if weights.is_local else weights.name,
        "weights": fingerprint(Path(weights.location))[:16] if weights.is_local else weights.revision,
        "processor": processor_hash(evaluator.processor),
        "dtype": str(evaluator.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rotatek": __version__,
    } | options


def artifact_hash(artifact: Artifact) -> str:
    """Identifies an artifact by its method and tensors."""
    return tensors_hash(artifact.tensors, repr(asdict(artifact.method)))


def tensors_hash(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """Identifies tensors by their names and numbers, and what is said about them."""
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_results(directory: Path, measured: Sequence[Measured], facts: dict[str, Any]) -> Path:
    """Write results.csv whole or not at all; returns its path.

    Raises:
        RotateKError: the folder cannot be written.
    """
    columns = ("data", "model", "artifact", "dtype", "device", "torch", "transformers", "rotatek")
    record = {name: facts[name] for name in columns}
    rows = [{name: _cell(value) for name, value in (row | record).items()} for m in measured for row in m.table_rows()]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    file = directory / RESULTS
    staged: str | None = None
    try:
        handle, staged = tempfile.mkstemp(prefix=f".{RESULTS}-", dir=directory)
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as stream:
            stream.write(text.getvalue())
        Path(staged).chmod(0o644)
        Path(staged).replace(file)
    except OSError as error:
        if staged is not None:
            Path(staged).unlink(missing_ok=True)
        raise RotateKError(f"could not write {file}: {error.strerror or error}; free space and run again with --resume") from error
    return file


def read_results(file: Path) -> list[dict[str, str]]:
    """Rows of a results.csv.

    Raises:
        RotateKError: it is missing, or no such table.
    """
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise RotateKError(f"{file} cannot be read ({error}); pass the results.csv that rotatek-eval --output wrote") from error
    if not rows or not {"ask", "method", "skill", "exact_match", "kl", "span_bytes"} <= rows[0].keys():
        raise RotateKError(f"{file} is no table of rotatek-eval; pass the results.csv that --output wrote")
    return rows


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Intervals as two columns each."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name.endswith("_interval"):
            stem = name.removesuffix("_interval")
            flat |= {f"{stem}_low": value[0], f"{stem}_high": value[1]}
        else:
            flat[name] = value
    return flat


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 1e4 else f"{value:.6g}"  # bytes to a tenth, scores to six digits
    return "" if value is None else value
