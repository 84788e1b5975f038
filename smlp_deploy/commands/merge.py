"""smlp merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from smlp_deploy.commands import options as o


def merge(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder -o of smlp predict --shard.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file; .parquet or .jsonl, as the shards are.")],
    as_json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Make one file of all shards, in the order of the images, after checking that none is missing or doubled."""
    from smlp_deploy.commands.terminal import say, working
    from smlp_deploy.inference.merge import merge_shards

    with working(f"merging {folder}"):
        merged = merge_shards(folder, output)
    facts = merged.facts
    if as_json:
        result = {"path": str(output), "images": facts.images, "failed": facts.failed, "shards": merged.shards}
        typer.echo(json.dumps(result, indent=2))
    say(f"{facts.images} images, {facts.failed} failed, of {merged.shards} shards, written to {output}")
