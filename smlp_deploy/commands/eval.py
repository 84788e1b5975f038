"""smlp eval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smlp_deploy import strictjson
from smlp_deploy.commands import options as o
from smlp_deploy.errors import CheckError, UsageError
from smlp_deploy.files import read_file

if TYPE_CHECKING:
    from smlp_deploy.evaluation.accuracy import Evaluation

_MAX_REPORT_BYTES = 1 << 30


def evaluate(
    dataset: o.DatasetArgument,
    model: o.ModelsOption = None,
    mapping: o.MappingOption = None,
    class_order: o.ClassOrderOption = None,
    device: o.DeviceOption = None,
    provider: o.ProviderOption = None,
    runtime: o.RuntimeOption = o.Runtime.auto,
    batch_size: o.BatchSizeOption = None,
    workers: o.WorkersOption = None,
    min_top1: o.MinAccuracyOption = None,
    output: o.ReportOutputOption = None,
    resume: o.ResumeOption = False,
    html: o.HtmlOption = None,
    as_json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Measure accuracy on labelled images; several models see the same decoded images.

    With -o, each image's answers are kept in FILE.partial until the report is complete; --resume continues a run that
    was stopped.
    """
    from smlp_deploy.commands.output import check_html, is_finished
    from smlp_deploy.commands.sources import default_model
    from smlp_deploy.commands.terminal import building, suggest
    from smlp_deploy.evaluation.accuracy import evaluate_dataset
    from smlp_deploy.files import check_writable
    from smlp_deploy.images.dataset import check_dataset

    check_html(html, beside=output)
    if resume and output is None:
        raise UsageError("only a report written to a file can be continued", where="--resume", fix="add -o report.json")
    names, order = _class_names(mapping, class_order)
    placement = o.choose_placement(device, provider, runtime, model or [])
    check_dataset(dataset)
    if resume and output is not None and is_finished(output):
        _judge(_top1_of(output), min_top1)
        return
    o.check_files(*(model or ()))
    if output is not None:
        check_writable(output)
    paths = model or [default_model(None, placement)]
    with building("evaluating") as progress:
        report = evaluate_dataset(
            paths,
            dataset,
            mapping=names,
            class_order=order,
            placement=placement,
            batch_size=batch_size,
            workers=workers,
            output=output,
            resume=resume,
            progress=progress,
        )
    _show(report, paths, html=html, as_json=as_json)
    _judge([(found.name, found.top1.count, found.top1.n) for found in report.models], min_top1)
    suggest("smlp", "benchmark", *paths)


def _class_names(mapping: Path | None, order: Path | None) -> tuple[dict[str, str] | None, tuple[str, ...] | None]:
    """What --mapping and --class-order say, of which one may be given."""
    from smlp_deploy.images.dataset import read_mapping
    from smlp_deploy.images.labels import read_labels

    if mapping and order:
        raise UsageError("contradicts --mapping", where="--class-order", fix="give one of them")
    return read_mapping(mapping) if mapping else None, read_labels(order) if order else None


def _show(report: Evaluation, models: Sequence[Path], *, html: Path | None, as_json: bool) -> None:
    from smlp_deploy.commands.output import page_origin, show
    from smlp_deploy.commands.tables import show_evaluation
    from smlp_deploy.reports import evaluation_page

    show(
        as_json=as_json,
        json_text=report.to_json,
        table=lambda: show_evaluation(report),
        html=html,
        page=lambda: evaluation_page(page_origin(models), report),
    )


def _judge(models: Iterable[tuple[str, int, int]], min_top1: float | None) -> None:
    """Compare each model's top-1, as its name, right answers and images, with the bound.

    Raises:
        CheckError: one is below it.
    """
    for name, right, images in models:
        if min_top1 is not None and right / images < min_top1:
            raise CheckError(f"top-1 is {right / images:.4g} ({right} of {images}), below {min_top1:g}", where=name)


def _top1_of(report: Path) -> list[tuple[str, int, int]]:
    """Each model of a finished report, as its name, right answers and images.

    Raises:
        UsageError: it is not a report.
    """
    try:
        content = read_file(report, limit=_MAX_REPORT_BYTES, error=UsageError, fix="give the report of smlp eval -o")
        models = strictjson.loads(content.decode())["models"]
        return [(str(model["name"]), int(model["top1"]["count"]), int(model["top1"]["n"])) for model in models]
    except (ValueError, KeyError, TypeError):
        raise UsageError("is not a report of smlp eval", where=report, fix="choose another -o") from None
