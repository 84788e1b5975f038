"""The rules of smlp_deploy/exporters/triton.py, read back from the files; a real server is in test_triton_server.py."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smlp_deploy.errors import ArtifactError, ConfigError, SmlpError
from smlp_deploy.exporters.triton import ONNX, PLAN, Interface, Tensor, as_pbtxt, write_repository
from smlp_deploy.metadata import BatchProfile, Preprocessing
from tests.support.pbtxt import parse

LABELS = ("cat", 'a "dog"', "Käuzchen")
STEPS = ("preprocess", "smlpnet", "postprocess")
MODELS = {*STEPS, "classify"}


def interface(batch: int | None = None, **changes: Any) -> Interface:
    profile = BatchProfile.fixed(batch) if batch else BatchProfile(min=1, opt=32, max=64)
    return replace(
        Interface(
            platform=ONNX,
            batch=batch,
            profile=profile,
            input=Tensor(name="images", data_type="FP32", dims=(3, 8, 8)),
            output=Tensor(name="logits", data_type="FP32", dims=(3,)),
            labels=LABELS,
            preprocessing=Preprocessing(image_size=8),
            topk=2,
        ),
        **changes,
    )


def written(folder: Path, of: Interface, content: bytes = b"network") -> Path:
    name = "model.onnx" if of.platform == ONNX else "model.plan"
    return write_repository(folder / "model_repository", of, {name: content}).path


def config(repository: Path, model: str) -> dict[str, list[Any]]:
    return parse((repository / model / "config.pbtxt").read_text(encoding="utf-8"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rule_1_a_model_is_called_like_its_folder(tmp_path: Path) -> None:
    repository = written(tmp_path, interface())
    assert {path.name for path in repository.iterdir()} == MODELS
    for model in MODELS:
        assert config(repository, model)["name"] == [model]


def test_rule_2_versions_are_numbers_without_zeros_in_front(tmp_path: Path) -> None:
    for version in range(1, 12):
        repository = written(tmp_path, interface(), b"network %d" % version)
        assert (repository / "smlpnet" / str(version) / "model.onnx").read_bytes() == b"network %d" % version
    folders = {path.name for path in (repository / "smlpnet").iterdir() if path.is_dir()}
    assert folders == set(map(str, range(1, 12)))
    assert all((repository / model / "1").is_dir() for model in MODELS)


@pytest.mark.parametrize(("platform", "file"), [(ONNX, "model.onnx"), (PLAN, "model.plan")])
def test_rule_3_the_platform_and_its_file(platform: str, file: str, tmp_path: Path) -> None:
    repository = written(tmp_path, interface(platform=platform))
    assert config(repository, "smlpnet")["platform"] == [platform]
    assert platform in ("onnxruntime_onnx", "tensorrt_plan")
    assert (repository / "smlpnet" / "1" / file).is_file()
    assert "instance_group" not in config(repository, "smlpnet")


def test_rule_4_a_network_of_any_batch_size_is_batched(tmp_path: Path) -> None:
    repository = written(tmp_path, interface())
    for model in MODELS:
        found = config(repository, model)
        assert found["max_batch_size"] == [64]
        assert ("dynamic_batching" in found) == (model != "classify")
    assert config(repository, "preprocess")["input"][0]["dims"] == [1]
    assert config(repository, "smlpnet")["input"][0]["dims"] == [3, 8, 8]
    assert [output["dims"] for output in config(repository, "classify")["output"]] == [[2]] * 3


def test_rule_4_a_network_of_one_batch_size_has_it_in_its_dims(tmp_path: Path) -> None:
    repository = written(tmp_path, interface(batch=16))
    for model in MODELS:
        found = config(repository, model)
        assert found["max_batch_size"] == [0]
        assert "dynamic_batching" not in found
    network = config(repository, "smlpnet")
    assert network["input"][0]["dims"] == [16, 3, 8, 8]
    assert network["output"][0]["dims"] == [16, 3]
    assert "label_filename" not in network["output"][0]
    assert [warm["batch_size"] for warm in network["model_warmup"]] == [[1]]
    assert config(repository, "preprocess")["input"][0]["dims"] == [16]
    assert [output["dims"] for output in config(repository, "classify")["output"]] == [[16, 2]] * 3


@pytest.mark.parametrize(
    ("profile", "preferred"),
    [
        (BatchProfile(min=1, opt=32, max=64), [8, 16, 32]),
        (BatchProfile(min=1, opt=64, max=64), [16, 32, 64]),
        (BatchProfile(min=1, opt=3, max=5), [3]),
        (BatchProfile(min=1, opt=1, max=8), None),
    ],
)
def test_rule_5_preferred_sizes_are_inside_the_profile(
    profile: BatchProfile, preferred: list[int] | None, tmp_path: Path
) -> None:
    network = config(written(tmp_path, interface(profile=profile)), "smlpnet")
    (batching,) = network["dynamic_batching"]
    assert batching.get("preferred_batch_size") == preferred
    assert all(1 < size <= network["max_batch_size"][0] for size in preferred or ())
    assert {warm["batch_size"][0] for warm in network["model_warmup"]} == {1, profile.opt}


def test_rule_7_the_label_file_has_a_line_for_each_class(tmp_path: Path) -> None:
    repository = written(tmp_path, interface())
    (output,) = config(repository, "smlpnet")["output"]
    (name,) = output["label_filename"]
    assert "/" not in name
    assert (repository / "smlpnet" / name).read_text(encoding="utf-8").splitlines() == list(LABELS)


@pytest.mark.parametrize("batch", [None, 4])
def test_rule_8_the_ensemble_connects_its_steps(batch: int | None, tmp_path: Path) -> None:
    repository = written(tmp_path, interface(batch=batch))
    ensemble = config(repository, "classify")
    known = {tensor["name"][0]: tensor for tensor in ensemble["input"]}
    for step in ensemble["ensemble_scheduling"][0]["step"]:
        model = config(repository, step["model_name"][0])
        assert model["max_batch_size"] == ensemble["max_batch_size"]
        taken = {entry["key"][0]: entry["value"][0] for entry in step["input_map"]}
        given = {entry["key"][0]: entry["value"][0] for entry in step["output_map"]}
        assert taken.keys() == {tensor["name"][0] for tensor in model["input"]}
        assert given.keys() == {tensor["name"][0] for tensor in model["output"]}
        for tensor in model["input"]:
            came = known[taken[tensor["name"][0]]]
            assert (came["data_type"], came["dims"]) == (tensor["data_type"], tensor["dims"])
        known |= {given[tensor["name"][0]]: tensor for tensor in model["output"]}
    for tensor in ensemble["output"]:
        assert {key: known[tensor["name"][0]][key] for key in tensor} == tensor
    assert [step["model_name"][0] for step in ensemble["ensemble_scheduling"][0]["step"]] == list(STEPS)


def test_the_warm_up_is_a_request_that_the_network_takes(tmp_path: Path) -> None:
    network = config(written(tmp_path, interface()), "smlpnet")
    (images,) = network["input"]
    for warm in network["model_warmup"]:
        (entry,) = warm["inputs"]
        assert entry["key"] == images["name"]
        assert entry["value"] == [{"data_type": images["data_type"], "dims": images["dims"], "zero_data": ["true"]}]


def test_pixels_are_uint8(tmp_path: Path) -> None:
    pixels = Tensor(name="images", data_type="UINT8", dims=(8, 8, 3))
    repository = written(tmp_path, interface(input=pixels))
    for model, side in (("preprocess", "output"), ("smlpnet", "input")):
        assert config(repository, model)[side][0] == {
            "name": ["images"],
            "data_type": ["TYPE_UINT8"],
            "dims": [8, 8, 3],
        }


def test_the_interface_is_read_as_it_was_written(tmp_path: Path) -> None:
    repository = written(tmp_path, interface())
    for model in MODELS:
        assert Interface.read(repository / model) == interface()


def test_a_new_export_keeps_what_users_tuned(tmp_path: Path) -> None:
    repository = written(tmp_path, interface())
    tuned = repository / "smlpnet" / "config.pbtxt"
    tuned.write_text(tuned.read_text() + "instance_group { count: 2 }\n")
    before = files(repository)
    written(tmp_path, interface(), b"second")
    assert files(repository) == {**before, "smlpnet/2/model.onnx": b"second"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"labels": ("cat", "dog", "owl")}, "labels"),
        ({"platform": PLAN}, "platform"),
        ({"profile": BatchProfile(min=1, opt=32, max=128)}, "profile"),
        ({"preprocessing": Preprocessing(image_size=8, interpolation="bilinear")}, "preprocessing"),
        ({"input": Tensor(name="images", data_type="UINT8", dims=(8, 8, 3))}, "input"),
        (
            {"labels": ("cat", "dog"), "output": Tensor(name="logits", data_type="FP32", dims=(2,))},
            "output, labels",
        ),
    ],
)
def test_another_interface_is_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    repository = written(tmp_path, interface())
    before = files(repository)
    with pytest.raises(SmlpError, match=rf"have another {named}, and all.*export into another folder, or remove"):
        written(tmp_path, interface(**changes))
    assert files(tmp_path) == {f"model_repository/{name}": content for name, content in before.items()}


def test_a_model_of_another_tool_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "model_repository" / "preprocess"
    other.mkdir(parents=True)
    (other / "config.pbtxt").write_text('name: "preprocess"\n')
    with pytest.raises(SmlpError, match="is a model that smlp export did not write"):
        written(tmp_path, interface())
    assert files(tmp_path) == {"model_repository/preprocess/config.pbtxt": b'name: "preprocess"\n'}


def test_other_models_stay_beside_it_and_what_was_removed_comes_back(tmp_path: Path) -> None:
    (tmp_path / "model_repository" / "resnet" / "1").mkdir(parents=True)
    repository = written(tmp_path, interface())
    for path in (repository / "classify").rglob("*.*"):
        path.unlink()
    (repository / "classify" / "1").rmdir()
    (repository / "classify").rmdir()
    written(tmp_path, interface(), b"second")
    assert {path.name for path in repository.iterdir()} == MODELS | {"resnet"}
    assert (repository / "classify" / "config.pbtxt").is_file()
    assert (repository / "smlpnet" / "2" / "model.onnx").read_bytes() == b"second"


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize("number", [1, 5])
def test_a_full_disk_leaves_no_partial_files(
    already: bool, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if already:
        written(tmp_path, interface())
        (tmp_path / "model_repository" / "classify").rename(tmp_path / "classify")
    before = files(tmp_path)
    left = number
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        nonlocal left
        left -= 1
        if left == 0 or data == b"second":
            write(path, data[:1])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SmlpError, match=r"cannot write: No space left on device.*make room"):
        written(tmp_path, interface(), b"second")
    assert files(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("place", ["/", "file"])
def test_what_cannot_be_a_repository_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SmlpError, match="cannot be a model repository"):
        write_repository(tmp_path / place, interface(), {"model.onnx": b""})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ("cat", "dog")}, "2 labels for 3 outputs"),
        ({"labels": ("cat", "a\ndog", "owl")}, "a label has several lines"),
        ({"profile": BatchProfile(min=4, opt=32, max=64)}, "batches of 4 to 64 cannot be served.*--min-batch 1"),
        ({"topk": 4}, "the best 4 classes"),
        ({"platform": "onnx"}, "platform 'onnx'"),
    ],
)
def test_what_cannot_be_served_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        interface(**changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace('"topk": 2', '"topk": 20'), "the best 20 classes"),
        (lambda text: text.replace('"topk": 2', '"topk": "2"'), "cannot be read"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "schema 2 is not 1"),
        (lambda text: "{", "cannot be read"),
    ],
)
def test_a_damaged_interface_is_one_line(edit: Callable[[str], str], message: str, tmp_path: Path) -> None:
    (tmp_path / "smlp.json").write_text(edit(interface().to_json()), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        Interface.read(tmp_path)


def test_a_folder_without_an_interface_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no such file.*smlp export --format triton writes it"):
        Interface.read(tmp_path)


def test_text_is_quoted_as_protocol_buffers_do() -> None:
    text = as_pbtxt({"name": 'a "b" \\ c', "dims": [1, 2], "empty": {}, "many": [{"a": 1}, {"a": 2}]})
    assert parse(text) == {"name": ['a "b" \\ c'], "dims": [1, 2], "empty": [{}], "many": [{"a": [1]}, {"a": [2]}]}
    assert json.loads(text.splitlines()[0].removeprefix("name: ")) == 'a "b" \\ c'
