"""Pages of how fast models run, and of the kernels that TensorRT compiles them to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from smlp_deploy.reports import charts
from smlp_deploy.reports.page import (
    Fact,
    Origin,
    Section,
    Table,
    facts_table,
    four_digits,
    numbered,
    render,
    require_report,
    shown,
)

if TYPE_CHECKING:
    from smlp_deploy.evaluation.benchmark import BatchTiming, Benchmark, Ratio
    from smlp_deploy.evaluation.profile import GraphProfile
    from smlp_deploy.exporters.kernels import Kernel

_KERNELS_SHOWN = 20


def benchmark_page(origin: Origin, report: Benchmark) -> str:
    """How fast models run, side by side."""
    require_report()
    first, *others = report.models
    position, fastest = max(enumerate(first.batches), key=lambda numbered: numbered[1].images_per_second)
    facts = [Fact(f"{four_digits(fastest.images_per_second)} images/s", f"at batch {fastest.batch} · {first.name}")]
    for model in others:
        timing = model.batches[position]
        if timing.ratio:
            value, interval = _ratio(timing.ratio)
            known = f"(95 %: {interval}) " if interval else ""
            facts.append(Fact(f"{value}×", f"{known}as fast at batch {timing.batch} · {model.name}"))
    machine = {name: value for name, value in report.environment.items() if name not in origin.versions}
    return render(
        "Speed",
        "Models timed in turns on one machine. A ratio is the speedup over model 1: the median over the rounds, with"
        " its 95 % bootstrap interval.",
        origin,
        facts=facts,
        sections=[
            _speed_section(report),
            _latency_section(report),
            *([_end_to_end_section(report)] if first.end_to_end else []),
            _starts_section(report),
            Section(name="environment", title="Environment", tables=[facts_table(machine)]),
        ],
    )


def _by_batch(report: Benchmark) -> Iterator[tuple[str, BatchTiming]]:
    """Each model's name and timing, grouped by batch size."""
    for of_size in zip(*(model.batches for model in report.models), strict=True):
        for (name, _), timing in zip(numbered(report.models), of_size, strict=True):
            yield name, timing


def _speed_section(report: Benchmark) -> Section:
    throughput = charts.line_chart(
        [(name, [timing.images_per_second for timing in model.batches]) for name, model in numbered(report.models)],
        ticks=[str(timing.batch) for timing in report.models[0].batches],
        name="throughput",
        title="Images per second by batch size",
        units=("batch", "images/s"),
    )
    ratios = [
        (f"batch {timing.batch}: {name}", timing.ratio.value, *_ends(timing.ratio))
        for name, timing in _by_batch(report)
        if timing.ratio
    ]
    title = "Speedup over model 1, with 95 % intervals"
    drawn = charts.interval_chart(ratios, name="ratios", title=title, unit="ratio", reference=1)
    rows = [
        (str(timing.batch), name, four_digits(timing.images_per_second), *_ratio(timing.ratio))
        for name, timing in _by_batch(report)
    ]
    heads = ("batch", "model", "images/s", "ratio", "95 %")
    table = Table(caption="Throughput of the median run", heads=heads, words=("model",), rows=rows)
    both = [throughput, drawn] if ratios else [throughput]
    return Section(name="speed", title="Throughput", charts=both, tables=[table])


