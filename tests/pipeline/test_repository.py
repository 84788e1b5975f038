from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from smlp_deploy.artifacts import engine_manifest_path
from smlp_deploy.errors import ArtifactError, ConfigError, SmlpError, UsageError
from smlp_deploy.exporters.triton import Interface
from smlp_deploy.files import BUNDLED_MODEL
from smlp_deploy.graphs.file import Graph
from smlp_deploy.metadata import BatchProfile, EngineManifest, ModelMetadata
from smlp_deploy.pipeline.repository import export_repository
from smlp_deploy.runners.tensorrt import read_manifest
from tests.support import fakes
from tests.support.graphs import smallest_classifier
from tests.support.pbtxt import parse

TYPES = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.UINT8: "TYPE_UINT8"}


def network_config(repository: Path) -> dict[str, list[Any]]:
    return parse((repository / "smlpnet" / "config.pbtxt").read_text(encoding="utf-8"))


def small_onnx(folder: Path, of: ModelMetadata | None = None) -> Path:
    """A file of four classes."""
    metadata = of or fakes.metadata()
    model = smallest_classifier()
    for value in (model.graph.input[0], model.graph.output[0]):
        if metadata.batch:
            value.type.tensor_type.shape.dim[0].dim_value = metadata.batch
    graph = Graph.of(model, metadata, path=folder / "small.onnx")
    graph.save()
    return graph.path


def engine(folder: Path, **changes: Any) -> Path:
    """The file of an engine, which is not loaded, and its manifest."""
    plan = b"the plan of an engine"
    manifest = EngineManifest(
        engine_sha256=hashlib.sha256(plan).hexdigest(),
        metadata=replace(fakes.metadata(), input="uint8"),
        onnx_file="small.onnx",
        onnx_sha256="",
        backend="tensorrt",
        version="10.13.2.6",
        profile=BatchProfile(min=1, opt=16, max=32),
        architectures=("sm89",),
        ran_here=True,
    )
    path = folder / "small.engine"
    path.write_bytes(plan)
    engine_manifest_path(path).write_text(replace(manifest, **changes).to_json(), encoding="utf-8")
    return path


def test_rule_6_names_types_and_dims_are_those_of_the_graph(tmp_path: Path) -> None:
    found = export_repository(BUNDLED_MODEL, tmp_path / "model_repository")
    graph = onnx.load(found.path / "smlpnet" / "1" / "model.onnx").graph
    config = network_config(found.path)
    for stated, (value,) in ((config["input"], graph.input), (config["output"], graph.output)):
        batch, *dims = (dim.dim_value for dim in value.type.tensor_type.shape.dim)
        assert batch == 0  # any
        assert stated[0]["name"] == [value.name]
        assert stated[0]["data_type"] == [TYPES[value.type.tensor_type.elem_type]]
        assert stated[0]["dims"] == dims
    assert (found.path / "smlpnet" / "1" / "model.onnx").read_bytes() == BUNDLED_MODEL.read_bytes()


def test_the_interface_is_that_of_the_artifact(tmp_path: Path) -> None:
    found = export_repository(BUNDLED_MODEL, tmp_path / "model_repository")
    metadata = Graph.read(BUNDLED_MODEL).metadata
    assert found.version == 1
    assert found.interface.labels == metadata.labels
    assert found.interface.preprocessing == metadata.preprocessing
    assert found.interface.topk == 5
    assert export_repository(BUNDLED_MODEL, tmp_path / "model_repository").version == 2


def test_a_file_of_one_batch_size_is_not_batched(tmp_path: Path) -> None:
    path = small_onnx(tmp_path, fakes.metadata(batch=8))
    config = network_config(export_repository(path, tmp_path / "model_repository").path)
    assert config["max_batch_size"] == [0]
    assert config["input"][0]["dims"] == [8, 3, 8, 8]


def test_an_engine_brings_its_manifest_profile_and_input(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = export_repository(engine(tmp_path), tmp_path / "model_repository")
    config = network_config(found.path)
    assert config["platform"] == ["tensorrt_plan"]
    assert config["max_batch_size"] == [32]
    assert config["dynamic_batching"][0]["preferred_batch_size"] == [4, 8, 16]
    assert config["input"] == [{"name": ["images"], "data_type": ["TYPE_UINT8"], "dims": [8, 8, 3]}]
    plan = found.path / "smlpnet" / "1" / "model.plan"
    assert read_manifest(plan) == read_manifest(tmp_path / "small.engine")
    assert caplog.messages == ["the engine loads only in a Triton with TensorRT 10.13.2.6, on sm89"]


def test_an_engine_of_one_batch_size_is_not_batched(tmp_path: Path) -> None:
    path = engine(tmp_path, profile=BatchProfile.fixed(4))
    found = export_repository(path, tmp_path / "model_repository")
    assert found.interface.batch == 4
    assert network_config(found.path)["input"][0]["dims"] == [4, 8, 8, 3]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"backend": "tensorrt-rtx"}, ArtifactError, "an engine of tensorrt-rtx, and Triton runs TensorRT's.*--target"),
        ({"engine_sha256": "0" * 64}, ArtifactError, "does not match the sha256 in its manifest"),
        ({"profile": BatchProfile(min=2, opt=16, max=32)}, ConfigError, "batches of 2 to 32 cannot be served"),
    ],
)
def test_engines_that_triton_cannot_run_are_refused(
    changes: dict[str, Any], error: type[SmlpError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export_repository(engine(tmp_path, **changes), tmp_path / "model_repository")
    assert not (tmp_path / "model_repository").exists()


def test_an_engine_without_its_manifest_is_refused(tmp_path: Path) -> None:
    path = engine(tmp_path)
    engine_manifest_path(path).unlink()
    with pytest.raises(ArtifactError, match=r"no such file.*build the engine again"):
        export_repository(path, tmp_path / "model_repository")


def test_a_checkpoint_is_to_be_exported_first(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is made of an ONNX file or an engine.*smlp export CHECKPOINT"):
        export_repository(tmp_path / "my.pth", tmp_path / "model_repository")


def test_bf16_is_for_gpus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = small_onnx(tmp_path, replace(fakes.metadata(), precision="bf16"))
    export_repository(path, tmp_path / "model_repository")
    assert "no bf16 kernels for CPUs" in caplog.text


def test_another_model_does_not_become_a_version(tmp_path: Path) -> None:
    repository = export_repository(BUNDLED_MODEL, tmp_path / "model_repository").path
    with pytest.raises(SmlpError, match="have another input, output, labels, preprocessing, topk"):
        export_repository(small_onnx(tmp_path), repository)
    assert Interface.read(repository / "smlpnet").labels == Graph.read(BUNDLED_MODEL).metadata.labels
