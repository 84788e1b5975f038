from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from smlp_deploy.errors import ConfigError, UsageError
from smlp_deploy.metadata import IMAGENET_MEAN, CheckpointMetadata
from smlp_deploy.models.checkpoint import Checkpoint, load_checkpoint
from smlp_deploy.models.description import describe, imagenet_labels, read_labels


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


def test_labels_are_read_from_text_and_json(tmp_path: Path) -> None:
    text, listed = tmp_path / "labels.txt", tmp_path / "labels.json"
    text.write_text("cat\nbig dog \n", encoding="utf-8")
    listed.write_text(json.dumps(["cat", "big dog"]))
    assert read_labels(text) == read_labels(listed) == ("cat", "big dog")


@pytest.mark.parametrize("content", ["cat\n\ndog\n", b"\xff\xfe"])
def test_what_is_no_list_of_labels_is_refused(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError):
        read_labels(path)
