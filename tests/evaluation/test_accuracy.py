"""Statistics are checked against values worked out by hand; layouts on real small image files."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scripts.digits import write_held_out
from smlp_deploy.errors import StoppedError, UsageError
from smlp_deploy.evaluation.accuracy import (
    Answer,
    Confusion,
    Evaluation,
    EvaluationIdentity,
    Share,
    calibration_error,
    evaluate,
    mcnemar,
)
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.images.dataset import LabelledImage, find_labelled_images
from smlp_deploy.inference.resume import RecordFile
from smlp_deploy.interrupts import StopRequest
from smlp_deploy.pipeline.export import Export
from smlp_deploy.pipeline.precision import to_input
from smlp_deploy.runners import open_runner
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner
from tests.support.fakes import Exported, FakeRunner, metadata, quadrant_means


def picture(path: Path, bright: int = 0) -> Path:
    """An 8 x 8 image of which one quadrant is white, which `quadrant_means` sees."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (8, 8))
    image.paste("white", (bright % 2 * 4, bright // 2 * 4, bright % 2 * 4 + 4, bright // 2 * 4 + 4))
    image.save(path)
    return path


def runner(table: Mapping[int, list[float]]) -> FakeRunner:
    """Logits by the white quadrant of the image."""
    return FakeRunner(lambda batch: np.array([table[int(i)] for i in quadrant_means(batch).argmax(axis=1)], np.float32))


@pytest.fixture
def four(tmp_path: Path) -> tuple[LabelledImage, ...]:
    """Images 0 to 3, each of its own class."""
    return tuple(LabelledImage(picture(tmp_path / f"{i}.png", i), i) for i in range(4))


class TestStatistics:
    @pytest.mark.parametrize(
        ("count", "n", "low", "high"),
        [
            (8, 10, 0.4902, 0.9433),
            (0, 10, 0, 0.2775),
            (10, 10, 0.7225, 1),
            (0, 1, 0, 0.7935),
            (50, 100, 0.4038, 0.5962),
        ],
    )
    def test_wilson_intervals_are_the_published_ones(self, count: int, n: int, low: float, high: float) -> None:
        share = Share.of(count, n)
        assert share.value == count / n
        assert (share.low, share.high) == pytest.approx((low, high), abs=5e-5)

    @pytest.mark.parametrize(
        ("first", "second", "p"),
        [(0, 0, 1), (5, 5, 1), (0, 1, 1), (0, 5, 2 / 32), (1, 5, 2 * 7 / 64), (6, 2, 2 * 37 / 256), (0, 2000, 0)],
    )
    def test_mcnemar_is_the_binomial_sum(self, first: int, second: int, p: float) -> None:
        assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(p)

    @settings(derandomize=True, deadline=None, max_examples=60, database=None)
    @given(st.integers(0, 300), st.integers(0, 300))
    def test_mcnemar_agrees_with_the_sum_in_floating_point(self, first: int, second: int) -> None:
        n = first + second
        tail = math.fsum(math.comb(n, i) / 2**n for i in range(min(first, second) + 1))
        assert mcnemar(first, second) == pytest.approx(min(1, 2 * tail), rel=1e-9)

    def test_calibration_error_weighs_each_bin_by_its_images(self) -> None:
        # 0.95 and 0.99 share the last bin: |1 + 0 - 1.94| = 0.94. 0.5 is alone in its own: |1 - 0.5| = 0.5.
        error = calibration_error(np.array([0.95, 0.99, 0.5]), np.array([True, False, True]))
        assert error == pytest.approx((0.94 + 0.5) / 3)

    def test_a_bin_has_its_upper_end(self) -> None:
        # 0.2 = 3/15 is in the third bin with 0.15, whose errors cancel; 0.21 is in the fourth.
        together = calibration_error(np.array([0.2, 0.15, 0.15, 0.15, 0.15]), np.array([True, *[False] * 4]))
        assert together == pytest.approx(abs(1 - 0.8) / 5)
        assert calibration_error(np.array([0.2, 0.21]), np.array([True, False])) == pytest.approx((0.8 + 0.21) / 2)
        assert calibration_error(np.array([1.0, 1e-300]), np.array([True, False])) == pytest.approx(0, abs=1e-12)


class TestTwoModels:
    """The first answers 0, 1, 1, 0 to images of 0, 1, 2, 3; the second 0, 2, 2, 0."""

    @pytest.fixture
    def evaluation(self, four: tuple[LabelledImage, ...]) -> Evaluation:
        sure, ln3 = [9.0, 0, 0, 0], math.log(3)
        first = runner({0: sure, 1: [0, ln3, 0, 0], 2: [0, ln3, 0, 0], 3: sure})
        second = runner({0: sure, 1: [0, 0, 5, 0], 2: [0, 0, 5, 0], 3: sure})
        return evaluate([first, second], four, batch_size=3)

    def test_each_number_of_a_model(self, evaluation: Evaluation) -> None:
        first = evaluation.models[0]
        assert (first.top1, first.top5) == (Share.of(2, 4), Share.of(4, 4))
        assert [(c.label, c.n, c.top1) for c in first.classes] == [(f"class {i}", 1, float(i < 2)) for i in range(4)]
        sure = math.log(math.exp(9) + 3)  # less the label's logit
        assert first.loss == pytest.approx((sure - 9 - math.log(3 / 6) - math.log(1 / 6) + sure) / 4)
        p = math.exp(9) / (math.exp(9) + 3)  # twice, once right; and twice 0.5, once right
        assert first.calibration_error == pytest.approx((2 * p - 1) / 4)

    def test_the_pair(self, evaluation: Evaluation) -> None:
        (pair,) = evaluation.pairs
        assert (pair.first, pair.second, pair.agreement) == (0, 1, Share.of(2, 4))
        assert (pair.only_first, pair.only_second, pair.p_value) == (1, 1, 1)

    def test_every_image_has_a_record(self, evaluation: Evaluation, four: tuple[LabelledImage, ...]) -> None:
        assert [record.path for record in evaluation.records] == [str(sample.path) for sample in four]
        record = evaluation.records[1]
        assert (record.label, [answer.index for answer in record.answers]) == (1, [1, 2])
        assert record.answers[0].probability == pytest.approx(0.5)

    def test_json_has_all_of_it(self, evaluation: Evaluation) -> None:
        document = json.loads(evaluation.to_json())
        assert (document["named_by"], document["evaluated"], document["unreadable"]) == ("label", 4, 0)
        assert document["models"][1]["confusions"][0] == {"label": 1, "predicted": 2, "count": 1}
        assert document["pairs"][0]["agreement"]["value"] == 0.5
        assert document["records"][3]["answers"][0]["index"] == 0


def test_the_fifth_class_is_among_the_best_and_frequent_confusions_come_first(four: tuple[LabelledImage, ...]) -> None:
    falling = FakeRunner(lambda batch: np.array([[6, 5, 4, 3, 2, 1]] * len(batch), np.float32), metadata(classes=6))
    samples = [LabelledImage(sample.path, label) for sample, label in zip(four, (4, 1, 5, 5), strict=True)]
    model = evaluate([falling], samples).models[0]
    assert (model.top1, model.top5) == (Share.of(0, 4), Share.of(2, 4))
    assert model.confusions == tuple(Confusion(label=i, predicted=0, count=n) for i, n in ((5, 2), (1, 1), (4, 1)))


class TestImagesThatFail:
    def test_unreadable_ones_are_listed_and_shift_nothing(self, tmp_path: Path) -> None:
        samples = [LabelledImage(tmp_path / f"{i}.png", i % 4) for i in range(20)]
        for i in range(20):
            if i % 3:
                picture(tmp_path / f"{i}.png", i % 4)
        (tmp_path / "3.png").write_text("no image")
        seen: list[tuple[int, int]] = []
        fake = FakeRunner(quadrant_means)
        result = evaluate([fake], samples, batch_size=3, workers=2, progress=lambda *step: seen.append(step))
        assert result.evaluated == 13
        assert result.models[0].top1 == Share.of(13, 13)
        assert [Path(record.path).stem for record in result.unreadable] == ["0", "3", "6", "9", "12", "15", "18"]
        assert result.records[0].error == "no such file or directory"
        assert (result.records[0].answers, result.records[1].error) == ((), None)
        assert seen == [(3, 20), (6, 20), (9, 20), (12, 20), (15, 20), (18, 20), (20, 20)]
        assert json.loads(result.to_json())["unreadable"] == 7

    def test_where_none_can_be_read_there_is_no_result(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="none of the 1 images can be read: no such file"):
            evaluate([FakeRunner(quadrant_means)], [LabelledImage(tmp_path / "a.png", 0)])

    def test_no_answer_is_wrong_and_agrees_with_nothing(self, four: tuple[LabelledImage, ...]) -> None:
        def spoilt(batch: FloatArray) -> FloatArray:
            logits = quadrant_means(batch)
            logits[logits.argmax(axis=1) == 2] = np.nan
            return logits

        result = evaluate([FakeRunner(spoilt), FakeRunner(spoilt)], four)
        model = result.models[0]
        assert (model.top1, model.top5, model.unanswered) == (Share.of(3, 4), Share.of(3, 4), 1)
        assert model.loss == pytest.approx(0, abs=1e-6)
        assert model.confusions == ()
        assert result.records[2].answers[0] == Answer(error="the network's output has NaN or infinite values")
        assert result.pairs[0].agreement == Share.of(3, 4)

    def test_a_model_that_answers_nothing_has_no_means(self, four: tuple[LabelledImage, ...]) -> None:
        result = evaluate([FakeRunner(lambda batch: quadrant_means(batch) * np.float32(np.inf))], four)
        model = result.models[0]
        assert (model.top1.count, model.loss, model.calibration_error, model.unanswered) == (0, None, None, 4)
        assert json.loads(result.to_json())["models"][0]["loss"] is None

    def test_a_batch_that_fails_is_run_one_by_one(self, four: tuple[LabelledImage, ...]) -> None:
        def picky(batch: FloatArray) -> FloatArray:
            logits = quadrant_means(batch)
            if (logits.argmax(axis=1) == 1).any():
                raise RuntimeError("no memory\nfor this")
            return logits

        fake = FakeRunner(picky)
        result = evaluate([fake], four, batch_size=2)
        assert fake.batch_sizes == [2, 1, 1, 2]
        assert [record.answers[0].index for record in result.records] == [0, None, 2, 3]
        assert result.records[1].answers[0].error == "the network failed on it: RuntimeError: no memory"


class TestRefusals:
    def test_models_that_differ_in_more_than_the_network(self, four: tuple[LabelledImage, ...]) -> None:
        plain = metadata()
        other = replace(
            plain, labels=("a", "b", "c", "d"), preprocessing=replace(plain.preprocessing, interpolation="nearest")
        )
        with pytest.raises(UsageError, match="fake and fake differ in interpolation and labels"):
            evaluate([FakeRunner(quadrant_means, plain), FakeRunner(quadrant_means, other)], four)

    def test_impossible_numbers_and_nothing_to_do(self, four: tuple[LabelledImage, ...]) -> None:
        fake = FakeRunner(quadrant_means)
        for batch_size, workers in ((0, 1), (1, 0)):
            with pytest.raises(UsageError, match="at least 1"):
                evaluate([fake], four, batch_size=batch_size, workers=workers)
        for runners, samples in (([], four), ([fake], ())):
            with pytest.raises(UsageError, match="nothing to evaluate"):
                evaluate(runners, samples)


class TestContinued:
    """Twenty images of which every fifth cannot be read, in batches of three, by two models of which one has gaps."""

    @pytest.fixture
    def samples(self, tmp_path: Path) -> list[LabelledImage]:
        paths = [tmp_path / f"{i}.png" for i in range(20)]
        for i, path in enumerate(paths):
            if i % 5 != 2:
                picture(path, i % 4)
        return [LabelledImage(path, i % 3) for i, path in enumerate(paths)]

    @pytest.fixture
    def target(self, tmp_path: Path, samples: list[LabelledImage]) -> Path:
        (tmp_path / "m").write_text("model")
        return tmp_path / "report" / "report.json"

    def run(
        self, target: Path, samples: Sequence[LabelledImage], *, resume: bool, until: int | None = None
    ) -> list[int]:
        """One run as the command line makes it, with a signal once `until` images are done; where its batches ended."""

        def gaps(batch: FloatArray) -> FloatArray:
            logits = quadrant_means(batch) / np.float32(7)
            logits[logits.argmax(axis=1) == 1] = np.nan
            return logits

        runners = [FakeRunner(lambda batch: quadrant_means(batch) / np.float32(3)), FakeRunner(gaps)]
        model = target.parent.parent / "m"
        identity = EvaluationIdentity.of([model, model], runners[0].metadata, samples, batch_size=3)
        stop, ends = StopRequest(), []

        def progress(done: int, total: int) -> None:
            ends.append(done)
            if done == until:
                stop.receive(signal.SIGTERM)

        with RecordFile.open(target, identity, resume=resume) as kept:
            report = evaluate(runners, samples, batch_size=3, workers=2, progress=progress, kept=kept, stop=stop)
            kept.conclude(report.to_json())
        return ends

    def test_wherever_it_was_cut_the_report_is_the_same(self, samples: list[LabelledImage], target: Path) -> None:
        self.run(target, samples, resume=False)
        assert [path.name for path in target.parent.iterdir()] == ["report.json"]
        expected = target.read_bytes()
        target.unlink()
        with pytest.raises(
            StoppedError, match=r"SIGTERM after 20 images · .*report\.json\.partial · the same .*--resume"
        ):
            self.run(target, samples, resume=True, until=20)
        partial, beside = (target.with_name(f"report.json.{end}") for end in ("partial", "partial.json"))
        whole, facts = partial.read_bytes(), beside.read_text()
        for cut in range(0, len(whole) + 1, 97):
            partial.write_bytes(whole[:cut])
            beside.write_text(facts)
            ends = self.run(target, samples, resume=True)
            lines = whole[:cut].count(b"\n")
            assert ends == [end for end in (3, 6, 9, 12, 15, 18, 20) if end > lines // 3 * 3]
            assert target.read_bytes() == expected
            target.unlink()

    @pytest.mark.parametrize("until", [3, 9, 18])
    def test_a_signal_ends_it_behind_a_whole_batch(
        self, samples: list[LabelledImage], target: Path, until: int
    ) -> None:
        with pytest.raises(StoppedError, match=f"stopped by SIGTERM after {until} images") as caught:
            self.run(target, samples, resume=False, until=until)
        assert caught.value.exit_code == 143
        lines = target.with_name("report.json.partial").read_text().splitlines()
        assert [json.loads(line)["label"] for line in lines] == [sample.label for sample in samples[:until]]
        assert not target.exists()
        assert self.run(target, samples, resume=True)[0] == min(until + 3, 20)

    def test_another_evaluation_is_not_continued(self, samples: list[LabelledImage], target: Path) -> None:
        with pytest.raises(StoppedError):
            self.run(target, samples, resume=False, until=6)
        with pytest.raises(UsageError, match=r"found an interrupted run · .* · add --resume"):
            self.run(target, samples, resume=False)
        others = (
            (samples[1:], "samples count was 20, now it is 19"),
            ([*samples[:19], replace(samples[19], label=3)], "samples sha256 was [0-9a-f]{64}, now it is"),
            ([replace(sample, named_by="index") for sample in samples], "samples sha256 was"),
        )
        for those, message in others:
            with pytest.raises(
                UsageError, match=rf"cannot continue it: {message}.* · .*partial · use the same settings"
            ):
                self.run(target, those, resume=True)
        (target.parent.parent / "m").write_text("another")
        with pytest.raises(UsageError, match=r"cannot continue it: model 1 was \w{64}, now it is \w{64} · "):
            self.run(target, samples, resume=True)

    def test_each_fact_of_the_models_counts(self, samples: list[LabelledImage], target: Path) -> None:
        with pytest.raises(StoppedError):
            self.run(target, samples, resume=False, until=6)
        model, plain = target.parent.parent / "m", metadata()
        nearest = replace(plain, preprocessing=replace(plain.preprocessing, interpolation="nearest"))
        one = EvaluationIdentity.of([model], plain, samples, batch_size=3)
        two = EvaluationIdentity.of([model, model], plain, samples, batch_size=3)
        for other, message in (
            (one, "model count was 2, now it is 1"),
            (replace(two, batch_size=4), "batch size was 3, now it is 4"),
            (EvaluationIdentity.of([model, model], nearest, samples, batch_size=3), "preprocessing interpolation was"),
            (EvaluationIdentity.of([model, model], metadata(classes=5), samples, batch_size=3), "labels was"),
            (replace(two, versions={**two.versions, "numpy": "0"}), "versions numpy was"),
        ):
            with (
                pytest.raises(UsageError, match=f"cannot continue it: {message}.* · "),
                RecordFile.open(target, other, resume=True),
            ):
                pass

    def test_where_no_image_can_be_read_nothing_is_left_to_continue(
        self, samples: list[LabelledImage], target: Path
    ) -> None:
        with pytest.raises(UsageError, match="none of the 2 images can be read"):
            self.run(target, [samples[2], samples[7]], resume=False)
        assert not list(target.parent.iterdir())


def test_the_bundled_model_on_its_held_out_digits(digits_export: Export, tmp_path: Path) -> None:
    write_held_out(tmp_path)
    with open_runner(digits_export.path) as first, open_runner(digits_export.path) as second:
        samples = find_labelled_images(tmp_path, first.metadata.labels)
        result = evaluate([first, second], samples, batch_size=64)
    model, (pair,) = result.models[0], result.pairs
    assert (result.named_by, result.evaluated, len(model.classes)) == ("label", 1000, 10)
    assert abs(model.top1.count - 987) <= 1  # another CPU may tip one digit
    assert model.top1.low < model.top1.value < model.top1.high <= model.top5.value
    assert model.loss == pytest.approx(0.124, abs=0.002)
    assert sum(confusion.count for confusion in model.confusions) == 1000 - model.top1.count
    assert (pair.agreement.value, pair.only_first, pair.only_second, pair.p_value) == (1, 0, 0, 1)


def test_models_of_either_input_see_the_same_images(exported: Exported, digit_images: list[Path]) -> None:
    samples = [LabelledImage(path, int(path.name.split("-")[1])) for path in digit_images]
    floats, half = exported().graph, exported("fp16").graph
    pixels = to_input(floats, "uint8")
    with ExitStack() as stack:
        runners = [stack.enter_context(OnnxRuntimeRunner(graph)) for graph in (pixels, floats, to_input(half, "uint8"))]
        mixed = evaluate(runners, samples, batch_size=5)
        alone = evaluate(runners[1:2], samples, batch_size=5)
    assert [pair.agreement.value for pair in mixed.pairs] == [1, 1, 1]
    assert mixed.models[1] == alone.models[0]
    assert mixed.models[0].loss == pytest.approx(mixed.models[1].loss, rel=1e-4)
    assert mixed.models[0].top1.count >= 11
