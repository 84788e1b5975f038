"""Pages of whether two forms of a network compute the same, and where they diverge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from smlp_deploy.reports import charts
from smlp_deploy.reports.page import (
    ROWS_SHOWN,
    Fact,
    Origin,
    Section,
    Table,
    Verdict,
    facts_table,
    number,
    percent,
    render,
    require_report,
    shown,
)

if TYPE_CHECKING:
    from smlp_deploy.evaluation.layers import DivergenceReport, LayerNoise
    from smlp_deploy.evaluation.parity import HalfReport, ParityReport


def parity_page(origin: Origin, report: ParityReport) -> str:
    """Whether two runners compute the same function, gate by gate."""
    require_report()
    verdict = Verdict(report.passed, "passed" if report.passed else "FAILED")
    failed = ", ".join(gate.name for gate in report.failures)
    heads = ("gate", "verdict", "measured", "limit", "detail")
    gates = [
        (
            gate.name,
            Verdict(gate.passed, "passed" if gate.passed else "FAILED"),
            "" if math.isnan(gate.measured) else f"{gate.measured:.4g}",
            gate.limit,
            gate.detail,
        )
        for gate in report.gates
    ]
    words = ("gate", "verdict", "limit", "detail")
    table = Table(caption="All gates must pass", heads=heads, words=words, rows=gates)
    return render(
        "Parity",
        f"{report.candidate} ({report.precision}) against {report.reference}.",
        origin,
        facts=[
            Fact(verdict, f"failed: {failed}" if failed else f"{len(gates)} gates"),
            Fact(number(report.max_relative, ".2e"), "largest logit difference, in standard deviations of the logits"),
            Fact(number(report.min_cosine, ".7f"), "smallest cosine"),
            Fact(percent(report.top1_agreement), "same best class"),
        ],
        sections=[
            Section(name="gates", title="Gates", tables=[table]),
            Section(name="measured", title="Measurements", tables=[facts_table(_measured(report))]),
            *([_half_section(report.half)] if report.half else []),
            *_not_compared(report.unreadable),
        ],
    )


def _measured(report: ParityReport) -> dict[str, str]:
    return {
        "real images": f"{report.images:,}",
        "seeded noise inputs": f"{report.noise:,}",
        "batch sizes": ", ".join(map(str, report.batch_sizes)),
        "standard deviation of the reference's logits": number(report.logit_scale, ".4g"),
        "largest logit difference": number(report.max_abs, ".3e"),
        "mean share of the five best classes in common": percent(report.top5_agreement),
        "NaN logits": f"{report.nan_count:,}",
        "infinite logits": f"{report.inf_count:,}",
        "sha256 of the candidate": report.artifact_sha256 or "not known",
    }


def _half_section(half: HalfReport) -> Section:
    facts = {
        "inputs run in fp16 arithmetic": f"{half.images:,}",
        "largest logit difference, in standard deviations of the logits": number(half.max_relative, ".2e"),
        "smallest cosine": number(half.min_cosine, ".7f"),
        "largest activation": f"{half.largest_activation:.4g} of {half.range:g}, in {half.layer}",
    }
    return Section(name="half", title="fp16 arithmetic and range", tables=[facts_table(facts)])


def divergence_page(origin: Origin, report: DivergenceReport) -> str:
    """How the difference between two forms of a network grows from point to point."""
    require_report()
    over = report.first_over
    verdict = Verdict(over is None, "within the gate" if over is None else f"over the gate at {over.name}")
    chart = charts.growth_chart(
        [(point.name, point.error) for point in report.points],
        gate=report.max_error,
        name="growth",
        title="Relative error at each point of the network",
        unit="relative error",
    )
    rows = [
        (
            point.name,
            number(point.error, ".2e"),
            "" if math.isnan(point.error) else f"{point.sqnr_db:.1f}",
            "" if point.growth is None else f"×{point.growth:.2g}",
            number(point.max_abs, ".2e"),
            number(point.worst_error, ".2e"),
            point.worst_image,
            Verdict(point.error <= report.max_error, "within" if point.error <= report.max_error else "over"),
        )
        for point in report.points
    ]
    heads = ("after", "error", "SQNR, dB", "growth", "largest difference", "worst image's error", "worst image", "gate")
    table = Table(caption="In execution order", heads=heads, words=("after", *heads[-2:]), rows=rows)
    return render(
        "Layer by layer",
        f"{report.candidate} ({report.precision}) against {report.reference}, {report.images:,} images.",
        origin,
        facts=[
            Fact(verdict, f"at most {report.max_error:g}"),
            *(
                Fact(number(p.error, ".2e"), f"relative error after {p.name}, the last point")
                for p in report.points[-1:]
            ),
        ],
        sections=[
            Section(name="points", title="Growth of the error", charts=[chart] if rows else [], tables=[table]),
            *([_layers_section(report.layers)] if report.layers else []),
            *_not_compared(report.unreadable),
        ],
    )


def _layers_section(layers: Sequence[LayerNoise]) -> Section:
    """The noise of each int8 layer, the worst first."""
    rows = [(layer.name, _decibels(layer.own_sqnr_db), _decibels(layer.sqnr_db)) for layer in layers]
    heads = ("int8 layer", "own SQNR, dB", "in the network, dB")
    table = Table(caption="The most noise of its own first", heads=heads, words=heads[:1], rows=rows)
    text = (
        "Signal-to-quantization-noise ratio at the layer's output: of the layer alone, given its input in the fp32"
        " network, and inside the int8 network, with the accumulated noise of all layers before it."
    )
    return Section(name="layers", title="Int8 layers", text=[text], tables=[table])


def _decibels(value: float) -> str:
    return "no noise" if value == math.inf else number(value, ".1f")


def _not_compared(unreadable: Sequence[str]) -> list[Section]:
    rows = [(reason,) for reason in unreadable[:ROWS_SHOWN]]
    table = Table(caption=shown(unreadable, ROWS_SHOWN), heads=("image",), words=("image",), rows=rows)
    return [Section(name="unreadable", title="Images not compared", tables=[table])] if rows else []
