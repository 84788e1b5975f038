"""smlp eval."""

from __future__ import annotations

from smlp_deploy.commands import options as o
from smlp_deploy.errors import SmlpError, UsageError


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
    from smlp_deploy.commands.output import check_html, show
    from smlp_deploy.commands.sources import default_model
    from smlp_deploy.commands.tables import show_evaluation
    from smlp_deploy.commands.terminal import building, suggest
    from smlp_deploy.evaluation.accuracy import evaluate_dataset
    from smlp_deploy.files import check_writable
    from smlp_deploy.images.dataset import check_dataset, read_mapping
    from smlp_deploy.images.labels import read_labels
    from smlp_deploy.reports import evaluation_page

    check_html(html, beside=output)
    if resume and output is None:
        raise UsageError("only a report written to a file can be continued", where="--resume", fix="add -o report.json")
    if mapping and class_order:
        raise UsageError("contradicts --mapping", where="--class-order", fix="give one of them")
    names = read_mapping(mapping) if mapping else None
    order = read_labels(class_order) if class_order else None
    placement = o.choose_placement(device, provider, runtime, model or [])
    check_dataset(dataset)
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
    show(
        as_json=as_json,
        json_text=report.to_json,
        table=lambda: show_evaluation(report),
        html=html,
        page=lambda: evaluation_page(report),
    )
    below = [found for found in report.models if min_top1 is not None and found.top1.value < min_top1]
    if below:
        top1 = below[0].top1
        found = f"top-1 is {top1.value:.4g} ({top1.count} of {top1.n})"
        raise SmlpError(f"{found}, below {min_top1:g}", where=below[0].name)
    suggest("smlp", "benchmark", *paths)
