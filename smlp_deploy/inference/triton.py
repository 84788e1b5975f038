"""What the Python backend of Triton runs: from encoded images to the network's input, and from logits to classes.

The files `model.py` in a repository import these classes. Triton calls `initialize` once, `execute` with the requests
of a batch, and `finalize` at the end. Its own module exists only in the processes that it starts.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smlp_deploy.errors import ImageError
from smlp_deploy.exporters.triton import IMAGE, INDEX, LABEL, PROBABILITY, Interface
from smlp_deploy.images.batches import available_cores
from smlp_deploy.images.decode import keep_memory
from smlp_deploy.images.preprocessing import load_image
from smlp_deploy.inference.classify import best_classes

Answer = Mapping[str, NDArray[Any]] | str
"""The outputs of a request by name, or why it has none."""


class _Model(ABC):
    """The form in which Triton calls a model; each request has outputs of its own, or an error of its own."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read what is served, and start what `execute` needs.

        Args:
            args: of Triton; `model_repository` is the model's folder.
        """
        self.interface = Interface.read(Path(args["model_repository"]))
        self._triton = importlib.import_module("triton_python_backend_utils")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request, in order."""
        name = self.input_name()
        tensors = [self._triton.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
        return [self._response(answer) for answer in self.answers(tensors)]

    @abstractmethod
    def input_name(self) -> str:
        """Of the tensor that a request has."""

    @abstractmethod
    def answers(self, tensors: Sequence[NDArray[Any]]) -> list[Answer]:
        """The answer to each request, given its input."""

    def _response(self, answer: Answer) -> Any:
        triton = self._triton
        if isinstance(answer, str):
            error = triton.TritonError(answer, triton.TritonError.INVALID_ARG)
            return triton.InferenceResponse(output_tensors=[], error=error)
        return triton.InferenceResponse([triton.Tensor(name, values) for name, values in answer.items()])


class Preprocess(_Model):
    """Encoded images, N, 1 or N, to the network's input; decoded by as many threads as there are cores."""

    def initialize(self, args: Mapping[str, str]) -> None:
        super().initialize(args)
        keep_memory()
        self._pool = ThreadPoolExecutor(available_cores(), thread_name_prefix="decode")

    def finalize(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def input_name(self) -> str:
        return IMAGE

    def answers(self, tensors: Sequence[NDArray[Any]]) -> list[Answer]:
        tensor = self.interface.input
        kind = np.dtype(np.uint8 if tensor.data_type == "UINT8" else np.float32)
        prepared = [np.empty((encoded.size, *tensor.dims), kind) for encoded in tensors]
        reasons = [
            self._pool.map(self._load, encoded.reshape(-1).tolist(), inputs)
            for encoded, inputs in zip(tensors, prepared, strict=True)
        ]
        return [_first(list(each)) or {tensor.name: inputs} for each, inputs in zip(reasons, prepared, strict=True)]

    def _load(self, content: bytes, out: NDArray[Any]) -> str | None:
        """Prepare an image; returns the reason if it cannot be read."""
        try:
            load_image(content, self.interface.preprocessing, out)
        except ImageError as error:
            return str(error)
        return None


def _first(reasons: Sequence[str | None]) -> str | None:
    """The first reason; with the image's number if the request has several."""
    for number, reason in enumerate(reasons, start=1):
        if reason is not None:
            return reason if len(reasons) == 1 else f"image {number} of {len(reasons)}: {reason}"
    return None


class Postprocess(_Model):
    """Logits, N, classes, to the best classes: their indices, labels and probabilities, each N, topk."""

    def input_name(self) -> str:
        return self.interface.output.name

    def answers(self, tensors: Sequence[NDArray[Any]]) -> list[Answer]:
        return [self._best(logits) for logits in tensors]

    def _best(self, logits: NDArray[Any]) -> Answer:
        if not np.isfinite(logits).all():
            return "the network's output has NaN or infinite values"
        best = list(best_classes(logits, self.interface.labels, self.interface.topk))
        return {
            INDEX: np.array([[score.index for score in scores] for scores in best], np.int32),
            LABEL: np.array([[score.label.encode() for score in scores] for scores in best], np.object_),
            PROBABILITY: np.array([[score.probability for score in scores] for scores in best], np.float32),
        }
