"""The calibration pass of several processes: each sums the moments of its share of the documents, then the sums are added.

Moments are sums, so it does not matter who read which document. A process saves its share under its own name while it works; the whole
is saved once, as a single process would have saved it, so that a later compilation with any number of processes finds it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .batches import Encoded
from .calibrate import MomentStore, calibrate
from .errors import RotateKError
from .geometry import Geometry
from .moments import Moments
from .parallel import Processes

MOST = 1024  # numbers of processes of which an interrupted run is recognised


def calibrate_together(
    model: Any,
    items: Sequence[Encoded],
    geometry: Geometry,
    key: dict[str, Any],
    batch_size: int,
    resume: bool,
    pad_id: int,
    quiet: bool,
    together: Processes,
    directory: Path | None = None,
) -> Moments:
    """Moments of all items, the same in every process; one process is `calibrate`.

    Args:
        items: all documents; this process reads its share.
        key, directory: of the `MomentStore`.

    Raises:
        RotateKError: as `calibrate`; or another process ended; or `resume` with another number of processes than was interrupted.
    """
    store = MomentStore(key, directory)
    saved = together.broadcast(store.load().documents if together.main else None)
    if saved != len(items) and resume:
        before = together.broadcast(_interrupted(key, directory, saved) if together.main else None)
        if before not in (0, together.size):
            raise RotateKError(
                f"the interrupted calibration ran with {before} process{'es' if before > 1 else ''}, this one has {together.size}; "
                f"start {before} again, or leave --resume out to begin anew"
            )
        if before == 0:
            warnings.warn("--resume: nothing saved, starting anew", stacklevel=2)
    if together.size == 1:
        return calibrate(model, items, geometry, store, batch_size, resume, pad_id, quiet)
    if saved == len(items):
        moments = store.load() if together.main else Moments()
        return Moments(together.sum_named(moments.sums), len(items))
    mine = _share_store(key, directory, together.rank, together.size)
    moments = calibrate(model, together.share(items), geometry, mine, batch_size, resume, pad_id, quiet)
    whole = Moments(together.sum_named(_without_repeated(moments.sums, together)), len(items))
    if together.main:
        store.save(whole)
    together.gather(None)  # nobody forgets its share before the whole is safe
    for size in range(2, MOST) if together.main else ():
        for rank in range(size if size == together.size else 1):
            with suppress(OSError):
                _share_store(key, directory, rank, size).file.unlink()
    with suppress(OSError):
        mine.file.unlink()  # on another machine the main process does not see it
    return whole


def _share_store(key: dict[str, Any], directory: Path | None, rank: int, size: int) -> MomentStore:
    return MomentStore(key | {"share": [rank, size]}, directory)


def _interrupted(key: dict[str, Any], directory: Path | None, documents: int) -> int:
    """How many processes an interrupted calibration had; 0 if there is none."""
    if documents:
        return 1
    return next((size for size in range(2, MOST) if _share_store(key, directory, 0, size).file.is_file()), 0)


def _without_repeated(sums: dict[str, Any], together: Processes) -> dict[str, Any]:
    """What each process adds: of figures that are the model's and not the documents', only one process's."""
    constant = {name for name in sums if name.endswith(".output_gram")}
    owners = together.gather(bool(constant))
    first = owners.index(True) if True in owners else 0
    return sums if together.rank == first else {name: value for name, value in sums.items() if name not in constant}
