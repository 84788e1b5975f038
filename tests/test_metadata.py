from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smlp_deploy.errors import ConfigError
from smlp_deploy.metadata import (
    FORMS,
    INTERPOLATIONS,
    MAX_BATCH,
    MAX_BLOCKS,
    MAX_IMAGE_SIZE,
    MAX_NUMBER,
    PRECISIONS,
    BatchProfile,
    CheckpointMetadata,
    EngineManifest,
    ModelMetadata,
    Preprocessing,
    SMLPNetConfig,
)
from tests.support.fakes import metadata


def test_metadata_survive_json() -> None:
    original = replace(metadata(classes=2, batch=7), labels=("Straße", 'a"b\n'), libraries={"torch": "2"})
    assert ModelMetadata.from_json(original.to_json(), where="x") == original


def test_the_form_for_cpus_leaves_no_trace() -> None:
    assert "form" not in json.loads(metadata().to_json())
    for_gpus = replace(metadata(), form="gpu")
    assert json.loads(for_gpus.to_json())["form"] == "gpu"
    assert ModelMetadata.from_json(for_gpus.to_json(), where="x") == for_gpus


def test_checkpoint_metadata_survive_json() -> None:
    own = CheckpointMetadata(labels=("a", "b"), preprocessing=Preprocessing(image_size=32), training={"top1": 98.5})
    assert CheckpointMetadata.from_json(own.to_json(), where="x", image_size=32) == own


def test_a_crop_of_1_keeps_its_bytes() -> None:
    text = metadata().to_json().replace('"crop_pct": 1.0', '"crop_pct": 1')
    assert '"crop_pct": 1,' in text
    assert ModelMetadata.from_json(text, where="x").to_json() == text


def test_checkpoint_metadata_complete_a_preprocessing_and_ignore_the_fields_of_other_tools() -> None:
    text = '{"preprocessing": {"crop_pct": 0.9}, "epochs": 300}'
    found = CheckpointMetadata.from_json(text, where="x", image_size=32)
    assert found == CheckpointMetadata(preprocessing=Preprocessing(image_size=32, crop_pct=0.9))
    with pytest.raises(ConfigError, match="unknown field 'crop'"):
        CheckpointMetadata.from_json('{"preprocessing": {"crop": 1}}', where="x", image_size=32)


def manifest() -> EngineManifest:
    return EngineManifest(
        engine_sha256="0" * 64,
        metadata=metadata(),
        onnx_file="größe.onnx",
        onnx_sha256="1" * 64,
        backend="tensorrt",
        version="10.12",
        profile=BatchProfile(opt=8, max=8),
        architectures=("sm90",),
        ran_here=True,
        options={"workspace": 1e300, "tolerance": 1e-7},
        memory=("12 MiB of weights",),
        graph_parity={"top1": 98.7},
    )


def test_a_manifest_survives_json() -> None:
    text = manifest().to_json()
    assert EngineManifest.from_json(text, where="x") == manifest()
    assert EngineManifest.from_json(text, where="x").to_json() == text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 1, "flavour": "tensorrt"}, "metadata schema 1 is not 2, .*build the engine again"),
        ({"schema": 3}, "metadata schema 3 is not 2, .*upgrade smlp-deploy, or build the engine again"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"profile": {"min": 1, "opt": 1, "max": 1, "surprise": 1}}, "unknown field 'surprise'"),
        ({"profile": {"min": True}}, "Expected `int`, got `bool`"),
        ({"profile": {"min": 65}}, "is not in order"),
        ({"engine_sha256": 7}, "Expected `str`, got `int` - .*engine_sha256"),
        ({"ran_here": 1}, "Expected `bool`, got `int` - .*ran_here"),
        ({"architectures": "sm90"}, "Expected `array`, got `str` - .*architectures"),
        ({"options": ["a"]}, "Expected `object`, got `array` - .*options"),
        ({"memory": [{}]}, "Expected `str`, got `object` - .*memory"),
        ({"metadata": {}}, "Object missing required field `name` - .*metadata"),
        ({"metadata": json.loads(metadata().to_json()) | {"labels": ["a"]}}, "1 labels for 4 classes"),
    ],
)
def test_an_invalid_manifest_is_refused(change: dict[str, Any], reason: str) -> None:
    document = json.loads(manifest().to_json()) | change
    with pytest.raises(ConfigError, match=reason) as caught:
        EngineManifest.from_json(json.dumps(document), where="x.engine.json")
    assert caught.value.where == "x.engine.json"


