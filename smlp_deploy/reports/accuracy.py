"""Pages of predictions and accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from smlp_deploy.reports import charts
from smlp_deploy.reports.page import (
    ROWS_SHOWN,
    Bar,
    Card,
    Fact,
    Origin,
    Section,
    Table,
    number,
    numbered,
    percent,
    plural,
    render,
    require_report,
    shown,
    thumbnail,
)

if TYPE_CHECKING:
    from smlp_deploy.evaluation.accuracy import Evaluation, ImageRecord, Share
    from smlp_deploy.inference.classify import Prediction

IMAGES_SHOWN = 200
"""The most images on a page."""

_WRONG_SHOWN, _DIFFERENT_SHOWN, _RIGHT_SHOWN = 100, 60, 40
_CLASSES_SHOWN = 30
_BARS = 5


def predictions_page(origin: Origin, predictions: Sequence[Prediction], *, model: str, total: int, failed: int) -> str:
    """A model's predictions.

    Args:
        predictions: those to show, the first of the run.
        model: the model's name.
        total: number of images in the run.
        failed: those of them without a prediction.
    """
    require_report()
    cards = tuple(
        Card(
            path=prediction.path,
            picture=thumbnail(prediction.path),
            error=prediction.error,
            bars=tuple(Bar(label=score.label, probability=score.probability) for score in prediction.scores[:_BARS]),
        )
        for prediction in predictions
    )
    which = f"The first {len(cards):,} of {total:,} images." if len(cards) < total else "All images, in order."
    return render(
        "Predictions",
        f"Best classes of {model}, with softmax probabilities.",
        origin,
        facts=[Fact(f"{total:,}", plural(total, "image")), Fact(f"{failed:,}", "failed")],
        sections=[Section(name="images", title="Images", text=[which], cards=cards)],
    )


def evaluation_page(origin: Origin, report: Evaluation) -> str:
    """Accuracy of models, their confusions, and the images they misclassify."""
    require_report()
    on = f"on {report.evaluated:,} {plural(report.evaluated, 'image')}"
    return render(
        "Accuracy",
        f"{on[3:]}, {len(report.unreadable):,} unreadable; the dataset names its classes by {report.named_by}.",
        origin,
        facts=[
            Fact(f"{percent(m.top1.value)} top-1", f"(95 %: {_interval(m.top1)}) {on} · {m.name}")
            for m in report.models
        ],
        sections=[
            _models_section(report),
            *([_pairs_section(report)] if report.pairs else []),
            *_image_sections(report),
            *(_confusions_section(report, number) for number in range(len(report.models))),
            _classes_section(report),
            *([_unreadable_section(report.unreadable)] if report.unreadable else []),
        ],
    )


def _models_section(report: Evaluation) -> Section:
    rows = [
        (
            name,
            model.precision,
            percent(model.top1.value),
            _interval(model.top1),
            percent(model.top5.value),
            number(model.loss, ".4f"),
            number(model.calibration_error, ".4f"),
            f"{model.unanswered:,}",
        )
        for name, model in numbered(report.models)
    ]
    shares = [
        (name, 100 * model.top1.value, 100 * model.top1.low, 100 * model.top1.high)
        for name, model in numbered(report.models)
    ]
    heads = ("model", "precision", "top-1", "95 %", "top-5", "loss", "ECE", "unanswered")
    table = Table(caption="Accuracy with Wilson intervals", heads=heads, words=("model", "precision"), rows=rows)
    chart = charts.interval_chart(shares, name="top1", title="Top-1 accuracy with 95 % intervals", unit="top-1, %")
    text = ["Loss is the mean cross-entropy in nats; ECE the expected calibration error in 15 bins."]
    return Section(name="models", title="Models", text=text, charts=[chart] if len(rows) > 1 else [], tables=[table])


def _pairs_section(report: Evaluation) -> Section:
    heads = ("models", "same class", "95 %", "only first right", "only second right", "McNemar p")
    rows = [
        (
            f"{pair.first + 1} and {pair.second + 1}",
            percent(pair.agreement.value),
            _interval(pair.agreement),
            f"{pair.only_first:,}",
            f"{pair.only_second:,}",
            f"{pair.p_value:.3g}",
        )
        for pair in report.pairs
    ]
    table = Table(caption="Models on the same images", heads=heads, words=("models",), rows=rows)
    text = ["p is from McNemar's exact test; a small p means that one of the two is right more often."]
    return Section(name="pairs", title="Model against model", text=text, tables=[table])


def _image_sections(report: Evaluation) -> list[Section]:
    """Images that all models misclassify, that some do, and that none does; the rest by ascending confidence."""
    several = len(report.models) > 1
    groups: dict[str, list[ImageRecord]] = {"wrong": [], "different": [], "right": []}
    for record in report.records:
        right = [answer.index == record.label for answer in record.answers]
        if right:
            groups["right" if all(right) else "different" if any(right) else "wrong"].append(record)
    for name, records in groups.items():
        records.sort(key=_confidence, reverse=name != "right")
    titles = {
        "wrong": ("No model is right" if several else "Wrong", "most confident first", _WRONG_SHOWN),
        "different": ("Some models are right, some wrong", "most confident first", _DIFFERENT_SHOWN),
        "right": ("All models are right" if several else "Right", "least confident first", _RIGHT_SHOWN),
    }
    return [
        Section(
            name=name,
            title=f"{title}: {len(groups[name]):,}",
            text=[f"Shown: {shown(groups[name], most)}, {order}. Bars show the probability of the answer."],
            cards=[_record_card(record, report) for record in groups[name][:most]],
        )
        for name, (title, order, most) in titles.items()
        if groups[name]
    ]


def _confidence(record: ImageRecord) -> float:
    return max(answer.probability or 0.0 for answer in record.answers)


def _record_card(record: ImageRecord, report: Evaluation) -> Card:
    bars = tuple(
        Bar(
            label=answer.error or "no answer" if answer.index is None else report.labels[answer.index],
            probability=answer.probability,
            good=answer.index == record.label,
            by=str(number) if len(record.answers) > 1 else "",
        )
        for number, answer in enumerate(record.answers, start=1)
    )
    text = f"label: {report.labels[record.label]}"
    return Card(path=record.path, picture=thumbnail(record.path), text=text, bars=bars)


def _confusions_section(report: Evaluation, position: int) -> Section:
    """One model's confusions: a heat map of the classes it confuses most, and a table."""
    model = report.models[position]
    often: Counter[int] = Counter({of_class.index: 0 for of_class in model.classes})
    for confusion in model.confusions:
        often.update({confusion.label: confusion.count, confusion.predicted: confusion.count})
    drawn = sorted(index for index, _ in often.most_common(_CLASSES_SHOWN))
    counts = {(confusion.label, confusion.predicted): confusion.count for confusion in model.confusions}
    counts |= {(of_class.index, of_class.index): of_class.right for of_class in model.classes}
    title = f"Labels in rows, answers of model {position + 1} in columns"
    chart = charts.heat_map(
        [report.labels[index] for index in drawn],
        [[counts.get((row, column), 0) for column in drawn] for row in drawn],
        name=f"confusions-{position + 1}",
        title=title,
        axes_names=("label", "answer"),
    )
    rows = [
        (report.labels[confusion.label], report.labels[confusion.predicted], f"{confusion.count:,}")
        for confusion in model.confusions[:ROWS_SHOWN]
    ]
    heads = ("label", "taken for", "images")
    caption = f"Confusions, most frequent first: {shown(model.confusions, ROWS_SHOWN)}"
    text = f"{model.name}; right answers are grey."
    if len(often) > len(drawn):
        text += f" Shown are the {len(drawn)} most confused of {len(often):,} classes."
    return Section(
        name=f"confusions-of-{position + 1}",
        title=f"Confusions of model {position + 1}" if len(report.models) > 1 else "Confusions",
        text=[text],
        charts=[chart],
        tables=[Table(caption=caption, heads=heads, words=heads[:2], rows=rows, folded=True)] if rows else [],
    )


