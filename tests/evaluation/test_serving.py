"""The comparison and the measurement with a fake server; a real one is in test_triton_server.py."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smlp_deploy.errors import MissingDependencyError, SmlpError, UsageError
from smlp_deploy.evaluation.server import GRPC, HTTP, Endpoint, TritonClient, endpoints_of
from smlp_deploy.evaluation.serving import Settings, check_server, compare, measure_load
from smlp_deploy.files import BUNDLED_MODEL
from smlp_deploy.inference.classify import Classifier, Prediction, Score

ENDPOINT = Endpoint(protocol=HTTP, address="localhost:8000")
LABELS = ("cat", "dog", "owl")


def answer(*probabilities: float, labels: tuple[str, ...] = LABELS) -> Prediction:
    """The best classes, given the probability of each."""
    order = sorted(range(len(probabilities)), key=lambda index: -probabilities[index])
    return Prediction("", tuple(Score(index, labels[index], probabilities[index]) for index in order))


REFUSED = Prediction("", error="damaged image")


class FakeServer:
    """A server of the artifact here, whose answers a function may change; counts one run for two requests."""

    def __init__(
        self, classifier: Classifier, change: Callable[[Prediction], Prediction] = lambda found: found
    ) -> None:
        self._classifier, self._change = classifier, change
        self._lock = threading.Lock()
        self.asked = 0
        self.open = 0
        self.input_type = ""

    def connect(self, endpoint: Endpoint) -> FakeServer:
        with self._lock:
            self.open += 1
        return self

    def check(self, *, input_type: str) -> str:
        self.input_type = input_type
        return "fake 1.0"

    def classify(self, content: bytes) -> Prediction:
        with self._lock:
            self.asked += 1
        return self._change(next(iter(self._classifier.classify(content))))

    def runs(self) -> int:
        return self.asked // 2

    def close(self) -> None:
        with self._lock:
            self.open -= 1


@pytest.mark.parametrize(
    ("server", "here", "same", "largest", "said"),
    [
        (answer(0.7, 0.2, 0.1), answer(0.7, 0.2, 0.1), 1, 0.0, ""),
        (answer(0.6, 0.3, 0.1), answer(0.7, 0.2, 0.1), 1, 0.1, ""),
        (answer(0.4, 0.5, 0.1), answer(0.5, 0.4, 0.1), 0, 0.1, "a.jpg: dog 50.0% on the server, cat 50.0% here"),
        (REFUSED, REFUSED, 1, 0.0, ""),
        (REFUSED, answer(1, 0, 0), 0, 0.0, "a.jpg: only the server refuses it: damaged image"),
        (answer(1, 0, 0), REFUSED, 0, 0.0, "a.jpg: only the model here refuses it: damaged image"),
        (answer(1, 0, 0, labels=("cow", "dog", "owl")), answer(1, 0, 0), 0, 0.0, "a.jpg: the server calls class 0 cow"),
        (answer(1, 0, 0, 0, labels=(*LABELS, "eel")), answer(1, 0, 0), 0, 0.0, "a.jpg: the server calls class 3 eel"),
    ],
)
def test_agreement_of_one_image(server: Prediction, here: Prediction, same: int, largest: float, said: str) -> None:
    (found,) = compare([ENDPOINT], [Path("a.jpg")], [[server]], [here], LABELS)
    assert (found.images, found.same, found.refused) == (1, same, int(server is here is REFUSED))
    assert found.largest == pytest.approx(largest)
    assert found.disagreements == ((said,) if said else ())


def test_probabilities_that_are_no_numbers_do_not_pass(digit_images: list[Path]) -> None:
    def broken(found: Prediction) -> Prediction:
        return Prediction("", tuple(Score(s.index, s.label, float("nan")) for s in found.scores))

    with Classifier.open(BUNDLED_MODEL) as classifier:
        server = FakeServer(classifier, broken)
        report = check_server([ENDPOINT], classifier, digit_images[:1], settings=quick(), connect=server.connect)
    name = digit_images[0]
    assert report.agreements[0].disagreements == (f"{name}: a probability on the server is not a finite number",)
    assert report.failures
    assert json.loads(report.to_json())["passed"] is False


def quick(**changes: Any) -> Settings:
    return Settings(**{"concurrency": (), "requests": 8, **changes})


def test_a_server_of_the_same_artifact_agrees_and_is_measured(digit_images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(digit_images[0].read_bytes()[:200])
    images = [*digit_images, tmp_path / "broken.jpg"]
    endpoints = endpoints_of("localhost")
    told: list[tuple[str, int, int]] = []
    with Classifier.open(BUNDLED_MODEL) as classifier:
        server = FakeServer(classifier)
        report = check_server(
            endpoints,
            classifier,
            images,
            settings=quick(concurrency=(1, 3)),
            connect=server.connect,
            progress=lambda *step: told.append(step),
        )
    assert server.open == 0
    assert server.input_type == "FP32"
    assert not report.failures
    assert [(a.endpoint, a.images, a.refused, a.share) for a in report.agreements] == [
        ("http://localhost:8000", 13, 1, 1.0),
        ("grpc://localhost:8001", 13, 1, 1.0),
    ]
    assert max(found.largest for found in report.agreements) < 1e-6  # batches of other sizes round differently
    assert [(load.concurrency, load.requests, load.runs) for load in report.loads] == [(1, 8, 4), (3, 8, 4)] * 2
    for load in report.loads:
        assert 0 < load.median <= load.p90 <= load.p99 <= load.seconds
        assert load.images_per_second == pytest.approx(8 / load.seconds)
    assert ("asking http://localhost:8000", 13, 13) in told
    assert ("measuring grpc://localhost:8001", 2, 2) in told
    document = json.loads(report.to_json())
    assert document["passed"] is True
    assert document["server"] == "fake 1.0"


@pytest.mark.parametrize(
    ("min_top1", "max_difference", "failed"), [(1.0, None, True), (0.0, None, True), (0.0, 1.0, False)]
)
def test_bounds_decide(min_top1: float, max_difference: float | None, failed: bool, digit_images: list[Path]) -> None:
    def turned(found: Prediction) -> Prediction:
        first, second, *rest = found.scores
        return Prediction("", (second, Score(first.index, first.label, second.probability), *rest))

    settings = quick(min_top1=min_top1, max_difference=max_difference)
    with Classifier.open(BUNDLED_MODEL) as classifier:
        server = FakeServer(classifier, turned)
        report = check_server([ENDPOINT], classifier, digit_images[:2], settings=settings, connect=server.connect)
    assert bool(report.failures) is failed
    assert json.loads(report.to_json())["passed"] is not failed
    if failed:
        assert report.failures[0].startswith("http://localhost:8000: top-1 is the same on 0 of 2 images, probabilities")


def test_nothing_is_measured_if_no_image_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with Classifier.open(BUNDLED_MODEL) as classifier:
        server = FakeServer(classifier)
        report = check_server([ENDPOINT], classifier, [tmp_path / "a.jpg"], connect=server.connect)
    assert report.loads == ()
    assert not report.failures


def test_a_file_that_cannot_be_sent_is_an_error(tmp_path: Path) -> None:
    with (
        Classifier.open(BUNDLED_MODEL) as classifier,
        pytest.raises(SmlpError, match=r"no such file.*name image files"),
    ):
        check_server([ENDPOINT], classifier, [tmp_path / "absent.jpg"], connect=FakeServer(classifier).connect)


def test_a_server_that_fails_under_load_ends_the_measurement(digit_images: list[Path]) -> None:
    with Classifier.open(BUNDLED_MODEL) as classifier:
        server = FakeServer(classifier)

        def failing(found: Prediction) -> Prediction:
            if server.asked > 3:
                raise SmlpError("the server fails: out of memory")
            return found

        server._change = failing
        content = [digit_images[0].read_bytes()]
        with pytest.raises(SmlpError, match="out of memory"):
            measure_load(ENDPOINT, content, lambda: server.connect(ENDPOINT), concurrency=2, requests=1000)
    assert server.open == 0
    assert server.asked < 10


def test_a_server_that_refuses_under_load_is_an_error(digit_images: list[Path]) -> None:
    with Classifier.open(BUNDLED_MODEL) as classifier:
        server = FakeServer(classifier, lambda found: REFUSED)
        content = [digit_images[0].read_bytes()]
        with pytest.raises(SmlpError, match="refuses an image that it answered before: damaged image"):
            measure_load(ENDPOINT, content, lambda: server.connect(ENDPOINT), concurrency=1, requests=5)


@pytest.mark.parametrize(
    ("url", "grpc", "expected"),
    [
        ("localhost", None, ("http://localhost:8000", "grpc://localhost:8001")),
        ("http://10.0.0.1:9000/", None, ("http://10.0.0.1:9000", "grpc://10.0.0.1:9001")),
        ("https://triton.example", "other:443", ("https://triton.example:8000", "grpcs://other:443")),
        ("[::1]:8000", None, ("http://[::1]:8000", "grpc://[::1]:8001")),
    ],
)
def test_addresses(url: str, grpc: str | None, expected: tuple[str, str]) -> None:
    assert tuple(map(str, endpoints_of(url, grpc=grpc))) == expected


@pytest.mark.parametrize(
    ("url", "grpc"),
    [
        ("", None),
        ("ftp://a", None),
        ("a:b", None),
        ("a:0", None),
        ("a:65535", None),
        ("a/v2", None),
        ("a b", None),
        ("a", "b"),
        ("a", ":1"),
        ("user:word@host", None),
    ],
)
def test_what_is_no_address_is_refused(url: str, grpc: str | None) -> None:
    with pytest.raises(UsageError):
        endpoints_of(url, grpc=grpc)


@pytest.mark.parametrize("changes", [{"requests": 0}, {"concurrency": (1, 0)}])
def test_numbers_below_one_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        Settings(**changes)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    with pytest.raises(MissingDependencyError, match=r'tritonclient not installed.*pip install "smlp-deploy\[serve\]"'):
        TritonClient(ENDPOINT)


class FakeFailureError(Exception):
    def __init__(self, status: str, message: str) -> None:
        self._status, self._message = status, message

    def status(self) -> str:
        return self._status

    def message(self) -> str:
        return self._message


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "no server answers: Connection refused"),
        (TimeoutError("timed out"), "no server answers: timed out"),
        (
            FakeFailureError("StatusCode.UNAVAILABLE", "failed to connect to all addresses"),
            "no server answers: failed to",
        ),
        (FakeFailureError("500", "out of memory"), "the server fails: out of memory.*its log says why"),
        (FakeFailureError("StatusCode.INTERNAL", "broken"), "the server fails: broken"),
    ],
)
@pytest.mark.parametrize("protocol", [HTTP, GRPC])
def test_a_server_that_does_not_answer_is_one_line(
    protocol: str, failure: Exception, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **settings: Any) -> None:
        raise failure

    client = SimpleNamespace(is_model_ready=fail, infer=fail, close=lambda: None)
    modules = {
        "tritonclient": SimpleNamespace(__spec__=SimpleNamespace()),
        "tritonclient.utils": SimpleNamespace(InferenceServerException=FakeFailureError),
        f"tritonclient.{protocol}": SimpleNamespace(
            InferenceServerClient=lambda *given, **settings: client,
            InferInput=lambda *given: SimpleNamespace(set_data_from_numpy=lambda values: None),
        ),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with closing(TritonClient(Endpoint(protocol=protocol, address="localhost:1"))) as found:
        with pytest.raises(SmlpError, match=expected):
            found.check(input_type="FP32")
        with pytest.raises(SmlpError, match=expected):
            found.classify(b"")
