"""Results as tables on stdout, or on stderr beside machine-readable output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from smlp_deploy.commands.terminal import say, stderr, stdout
from smlp_deploy.errors import printable

if TYPE_CHECKING:
    from smlp_deploy.doctor import Finding
    from smlp_deploy.evaluation.accuracy import Evaluation
    from smlp_deploy.evaluation.benchmark import Benchmark, Ratio
    from smlp_deploy.evaluation.layers import DivergenceReport
    from smlp_deploy.evaluation.parity import ParityReport
    from smlp_deploy.evaluation.profile import GraphProfile
    from smlp_deploy.evaluation.sensitivity import SensitivityReport
    from smlp_deploy.evaluation.serving import ServerReport
    from smlp_deploy.exporters.kernels import KernelSummary
    from smlp_deploy.models.variants import Variant

_LABELS_SHOWN = 5
_LAYERS_SHOWN = 10
_CONFUSIONS_SHOWN = 5
_STATUS_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def _table(*heads: str | Text, words: Sequence[str] = (), no_wrap: Sequence[str] = (), **settings: Any) -> Table:
    """An empty table; columns hold right-aligned numbers, unless they are among the `words`."""
    table = Table(box=None, pad_edge=False, **settings)
    for head in heads:
        table.add_column(head, justify="left" if str(head) in words else "right", no_wrap=str(head) in no_wrap)
    return table


def show_variants(variants: Mapping[str, Variant]) -> None:
    from smlp_deploy.models.variants import OFFICIAL_URL, mac_count, parameter_count

    heads = ("variant", "parameters", "MACs at 224", "paper top-1", "official weights")
    table = _table(*heads, words=("variant", "official weights"), no_wrap=heads)
    for variant in variants.values():
        table.add_row(
            variant.name,
            f"{parameter_count(variant.config) / 1e6:.1f} M",
            f"{mac_count(variant.config) / 1e9:.2f} G",
            f"{variant.paper_top1} %",
            variant.weights_file or "never released",
        )
    console = stdout()
    console.print(table)
    console.print(f"official weights: {OFFICIAL_URL}", soft_wrap=True)


def show_parity(report: ParityReport, *, on_stderr: bool) -> None:
    """The report's gates as a table, then the failures."""
    heads = ("gate", "", "measured", "limit")
    table = _table(*heads, words=heads)
    for gate in report.gates:
        measured = _measured(gate.measured, share="%" in gate.limit)
        verdict = Text("passed", style="green") if gate.passed else Text("FAILED", style="bold red")
        table.add_row(gate.name, verdict, measured, gate.limit)
    console = stderr() if on_stderr else stdout()
    console.print(table)
    for gate in report.failures:
        console.print(Text(f"{gate.name}: {printable(gate.detail)}", style="red"), soft_wrap=True)
    for reason in report.unreadable:
        console.print(Text(f"not compared: {printable(reason)}", style="yellow"), soft_wrap=True)


def _measured(value: float, *, share: bool) -> str:
    """A gate's value as its limit is written; a share that is not whole is never rounded to 100.00%."""
    if value != value:
        return ""
    if not share:
        return f"{value:.3g}"
    return "99.99%" if 0.9999 < value < 1 else f"{value:.2%}"


def show_divergence(report: DivergenceReport) -> None:
    """How the error grows from point to point, on stdout."""
    console = stdout()
    console.print(Text(f"{printable(report.candidate)} against {printable(report.reference)}, {report.images} images"))
    heads = ("after", "error", "SQNR dB", "growth", "worst image", "")
    table = _table(*heads, words=("after", "worst image", ""), no_wrap=heads)
    for point in report.points:
        growth = "" if point.growth is None else ">x99" if point.growth > 99 else f"x{point.growth:.2g}"
        verdict = Text("") if point.error <= report.max_error else Text("over", style="bold red")
        name = printable(point.worst_image)
        image = f"{name[:8] if console.is_terminal else name} {point.worst_error:.1e}"
        table.add_row(Text(point.name), f"{point.error:.1e}", f"{point.sqnr_db:.1f}", growth, Text(image), verdict)
    console.print(table)
    if report.layers:
        columns = ("int8 layer", "own SQNR dB", "in the network")
        table = _table(*columns, words=columns[:1], no_wrap=columns)
        for layer in report.layers[:_LAYERS_SHOWN]:
            table.add_row(Text(printable(layer.name)), f"{layer.own_sqnr_db:.1f}", f"{layer.sqnr_db:.1f}")
        console.print(table)
        shown = min(_LAYERS_SHOWN, len(report.layers))
        console.print(f"the {shown} int8 layers with the most noise of their own, of {len(report.layers)}")
    for reason in report.unreadable:
        console.print(Text(f"not compared: {printable(reason)}", style="yellow"), soft_wrap=True)


