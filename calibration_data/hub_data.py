"""Data sets on the Hub: which repository and commit, and one split of it as a stream.

Only what is read is downloaded: `datasets` streams parquet files in pieces. Offline (`HF_HUB_OFFLINE`, or no network) the
repository is read from the Hub cache, where `hf download --repo-type dataset ID` puts it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataError
from .quiet import quiet_datasets, reason_of

TIMEOUT = 30  # seconds for the one question that is asked before anything is read
HELD_OUT = ("validation", "val", "testmini", "test")
TRAIN = ("train",)


@dataclass(frozen=True, slots=True)
class Repository:
    """A data set on the Hub at one commit; `location` is its id, or the folder of a cached copy."""

    id: str
    commit: str
    location: str

    @property
    def cached(self) -> bool:
        return self.location != self.id


def is_hub_id(name: str) -> bool:
    """Whether a name has the form org/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith((".", "/", "~")) and "../" not in name


def find_repository(ids: Sequence[str], revision: str | None = None) -> Repository:
    """The first of these repositories that exists (one set may have an old and a new name), and its commit.

    Raises:
        DataError: none exists, access is missing, the revision is unknown, or there is neither network nor a cached copy.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    api, names = HfApi(), " or ".join(ids)
    for hub_id in ids:
        if Path(hub_id).is_dir():
            raise DataError(f"the folder {hub_id} here hides the Hub data set of that name; run in another folder, or pass its path")
        try:
            info = api.dataset_info(hub_id, revision=revision, timeout=TIMEOUT)
        except GatedRepoError as error:
            raise DataError(f"access to {hub_id} is gated; ask for it at its page, then log in with `hf auth login`") from error
        except RepositoryNotFoundError:
            continue
        except RevisionNotFoundError as error:
            raise DataError(f"{hub_id} has no revision {revision!r}; pass a branch, tag or commit of it") from error
        except OfflineModeIsEnabled:
            return cached_repository(ids, revision, "HF_HUB_OFFLINE is set")
        except Exception as error:  # its http client has many ways to say that nobody answers
            return cached_repository(ids, revision, reason_of(error))
        return Repository(hub_id, str(info.sha), hub_id)
    raise DataError(
        f"there is no data set {names} on the Hub (or it is private), and no such path here; check the name, or log in with `hf auth login`"
    )


def cached_repository(ids: Sequence[str], revision: str | None, why: str) -> Repository:
    """A copy in the Hub cache.

    Raises:
        DataError: none is there.
    """
    from huggingface_hub import snapshot_download

    for hub_id in ids:
        try:
            folder = snapshot_download(hub_id, repo_type="dataset", revision=revision, local_files_only=True)
        except Exception:  # not there, or not this revision
            continue
        return Repository(hub_id, Path(folder).name, folder)
    at = f" at revision {revision}" if revision else ""
    raise DataError(
        f"no answer from the Hub ({why}), and {' or '.join(ids)}{at} is not in the local cache; "
        f"fetch it with `hf download --repo-type dataset {ids[0]}`, or pass a local path"
    )


def open_splits(found: Repository, config: str | None) -> dict[str, Any]:
    """Every split of a repository as a `datasets.IterableDataset`; nothing but its listing is read.

    Raises:
        DataError: unknown configuration, no data files, a loading script, or the connection broke.
    """
    from datasets import get_dataset_config_names, load_dataset

    revision = None if found.cached else found.commit
    with quiet_datasets():
        try:
            return dict(load_dataset(found.location, config, streaming=True, revision=revision))
        except Exception as error:  # ValueError for a configuration, and whatever its readers and the network raise
            try:
                configs = get_dataset_config_names(found.location, revision=revision)
            except Exception:  # it only adds a hint; the first error is what is reported below
                configs = []
            if configs and config not in configs and (config is not None or len(configs) > 1):
                said = f"has no configuration {config!r}" if config else "has several configurations"
                listed = ", ".join(f"{found.id}:{name}" for name in configs[:20])
                raise DataError(f"{found.id} {said}; use one of {listed}") from error
            if "scripts are no longer supported" in str(error):
                raise DataError(f"{found.id} is a loading script, which is not run; use a repository of parquet files") from error
            raise DataError(f"{found.id} could not be opened ({reason_of(error)}); check the name, or the connection") from error
