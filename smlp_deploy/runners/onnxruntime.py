"""ONNX files in ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self, cast

import onnxruntime

from smlp_deploy.errors import ArtifactError
from smlp_deploy.metadata import METADATA_KEY, ModelMetadata
from smlp_deploy.runners.base import FloatArray, in_fixed_batches

_ERRORS_ONLY = 3


class OnnxRuntimeRunner:
    """Runs an ONNX file that `smlp export` wrote.

    Args:
        path: the file.

    Raises:
        ArtifactError: not an ONNX file, or without smlp-deploy's metadata.
        ConfigError: its metadata is damaged.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ArtifactError("no such file", where=path, fix="smlp export --format onnx makes one")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        # onnxruntime's exceptions share no base class of their own.
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ArtifactError(f"ONNX Runtime cannot load it: {reason}", where=path, fix="export it again") from None
        self.name = f"onnxruntime (CPU) {path.name}"
        self.metadata = _metadata(session, path)
        self._session: onnxruntime.InferenceSession | None = session

    def infer(self, batch: FloatArray) -> FloatArray:
        if self.metadata.batch is not None:
            return in_fixed_batches(batch, self.metadata.batch, self._run)
        return self._run(batch)

    def _run(self, batch: FloatArray) -> FloatArray:
        assert self._session is not None, "the runner is closed"
        return cast(FloatArray, self._session.run(None, {self._session.get_inputs()[0].name: batch})[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session = None


def _metadata(session: onnxruntime.InferenceSession, path: Path) -> ModelMetadata:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise ArtifactError(
            "has no labels and preprocessing inside: smlp-deploy did not write it",
            where=path,
            fix="export the checkpoint with smlp export",
        )
    return ModelMetadata.from_json(text, where=path)