def test_the_same_metadata_give_the_same_text() -> None:
    assert metadata().to_json() == metadata().to_json()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 2}, "metadata schema 2 is not 1.*upgrade"),
        ({"schema": True}, "metadata schema True is not 1"),
        ({"labels": ["a"]}, "1 labels for 4 classes"),
        ({"labels": "abcd"}, r"Expected `array`, got `str` - at `\$\.labels`"),
        ({"labels": None}, r"metadata is damaged: Expected `array`, got `null` - at `\$\.labels`"),
        ({"batch": 0}, "batch 0 is not a positive integer"),
        ({"precision": "fp3"}, "precision 'fp3' is unknown"),
        ({"form": "tpu"}, "form 'tpu' is unknown · model.onnx · one of cpu, gpu"),
        ({"config": {"dim": 4}}, "metadata is damaged: Object missing required field `depths`"),
        ({"surprise": 1}, "metadata is damaged: unknown field 'surprise'"),
        ({"preprocessing": {"image_size": 16}}, "makes images of 16 pixels, the network takes 8"),
        ({"preprocessing": {"image_size": 8, "std": [0, 1, 1]}}, "not three positive numbers"),
        ({"preprocessing": {"image_size": 8, "mean": [1, 2]}}, "Expected `array` of length 3, got 2"),
        ({"preprocessing": {"image_size": 8, "crop_pct": 2}}, "outside 0.05 to 1"),
        ({"preprocessing": {"image_size": 8, "interpolation": "area"}}, "interpolation 'area' is unknown"),
        ({"preprocessing": {"image_size": 10**9}}, "not an integer from 1 to 2048"),
        ({"preprocessing": {"image_size": 8, "std": [1e-300, 1, 1]}}, "not three positive numbers"),
        ({"preprocessing": {"image_size": 8, "mean": [1e300, 1, 1]}}, "not three finite numbers"),
        ({"preprocessing": {"image_size": 8, "interpolation": 1}}, r"Expected `str`, got `int` - .*interpolation"),
        ({"preprocessing": {"image_size": True}}, r"Expected `int`, got `bool` - .*image_size"),
        ({"name": "../../etc/model"}, "cannot be part of a file name"),
        ({"name": "a\\b"}, "cannot be part of a file name"),
        ({"name": "a\nb"}, "cannot be part of a file name"),
        ({"name": "x" * 300}, "cannot be part of a file name"),
        ({"name": "\u4e16" * 100}, "cannot be part of a file name"),
        ({"name": "\udcff"}, "half a character"),
        ({"name": ""}, "cannot be part of a file name"),
        ({"name": None}, "Expected `str`, got `null` - .*name"),
        ({"labels": ["a", "b", "c", "\ud800"]}, "half a character"),
        ({"labels": ["a", "b", "c", "x" * 1001]}, "Expected `str` of length <= 1000"),
        ({"labels": ["a", "b", "c", 4]}, r"Expected `str`, got `int` - at `\$\.labels\[3\]`"),
        ({"batch": True}, r"Expected `int \| null`, got `bool` - .*batch"),
        ({"batch": 10**9}, "not a positive integer up to 65536"),
        ({"ema": "yes"}, "Expected `bool`, got `str` - .*ema"),
        ({"checkpoint": 7}, "Expected `str`, got `int` - .*checkpoint"),
        ({"checkpoint_sha256": None}, "Expected `str`, got `null` - .*checkpoint_sha256"),
        ({"variant": 7}, r"Expected `str \| null`, got `int` - .*variant"),
        ({"precision": ["fp32"]}, "Expected `str`, got `array` - .*precision"),
        ({"libraries": {"torch": 2}}, "Expected `str`, got `int` - .*libraries"),
        ({"libraries": [["torch", "2"]]}, "Expected `object`, got `array` - .*libraries"),
        ({"quantization": []}, "Expected `object`, got `array` - .*quantization"),
        ({"config": {"dim": 4, "depths": [10**6], "image_size": 8, "num_classes": 4}}, "at most 2048 blocks"),
        ({"config": {"dim": 10**30, "depths": [1], "image_size": 8, "num_classes": 4}}, "no number above 1048576"),
        ({"config": {"dim": 4, "depths": "11", "image_size": 8, "num_classes": 4}}, "Expected `array`, got `str`"),
        ({"config": {"dim": 4, "depths": [True], "image_size": 8, "num_classes": 4}}, "Expected `int`, got `bool`"),
        ({"config": 7}, "metadata is damaged: Expected `object`, got `int`"),
        ({"x" * 9999: 1}, r"metadata is damaged: unknown field 'x{200,300}\.\.\. "),
    ],
)
def test_invalid_metadata_are_refused(change: dict[str, Any], reason: str) -> None:
    document = json.loads(metadata().to_json()) | change
    with pytest.raises(ConfigError, match=reason) as caught:
        ModelMetadata.from_json(json.dumps(document), where="model.onnx")
    assert "model.onnx" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "7",
        "nonsense",
        "[" * 100_000,
        "[]" * 200_000,
        '{"name": NaN}',
        '{"a": 1e999}',
        '{"a": 1, "a": 1}',
        "{}",
    ],
)
def test_json_that_is_not_metadata_is_refused(text: str) -> None:
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


