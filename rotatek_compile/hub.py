"""Artifacts on the Hugging Face Hub: named by id and revision, fetched into the Hub's cache, every failure one sentence.

`HF_TOKEN`, `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` are read by huggingface_hub itself. Nothing but the file names below is ever
fetched or pushed.
"""

from __future__ import annotations

import errno
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RotateKError, UsageError
from .output import CONFIG_FILE

if TYPE_CHECKING:
    from .artifact import Artifact

PICTURE_FILE = "heads.png"  # of the model card
OWN_FILES = (CONFIG_FILE, "rotatek.safetensors", "rap.safetensors", "report.json", "README.md", PICTURE_FILE)
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
SIDECAR = OWN_FILES + PROCESSOR_FILES
_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")


@dataclass(frozen=True, slots=True)
class HubArtifact:
    """An artifact that was fetched: repository, commit, and whether the base weights lie beside it there."""

    repo: str
    commit: str
    weights: bool


def open_artifact(name: str | Path, revision: str | None = None) -> Artifact:
    """Read and check an artifact by directory or Hub id: `locate`, then `artifact.read_artifact`.

    Raises:
        UsageError, RotateKError: see there.
    """
    from .artifact import read_artifact

    path, remote = locate(name, revision)
    artifact = read_artifact(path)
    artifact.remote = remote
    return artifact


def locate(name: str | Path, revision: str | None = None) -> tuple[Path, HubArtifact | None]:
    """Where an artifact is on this machine; one that is named by a Hub id is fetched (the sidecar only, never weights).

    Args:
        name: a directory, or `org/name` or `org/name@revision` of the Hub. A `Path` object is a directory always; of a text that could be
            both, the directory wins.
        revision: branch, tag or commit.

    Raises:
        UsageError: a revision of a local directory, or two revisions.
        RotateKError: it cannot be fetched, or is no artifact.
    """
    path = Path(name).expanduser()
    found = None if isinstance(name, Path) or path.exists() else _parse(name)
    if found is None:
        if revision is not None:
            raise UsageError(f"--revision {revision} is for artifacts on the Hub, but {name} is a local path; leave it out")
        return path, None
    repo, own = found
    if own is not None and revision is not None and own != revision:
        raise UsageError(f"{name} names revision {own}, --revision names {revision}; leave one out")
    return fetch(repo, own or revision)


def _parse(name: str) -> tuple[str, str | None] | None:
    repo, at, revision = name.partition("@")
    if not _ID.fullmatch(repo) or (at and not revision):
        return None
    return repo, revision or None


def fetch(repo: str, revision: str | None = None) -> tuple[Path, HubArtifact]:
    """The sidecar files of an artifact, in the Hub's cache.

    Where the Hub cannot be reached, a cached copy is used with a warning; with `HF_HUB_OFFLINE` silently.

    Raises:
        RotateKError: no such repository or revision, gated, no artifact, not cached, or no room on the disk.
    """
    from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    quiet_unless_terminal()
    if is_offline_mode():
        return _cached(repo, revision, "HF_HUB_OFFLINE is set")
    with hub_errors(repo, revision):
        try:
            info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        except Exception as error:
            if isinstance(error, HfHubHTTPError) or not _is_connection(error):
                raise
            found = _cached(repo, revision, f"the Hub at {constants.ENDPOINT} cannot be reached")
            warnings.warn(f"the Hub cannot be reached; using the cached commit {found[1].commit[:12]} of {repo}", stacklevel=3)
            return found
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        if CONFIG_FILE not in sizes:
            raise RotateKError(f"{repo} on the Hub is no RotateK artifact: it has no {CONFIG_FILE}; rotatek-push uploads one")
        wanted = {name: size for name, size in sizes.items() if name in SIDECAR}
        _check_cache_space(sum(wanted.values()), repo)
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=list(wanted)))
    return path, HubArtifact(repo, path.name, any(name.startswith("model") and name.endswith(".safetensors") for name in sizes))


