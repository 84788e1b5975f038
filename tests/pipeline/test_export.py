from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from smlp_deploy.errors import ArtifactError, UsageError
from smlp_deploy.evaluation.parity import HALF_IMAGES, MIN_NOISE, ParityReport
from smlp_deploy.exporters.onnx import export_onnx
from smlp_deploy.files import BUNDLED_CHECKPOINT, DATA_FOLDER, sha256_of
from smlp_deploy.graphs.file import Graph, graph_facts
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.images.defaults import bundled_images
from smlp_deploy.metadata import PRECISIONS, ModelMetadata
from smlp_deploy.models.checkpoint import Checkpoint, load_checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.models.smlpnet import SMLPNet
from smlp_deploy.pipeline import export
from smlp_deploy.pipeline.export import Export, export_checkpoint
from smlp_deploy.pipeline.precision import Int8Options, to_input
from smlp_deploy.pipeline.verify import find_reference, prove_against_checkpoint, verify_artifact
from smlp_deploy.runners.base import Runner
from smlp_deploy.runners.pytorch import RecordingRunner
from tests.support.fakes import Exported
from tests.support.recipe import CASES, config_of, recipe_weights


def test_an_export_is_proven_and_says_so_beside_it(digits_export: Export) -> None:
    document = json.loads(digits_export.report_path.read_text())
    assert digits_export.report_path.name == "digits-fp32.parity.json"
    assert document["passed"] is True
    assert document["artifact_sha256"] == sha256_of(digits_export.path)
    assert document["images"] == len(bundled_images()) == 18
    assert document["candidate"] == "onnxruntime (CPU) digits-fp32.onnx"
    assert document["max_relative"] < 1e-4


def test_own_images_are_compared(digits: Checkpoint, digit_images: list[Path], tmp_path: Path) -> None:
    result = export_checkpoint(digits, describe(digits), tmp_path / "x.onnx", images=digit_images[:3])
    assert result.report.images == 3


