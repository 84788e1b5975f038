"""smlp benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from smlp_deploy.commands import options as o
from smlp_deploy.errors import UsageError

if TYPE_CHECKING:
    from smlp_deploy.evaluation.benchmark import Files


def benchmark(
    artifacts: o.ArtifactsArgument = None,
    batch_sizes: o.BatchSizesOption = "1,8,32",
    rounds: o.RoundsOption = 10,
    baseline: o.BaselineOption = False,
    reference: o.BaselineReferenceOption = None,
    device: o.DeviceOption = None,
    provider: o.ProviderOption = None,
    runtime: o.RuntimeOption = o.Runtime.auto,
    end_to_end: o.EndToEndOption = None,
    workers: o.EndToEndWorkersOption = None,
    output: o.ReportOutputOption = None,
    html: o.HtmlOption = None,
    as_json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Time models side by side in turns (A B A B), each in its own process."""
    from smlp_deploy.commands.output import check_html, page_origin, show
    from smlp_deploy.commands.sources import default_model
    from smlp_deploy.commands.tables import show_benchmark
    from smlp_deploy.commands.terminal import building, suggest
    from smlp_deploy.evaluation.benchmark import run_benchmark
    from smlp_deploy.evaluation.worker import Target
    from smlp_deploy.files import check_writable, write_text
    from smlp_deploy.pipeline.baselines import baselines_of
    from smlp_deploy.reports import benchmark_page

    check_html(html, beside=output)
    sizes = _parse_batch_sizes(batch_sizes)
    if reference is not None and not baseline:
        raise UsageError("is for --baseline", where="--reference", fix="add --baseline")
    files = _files(end_to_end, workers, batch=max(sizes))
    placement = o.choose_placement(device, provider, runtime, artifacts or [])
    o.check_files(*(artifacts or ()), reference)
    if output is not None:
        check_writable(output)
    paths = artifacts or [default_model(None, placement)]
    targets = [Target(path=path, placement=placement.for_file(path)) for path in paths]
    with building("loading") as progress:
        if baseline:
            progress("exporting the unlowered baseline", 0, 1)
        others = baselines_of(paths[0], reference=reference, placement=placement) if baseline else ()
        report = run_benchmark(
            targets, baselines=others, batch_sizes=sizes, rounds=rounds, files=files, progress=progress
        )
    if output is not None:
        write_text(output, report.to_json())
    show(
        as_json=as_json,
        json_text=report.to_json,
        table=lambda: show_benchmark(report),
        html=html,
        page=lambda: benchmark_page(
            page_origin([*paths, *(target.path for target in others if target.graph is None)]), report
        ),
    )
    if not as_json:
        suggest("smlp", "profile", next((path for path in paths if path.suffix.lower() == ".onnx"), "ONNX"))


def _parse_batch_sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UsageError(f"{text!r} is not a list of batch sizes", where="--batch", fix="for example 1,8,32")
    return sizes


def _files(images: list[str] | None, workers: int | None, *, batch: int) -> Files | None:
    """The files of an end-to-end measurement, if one was requested."""
    from smlp_deploy.evaluation.benchmark import Files
    from smlp_deploy.images.batches import available_cores

    if not images:
        if workers is not None:
            raise UsageError("is for --end-to-end", where="--workers", fix="add --end-to-end IMAGES")
        return None
    paths: tuple[Path, ...] = tuple(o.find_given_images(images, "--end-to-end"))
    return Files(paths=paths, batch=batch, workers=workers or available_cores())
