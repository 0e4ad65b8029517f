"""Benchmarks by name and Hub repositories by id, opened as a `DataSource`: which split, which reader, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import DataError
from .hub_data import HELD_OUT, TRAIN, find_repository, open_splits
from .known_sets import BUFFER, KNOWN, KnownSet, Origin, owners
from .readers import generic
from .source import CALIBRATION, NEW_TOKENS, DataSource
from .streamed import StreamedSamples, columns_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be opened: `ids` are names of one repository, the first of `splits` that is there is read.

    `origin` and `known` are given for what stands in the table.
    """

    ids: Sequence[str]
    config: str | None
    splits: Sequence[str]
    origin: Origin | None
    known: KnownSet | None


def open_known(name: str, split: str, seed: int, revision: str | None) -> DataSource:
    """A benchmark, or NAME:SPLIT of it.

    Raises:
        DataError: it cannot be had for this purpose, or not be reached.
    """
    known_name, colon, chosen = name.partition(":")
    origin, splits = _known_origin(known_name, chosen if colon else None, split)
    wanted = Wanted(ids=origin.ids, config=origin.config, splits=splits, origin=origin, known=KNOWN[known_name])
    return _open(name, wanted, split, seed, revision)


def open_hub(name: str, split: str, seed: int, revision: str | None, images: bool = True) -> DataSource:
    """A repository ID or ID:CONFIG. One of a known benchmark has its columns, prompt and metric, any other those of local data.

    Raises:
        DataError: it cannot be read for this purpose, or not be reached.
    """
    hub_id, _, config = name.partition(":")
    origin, known = _owner(hub_id, config or None)
    splits = TRAIN if split == CALIBRATION else origin.splits if origin and not origin.train else HELD_OUT
    wanted = Wanted(ids=(hub_id,), config=origin.config if origin else config or None, splits=splits, origin=origin, known=known)
    return _open(name, wanted, split, seed, revision, images)


def written(origin: Origin) -> str:
    """Id and configuration, as users write them."""
    return origin.ids[0] + (f":{origin.config}" if origin.config else "")


def _known_origin(name: str, chosen: str | None, split: str) -> tuple[Origin, tuple[str, ...]]:
    """Where a benchmark is read for this purpose, and which splits will do."""
    known = KNOWN[name]
    if split == CALIBRATION:
        if known.calibration is None:
            raise DataError(
                f"{name} has no train split ({written(known.evaluation)} has {', '.join(known.evaluation.splits)}), and calibration must "
                f"not read what is evaluated; calibrate on {', '.join(n for n, k in KNOWN.items() if k.calibration)} or your own documents"
            )
        if chosen not in (None, *known.calibration.splits):
            raise DataError(f"calibration reads train splits only; write {name} instead of {name}:{chosen}")
        return known.calibration, known.calibration.splits
    if chosen not in (None, *known.evaluation.splits):
        listed = ", ".join(f"{name}:{s}" for s in known.evaluation.splits)
        raise DataError(f"{name} has no split {chosen!r} for evaluation; use {listed}")
    return known.evaluation, (chosen,) if chosen else known.evaluation.splits[:1]


def _owner(hub_id: str, config: str | None) -> tuple[Origin | None, KnownSet | None]:
    """The benchmark to which a Hub id belongs, if it is known: its columns, prompt and metric hold for the repository too."""
    found = owners(hub_id, config)
    if len({origin.config for _, _, origin in found}) > 1:
        listed = ", ".join(f"{hub_id}:{origin.config}" for _, _, origin in found)
        raise DataError(f"{hub_id} has several configurations; use one of {listed}")
    return next(((origin, known) for _, known, origin in found), (None, None))


def _open(name: str, wanted: Wanted, split: str, seed: int, revision: str | None, images: bool = True) -> DataSource:
    found = find_repository(wanted.ids, revision)
    splits = open_splits(found, wanted.config)
    place = found.id + (f":{wanted.config}" if wanted.config else "")
    chosen = next((s for s in wanted.splits if s in splits), None)
    if chosen is None:
        why = "calibration must not read what is evaluated" if split == CALIBRATION else "evaluation must not read what is calibrated on"
        has = f"{place} has no split {' or '.join(wanted.splits)}, only {', '.join(splits) or 'none'}"
        raise DataError(f"{has}; {why}: {_instead(found.id, split)}")
    rows, where = splits[chosen], f"{place}/{chosen}"
    origin, known = wanted.origin, wanted.known
    reader = origin.reader if origin else generic(columns_of(rows, where), images)
    metric = known.metric if known else "exact_match"
    samples = StreamedSamples(rows, reader, where, metric, seed, origin.buffer if origin else BUFFER, sparse=known is not None)
    return DataSource(
        name, chosen, found.commit, None, samples.sample, repository=place, metric=metric,
        max_new_tokens=known.max_new_tokens if known else NEW_TOKENS,
    )  # fmt: skip


def _instead(hub_id: str, split: str) -> str:
    names = [n for n, known, _ in owners(hub_id, None) if split != CALIBRATION or known.calibration]
    if names:
        return f"use {names[0]}, which reads the right one"
    return "use another data set, or save rows of it as local data"
