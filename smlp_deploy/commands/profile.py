"""smlp profile."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from smlp_deploy.commands import options as o
from smlp_deploy.errors import UsageError


def profile(
    file: Annotated[Path, typer.Argument(metavar="ONNX", help="An ONNX file that smlp export wrote.")],
    batch: o.ProfileBatchOption = 8,
    gpu_arch: o.ProfileArchOption = "sm89",
    top: o.TopOption = 20,
    compare: o.CompareOption = None,
    html: o.HtmlOption = None,
    as_json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """List the kernels TensorRT compiles an ONNX file to, their bytes, and a roofline estimate; needs no GPU."""
    from smlp_deploy.commands import output
    from smlp_deploy.commands.tables import show_comparison, show_profile
    from smlp_deploy.commands.terminal import suggest, working
    from smlp_deploy.dependencies import require

    require("onnx", purpose="to read an ONNX file", extra="cpu")
    from smlp_deploy.evaluation.profile import profile_graph
    from smlp_deploy.reports import profile_page

    output.check_html(html)
    if html is not None and compare is not None:
        raise UsageError("a page shows one file", where="--html", fix="leave out --compare")
    o.check_files(file, compare)
    with working("compiling"):
        first, *others = (
            profile_graph(path, batch=batch, architecture=gpu_arch) for path in (file, compare) if path is not None
        )
    output.show(
        as_json=as_json,
        json_text=lambda: json.dumps([asdict(found) for found in (first, *others)], indent=2, default=str),
        table=lambda: show_comparison(first, others[0]) if others else show_profile(first, top=top),
        html=html,
        page=lambda: profile_page(output.page_origin([file]), first),
    )
    suggest("smlp", "build-engine", file)
