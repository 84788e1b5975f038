from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from smlp_deploy.errors import ArtifactError
from smlp_deploy.evaluation.parity import MIN_NOISE, Gates, ParityReport, check_half_range, prove
from smlp_deploy.images.batches import FloatArray, ImageArray
from smlp_deploy.images.defaults import bundled_images
from smlp_deploy.images.preprocessing import load_image, normalize
from smlp_deploy.metadata import PRECISIONS
from smlp_deploy.pipeline.export import Export
from smlp_deploy.pipeline.precision import to_input
from smlp_deploy.pipeline.verify import verify_artifact
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner
from tests.support.fakes import Exported, FakeRunner, metadata, quadrant_means

IMAGES = bundled_images()[:3]
Damage = Callable[[FloatArray], FloatArray]


def failed_gates(report: ParityReport) -> set[str]:
    assert report.passed == (not report.failures)
    return {gate.name for gate in report.failures}


def compared(damage: Damage, *, gates: Gates | None = None, batch: int | None = None) -> ParityReport:
    """The report on a runner whose logits are damaged."""
    candidate = FakeRunner(lambda images: damage(quadrant_means(images)), metadata(batch=batch))
    return prove(FakeRunner(quadrant_means), candidate, IMAGES, bounds=asdict(gates) if gates else None)


def test_equal_runners_pass() -> None:
    report = compared(lambda logits: logits)
    assert report.passed
    assert report.half is None
    assert (report.images, report.noise) == (3, 29)
    assert report.max_abs == report.max_relative == 0
    assert report.min_cosine == pytest.approx(1)
    assert report.top1_agreement == report.top5_agreement == 1
    assert (report.nan_count, report.inf_count) == (0, 0)


def test_the_candidate_runs_in_the_largest_batch_then_alone_and_in_an_odd_one() -> None:
    candidate = FakeRunner(quadrant_means)
    report = prove(FakeRunner(quadrant_means), candidate, IMAGES)
    assert candidate.batch_sizes == [32, 1, 1, 1, 1, 7]
    assert report.batch_sizes == (1, 7, 32)
    fixed = FakeRunner(quadrant_means, metadata(batch=4))
    prove(FakeRunner(quadrant_means), fixed, IMAGES)
    assert fixed.batch_sizes == [4, 1, 1, 1, 1, 4, 3]


def test_an_engine_runs_at_the_size_that_predict_uses() -> None:
    class Engine(FakeRunner):
        batch_size = 64

    candidate = Engine(quadrant_means)
    report = prove(FakeRunner(quadrant_means), candidate, IMAGES)
    assert report.batch_sizes == (1, 7, 64)
    assert candidate.batch_sizes[0] == 64
    assert report.images + report.noise == 64


