from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from fakes import metadata
from smlp_deploy.errors import ConfigError
from smlp_deploy.metadata import ModelCard, ModelMetadata, Preprocessing, SMLPNetConfig


def test_metadata_survive_json() -> None:
    original = replace(metadata(classes=2, batch=7), labels=("Straße", 'a"b\n'), libraries={"torch": "2"})
    assert ModelMetadata.from_json(original.to_json(), where="x") == original


def test_a_card_survives_json() -> None:
    card = ModelCard(labels=("a", "b"), preprocessing=Preprocessing(image_size=32), training={"top1": 98.5})
    assert ModelCard.from_json(card.to_json(), where="x", image_size=32) == card


def test_the_same_metadata_give_the_same_text() -> None:
    assert metadata().to_json() == metadata().to_json()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 2}, "metadata schema 2 is not 1.*upgrade"),
        ({"labels": ["a"]}, "1 labels for 4 classes"),
        ({"labels": "abcd"}, "labels are not a list of strings"),
        ({"labels": None}, "metadata is damaged"),
        ({"batch": 0}, "batch 0 is not a positive integer"),
        ({"precision": "fp3"}, "precision 'fp3' is unknown"),
        ({"config": {"dim": 4}}, "metadata is damaged"),
        ({"surprise": 1}, "metadata is damaged"),
        ({"preprocessing": {"image_size": 16}}, "makes images of 16 pixels, the network takes 8"),
        ({"preprocessing": {"image_size": 8, "std": [0, 1, 1]}}, "not three positive numbers"),
        ({"preprocessing": {"image_size": 8, "mean": [1, 2]}}, "not three finite numbers"),
        ({"preprocessing": {"image_size": 8, "crop_pct": 2}}, "outside 0.05 to 1"),
        ({"preprocessing": {"image_size": 8, "interpolation": "area"}}, "interpolation 'area' is unknown"),
        ({"preprocessing": {"image_size": 10**9}}, "not an integer from 1 to 65536"),
    ],
)
def test_metadata_that_lie_are_refused(change: dict[str, Any], reason: str) -> None:
    document = json.loads(metadata().to_json()) | change
    with pytest.raises(ConfigError, match=reason) as caught:
        ModelMetadata.from_json(json.dumps(document), where="model.onnx")
    assert "model.onnx" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "[" * 100_000])
def test_what_is_no_metadata_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="metadata is damaged"):
        ModelMetadata.from_json(text, where="x")


def test_resize_is_256_for_a_crop_of_224() -> None:
    assert Preprocessing(image_size=224).resize == 256
    assert Preprocessing(image_size=32, crop_pct=1.0).resize == 32


@pytest.mark.parametrize(
    "values",
    [
        {"dim": 0, "depths": (1,)},
        {"dim": 8, "depths": ()},
        {"dim": 8, "depths": (1, 0)},
        {"dim": 8, "depths": (1,), "num_classes": -1},
        {"dim": 8, "depths": (1,), "expansion": 1.5},
    ],
)
def test_impossible_configurations_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="positive integer"):
        SMLPNetConfig(**values)


def test_an_image_that_does_not_divide_is_refused_with_one_that_does() -> None:
    with pytest.raises(ConfigError, match=r"image size 230 is not a multiple of 32.*use 224"):
        SMLPNetConfig(dim=80, depths=(2, 8, 14, 2), image_size=230)


def test_stages_channels_and_grids() -> None:
    config = SMLPNetConfig(dim=80, depths=(2, 1, 3))
    assert config.stages() == (0, 0, 1, 2, 2, 2)
    assert [config.channels(stage) for stage in range(3)] == [80, 160, 320]
    assert [config.grid(stage) for stage in range(3)] == [56, 28, 14]
