"""An artifact pushed to the Hugging Face Hub: rights checked before any work, then one commit of known files and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .artifact import CARD_FILE, Artifact, read_artifact
from .card import card_for_hub
from .errors import RotateKError, UsageError
from .hub import PROCESSOR_FILES, SIDECAR, hub_errors, quiet_unless_terminal
from .output import CONFIG_FILE
from .weights import CONFIG, INDEX, PATTERNS, checkpoint_directory, checkpoint_files, has_weights

_BLANK = {".gitattributes", CARD_FILE}  # what the Hub itself puts into a new repository
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
_NOT_SCANNED = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json", INDEX)  # words of a language


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A repository that was found fit to be pushed to."""

    repo: str
    private: bool = False
    create_pr: bool = False
    revision: str | None = None
    files: frozenset[str] = frozenset()  # there already; empty for a new repository
    exists: bool = False
    commit: str | None = None  # the newest one there
    base_model: dict[str, Any] | None = None  # of the artifact that is there

    @property
    def foreign(self) -> bool:
        """Whether the repository holds something else, such as a checkpoint."""
        return bool(self.files - _BLANK) and CONFIG_FILE not in self.files


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What was pushed (or would be): where to, and bytes by file name."""

    repo: str
    url: str
    commit: str | None
    pull_request: str | None
    files: dict[str, int]
    changed: bool = True  # whether there was anything new

    def to_json(self) -> dict[str, Any]:
        return {
            "repo": self.repo,
            "url": self.url,
            "commit": self.commit,
            "pull_request": self.pull_request,
            "changed": self.changed,
            "files": self.files,
            "bytes": sum(self.files.values()),
        }


def check_target(repo: str, *, private: bool = False, create_pr: bool = False, revision: str | None = None) -> Target:
    """Everything about a push that can be known before there is something to push: network, token, name, rights.

    Args:
        repo: `ORG/NAME`, or `NAME` in the token's own account.
        create_pr: open a pull request instead of committing; needs an existing repository, and no right to write.
        revision: branch to commit to, or to open the pull request against.

    Raises:
        UsageError: no name of a repository, or of a branch.
        RotateKError: offline, no token, no right, or a repository that holds something else.
    """
    from huggingface_hub import HfApi, get_token, is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is no name of a Hub repository; use ORG/NAME with letters, digits, '-', '_' and '.'") from error
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UsageError(f"--revision {revision} is a commit; a push goes to a branch, name one")
    if is_offline_mode():
        raise RotateKError(f"{repo} cannot be written to: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it")
    if get_token() is None:
        raise RotateKError(f"pushing to {repo} needs a token that can write; set HF_TOKEN, or run: hf auth login")
    api = HfApi()
    with hub_errors(repo, revision, "write to"):
        account = api.whoami()
    if "/" not in repo:
        repo = f"{account['name']}/{repo}"
    info = _repository(api, repo, revision, create_pr)
    if info is None:
        if create_pr:
            raise RotateKError(f"there is no repository {repo} to open a pull request for; push without --create-pr to make it")
        _check_namespace(account, repo)
        return Target(repo=repo, private=private, revision=revision)
    if private and not info.private:
        raise RotateKError(f"{repo} exists and is public; make it private in its settings, or push to another name")
    files = frozenset(file.rfilename for file in info.siblings or [])
    base = _base_model(api, repo, info.sha) if CONFIG_FILE in files else None
    target = Target(
        repo=repo, private=private, create_pr=create_pr, revision=revision, files=files, exists=True, commit=info.sha, base_model=base
    )
    if not create_pr:
        with hub_errors(repo, revision, "write to"):
            api.auth_check(repo, write=True)
        if target.foreign:
            raise RotateKError(f"{repo} holds files but no artifact; push to another name, or add the artifact to it with --create-pr")
    return target


def _repository(api: Any, repo: str, revision: str | None, create_pr: bool) -> Any:
    """What the Hub says of a repository at a branch; of `main` for a branch that is yet to be made; None if there is no repository."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    with hub_errors(repo, revision, "write to"):
        try:
            return api.model_info(repo, revision=revision)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None
        except RevisionNotFoundError:
            if create_pr or revision is None:
                raise
            return api.model_info(repo)