class TestPixels:
    """Runners that take uint8 pixels, float32 or one of each."""

    @staticmethod
    def proven(reference: str, candidate: str) -> tuple[ParityReport, dict[str, list[ImageArray]]]:
        """The report on runners of these inputs, and the batches that each of them saw."""
        seen: dict[str, list[ImageArray]] = {"reference": [], "candidate": []}

        def runner(name: str, taken: str) -> FakeRunner:
            of = replace(metadata(), input=taken)

            def logits(batch: ImageArray) -> FloatArray:
                seen[name].append(batch.copy())
                if taken == "float32":
                    return quadrant_means(batch)
                normalized = np.empty((len(batch), 3, 8, 8), np.float32)
                normalize(batch, of.preprocessing, normalized)
                return quadrant_means(normalized)

            return FakeRunner(logits, of)

        return prove(runner("reference", reference), runner("candidate", candidate), IMAGES), seen

    @pytest.mark.parametrize("inputs", [("float32", "uint8"), ("uint8", "float32"), ("uint8", "uint8")])
    def test_both_see_the_same_images_and_noise(self, inputs: tuple[str, str]) -> None:
        report, seen = self.proven(*inputs)
        assert report.passed
        assert report.max_abs == 0
        assert (report.images, report.noise) == (3, 29)
        for taken, batches in zip(inputs, seen.values(), strict=True):
            whole = batches[0]
            assert whole.dtype == taken
            assert whole.shape == ((32, 8, 8, 3) if taken == "uint8" else (32, 3, 8, 8))
            if taken == "uint8":
                first = load_image(IMAGES[0], metadata().preprocessing, np.empty((8, 8, 3), np.uint8))
                np.testing.assert_array_equal(whole[0], first)
                assert 120 < whole[3:].mean() < 135
                assert (whole[3:].min(), whole[3:].max()) == (0, 255)

    def test_real_images_are_the_same_bytes_for_float32_whatever_the_other_takes(self) -> None:
        (_, alone), (_, mixed) = self.proven("float32", "float32"), self.proven("float32", "uint8")
        assert alone["reference"][0][:3].tobytes() == mixed["reference"][0][:3].tobytes()

    def test_for_float32_alone_the_noise_is_as_ever(self) -> None:
        _, seen = self.proven("float32", "float32")
        noise = np.random.default_rng(2109).standard_normal((29, 3, 8, 8), dtype=np.float32)
        assert seen["candidate"][0][3:].tobytes() == noise.tobytes()

    def test_a_wrong_normalization_fails(self) -> None:
        wrong = FakeRunner(
            lambda batch: quadrant_means(np.moveaxis(batch, -1, 1).astype(np.float32) / np.float32(255)),
            replace(metadata(), input="uint8"),
        )
        assert "cosine" in failed_gates(prove(FakeRunner(quadrant_means), wrong, IMAGES))

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_a_real_graph_is_exact_by_the_gates_of_its_precision(self, exported: Exported, precision: str) -> None:
        graph = exported(precision).graph
        with OnnxRuntimeRunner(graph) as floats, OnnxRuntimeRunner(to_input(graph, "uint8")) as pixels:
            report = prove(floats, pixels, IMAGES)
            assert report.passed, report.failures
            assert report.precision == precision
            assert prove(pixels, floats, IMAGES).passed


def test_small_noise_passes_and_is_measured() -> None:
    report = compared(lambda logits: logits + np.float32(1e-4))
    assert report.passed
    assert report.max_abs == pytest.approx(1e-4, rel=0.1)
    assert report.max_relative == pytest.approx(report.max_abs / report.logit_scale)


def test_a_large_difference_fails_and_names_the_image() -> None:
    def shift_one(logits: FloatArray) -> FloatArray:
        if len(logits) == 32:
            logits[2, 1] += np.float32(0.5)
        return logits

    report = compared(shift_one)
    assert "difference" in failed_gates(report)
    assert report.failures[0].detail == f"worst at {IMAGES[2].name}"


def test_a_difference_only_in_odd_batches_is_found() -> None:
    report = compared(lambda logits: logits + (1 if len(logits) == 7 else 0))
    assert "difference" in failed_gates(report)
    assert "in a batch of 7" in report.failures[0].detail


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_no_number_fails_however_loose_the_gates(bad: float) -> None:
    def spoil(logits: FloatArray) -> FloatArray:
        logits[0, 0] = bad
        return logits

    report = compared(spoil, gates=Gates(difference=np.inf, cosine=-1, top1=0))
    assert "finite" in failed_gates(report)
    assert IMAGES[0].name in report.failures[0].detail
    assert json.loads(report.to_json())["passed"] is False


def test_bounds_in_place_of_the_precisions_own_are_judged_by_and_recorded() -> None:
    def shifted(batch: FloatArray) -> FloatArray:
        logits = quadrant_means(batch)
        logits += np.float32(0.001) * logits.std()
        return logits

    runner, candidate = FakeRunner(quadrant_means), FakeRunner(shifted)
    assert failed_gates(prove(runner, candidate, IMAGES)) == {"difference"}
    report = prove(runner, candidate, IMAGES, bounds={"difference": 0.1})
    assert report.passed
    assert report.bounds == Gates(cosine=0.99999, difference=0.1)
    assert json.loads(report.to_json())["bounds"] == {"cosine": 0.99999, "difference": 0.1, "top1": 1.0}


def test_all_nan_fails_every_numeric_gate() -> None:
    report = compared(lambda logits: logits * np.float32(np.nan))
    assert failed_gates(report) >= {"finite", "difference", "cosine", "top-1"}
    document = json.loads(report.to_json())
    assert document["max_abs"] is None
    assert document["nan_count"] == report.nan_count > 0