def fetch_weights(artifact: HubArtifact) -> Path:
    """The weights that lie beside a fetched artifact, of the same commit; returns the directory that holds both.

    Raises:
        RotateKError: they cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    from .weights import PATTERNS

    sizes = remote_sizes(artifact.repo, artifact.commit, PATTERNS)
    if sizes is not None:
        _check_cache_space(sum(sizes.values()), artifact.repo)
    with hub_errors(artifact.repo, artifact.commit):
        return Path(snapshot_download(artifact.repo, revision=artifact.commit, allow_patterns=[*SIDECAR, *PATTERNS]))


def remote_sizes(repo: str, revision: str | None, patterns: Sequence[str]) -> dict[str, int] | None:
    """Bytes by file name in a repository, of names that match; None where the Hub is not asked (`HF_HUB_OFFLINE`).

    Raises:
        RotateKError: the repository cannot be read.
    """
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        return None
    with hub_errors(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return {name: size for name, size in files.items() if any(fnmatch(name, pattern) for pattern in patterns)}


def _cached(repo: str, revision: str | None, why: str) -> tuple[Path, HubArtifact]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from .weights import has_weights

    try:
        path = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=list(SIDECAR)))
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        named = f"{repo} at revision {revision}" if revision else repo
        raise RotateKError(f"{repo} is no local directory, {why}, and no whole copy of {named} is in the Hub's cache") from error
    return path, HubArtifact(repo, path.name, has_weights(path))


def _check_cache_space(needed: int, repo: str) -> None:
    from huggingface_hub import constants

    check_space(Path(constants.HF_HUB_CACHE), needed, f"{repo} in the Hub's cache")


def check_space(target: Path, needed: int, what: str) -> None:
    """Refuse what would fill the disk that holds `target` (or will hold it).

    Raises:
        RotateKError: with the bytes wanted and the bytes there.
    """
    place = existing(target)
    if (free := shutil.disk_usage(place).free) < needed:
        raise RotateKError(f"{what} needs {needed / 1e9:.2f} GB, {place} has {free / 1e9:.2f} GB free; free some space")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


@contextmanager
def hub_errors(repo: str, revision: str | None = None, doing: str = "read") -> Iterator[None]:
    """Turn whatever a call to the Hub raises into one sentence that says what to do.

    Args:
        doing: what was tried, as a verb.

    Raises:
        RotateKError: in place of any error of the Hub, the network or the disk.
    """
    try:
        yield
    except RotateKError:
        raise
    except Exception as error:
        sentence = _sentence(error, repo, revision, doing)
        if sentence is None:
            raise
        raise RotateKError(sentence) from error


def _sentence(error: BaseException, repo: str, revision: str | None, doing: str) -> str | None:
    from huggingface_hub import constants, errors, get_token

    end = constants.ENDPOINT
    account = "this token can read" if get_token() else "can be read without a token"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo} cannot be {_past(doing)}: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated; ask for access at {end}/{repo}, and set HF_TOKEN to a token of the account that has it"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision or 'main'}; name a branch, tag or commit that exists"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repo} is no local directory, and no repository on the Hub that {account}; check the name (a private one needs HF_TOKEN)"
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is no name of a Hub repository; use ORG/NAME with letters, digits, '-', '_' and '.'"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{repo} could not be fetched whole from {end}: {_first_line(error.__cause__ or error)}; try again"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return f"the Hub does not accept the token; set HF_TOKEN to a valid one from {end}/settings/tokens, or run: hf auth login"
        if status == 403:
            return f"the token has no right to {doing} {repo} ({_first_line(error.server_message or 'forbidden')}); use one that has"
        if status == 429:
            return "the Hub limits the rate of requests; wait some minutes and run the command again"
        return f"the Hub answered {status} when asked to {doing} {repo} ({_first_line(error.server_message or error)}); try again later"
    if _is_connection(error):
        return f"the Hub at {end} cannot be reached ({_first_line(error)}); check the network and HF_ENDPOINT"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space is left for {repo}; free some, or set HF_HOME to another disk"
    if error.__cause__ is not None:  # an upload in a thread wraps its error
        return _sentence(error.__cause__, repo, revision, doing)
    if isinstance(error, (OSError, ValueError)) or type(error).__module__.startswith(("huggingface_hub", "hf_xet")):
        return f"{repo} could not be {_past(doing)}: {_first_line(error)}"
    return None


def _past(doing: str) -> str:
    return {"write to": "written to"}.get(doing, doing)


def _is_connection(error: BaseException) -> bool:
    # the HTTP client is httpx or httpx2, by the version of huggingface_hub
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore")


def _first_line(error: Any) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def quiet_unless_terminal(quiet: bool = False) -> None:
    """The Hub's progress bars, only where a person watches."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