def _classes_section(report: Evaluation) -> Section:
    """Each model's accuracy on each class, the first model's worst class first."""
    by_class = sorted(zip(*(model.classes for model in report.models), strict=True), key=lambda of: of[0].top1)
    rows = [
        (first.label, f"{first.n:,}", *(f"{100 * one.top1:.1f} %" for one in (first, *others)))
        for first, *others in by_class
    ]
    heads = ("class", "images", *(f"top-1 of {number}" for number in range(1, len(report.models) + 1)))
    table = Table(caption="Top-1 by class", heads=heads, words=heads[:1], rows=rows, folded=len(rows) > _CLASSES_SHOWN)
    return Section(name="classes", title="Classes", text=["Sorted by model 1, lowest first."], tables=[table])


def _unreadable_section(records: Sequence[ImageRecord]) -> Section:
    heads = ("image", "reason")
    rows = [(record.path, record.error or "") for record in records[:ROWS_SHOWN]]
    table = Table(caption=shown(records, ROWS_SHOWN), heads=heads, words=heads, rows=rows, folded=True)
    return Section(name="unreadable", title=f"Unreadable images: {len(records):,}", tables=[table])


def _interval(share: Share) -> str:
    return f"{100 * share.low:.1f} to {100 * share.high:.1f}"