def _base_model(api: Any, repo: str, commit: str) -> dict[str, Any] | None:
    with hub_errors(repo, commit):
        file = api.hf_hub_download(repo, CONFIG_FILE, revision=commit)
    try:
        base = json.loads(Path(file).read_text(encoding="utf-8"))["base_model"]
    except (ValueError, KeyError, TypeError):
        return None  # damaged, about to be replaced
    return base if isinstance(base, dict) else None


def _check_namespace(account: dict[str, Any], repo: str) -> None:
    """Whether this account may make a repository of this name, as far as `whoami` tells."""
    owner, name = repo.split("/")[0], account.get("name")
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise RotateKError(f"the token of {name} can only read; set HF_TOKEN to one that can write")
    if token.get("role") == "fineGrained":
        scoped = (token.get("fineGrained") or {}).get("scoped") or []
        if not any("repo.write" in entry.get("permissions", ()) for entry in scoped):
            raise RotateKError(f"the fine-grained token of {name} has no right to write to repositories; use one that has")
        return  # such a token need not show the organisations of its owner
    roles = {org.get("name"): org.get("roleInOrg") for org in account.get("orgs") or []}
    if owner != name and owner not in roles:
        raise RotateKError(f"{name} is no member of {owner}, so {repo} cannot be made; push to {name}/{repo.split('/')[1]}")
    if roles.get(owner) == "read":
        raise RotateKError(f"{name} can only read in {owner}, so {repo} cannot be made; push to {name}/{repo.split('/')[1]}")