def show_evaluation(report: Evaluation) -> None:
    """The figures of each model and pair, and the first model's confusions, on stdout."""
    console = stdout()
    console.print(f"{report.evaluated} images, {len(report.unreadable)} unreadable; classes named by {report.named_by}")
    table = _table("", "model", "top-1 %", "95%", "top-5 %", "loss", "ECE", words=("", "model"))
    for number, model in enumerate(report.models, start=1):
        interval = f"{100 * model.top1.low:.1f}-{100 * model.top1.high:.1f}"
        loss, ece = ("" if v is None else f"{v:.4f}" for v in (model.loss, model.calibration_error))
        top1, top5 = (f"{100 * share.value:.2f}" for share in (model.top1, model.top5))
        table.add_row(str(number), Text(printable(model.name)), top1, interval, top5, loss, ece)
    console.print(table)
    if report.pairs:
        heads = ("models", "agree on", "only first right", "only second right", "McNemar p")
        table = _table(*heads, words=("models",))
        for pair in report.pairs:
            models = f"{pair.first + 1} and {pair.second + 1}"
            agree = f"{100 * pair.agreement.value:.2f}%"
            table.add_row(models, agree, str(pair.only_first), str(pair.only_second), f"{pair.p_value:.3g}")
        console.print(table)
    for confusion in report.models[0].confusions[:_CONFUSIONS_SHOWN]:
        label, predicted = (printable(report.labels[index]) for index in (confusion.label, confusion.predicted))
        console.print(Text(f"{label} taken for {predicted}: {confusion.count}"), soft_wrap=True)
    for record in report.unreadable[:_CONFUSIONS_SHOWN]:
        console.print(Text(f"unreadable: {printable(record.path)}: {printable(record.error or '')}"), soft_wrap=True)


def show_benchmark(report: Benchmark) -> None:
    """Each model's start, times by batch size, and end-to-end times if measured, on stdout."""
    console = stdout()
    console.print(_models_table(report))
    console.print(_batches_table(report))
    for line in _gpu_lines(report):
        console.print(Text(printable(line)), soft_wrap=True)
    if (first := report.models[0].end_to_end) is not None:
        files = f"{first.images} files to records, {first.failed} failed"
        console.print(f"{files}; batch {first.batch}, {first.workers} decoding threads")
        console.print(_end_to_end_table(report))
    unstable = {f"{i} at batch {b.batch}" for i, m in enumerate(report.models, 1) for b in m.batches if not b.stable}
    if unstable:
        console.print(Text(f"not stable when timing began: {', '.join(sorted(unstable))}", style="yellow"))
    for reason in report.left_out:
        console.print(Text(f"left out: {printable(reason)}", style="yellow"), soft_wrap=True)
    console.print("ratio: speedup over model 1, median over the rounds, with its 95% interval")


def _gpu_lines(report: Benchmark) -> Iterator[str]:
    """The times without transfers; if a model ran on a GPU, which that is, and its clocks."""
    from smlp_deploy.reports.page import four_digits

    for number, model in enumerate(report.models, start=1):
        for timing in model.batches:
            if timing.gpu_median is not None:
                found = f"{four_digits(1000 * timing.gpu_median)} ms by CUDA events, without transfers"
                yield f"{number} at batch {timing.batch}: {found}"
        if model.gpu_memory is not None:
            yield f"{number}: {model.gpu_memory / 1e6:.0f} MB of GPU memory for buffers and scratch, beside the weights"
    if any(model.gpu for model in report.models):
        facts = report.environment.items()
        yield from (f"{name}: {value}" for name, value in facts if name.startswith("GPU"))


def _models_table(report: Benchmark) -> Table:
    heads = ("", "model", "load s", "first s", "peak MB")
    table = _table(*heads, words=("", "model"), no_wrap=(*heads[:1], *heads[2:]))
    for number, model in enumerate(report.models, start=1):
        peak = "" if model.peak_memory is None else f"{model.peak_memory / 1e6:.0f}"
        name = Text(printable(model.name), overflow="fold")
        table.add_row(str(number), name, f"{model.load:.3g}", f"{model.first:.3g}", peak)
    return table


