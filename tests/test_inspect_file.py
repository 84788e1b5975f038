from __future__ import annotations

import json
from pathlib import Path

import pytest

from smlp_deploy.errors import ArtifactError, ConfigError, UsageError
from smlp_deploy.exporters.tensorrt import BuildOptions
from smlp_deploy.files import BUNDLED_CHECKPOINT, sha256_of
from smlp_deploy.graphs.file import Graph
from smlp_deploy.inspect_file import inspect_file
from smlp_deploy.pipeline.build import build_prepared, prepare_graph
from smlp_deploy.pipeline.export import Export


def test_a_checkpoint_tells_what_it_is() -> None:
    facts = inspect_file(BUNDLED_CHECKPOINT)
    assert facts["kind"] == "checkpoint"
    assert facts["parameters"] == facts["training"]["parameters"] == 509390
    assert facts["config"]["depths"] == (2, 3, 1)
    assert facts["labels"] == tuple("0123456789")
    json.dumps(facts)


def test_an_onnx_file_tells_what_it_is(digits_export: Export) -> None:
    facts = inspect_file(digits_export.path)
    assert facts["kind"] == "onnx"
    assert facts["sha256"] == sha256_of(digits_export.path)
    assert facts["metadata"]["labels"] == tuple("0123456789")
    assert facts["operators"]["MatMul"] == 12
    json.dumps(facts)


def test_an_engine_tells_what_the_file_beside_it_says(digits_export: Export, tmp_path: Path) -> None:
    path = tmp_path / "x.engine"
    options = BuildOptions(architectures=("sm89",))
    build_prepared(prepare_graph(Graph.read(digits_export.path), "fp16"), path, options, backend="tensorrt-rtx")
    facts = inspect_file(path)
    assert facts["kind"] == "engine"
    assert facts["metadata"]["precision"] == "fp16"
    path.write_bytes(b"another engine")
    with pytest.raises(ArtifactError, match="does not match the sha256 in its manifest"):
        inspect_file(path)
    (tmp_path / "x.engine.json").write_text("{")
    with pytest.raises(ConfigError, match="metadata is damaged"):
        inspect_file(path)
    (tmp_path / "x.engine.json").unlink()
    with pytest.raises(ArtifactError, match=r"no such file · .*x\.engine\.json"):
        inspect_file(path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a checkpoint, an ONNX file nor an engine"):
        inspect_file(tmp_path / "x.txt")