def push_artifact(directory: Path, target: Target, *, with_weights: bool = False, dry_run: bool = False, quiet: bool = False) -> Pushed:
    """Push an artifact directory in one commit; large files are streamed one by one.

    Only known names are pushed. Local paths in the configuration are reduced to their last part, and anything that still looks like a
    path of this machine or a token is refused. In a repository that held no artifact (`create_pr`) no file is overwritten.

    Raises:
        RotateKError: no valid artifact, weights that cannot be had or would not fit, or the Hub refused.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    quiet_unless_terminal(quiet)
    artifact = read_artifact(Path(directory))
    with_weights = with_weights or artifact.rap is not None  # a smaller checkpoint is its weights
    contents = collect(artifact, target, with_weights)
    sizes = {name: len(what) if isinstance(what, bytes) else what.stat().st_size for name, what in contents.items()}
    url = f"{constants.ENDPOINT}/{target.repo}"
    if dry_run:
        return Pushed(repo=target.repo, url=url, commit=None, pull_request=None, files=sizes)
    # of the artifact that is replaced; weights left of another base model would be read before shards that are pushed
    ours = [*PROCESSOR_FILES, *(PATTERNS if with_weights else ())] if CONFIG_FILE in target.files else []
    stale = sorted(name for name in target.files - contents.keys() if any(fnmatch(name, pattern) for pattern in ours))
    operations: list[Any] = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=what) for name, what in contents.items()]
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
    words = f"{artifact.rap.words}; {artifact.method.words}" if artifact.rap is not None and artifact.coded else artifact.method.words
    api = HfApi()
    with hub_errors(target.repo, target.revision, "write to"):
        if not target.exists:
            api.create_repo(target.repo, private=target.private or None, exist_ok=True)
        if target.revision is not None and not target.create_pr:
            api.create_branch(target.repo, branch=target.revision, exist_ok=True)
        commit = api.create_commit(
            target.repo,
            operations,
            commit_message=f"RotateK artifact{' with weights' if with_weights else ''}: {words}",
            revision=target.revision,
            create_pr=target.create_pr,
        )
    return Pushed(
        repo=target.repo, url=url, commit=commit.oid, pull_request=commit.pr_url, files=sizes, changed=commit.oid != target.commit
    )


def push_compiled(directory: Path, target: Target, with_weights: bool, quiet: bool) -> Pushed:
    """`push_artifact` after a compilation: a push that fails says that nothing else was lost.

    Raises:
        RotateKError: see there.
    """
    try:
        return push_artifact(directory, target, with_weights=with_weights, quiet=quiet)
    except RotateKError as error:
        more = " --with-weights" if with_weights else ""
        command = f"rotatek-push {directory} {target.repo}{more}"
        raise RotateKError(f"{error}; the artifact is in {directory}, push it with: {command}") from error


def collect(artifact: Artifact, target: Target, with_weights: bool) -> dict[str, Path | bytes]:
    """What is pushed, by name: files where they are, or bytes where they must be changed first.

    Raises:
        RotateKError: weights that cannot be had, the repository holds weights of another base model, or a file tells a secret.
    """
    directory = artifact.path
    assert directory is not None
    contents: dict[str, Path | bytes] = {name: directory / name for name in SIDECAR if (directory / name).is_file()}
    weights: Sequence[Path] = ()
    if with_weights and has_weights(directory):
        weights = checkpoint_files(directory)
    elif with_weights:
        from .api import base_source

        source = base_source(artifact)
        weights = checkpoint_files(checkpoint_directory(source), source.name)
    contents |= {file.name: file for file in weights}
    config = public_config(json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8")))
    if not with_weights and target.base_model not in (None, config["base_model"]) and CONFIG in target.files:
        raise RotateKError(f"{target.repo} holds the weights of another base model; push --with-weights too, or to another name")
    contents[CONFIG_FILE] = (json.dumps(config, indent=2) + "\n").encode()
    if CARD_FILE in contents:
        card = (directory / CARD_FILE).read_text(encoding="utf-8")
        contents[CARD_FILE] = card_for_hub(card, target.repo, bool(weights) and artifact.rap is None).encode()
    if target.foreign:
        contents = {name: what for name, what in contents.items() if name not in target.files}
    for name, what in contents.items():
        refuse_secrets(name, what)
    return contents


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """rotatek_config.json as it may be read by anyone: local paths of the base model and the data become their last part."""
    base, calibration = dict(config["base_model"]), dict(config["calibration"])
    if base.get("fingerprint"):
        base["id"] = Path(str(base["id"])).name
    if isinstance(data := calibration.get("data"), str) and (calibration.get("split") == "local" or Path(data).is_absolute()):
        calibration["data"] = Path(data).name
    return config | {"base_model": base, "calibration": calibration}


def refuse_secrets(name: str, what: Path | bytes) -> None:
    """Refuse a JSON file or card that holds a Hub token or a path of this machine; generated files do not, edited ones may.

    Raises:
        RotateKError: naming the file and what was seen.
    """
    if not name.endswith((".json", ".md")) or name in _NOT_SCANNED:
        return
    text = what.decode("utf-8") if isinstance(what, bytes) else what.read_text(encoding="utf-8")
    if _TOKEN.search(text):
        raise RotateKError(f"{name} holds what looks like a Hub token; take it out, it would be published")
    if name.endswith(".json"):
        for value in _strings(json.loads(text)):
            if value.startswith("/") and len(Path(value).parts) > 2 and Path(value).exists():
                raise RotateKError(f"{name} holds the local path {value}; take it out, it would be published")


def _strings(data: Any) -> list[str]:
    if isinstance(data, str):
        return [data]
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return [value for part in parts for value in _strings(part)]


def require_artifact(directory: Path) -> None:
    """Say that there is nothing to push before the Hub is asked.

    Raises:
        RotateKError: no artifact directory.
    """
    if not (directory / CONFIG_FILE).is_file():
        what = "does not exist" if not directory.exists() else f"is no artifact: it has no {CONFIG_FILE}"
        raise RotateKError(f"{directory} {what}; pass the directory that rotatek-compile wrote")


def describe(pushed: Pushed) -> str:
    """A push in words."""
    total = sum(pushed.files.values())
    if pushed.commit is None:
        lines = [f"{size:>14,}  {name}" for name, size in pushed.files.items()]
        return "\n".join([f"would push {len(pushed.files)} files, {total:,} bytes, to {pushed.url}", *lines])
    if not pushed.changed:
        return f"{pushed.url} holds this artifact already, commit {pushed.commit[:12]}; nothing was pushed"
    where = f"opened pull request {pushed.pull_request}" if pushed.pull_request else f"pushed to {pushed.url}"
    return f"{where}: {len(pushed.files)} files, {total:,} bytes, commit {pushed.commit[:12]}"
