from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from smlp_deploy.errors import UsageError
from smlp_deploy.evaluation.sensitivity import SensitivityReport, choose, measure_sensitivity
from smlp_deploy.images.batches import FloatArray

REFERENCE: FloatArray = np.eye(10, dtype=np.float32)[np.arange(100) % 10]
# Rows whose best class each layer spoils.
SPOILS = {"calm": range(0), "bad": range(8), "worst": range(8, 20), "mild": range(20, 21)}


def logits_with(layers: set[str]) -> FloatArray:
    logits = REFERENCE.copy()
    for layer in layers:
        logits[list(SPOILS[layer])] *= -1
    return logits


def without(left_out: tuple[str, ...]) -> FloatArray:
    return logits_with(set(SPOILS) - set(left_out))


@pytest.fixture
def report() -> SensitivityReport:
    return measure_sensitivity(list(SPOILS), lambda layer: logits_with({layer}), REFERENCE)


def test_layers_are_ordered_by_the_top1_they_lose(report: SensitivityReport) -> None:
    assert [(layer.layer, layer.drop) for layer in report.layers] == [
        ("worst", 12.0),
        ("bad", 8.0),
        ("mild", 1.0),
        ("calm", 0.0),
    ]
    assert (report.measure, report.inputs, report.left_out) == ("agreement", 100, ())


def test_equal_drops_are_ordered_by_the_error_over_the_logits_variance() -> None:
    noise = {"a": 0.01, "b": 0.03, "c": 0.02}
    report = measure_sensitivity(list(noise), lambda layer: REFERENCE + np.float32(noise[layer]), REFERENCE)
    assert [layer.layer for layer in report.layers] == ["b", "c", "a"]
    assert [layer.drop for layer in report.layers] == [0, 0, 0]
    assert report.layers[0].error == pytest.approx(0.03**2 / REFERENCE.var(), rel=1e-4)


def test_with_labels_accuracy_is_what_counts() -> None:
    labels = REFERENCE.argmax(axis=1)
    labels[:8] = (labels[:8] + 1) % 10  # the fp32 network itself is wrong here: nothing is left to lose
    report = measure_sensitivity(list(SPOILS), lambda layer: logits_with({layer}), REFERENCE, labels=labels)
    drops = {layer.layer: layer.drop for layer in report.layers}
    assert report.measure == "accuracy"
    assert drops["worst"] == 12
    assert drops["bad"] <= 0


def test_logits_that_are_not_finite_are_the_worst_harm() -> None:
    bad = {"nan": np.nan, "inf": np.inf, "fine": 0.0}
    report = measure_sensitivity(list(bad), lambda layer: REFERENCE + np.float32(bad[layer]), REFERENCE)
    assert report.layers[-1].layer == "fine"
    assert [layer.drop for layer in report.layers] == [100, 100, 0]
    assert [layer["error"] for layer in json.loads(report.to_json())["layers"]] == [None, None, 0]


@pytest.mark.parametrize(
    ("max_drop", "left_out"),
    [(21, ()), (20.9, ("worst",)), (9, ("worst",)), (1, ("worst", "bad")), (0, ("worst", "bad", "mild"))],
)
def test_as_few_layers_as_needed_are_left_out(
    report: SensitivityReport, max_drop: float, left_out: tuple[str, ...]
) -> None:
    chosen = choose(report, max_drop, without, reference_logits=REFERENCE)
    assert chosen.left_out == left_out
    assert chosen.whole_drop is not None
    assert chosen.whole_drop <= max_drop
    assert {layer.precision for layer in chosen.layers if layer.layer not in left_out} == {"int8"}


def test_the_report_is_json(report: SensitivityReport) -> None:
    document = json.loads(choose(report, 9, without, reference_logits=REFERENCE).to_json())
    assert document["max_drop"] == 9
    assert document["whole_drop"] == 9
    assert document["layers"][0] == {
        "layer": "worst",
        "drop": 12.0,
        "error": pytest.approx(0.12 * 0.4 / REFERENCE.var(), rel=1e-4),
        "precision": "half",
    }


def test_progress_is_told_after_each_layer() -> None:
    seen: list[int] = []
    measure_sensitivity(list(SPOILS), lambda _: REFERENCE, REFERENCE, progress=seen.append)
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda report: choose(report, -1, without, reference_logits=REFERENCE), "-1 percentage points"),
        (lambda report: choose(report, float("nan"), without, reference_logits=REFERENCE), "nan percentage points"),
        (lambda report: choose(report, 1, lambda _: -REFERENCE, reference_logits=REFERENCE), "100.00 .* even with"),
        (lambda _: measure_sensitivity([], lambda _: REFERENCE, REFERENCE[:0]), "no inputs"),
        (
            lambda _: measure_sensitivity([], lambda _: REFERENCE, REFERENCE, labels=np.zeros(3, np.int64)),
            "3 labels for 100 inputs",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    report: SensitivityReport, call: Callable[[SensitivityReport], object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        call(report)
