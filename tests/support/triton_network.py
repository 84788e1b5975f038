"""Runs an ONNX file in Triton's Python backend, where there is no ONNX Runtime backend: `model.py` beside it.

As that backend does, it runs all requests of a batch at once.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.triton = importlib.import_module("triton_python_backend_utils")
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        (images,), (logits,) = self.session.get_inputs(), self.session.get_outputs()
        batches = [self.triton.get_input_tensor_by_name(request, images.name).as_numpy() for request in requests]
        (found,) = self.session.run([logits.name], {images.name: np.concatenate(batches)})
        parts = np.split(found, np.cumsum([len(batch) for batch in batches])[:-1])
        return [self.triton.InferenceResponse([self.triton.Tensor(logits.name, part.copy())]) for part in parts]