def _latency_section(report: Benchmark) -> Section:
    drawn = []
    for batch in dict.fromkeys(timing.batch for _, timing in _by_batch(report)):
        rounds = [
            (name, [[1000 * run for run in one] for one in timing.rounds])
            for name, timing in _by_batch(report)
            if timing.batch == batch
        ]
        title = f"Milliseconds per run at batch {batch}"
        drawn.append(charts.distribution_chart(rounds, name=f"latency-{batch}", title=title, unit="ms per run"))
    rows = [
        (
            str(timing.batch),
            name,
            *(four_digits(1000 * t) for t in (timing.median, timing.p90, timing.p95, timing.p99)),
            f"{timing.spread:.1%}",
            "" if timing.gpu_median is None else four_digits(1000 * timing.gpu_median),
            "yes" if timing.stable else "NO",
        )
        for name, timing in _by_batch(report)
    ]
    heads = ("batch", "model", "median ms", "p90", "p95", "p99", "IQR / median", "GPU alone, ms", "stable")
    table = Table(caption="Time of a run", heads=heads, words=("model", "stable"), rows=rows)
    text = "Boxes span the middle half of all runs, whiskers 1 to 99 %; ticks are the medians of rounds."
    return Section(name="latency", title="Latency", text=[text], charts=drawn, tables=[table])


def _end_to_end_section(report: Benchmark) -> Section:
    ends = [(name, model.end_to_end) for name, model in numbered(report.models) if model.end_to_end]
    first = ends[0][1]
    rows = [
        (
            name,
            four_digits(end.images_per_second),
            *(f"{seconds:.2f}" for seconds in (end.seconds, end.inference, end.idle, end.decode)),
            *_ratio(end.ratio),
        )
        for name, end in ends
    ]
    heads = ("model", "images/s", "seconds", "network", "idle", "decoding alone", "ratio", "95 %")
    caption = f"{first.images:,} files, {first.failed:,} failed; batch {first.batch}, {first.workers} decoding threads"
    table = Table(caption=caption, heads=heads, words=("model",), rows=rows)
    return Section(name="files", title="From files to records", tables=[table])


def _starts_section(report: Benchmark) -> Section:
    rows = [
        (
            name,
            model.precision,
            f"{model.load:.3g}",
            f"{model.first:.3g}",
            "" if model.peak_memory is None else f"{model.peak_memory / 1e6:,.0f}",
        )
        for name, model in numbered(report.models)
    ]
    heads = ("model", "precision", "load, s", "first prediction, s", "peak memory, MB")
    table = Table(caption="Each model in its own process", heads=heads, words=heads[:2], rows=rows)
    text = [f"Left out: {reason}" for reason in report.left_out]
    return Section(name="starts", title="Start and memory", text=text, tables=[table])


def profile_page(origin: Origin, profile: GraphProfile) -> str:
    """The kernels that TensorRT compiles a graph to, where their memory traffic is, and their least time."""
    require_report()
    summary = profile.summary
    unknown = f"; bytes of {summary.bytes_unknown:,} kernels unknown" if summary.bytes_unknown else ""
    return render(
        "Kernels",
        f"{profile.source}: {profile.precision}, compiled for {profile.architecture} at batch {summary.batch}."
        " Bytes are estimated from the kernels' shapes; nothing was run.",
        origin,
        facts=[
            Fact(f"{summary.count:,} kernels", f"convolutions and matrix products: {summary.compute or 'none'}"),
            Fact(f"{summary.bytes_per_image / 1e6:,.2f} MB", f"read and written per image{unknown}"),
            Fact(f"{profile.macs / 1e6:,.1f} M", "multiply-accumulates per image"),
        ],
        sections=[
            *([_traffic_section(profile)] if summary.count > summary.bytes_unknown else []),
            _roofline_section(profile),
            _kernels_section(profile.kernels),
        ],
    )


