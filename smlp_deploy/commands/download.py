"""smlp download."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from smlp_deploy.commands.options import JsonOption, QuietOption


def download(
    variant: Annotated[str, typer.Argument(metavar="VARIANT", help="A variant name; smlp models lists them.")],
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Download a variant's official weights to the user's cache directory, or verify those already there."""
    from smlp_deploy.commands.terminal import downloading, suggest
    from smlp_deploy.files import sha256_of
    from smlp_deploy.models.pretrained import fetch_weights
    from smlp_deploy.models.variants import find_variant

    with downloading() as progress:
        path = fetch_weights(find_variant(variant), progress=progress)
    if as_json:
        facts = {"variant": variant, "path": str(path), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(path)
    suggest("smlp", "export", variant)
