"""smlp verify."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from smlp_deploy.commands import options as o
from smlp_deploy.commands.groups import Gates, with_groups
from smlp_deploy.errors import CheckError, UsageError

if TYPE_CHECKING:
    from smlp_deploy.evaluation.layers import DivergenceReport
    from smlp_deploy.runners.placement import Placement


@with_groups
def verify(
    *,
    candidate: o.CandidateArgument,
    reference: o.VerifyReferenceOption = None,
    images: o.VerifyImagesOption = None,
    device: o.DeviceOption = None,
    provider: o.ProviderOption = None,
    runtime: o.RuntimeOption = o.Runtime.auto,
    gates: Gates,
    layers: o.LayersOption = False,
    max_error: o.MaxErrorOption = None,
    save: o.SaveOption = None,
    html: o.HtmlOption = None,
    as_json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Compare an artifact with the trained network on real images and seeded noise."""
    from smlp_deploy.commands.output import check_html
    from smlp_deploy.files import check_writable

    check_html(html, beside=save)
    if layers and gates.bounds:
        raise UsageError("the gate of --layers is --max-error", where=f"the bound on {next(iter(gates.bounds))}")
    if candidate.suffix == ".json" and (device or provider or runtime is not o.Runtime.auto):
        raise UsageError(
            "is a saved report, so nothing is run", where=candidate, fix="leave out --device, --provider, --runtime"
        )
    if (max_error is not None or save is not None) and not layers:
        raise UsageError("is for --layers", where="--save" if save else "--max-error", fix="add --layers")
    if max_error is not None and not math.isfinite(max_error):
        raise UsageError("is not a finite number", where="--max-error")
    placement = o.choose_placement(device, provider, runtime, [candidate])
    is_report = layers and candidate.suffix == ".json"
    if is_report and (reference is not None or images):
        raise UsageError(
            "is a saved report, so nothing is run", where=candidate, fix="leave out --reference and --images"
        )
    paths = o.find_given_images(images, "--images") if images else None
    o.check_files(candidate, reference)
    if save is not None:
        check_writable(save)
    if layers:
        report = _divergence(candidate, reference, paths, max_error, placement)
        _show_layers(candidate, reference, report, save=save, html=html, as_json=as_json)
        return
    _verify_whole(candidate, reference, paths, gates.bounds, placement, html=html, as_json=as_json)


def _verify_whole(
    candidate: Path,
    reference: Path | None,
    images: list[Path] | None,
    bounds: dict[str, float],
    placement: Placement,
    *,
    html: Path | None,
    as_json: bool,
) -> None:
    """Show the gates.

    Raises:
        CheckError: a gate failed.
    """
    from smlp_deploy.commands import output
    from smlp_deploy.commands.tables import show_parity
    from smlp_deploy.commands.terminal import suggest, working
    from smlp_deploy.pipeline.verify import verify_artifact
    from smlp_deploy.reports import parity_page

    with working(f"comparing {candidate} with the trained network"):
        report = verify_artifact(candidate, reference=reference, images=images, bounds=bounds, placement=placement)
    output.show(
        as_json=as_json,
        json_text=report.to_json,
        table=lambda: show_parity(report, on_stderr=False),
        html=html,
        page=lambda: parity_page(output.page_origin([candidate, reference]), report),
    )
    if not report.passed:
        raise CheckError(
            f"parity failed: {', '.join(gate.name for gate in report.failures)}",
            where=candidate,
            fix="find where they diverge with smlp verify --layers",
        )
    suggest("smlp", "benchmark", candidate)


def _divergence(
    candidate: Path,
    reference: Path | None,
    images: list[Path] | None,
    max_error: float | None,
    placement: Placement,
) -> DivergenceReport:
    """The error at each point: measured, or read from a report that --save wrote."""
    from smlp_deploy.commands.terminal import working
    from smlp_deploy.evaluation.layers import DivergenceReport
    from smlp_deploy.files import read_text

    if candidate.suffix != ".json":
        from smlp_deploy.pipeline.verify import verify_layers

        with working(f"comparing {candidate} block by block"):
            return verify_layers(
                candidate, reference=reference, images=images, max_error=max_error, placement=placement
            )
    text = read_text(candidate, error=UsageError, fix="smlp verify --layers --save makes one")
    report = DivergenceReport.from_json(text, where=candidate)
    return report if max_error is None else report.judged_by(max_error)


def _show_layers(
    candidate: Path,
    reference: Path | None,
    report: DivergenceReport,
    *,
    save: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Show the error at each point.

    Raises:
        CheckError: one is over the gate.
    """
    from smlp_deploy.commands import output
    from smlp_deploy.commands.tables import show_divergence
    from smlp_deploy.commands.terminal import suggest
    from smlp_deploy.files import write_text
    from smlp_deploy.reports import divergence_page

    if save is not None:
        write_text(save, report.to_json())
    output.show(
        as_json=as_json,
        json_text=report.to_json,
        table=lambda: show_divergence(report),
        html=html,
        page=lambda: divergence_page(output.page_origin([candidate, reference]), report),
    )
    if (over := report.first_over) is not None:
        raise CheckError(
            f"diverges from {report.reference} at {over.name}: error {over.error:.2g}, allowed {report.max_error:g}",
            where=candidate,
        )
    suggest("smlp", "eval", "DATASET", "--model", "ARTIFACT" if candidate.suffix == ".json" else candidate)