def _batches_table(report: Benchmark) -> Table:
    from smlp_deploy.reports.page import four_digits

    heads = ("batch", "", "median ms", "p90", "p95", "p99", "images/s", "ratio", "95%")
    table = _table(*heads, no_wrap=heads)
    for of_size in zip(*(model.batches for model in report.models), strict=True):
        for number, timing in enumerate(of_size, start=1):
            times = (four_digits(1000 * t) for t in (timing.median, timing.p90, timing.p95, timing.p99))
            size = str(timing.batch) if number == 1 else ""
            table.add_row(size, str(number), *times, four_digits(timing.images_per_second), *_ratio(timing.ratio))
    return table


def _end_to_end_table(report: Benchmark) -> Table:
    from smlp_deploy.reports.page import four_digits

    heads = ("", "images/s", "seconds", "network", "idle", "decoding alone", "ratio", "95%")
    table = _table(*heads, no_wrap=heads)
    for number, model in enumerate(report.models, start=1):
        if (end := model.end_to_end) is not None:
            seconds = (f"{value:.2f}" for value in (end.seconds, end.inference, end.idle, end.decode))
            table.add_row(str(number), four_digits(end.images_per_second), *seconds, *_ratio(end.ratio))
    return table


def _ratio(ratio: Ratio | None) -> tuple[str, str]:
    if ratio is None:
        return "1", ""
    return f"{ratio.value:.2f}", "" if ratio.low is None else f"{ratio.low:.2f}-{ratio.high:.2f}"


def show_server(report: ServerReport) -> None:
    """How far the server agrees, on which images it does not, and its times, on stdout."""
    from smlp_deploy.reports.page import four_digits

    console = stdout()
    console.print(Text(f"{printable(report.server)} against {printable(report.model)}"), soft_wrap=True)
    table = _table("", "images", "refused by both", "same top-1", "largest difference", words=("",))
    for found in report.agreements:
        share = _measured(found.share, share=True)
        table.add_row(found.endpoint, str(found.images), str(found.refused), share, f"{found.largest:.2g}")
    console.print(table)
    for found in report.agreements:
        for line in found.disagreements:
            console.print(Text(f"{found.endpoint}: {printable(line)}", style="red"), soft_wrap=True)
    if report.loads:
        heads = ("", "clients", "median ms", "p90", "p99", "images/s", "requests", "runs")
        table = _table(*heads, words=("",))
        for load in report.loads:
            times = (four_digits(1000 * seconds) for seconds in (load.median, load.p90, load.p99))
            counts = (str(load.requests), str(load.runs))
            table.add_row(load.endpoint, str(load.concurrency), *times, four_digits(load.images_per_second), *counts)
        console.print(table)


def show_findings(findings: Sequence[Finding]) -> None:
    """What works, what does not, and how to fix it, on stdout: a table on a terminal, else one line each."""
    console = stdout()
    lines = [(f.status, printable(f.name), printable(f.detail)) for f in findings]
    fixes = [f.fix and f"try: {printable(f.fix)}" for f in findings]
    if console.is_terminal:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        for (status, name, detail), fix in zip(lines, fixes, strict=True):
            table.add_row(Text(status, style=_STATUS_STYLES[status]), Text(name), Text(detail))
            if fix:
                table.add_row("", "", Text(fix, style="dim"))
        console.print(table)
        return
    width = max(len(name) for _, name, _ in lines)
    for (status, name, detail), fix in zip(lines, fixes, strict=True):
        console.print(f"{status:<7} {name:<{width}}  {detail}", markup=False, soft_wrap=True)
        if fix:
            console.print(f"{'':<7} {'':<{width}}  {fix}", markup=False, soft_wrap=True)