def test_every_stage_of_an_int8_export_tells_how_much_of_it_is_done(digits: Checkpoint, tmp_path: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    images = tuple(sorted((DATA_FOLDER / "calibration").glob("*"))[:40])
    export_checkpoint(
        digits,
        replace(describe(digits, precision="int8"), form="gpu"),  # which has fewer layers to measure
        tmp_path / "x.onnx",
        int8=Int8Options(images=images, max_drop=100.0),
        progress=lambda what, done, total: told.setdefault(what, []).append((done, total)),
    )
    assert list(told) == [
        "making the graph",
        "reading calibration images",
        "calibrating",
        "running the fp32 graph",
        "measuring each layer",
        "choosing the layers to leave in half precision",
        "converting to int8",
        "comparing",
        "checking the range of fp16",
    ]
    for what, steps in told.items():
        assert steps == sorted(steps), what
        done, total = steps[-1]
        assert done == total, what
    assert told["reading calibration images"][-1] == (40, 40)
    assert told["calibrating"] == [(done, 40) for done in range(2, 41, 2)]
    assert told["comparing"] == [(0, 32), (32, 32)]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_proven_too(exported: Exported, precision: str) -> None:
    result = exported(precision)
    assert result.report.passed
    assert result.report.precision == precision
    assert 1e-5 < result.report.max_relative < 0.1
    assert (result.report.half is not None) == (precision == "fp16")
    assert verify_artifact(result.path).passed
    assert result.path.stat().st_size < 0.6 * BUNDLED_CHECKPOINT.stat().st_size


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_export_of_uint8_input_is_proven_in_every_precision(
    digits: Checkpoint, exported: Exported, tmp_path: Path, precision: str
) -> None:
    metadata = replace(describe(digits, precision=precision), input="uint8")
    result = export_checkpoint(digits, metadata, tmp_path / "x.onnx")
    assert result.report.passed, result.report.failures
    assert (result.report.precision, result.graph.metadata.input) == (precision, "uint8")
    assert Graph.read(result.path).content == to_input(exported(precision).graph, "uint8").content
    assert verify_artifact(result.path).passed
    assert graph_facts(result.path).inputs == ("images uint8 batchx32x32x3",)


def test_activations_near_the_end_of_fp16_fail_with_the_layers_name(digits: Checkpoint, tmp_path: Path) -> None:
    # The block's output grows a thousandfold; LayerNorm and the head's BatchNorm bring it back, so logits look fine.
    weights = {key: tensor.clone() for key, tensor in digits.state_dict.items()}
    for key in ("channel_mix.5.2.net.3.weight", "channel_mix.5.2.net.3.bias", "batch_norm.running_mean"):
        weights[key] *= 4000
    weights["batch_norm.running_var"] *= 4000**2
    loud = replace(digits, state_dict=weights)
    result = export_checkpoint(loud, describe(loud, precision="fp16"), tmp_path / "x.onnx")
    failure = next(gate for gate in result.report.failures if gate.name == "fp16 range")
    assert "blocks.5" in failure.detail


def test_the_images_of_the_calibration_are_not_recorded_again(
    digits: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[int] = []
    infer = RecordingRunner.infer

    def count(recorder: RecordingRunner, batch: FloatArray) -> FloatArray:
        recorded.append(len(batch))
        return infer(recorder, batch)

    monkeypatch.setattr(RecordingRunner, "infer", count)
    own = replace(digits, sha256="0" * 64)  # not the bundled model, whose proof has images of its own
    images = tuple(sorted((DATA_FOLDER / "calibration").glob("*"))[:40])
    few, all_of_them = HALF_IMAGES + MIN_NOISE, 40 + MIN_NOISE
    found = []
    # A fixed batch of 16 leaves eight of the images out of the calibration.
    for batch, chosen, expected in ((None, None, few), (None, images[::-1], all_of_them), (16, None, all_of_them)):
        recorded.clear()
        metadata = describe(own, precision="int8", batch=batch)
        result = export_checkpoint(own, metadata, tmp_path / "x.onnx", images=chosen, int8=Int8Options(images=images))
        assert (result.report.images, sum(recorded)) == (40, expected)
        assert result.report.half is not None
        found.append(result.report.half.largest_activation)
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


def test_what_was_proven_is_what_is_written(
    digits: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, proven = tmp_path / "x.onnx", []

    def prove_and_swap(candidate: Runner, *arguments: Any, **options: Any) -> ParityReport:
        target.write_bytes(b"swapped while the proof ran")
        proven.append(candidate)
        return prove_against_checkpoint(candidate, *arguments, **options)

    monkeypatch.setattr(export, "prove_against_checkpoint", prove_and_swap)
    result = export_checkpoint(digits, describe(digits), target)
    assert len(proven) == 1
    assert target.read_bytes() == result.graph.content
    assert result.report.artifact_sha256 == sha256_of(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.onnx", "x.parity.json"]


class TestAnExportThatFailsParity:
    @pytest.fixture
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An exporter that writes one weight wrongly."""

        def export_wrongly(network: SMLPNet, metadata: ModelMetadata, *, path: Path, opset: int) -> Graph:
            graph = export_onnx(network, metadata, path=path, opset=opset)
            model = graph.model()
            bias = next(tensor for tensor in model.graph.initializer if tensor.name == "head.bias")
            bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(1), "head.bias"))
            return Graph.of(model, graph.metadata, path=path)

        monkeypatch.setattr(export, "export_onnx", export_wrongly)

    @pytest.mark.usefixtures("broken")
    def test_is_kept_under_a_failed_name_and_the_old_file_stays(self, digits: Checkpoint, tmp_path: Path) -> None:
        target = tmp_path / "x.onnx"
        target.write_text("the last good one")
        result = export_checkpoint(digits, describe(digits), target)
        assert not result.report.passed
        assert target.read_text() == "the last good one"
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["x.onnx", "x.onnx.failed", "x.onnx.parity.json"]
        assert json.loads(result.report_path.read_text())["passed"] is False
        assert result.path == tmp_path / "x.onnx.failed"


def micro_onnx(checkpoint: Path, folder: Path) -> Path:
    """An ONNX file of a checkpoint in another folder."""
    loaded = load_checkpoint(checkpoint)
    folder.mkdir()
    export_onnx(loaded.network(), describe(loaded), path=folder / "micro.onnx").save()
    return folder / "micro.onnx"


class TestVerify:
    def test_the_bundled_reference_is_found(self, digits_export: Export) -> None:
        report = verify_artifact(digits_export.path)
        assert report.passed
        assert report.reference == "pytorch (CPU) smlpnet_digits.safetensors"

    def test_another_reference_must_be_given(self, micro_pth: Path, tmp_path: Path) -> None:
        target = micro_onnx(micro_pth, tmp_path / "elsewhere")
        with pytest.raises(UsageError, match=r"made from micro\.pth, which was not found.*--reference"):
            verify_artifact(target)
        assert verify_artifact(target, reference=micro_pth).passed

    @pytest.mark.parametrize("name", ["micro.pth", "renamed.ckpt"])
    @pytest.mark.parametrize("folder", ["working", "beside"])
    def test_the_reference_is_found_beside_the_artifact_or_in_the_working_folder(
        self, micro_pth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str
    ) -> None:
        target = micro_onnx(micro_pth, tmp_path / "beside")
        (tmp_path / "working").mkdir()
        monkeypatch.chdir(tmp_path / "working")
        reference = micro_pth.rename(tmp_path / folder / name)
        Path("other.pth").write_bytes(b"another")
        os.mkfifo("pipe.pth")
        Path("loop.pth").symlink_to("loop.pth")
        metadata = Graph.read(target).metadata
        assert find_reference(metadata, target).samefile(reference)
        # Under the name of the original, which is looked at first, lies another file.
        if name != "micro.pth":
            Path("micro.pth").write_bytes(b"another")
        assert find_reference(metadata, target).samefile(reference)
        reference.write_bytes(reference.read_bytes()[:-1] + b"x")
        with pytest.raises(UsageError, match="was not found beside it or in the working folder"):
            find_reference(metadata, target)

    def test_an_artifact_that_names_a_path_leads_nowhere_else(
        self, micro_pth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = micro_onnx(micro_pth, tmp_path / "beside")
        (tmp_path / "working").mkdir()
        monkeypatch.chdir(tmp_path / "working")
        metadata = replace(Graph.read(target).metadata, checkpoint=str(micro_pth))
        with pytest.raises(UsageError, match="was not found"):
            find_reference(metadata, target)

    def test_only_so_many_files_are_compared(
        self, micro_pth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = micro_onnx(micro_pth, tmp_path / "beside")
        monkeypatch.chdir(tmp_path)
        for i in range(70):
            Path(f"a{i}.pth").write_bytes(b"x")
        metadata = Graph.read(target).metadata
        assert find_reference(metadata, target).samefile(micro_pth)
        micro_pth.rename("z.pth")
        with pytest.raises(UsageError, match="was not found"):
            find_reference(metadata, target)

    def test_moving_averages_are_compared_with_moving_averages(self, tmp_path: Path) -> None:
        path, config = tmp_path / "both.pth", config_of(CASES["micro"])
        torch.save({"model": recipe_weights(config, 1), "model_ema": recipe_weights(config, 2)}, path)
        checkpoint = load_checkpoint(path, ema=True)
        result = export_checkpoint(checkpoint, describe(checkpoint), tmp_path / "x.onnx")
        assert verify_artifact(result.path, reference=path).passed

    def test_other_weights_fail_with_a_warning(
        self, digits_export: Export, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        other = tmp_path / "other.pth"
        checkpoint = load_checkpoint(BUNDLED_CHECKPOINT)
        torch.save(recipe_weights(checkpoint.config, 3), other)
        report = verify_artifact(digits_export.path, reference=other)
        assert not report.passed
        assert "is not the file that" in caplog.text

    def test_labels_given_at_export_verify_later(self, digits: Checkpoint, tmp_path: Path) -> None:
        metadata = describe(digits, labels=tuple("abcdefghij"))
        result = export_checkpoint(digits, metadata, tmp_path / "x.onnx")
        assert verify_artifact(result.path).passed

    def test_swapped_labels_fail(self, digits: Checkpoint, tmp_path: Path) -> None:
        metadata = replace(describe(digits), labels=tuple("1023456789"))
        export_onnx(digits.network(), metadata, path=tmp_path / "x.onnx").save()
        assert [gate.name for gate in verify_artifact(tmp_path / "x.onnx").failures] == ["class order"]

    def test_a_checkpoint_can_be_verified_too(self, tmp_path: Path) -> None:
        copy = tmp_path / BUNDLED_CHECKPOINT.name
        shutil.copy(BUNDLED_CHECKPOINT, copy)
        assert verify_artifact(copy).passed


def test_weights_that_overflow_when_folded_are_named_and_nothing_is_written(digits: Checkpoint, tmp_path: Path) -> None:
    weights = {key: tensor.clone() for key, tensor in digits.state_dict.items()}
    weights["token_mix.0.0.conv_merge.BN.weight"].fill_(3e38)
    weights["token_mix.0.0.conv_merge.BN.running_var"].zero_()
    with pytest.raises(ArtifactError, match=r"values that are NaN or infinite · .*/x\.onnx · nothing was written"):
        export_checkpoint(replace(digits, state_dict=weights), describe(digits), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
