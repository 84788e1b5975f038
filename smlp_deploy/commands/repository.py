"""smlp export --format triton."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from smlp_deploy.commands import options as o
from smlp_deploy.errors import UsageError

_OPTIONS = {"source", "format_", "output", "as_json", "quiet"}


def export_to_triton(context: typer.Context, source: str | None, output: Path | None, *, as_json: bool) -> None:
    """Put an ONNX file or engine into a model repository, and say what the server needs.

    Raises:
        UsageError: options that only an ONNX file has.
    """
    from smlp_deploy.commands.terminal import say, suggest
    from smlp_deploy.pipeline.repository import DEFAULT_REPOSITORY, export_repository

    _check_options(context)
    if source is not None:
        o.check_files(Path(source))
    artifact = Path(source) if source is not None else _newest()
    result = export_repository(artifact, output or DEFAULT_REPOSITORY)
    served = result.interface
    sizes = f"batches of {served.batch}" if served.batch else f"batches of up to {served.max_batch_size}"
    if as_json:
        facts = {"path": str(result.path), "version": result.version, "platform": served.platform}
        typer.echo(json.dumps({**facts, "batch": served.batch, "max_batch_size": served.max_batch_size}, indent=2))
    else:
        typer.echo(result.path)
    say(f"version {result.version} for {served.platform}, {sizes}; preprocess/ and postprocess/ need smlp-deploy there")
    suggest("smlp", "serve-check", "localhost:8000", "IMAGES", "--model", artifact)


def _check_options(context: typer.Context) -> None:
    """Check that no option was given that says how to make an ONNX file."""
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name))
        if given is not None and given.name == "COMMANDLINE" and parameter.name not in _OPTIONS:
            raise UsageError(
                "says how to make an ONNX file, and a repository is made of one that is there",
                where=parameter.opts[0],
                fix="export it first, then: smlp export --format triton ONNX",
            )


def _newest() -> Path:
    """The newest ONNX file, else the bundled model; an engine is taken only if it is named, as servers differ."""
    from smlp_deploy.artifacts import newest_artifact
    from smlp_deploy.commands.terminal import note
    from smlp_deploy.files import BUNDLED_MODEL

    newest = newest_artifact()
    if newest is None:
        note("no ONNX file given and none in artifacts/; using the bundled digits model")
        return BUNDLED_MODEL
    note(f"no ONNX file given; using {newest}, the newest in artifacts/")
    return newest
