"""rotatek-push: an artifact to the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .completion import paths


@click.command("push", help="Push ARTIFACT (a directory) to REPO (ORG/NAME, or NAME in your own account) on the Hugging Face Hub.")
@click.argument("artifact", type=click.Path(path_type=Path), shell_complete=paths("dir"))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--create-pr", is_flag=True, help="Open a pull request on an existing repository instead of committing.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to; made if it is new.  [default: main]")
@click.option("--with-weights", is_flag=True, help="Push the base model's weights too, file by file.")
@click.option("--dry-run", is_flag=True, help="Check token and rights, and show what would be pushed.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(
    artifact: Path,
    repo: str,
    private: bool,
    create_pr: bool,
    revision: str | None,
    with_weights: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from ..hub_push import check_target, describe, push_artifact, require_artifact

    require_artifact(artifact)
    target = check_target(repo, private=private, create_pr=create_pr, revision=revision)
    pushed = push_artifact(artifact, target, with_weights=with_weights, dry_run=dry_run, quiet=quiet)
    click.echo(json.dumps(pushed.to_json()) if as_json else describe(pushed))