def show_sensitivity(report: SensitivityReport) -> None:
    """The most sensitive int8 layers and the precision chosen for each, on stderr."""
    title = f"int8 alone, top-1 {report.measure} lost on {report.inputs} images"
    table = _table("layer", "points", "error", "choice", words=("layer", "choice"), title=title)
    for layer in report.layers[: max(_LAYERS_SHOWN, len(report.left_out))]:
        table.add_row(layer.layer, f"{layer.drop:.2f}", f"{layer.error:.1e}", layer.precision)
    stderr().print(table)
    chosen = (
        f"{len(report.layers) - len(report.left_out)} layers in int8, {len(report.left_out)} left in half precision"
    )
    say(f"{chosen}: {report.whole_drop:.2f} points lost, {report.max_drop:g} allowed")


def show_kernels(summary: KernelSummary) -> None:
    """An engine's kernels in three lines on stderr."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in summary.by_kind.items())
    say(f"{summary.count} kernels at batch {summary.batch}: {kinds}")
    say(f"convolutions and matrix products: {summary.compute}")
    moved = f"{summary.bytes_per_image / 1e6:.1f} MB read and written per image (estimate, from"
    known = summary.count - summary.bytes_unknown
    if not summary.bytes_unknown:
        say(f"{moved} the kernels' shapes)")
    else:
        say(f"at least {moved} the shapes of {known} kernels)" if known else "bytes read and written: unknown")


def show_profile(profile: GraphProfile, *, top: int) -> None:
    """The kernels that move the most bytes, totals, and the roofline estimate, on stdout."""
    from smlp_deploy.evaluation.profile import roofline  # imports onnx, which a table of predictions does not need

    console = stdout()
    summary = profile.summary
    console.print(
        f"{profile.source}: {profile.precision}, batch {summary.batch}, {profile.architecture}", soft_wrap=True
    )
    heads = ("MB", "precision", "kernel", "writes", "ONNX nodes")
    table = _table(*heads, words=heads[1:], no_wrap=heads[:-1])
    for kernel in sorted(profile.kernels, key=lambda kernel: -(kernel.nbytes or 0))[:top]:
        written = kernel.outputs[0].written_out("x") if kernel.outputs else ""
        nodes = Text(", ".join(kernel.nodes))
        megabytes = "?" if kernel.nbytes is None else f"{kernel.nbytes / 1e6:.2f}"
        table.add_row(megabytes, kernel.precision, kernel.kind, written, nodes)
    console.print(table)
    total = summary.bytes_per_image * summary.batch / 1e6
    unknown = f" (bytes of {summary.bytes_unknown} unknown)" if summary.bytes_unknown else ""
    kernels = f"{summary.count} kernels{unknown}, {total:.0f} MB read and written"
    console.print(f"{kernels}; convolutions and products: {summary.compute}")
    console.print("best case (an estimate; nothing was run)")
    heads = ("GPU", "us/image", "bound by", "GB/s", "T/s")
    estimates = _table(*heads, words=("GPU", "bound by"))
    for estimate in roofline(profile):
        gpu = estimate.gpu
        peak = f"{gpu.peak[profile.precision]:g}"
        estimates.add_row(gpu.name, f"{estimate.microseconds:.3g}", estimate.bound, f"{gpu.bandwidth:g}", peak)
    console.print(estimates)


def show_comparison(first: GraphProfile, second: GraphProfile) -> None:
    """The totals of two profiles side by side, on stdout."""
    table = _table("", Text(str(first.source)), Text(str(second.source)), "ratio", words=("",))
    kinds = sorted({*first.summary.by_kind, *second.summary.by_kind})
    rows = [
        ("kernels", first.summary.count, second.summary.count),
        ("KB per image", first.summary.bytes_per_image // 1000, second.summary.bytes_per_image // 1000),
        *((kind, first.summary.by_kind.get(kind, 0), second.summary.by_kind.get(kind, 0)) for kind in kinds),
    ]
    for name, one, other in rows:
        table.add_row(name, str(one), str(other), f"{other / one:.2f}" if one else "")
    stdout().print(table)


def show_facts(facts: Mapping[str, Any]) -> None:
    """Nested facts as two columns on stdout; long lists are shortened on a terminal."""
    console = stdout()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _flatten(facts):
        table.add_row(key, Text(printable(_fact_text(value, most=_LABELS_SHOWN if console.is_terminal else None))))
    console.print(table)


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, Mapping) and key != "operators":
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _fact_text(value: Any, *, most: int | None) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    if isinstance(value, list | tuple):
        shown = ", ".join(str(item) for item in value[:most])
        return shown + (f", … ({len(value)} in all)" if most is not None and len(value) > most else "")
    return "none" if value is None else str(value)
