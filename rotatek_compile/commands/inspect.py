"""rotatek-inspect: what an artifact keeps where, and what that should cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command("inspect", help="Show what ARTIFACT keeps per layer and head; with OTHER, compare two.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(artifact: Path, other: Path | None, as_json: bool) -> None:
    from ..artifact import read_artifact
    from ..inspection import compare, describe, summary

    first = read_artifact(artifact)
    second = read_artifact(other) if other else None
    if as_json:
        result: dict[str, Any] = summary(first)
        if second:
            result = {"artifact": result, "other": summary(second)}
        click.echo(json.dumps(result))
    else:
        click.echo(compare(first, second) if second else describe(first))