def _traffic_section(profile: GraphProfile) -> Section:
    traffic: dict[str, Counter[str]] = {}
    for kernel in profile.kernels:
        traffic.setdefault(_block(kernel), Counter())[kernel.precision] += kernel.nbytes or 0
    by_precision = sum(traffic.values(), Counter[str]())
    total = by_precision.total() or 1
    parts = [precision for precision, _ in by_precision.most_common()]
    blocks = [
        (block, *(f"{of[part] / 1e6:,.3f}" for part in parts), f"{of.total() / total:.1%}")
        for block, of in traffic.items()
    ]
    chart = charts.stacked_chart(
        [(block, {part: count / 1e6 for part, count in of.items()}) for block, of in traffic.items()],
        parts=parts,
        name="traffic",
        title="Megabytes read and written by block and precision",
        unit=f"MB at batch {profile.summary.batch}",
    )
    counts = Counter(kernel.precision for kernel in profile.kernels)
    precisions = [
        (part, f"{counts[part]:,}", f"{count / 1e6:,.3f}", f"{count / total:.1%}")
        for part, count in by_precision.most_common()
    ]
    heads = ("precision", "kernels", "MB", "share")
    tables = [
        Table(caption="By precision", heads=heads, words=heads[:1], rows=precisions),
        Table(caption="By block, in MB", heads=("block", *parts, "share"), words=("block",), rows=blocks, folded=True),
    ]
    return Section(name="traffic", title="Memory traffic", charts=[chart], tables=tables)


def _block(kernel: Kernel) -> str:
    """The block that a kernel belongs to, by its first ONNX node: `blocks.3` for `blocks.3.hidden/conv2d_5`."""
    module, slash, _ = next(iter(kernel.nodes), "").partition("/")
    if not slash:
        return "between blocks"
    name, _, rest = module.partition(".")
    number = rest.partition(".")[0]
    return f"{name}.{number}" if number.isdecimal() else name


def _roofline_section(profile: GraphProfile) -> Section:
    from smlp_deploy.evaluation.profile import roofline  # imports onnx, which the other pages do not need

    rows = [
        (
            estimate.gpu.name,
            f"{estimate.microseconds:,.1f}",
            estimate.bound,
            f"{estimate.memory_us:,.1f}",
            f"{estimate.compute_us:,.1f}",
            f"{estimate.gpu.bandwidth:g}",
            f"{estimate.gpu.peak[profile.precision]:g}",
            estimate.gpu.source,
        )
        for estimate in roofline(profile)
    ]
    heads = ("GPU", "µs/image", "bound by", "by memory, µs", "by arithmetic, µs", "GB/s", "T/s", "source")
    table = Table(caption="Least time per image", heads=heads, words=("GPU", "bound by", "source"), rows=rows)
    text = (
        "An estimate; nothing was run: all bytes over the memory bandwidth or all operations over the peak rate,"
        " whichever takes longer. Kernels reach neither limit; use it as a bound for comparing graphs."
    )
    return Section(name="roofline", title="Best case by data sheets", text=[text], tables=[table])


def _kernels_section(kernels: Sequence[Kernel]) -> Section:
    largest = sorted(kernels, key=lambda kernel: -(kernel.nbytes or 0))[:_KERNELS_SHOWN]
    words = ("precision", "kind", "writes", "ONNX nodes")

    def table(caption: str, some: Sequence[Kernel], *, folded: bool) -> Table:
        rows = [
            (
                "?" if kernel.nbytes is None else f"{kernel.nbytes / 1e6:,.3f}",
                kernel.precision,
                kernel.kind,
                kernel.outputs[0].written_out("×") if kernel.outputs else "",
                ", ".join(kernel.nodes),
            )
            for kernel in some
        ]
        return Table(caption=caption, heads=("MB", *words), words=words, rows=rows, folded=folded)

    first = table(f"Most bytes moved: {shown(kernels, _KERNELS_SHOWN)}", largest, folded=False)
    every = table(f"All {len(kernels):,}, in execution order", kernels, folded=True)
    return Section(name="kernels", title="Kernels", tables=[first, every])


def _ends(ratio: Ratio) -> tuple[float, float]:
    """The interval, or one of zero width if unknown."""
    return ratio.low or ratio.value, ratio.high or ratio.value


def _ratio(ratio: Ratio | None) -> tuple[str, str]:
    if ratio is None:
        return "1", ""
    return f"{ratio.value:.3g}", "" if ratio.low is None else f"{ratio.low:.3g} to {ratio.high:.3g}"