def test_nan_in_the_reference_fails_too() -> None:
    reference = FakeRunner(lambda images: quadrant_means(images) * np.float32(np.nan))
    assert "finite" in failed_gates(prove(reference, FakeRunner(quadrant_means), IMAGES))


def test_permuted_logits_fail_however_loose_the_gates() -> None:
    report = compared(lambda logits: logits[:, [1, 0, 2, 3]], gates=Gates(difference=np.inf, cosine=-1, top1=0))
    assert failed_gates(report) == {"class order"}
    assert "in another order" in report.failures[0].detail


def test_permuted_labels_fail() -> None:
    swapped = replace(metadata(), labels=("class 1", "class 0", "class 2", "class 3"))
    report = prove(FakeRunner(quadrant_means), FakeRunner(quadrant_means, swapped), IMAGES)
    assert failed_gates(report) == {"class order"}
    assert "label 0 is 'class 1', the reference's is 'class 0'" in report.failures[0].detail


def test_renamed_labels_are_the_users_choice() -> None:
    renamed = replace(metadata(), labels=("a", "b", "c", "d"))
    assert prove(FakeRunner(quadrant_means), FakeRunner(quadrant_means, renamed), IMAGES).passed


@pytest.mark.parametrize("damage", [lambda logits: logits[:, :3], lambda logits: logits[:1].repeat(2, axis=0)])
def test_another_shape_fails(damage: Damage) -> None:
    report = compared(damage)
    assert "shape" in failed_gates(report)
    assert np.isnan(report.max_abs)


def test_no_image_fails_though_the_noise_agrees(tmp_path: Path) -> None:
    runner = FakeRunner(quadrant_means)
    assert failed_gates(prove(runner, FakeRunner(quadrant_means), [])) == {"images"}
    report = prove(runner, FakeRunner(quadrant_means), [tmp_path / "absent.jpg"])
    assert failed_gates(report) == {"images"}
    assert "absent.jpg: no such file" in report.failures[0].detail


def test_int8_is_not_judged_on_noise_and_fails_without_images() -> None:
    int8 = replace(metadata(), precision="int8")

    def wrong_on_noise(images: FloatArray) -> FloatArray:
        # Noise sums to little over a quadrant; in these two photographs one is bright or dark as a whole.
        logits = quadrant_means(images)
        noisy = np.abs(logits).max(axis=1) < 40
        logits[noisy] *= -1
        return logits

    assert prove(FakeRunner(quadrant_means), FakeRunner(wrong_on_noise, int8), IMAGES[:2]).passed
    report = prove(FakeRunner(quadrant_means), FakeRunner(quadrant_means, int8), [])
    assert failed_gates(report) == {"images"}


def test_an_unreadable_image_is_left_out_and_reported(tmp_path: Path) -> None:
    report = prove(FakeRunner(quadrant_means), FakeRunner(quadrant_means), [tmp_path / "absent.jpg", *IMAGES])
    assert report.passed
    assert report.images == 3
    assert report.unreadable == (f"{tmp_path / 'absent.jpg'}: no such file or directory",)


def test_a_rotation_of_the_logits_fails_on_cosine() -> None:
    assert "cosine" in failed_gates(
        compared(lambda logits: logits[:, ::-1] + 1, gates=Gates(difference=9, cosine=0.999))
    )


def test_another_best_class_fails_where_the_margin_is_clear() -> None:
    report = compared(lambda logits: -logits, gates=Gates(difference=0.01, cosine=-1))
    assert "top-1" in failed_gates(report)


def test_constant_logits_prove_nothing() -> None:
    def constant(images: FloatArray) -> FloatArray:
        return np.zeros((len(images), 4), np.float32)

    assert failed_gates(prove(FakeRunner(constant), FakeRunner(constant), IMAGES)) >= {"difference", "cosine"}


def test_without_a_difference_bound_the_measured_one_is_the_margin() -> None:
    report = compared(lambda logits: logits + np.float32(5), gates=Gates(cosine=-1))
    assert report.passed
    assert "difference" not in {gate.name for gate in report.gates}


class Recorder(FakeRunner):
    def largest(self) -> tuple[str, float]:
        return "blocks.1", self.value

    value = 100.0