@pytest.mark.parametrize("sizes", [(0, 1, 2), (1, 1, MAX_BATCH + 1), (1, 2.5, 3), (True, 1, 1), (2, 1, 3)])
def test_batch_profiles_are_integers_in_order(sizes: tuple[int, int, int]) -> None:
    smallest, best, largest = sizes
    with pytest.raises(ConfigError, match="batch"):
        BatchProfile(min=smallest, opt=best, max=largest)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.text(st.characters(categories=["L", "N", "P", "S"], exclude_characters="/\\"), min_size=1, max_size=50)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(texts, json_values, max_size=3)


@st.composite
def configurations(draw: st.DrawFn) -> SMLPNetConfig:
    depths = tuple(draw(st.lists(st.integers(1, MAX_BLOCKS // 8), min_size=1, max_size=6)))
    patch_size = draw(st.integers(1, 64))
    step = patch_size * 2 ** (len(depths) - 1)
    return SMLPNetConfig(
        dim=draw(st.integers(1, MAX_NUMBER)),
        depths=depths,
        expansion=draw(st.integers(1, MAX_NUMBER)),
        patch_size=patch_size,
        image_size=step * draw(st.integers(1, MAX_IMAGE_SIZE // step)),
        num_classes=draw(st.integers(1, 20)),
    )


@st.composite
def preprocessings(draw: st.DrawFn, image_size: int) -> Preprocessing:
    mean, std = st.floats(-1000, 1000), st.floats(1e-6, 1e6)
    return Preprocessing(
        image_size=image_size,
        crop_pct=draw(st.floats(0.05, 1)),
        interpolation=draw(st.sampled_from(INTERPOLATIONS)),
        mean=draw(st.tuples(mean, mean, mean)),
        std=draw(st.tuples(std, std, std)),
    )


@st.composite
def any_metadata(draw: st.DrawFn) -> ModelMetadata:
    config = draw(configurations())
    return ModelMetadata(
        name=draw(names),
        config=config,
        labels=tuple(draw(st.lists(texts, min_size=config.num_classes, max_size=config.num_classes))),
        preprocessing=draw(preprocessings(config.image_size)),
        precision=draw(st.sampled_from(PRECISIONS)),
        batch=draw(st.none() | st.integers(1, MAX_BATCH)),
        form=draw(st.sampled_from(FORMS)),
        variant=draw(st.none() | texts),
        checkpoint=draw(texts),
        checkpoint_sha256=draw(texts),
        ema=draw(st.booleans()),
        libraries=draw(st.dictionaries(texts, texts, max_size=3)),
        quantization=draw(mappings),
    )


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(any_metadata())
def test_any_metadata_survive_json(original: ModelMetadata) -> None:
    text = original.to_json()
    assert ModelMetadata.from_json(text, where="x") == original
    assert ModelMetadata.from_json(text, where="x").to_json() == text


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(st.data())
def test_any_checkpoint_metadata_survive_json(data: st.DataObject) -> None:
    own = CheckpointMetadata(
        labels=data.draw(st.none() | st.lists(texts, max_size=5).map(tuple)),
        preprocessing=data.draw(st.none() | preprocessings(32)),
        training=data.draw(mappings),
    )
    assert CheckpointMetadata.from_json(own.to_json(), where="x", image_size=32) == own


@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(json_values, st.sampled_from([None, *json.loads(metadata().to_json())]))
def test_any_json_is_metadata_or_one_clear_error(value: Any, key: str | None) -> None:
    document = value if key is None else json.loads(metadata().to_json()) | {key: value}
    try:
        found = ModelMetadata.from_json(json.dumps(document), where="x")
    except ConfigError:
        return
    assert ModelMetadata.from_json(found.to_json(), where="x") == found
