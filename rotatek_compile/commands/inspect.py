"""rotatek-inspect: what an artifact keeps where, and what that should cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from .completion import paths


@click.command(
    "inspect", help="Show what ARTIFACT (a directory, or ORG/NAME on the Hub) keeps per layer and head; with OTHER, compare two."
)
@click.argument("artifact", shell_complete=paths("dir"))
@click.argument("other", required=False, shell_complete=paths("dir"))
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write one self-contained page of plots instead.")
@click.option("--overwrite", is_flag=True, help="Let --html replace a file that is no such page.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(artifact: str, other: str | None, html: Path | None, overwrite: bool, as_json: bool) -> None:
    if overwrite and html is None:
        raise UsageError("--overwrite says what --html may do; pass --html FILE with it")

    from ..hub import open_artifact
    from ..inspection import compare, describe, summary

    if html is not None:
        from ..report_page import page, refuse_page, write_page

        refuse_page(html, overwrite)
    first = open_artifact(artifact)
    second = open_artifact(other) if other else None
    if html is not None and any(one is not None and not one.coded for one in (first, second)):
        raise UsageError("--html shows what a coded cache keeps, and a smaller checkpoint (RAP) has none; leave it out")
    if html is not None:
        write_page(page([first, second] if second else [first]), html, overwrite)
    if as_json:
        result: dict[str, Any] = summary(first)
        if second:
            result = {"artifact": result, "other": summary(second)}
        if html is not None:
            result["html"] = str(html)
        click.echo(json.dumps(result))
    elif html is not None:
        click.echo(f"wrote {html}: {html.stat().st_size / 1024:.0f} KiB")
    else:
        click.echo(compare(first, second) if second else describe(first))