class TestHalfRange:
    def checked(self, *, largest: float = 100.0, damage: Damage = lambda logits: logits) -> ParityReport:
        reference, recorder = FakeRunner(quadrant_means), Recorder(quadrant_means)
        recorder.value = largest
        half = FakeRunner(lambda images: damage(quadrant_means(images)))
        report = check_half_range(prove(reference, reference, IMAGES), reference, half, recorder, IMAGES)
        assert half.batch_sizes == [2]
        assert sum(recorder.batch_sizes) == 32
        return report

    def test_what_was_measured_is_recorded(self) -> None:
        report = self.checked()
        assert report.passed
        assert report.half is not None
        assert (report.half.images, report.half.layer, report.half.largest_activation) == (2, "blocks.1", 100)
        assert json.loads(report.to_json())["half"]["range"] == 65504

    @pytest.mark.parametrize("known", [90.0, 40000.0])
    def test_images_whose_largest_activation_is_known_are_not_run_again(self, known: float) -> None:
        reference, half, recorder = FakeRunner(quadrant_means), FakeRunner(quadrant_means), Recorder(quadrant_means)
        proven = prove(reference, reference, IMAGES)
        report = check_half_range(proven, reference, half, recorder, IMAGES, largest=("blocks.2/add", known))
        assert sum(recorder.batch_sizes) == 2 + MIN_NOISE
        assert report.half is not None
        assert report.half.largest_activation == max(known, Recorder.value)
        assert report.half.layer == ("blocks.2/add" if known > Recorder.value else "blocks.1")
        assert report.passed == (known < 32752)

    def test_activations_above_half_the_range_fail_with_the_layer(self) -> None:
        report = self.checked(largest=40000)
        assert failed_gates(report) == {"fp16 range"}
        assert report.failures[0].detail == "largest in blocks.1"

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_overflow_in_the_arithmetic_fails(self, bad: float) -> None:
        assert failed_gates(self.checked(damage=lambda logits: logits * np.float32(bad))) == {"fp16 arithmetic"}

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_an_activation_that_is_no_number_fails(self, bad: float) -> None:
        assert failed_gates(self.checked(largest=bad)) == {"fp16 range"}


class TestARealFileBrokenOnPurpose:
    """The bundled model's own ONNX file, with one thing changed in it."""

    @pytest.fixture
    def model(self, digits_export: Export) -> onnx.ModelProto:
        return onnx.load(digits_export.path)

    def verified(self, model: onnx.ModelProto, tmp_path: Path) -> ParityReport:
        onnx.save(model, tmp_path / "broken.onnx")
        return verify_artifact(tmp_path / "broken.onnx")

    def change(self, model: onnx.ModelProto, name: str, change: Damage) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))

    def test_unchanged_passes(self, model: onnx.ModelProto, tmp_path: Path) -> None:
        assert self.verified(model, tmp_path).passed

    def test_one_nan_weight(self, model: onnx.ModelProto, tmp_path: Path) -> None:
        self.change(model, "head.bias", lambda bias: np.where(np.arange(10) == 3, np.nan, bias).astype(np.float32))
        with pytest.raises(ArtifactError, match=r"'head\.bias' has values that are NaN or infinite"):
            self.verified(model, tmp_path)

    def test_permuted_classes(self, model: onnx.ModelProto, tmp_path: Path) -> None:
        order = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
        self.change(model, "head.weight", lambda weight: weight[order])
        self.change(model, "head.bias", lambda bias: bias[order])
        assert failed_gates(self.verified(model, tmp_path)) >= {"class order", "difference", "top-1"}

    def test_swapped_axes(self, model: onnx.ModelProto, tmp_path: Path) -> None:
        self.change(model, "blocks.0.mixing.width", lambda matrix: matrix.T)
        assert "difference" in failed_gates(self.verified(model, tmp_path))

    def test_one_weight_off_by_a_percent(self, model: onnx.ModelProto, tmp_path: Path) -> None:
        def nudge(weight: FloatArray) -> FloatArray:
            weight[np.unravel_index(np.abs(weight).argmax(), weight.shape)] *= np.float32(1.01)
            return weight

        self.change(model, "head.weight", nudge)
        assert failed_gates(self.verified(model, tmp_path)) == {"difference"}
