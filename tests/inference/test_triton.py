"""The models of the Python backend, called as Triton calls them; a real server is in test_triton_server.py."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from smlp_deploy.exporters.triton import Interface, write_repository
from smlp_deploy.files import BUNDLED_MODEL
from smlp_deploy.images.preprocessing import load_image
from smlp_deploy.inference.classify import Classifier
from smlp_deploy.pipeline.repository import export_repository


@dataclass
class FakeTensor:
    name: str
    values: NDArray[Any]

    def as_numpy(self) -> NDArray[Any]:
        return self.values


class FakeError:
    INVALID_ARG = 3

    def __init__(self, message: str, code: int) -> None:
        self.message, self.code = message, code


@dataclass
class FakeResponse:
    output_tensors: Sequence[FakeTensor]
    error: FakeError | None = None

    def output(self, name: str) -> NDArray[Any]:
        assert self.error is None, self.error.message
        (found,) = (tensor.values for tensor in self.output_tensors if tensor.name == name)
        return found

    def refusal(self) -> str:
        assert self.error is not None
        assert self.error.code == FakeError.INVALID_ARG
        assert not self.output_tensors
        return self.error.message


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that Triton gives to its Python processes."""
    module = SimpleNamespace(
        Tensor=FakeTensor,
        TritonError=FakeError,
        InferenceResponse=FakeResponse,
        get_input_tensor_by_name=lambda request, name: request[name],
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_repository(BUNDLED_MODEL, tmp_path_factory.mktemp("served") / "model_repository").path


def started(repository: Path, model: str) -> Any:
    """A model as Triton starts it, from the file in the repository."""
    made = runpy.run_path(str(repository / model / "1" / "model.py"))["TritonPythonModel"]()
    made.initialize({"model_repository": str(repository / model), "model_version": "1"})
    return made


@pytest.fixture
def preprocess(repository: Path) -> Iterator[Any]:
    model = started(repository, "preprocess")
    yield model
    model.finalize()


def encoded(*contents: bytes) -> dict[str, FakeTensor]:
    """A request with one or more images."""
    return {"image": FakeTensor("image", np.array(contents, np.object_).reshape(-1, 1))}


def test_images_are_prepared_as_they_are_here(preprocess: Any, digit_images: list[Path]) -> None:
    requests = [encoded(path.read_bytes()) for path in digit_images]
    for path, response in zip(digit_images, preprocess.execute(requests), strict=True):
        here = load_image(path, preprocess.interface.preprocessing)
        np.testing.assert_array_equal(response.output("images"), here[None])


def test_a_bad_image_is_an_error_of_its_own_request(preprocess: Any, digit_images: list[Path]) -> None:
    good = digit_images[0].read_bytes()
    responses = preprocess.execute(
        [encoded(good), encoded(b"no image"), encoded(good[:100]), encoded(b""), encoded(good)]
    )
    assert "not an image in a supported format" in responses[1].refusal()
    assert "damaged image" in responses[2].refusal()
    assert responses[3].refusal() == "empty file"
    np.testing.assert_array_equal(responses[0].output("images"), responses[4].output("images"))


def test_a_request_of_several_images_names_the_bad_one(preprocess: Any, digit_images: list[Path]) -> None:
    good = digit_images[0].read_bytes()
    whole, broken = preprocess.execute([encoded(good, good), encoded(good, b"no image", good)])
    assert whole.output("images").shape == (2, 3, 32, 32)
    assert broken.refusal().startswith("image 2 of 3: not an image")


def test_a_path_is_not_read(preprocess: Any, digit_images: list[Path]) -> None:
    (response,) = preprocess.execute([encoded(str(digit_images[0]).encode())])
    assert "not an image" in response.refusal()


def test_pixels_are_uint8(repository: Path, digit_images: list[Path], tmp_path: Path) -> None:
    of = Interface.read(repository / "smlpnet")
    pixels = replace(of, input=replace(of.input, data_type="UINT8", dims=(32, 32, 3)))
    written = write_repository(tmp_path / "pixels", pixels, {"model.onnx": b""})
    model = started(written.path, "preprocess")
    (response,) = model.execute([encoded(digit_images[0].read_bytes())])
    model.finalize()
    here = load_image(digit_images[0], of.preprocessing, np.empty((32, 32, 3), np.uint8))
    np.testing.assert_array_equal(response.output("images"), here[None])


def test_the_best_classes_are_those_of_predict(repository: Path, digit_images: list[Path]) -> None:
    model = started(repository, "postprocess")
    with Classifier.open(BUNDLED_MODEL) as classifier:
        preprocessing = classifier.runner.metadata.preprocessing
        batch = np.stack([load_image(path, preprocessing) for path in digit_images])
        logits = classifier.predict_logits(batch)
        predictions = list(classifier.classify(digit_images, topk=5))
    parts = {"logits": FakeTensor("logits", logits[:7])}, {"logits": FakeTensor("logits", logits[7:])}
    responses = model.execute(parts)
    found = {
        name: np.concatenate([one.output(name) for one in responses]) for name in ("index", "label", "probability")
    }
    assert found["index"].dtype == np.int32
    assert found["probability"].dtype == np.float32
    for row, prediction in enumerate(predictions):
        assert found["index"][row].tolist() == [score.index for score in prediction.scores]
        assert [label.decode() for label in found["label"][row]] == [score.label for score in prediction.scores]
        np.testing.assert_allclose(
            found["probability"][row], [score.probability for score in prediction.scores], rtol=1e-6
        )


def test_logits_that_are_no_numbers_are_an_error_of_their_own_request(repository: Path) -> None:
    model = started(repository, "postprocess")
    bad = np.zeros((1, 10), np.float32)
    bad[0, 3] = np.nan
    good = np.zeros((1, 10), np.float32)
    responses = model.execute([{"logits": FakeTensor("logits", values)} for values in (bad, good)])
    assert responses[0].refusal() == "the network's output has NaN or infinite values"
    assert responses[1].output("index").tolist() == [[0, 1, 2, 3, 4]]
