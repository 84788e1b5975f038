from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smlp_deploy.errors import ConfigError, UsageError
from smlp_deploy.metadata import IMAGENET_MEAN, CheckpointMetadata
from smlp_deploy.models.checkpoint import Checkpoint, load_checkpoint
from smlp_deploy.models.description import describe, imagenet_labels


def of_1000_classes(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, config=replace(checkpoint.config, num_classes=1000), metadata=CheckpointMetadata())


def test_a_file_that_says_all_is_taken_at_its_word(digits: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    metadata = describe(digits)
    assert metadata.labels == tuple("0123456789")
    assert metadata.preprocessing.mean == (0.1307,) * 3
    assert metadata.name == "smlpnet_digits"
    assert metadata.checkpoint_sha256 == digits.sha256
    assert caplog.text == ""


def test_a_head_of_1000_classes_gets_imagenets(digits: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    metadata = describe(of_1000_classes(digits))
    assert metadata.labels[0] == "tench"
    assert metadata.preprocessing.mean == IMAGENET_MEAN
    assert "assumed to be ImageNet's" in caplog.text


def test_another_head_gets_indices_and_a_warning(micro_pth: Path, caplog: pytest.LogCaptureFixture) -> None:
    metadata = describe(load_checkpoint(micro_pth))
    assert metadata.labels == tuple("0123456789")
    assert "named by index" in caplog.text
    assert "states no preprocessing" in caplog.text


def test_options_come_first(digits: Checkpoint) -> None:
    given = {"mean": (0.5, 0.5, 0.5), "interpolation": "bilinear"}
    metadata = describe(digits, labels=tuple("abcdefghij"), preprocessing=given, batch=3)
    assert metadata.labels == tuple("abcdefghij")
    assert metadata.preprocessing.mean == (0.5, 0.5, 0.5)
    assert metadata.preprocessing.std == (0.3081,) * 3
    assert metadata.batch == 3


def test_too_few_labels_are_refused(digits: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="2 labels for 10 classes"):
        describe(digits, labels=("a", "b"))


def test_imagenet_labels_are_1000_different_names() -> None:
    labels = imagenet_labels()
    assert len(set(labels)) == 1000
    assert (labels[281], labels[517], labels[999]) == ("tabby", "crane (machine)", "toilet tissue")


class TestScale:
    """A mean and a standard deviation of pixels from 0 to 255 make a network predict nonsense."""

    @pytest.mark.parametrize(
        ("given", "line"),
        [
            (
                {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)},
                "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225",
            ),
            ({"mean": (123.675, 116.28, 103.53)}, "--mean 0.485,0.456,0.406"),
            ({"std": (58.395, 57.12, 57.375)}, "--std 0.229,0.224,0.225"),
            (
                {"mean": (103.94, 116.78, 123.68), "std": (1.0, 1.0, 1.0)},
                "--mean 0.407608,0.457961,0.48502 --std 0.00392157,0.00392157,0.00392157",
            ),
            ({"mean": (33.3, 33.3, 33.3), "std": (0.3, 0.3, 0.3)}, "--mean 0.130588,0.130588,0.130588"),
            ({"mean": (0.5, 0.5, 127.5)}, "--mean 0.00196078,0.00196078,0.5"),
        ],
    )
    def test_that_of_bytes_is_refused_with_the_line_that_divides(
        self, digits: Checkpoint, given: dict[str, Any], line: str
    ) -> None:
        with pytest.raises(UsageError, match=rf"for pixels from 0 to 255.* · --mean, --std · divide by 255: {line}$"):
            describe(digits, preprocessing=given)

    @pytest.mark.parametrize(
        ("mean", "std"),
        [
            ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # unchanged
            ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),  # 0 to 255
            ((0.485, 0.456, 0.406), (1 / 255, 1 / 255, 1 / 255)),  # as Caffe
            ((124 / 255, 117 / 255, 104 / 255), (1 / (0.0167 * 255),) * 3),  # timm's DPN
            ((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0)),
            ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0)),
        ],
    )
    def test_what_networks_are_trained_with_is_not(
        self, digits: Checkpoint, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        found = describe(digits, preprocessing={"mean": mean, "std": std}).preprocessing
        assert (found.mean, found.std) == (mean, std)

    def test_in_the_json_beside_a_checkpoint(self, micro_pth: Path) -> None:
        micro_pth.with_suffix(".json").write_text('{"preprocessing": {"mean": [127.5, 127.5, 127.5]}}')
        with pytest.raises(ConfigError, match=r"^mean 127\.5,.*belongs to micro\.pth · .* --mean 0\.5,0\.5,0\.5$"):
            describe(load_checkpoint(micro_pth))
        assert describe(load_checkpoint(micro_pth), preprocessing={"mean": (0.5,) * 3}).preprocessing.mean == (0.5,) * 3
