"""smlp inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from smlp_deploy.artifacts import CHECKPOINT_SUFFIXES
from smlp_deploy.commands.options import EmaOption, JsonOption, QuietOption, check_files


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint, ONNX file or engine.")],
    ema: EmaOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what a file contains: configuration, labels, preprocessing, provenance."""
    from smlp_deploy.commands import output
    from smlp_deploy.commands.tables import show_facts
    from smlp_deploy.commands.terminal import suggest
    from smlp_deploy.inspect_file import inspect_file

    if file.suffix.lower() in (".onnx", ".engine", *CHECKPOINT_SUFFIXES):
        check_files(file)
    facts = inspect_file(file, ema=ema)
    output.show(as_json=as_json, json_text=lambda: json.dumps(facts, indent=2), table=lambda: show_facts(facts))
    if not as_json:
        is_checkpoint = facts["kind"] == "checkpoint"
        suggest("smlp", *(("export", file) if is_checkpoint else ("predict", "--model", file, "IMAGES")))
