from __future__ import annotations

import json
from pathlib import Path

import pytest

from smlp_deploy.errors import UsageError
from smlp_deploy.export import Export
from smlp_deploy.files import BUNDLED_CHECKPOINT, sha256_of
from smlp_deploy.inspection import inspect_file


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


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a checkpoint nor an ONNX file"):
        inspect_file(tmp_path / "x.txt")
