"""Whether a running server answers as the same artifact does here, and how fast it is.

Agreement is judged on what clients get: the classes and probabilities of the ensemble. An image that both refuse is
agreement; one that only one of them refuses is not.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from statistics import median

import numpy as np

from smlp_deploy.errors import SmlpError, UsageError
from smlp_deploy.evaluation.server import Client, Endpoint, TritonClient
from smlp_deploy.files import read_file
from smlp_deploy.images.decode import MAX_FILE_SIZE
from smlp_deploy.inference.classify import Classifier, Prediction
from smlp_deploy.interrupts import Progress, no_progress
from smlp_deploy.runners.base import arithmetic_of

DEFAULT_CONCURRENCY = (1, 4, 16)
DEFAULT_REQUESTS = 200
MAX_DIFFERENCE = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2, "int8": 1e-1}
"""The largest difference of a probability, by what the artifact here computes in.

The server may run it in another backend. Between ONNX Runtime and OpenVINO the bundled model's probabilities differ, on
30 images, by up to 2e-7 in fp32, 7e-4 in fp16, 0.017 in bf16 and 0.039 in int8; the bounds leave room for more.
"""
_SHOWN = 20
"""Disagreements that a report names."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One protocol's answers, compared with the artifact here.

    Attributes:
        endpoint: where they came from.
        images: sent.
        refused: of these, refused by both.
        same: images with the same best class, or refused by both.
        largest: difference of a probability, over all images and classes of the answers.
        disagreements: the first images with another best class, or refused by one only, in words.
    """

    endpoint: str
    images: int
    refused: int
    same: int
    largest: float
    disagreements: tuple[str, ...]

    @property
    def share(self) -> float:
        """Of the images, those with the same best class, or refused by both."""
        return self.same / self.images


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests of one image each, by several clients that each wait for an answer before they ask again.

    Attributes:
        endpoint: where they went.
        concurrency: clients.
        requests: answered.
        seconds: from the first request to the last answer.
        median, p90, p99: seconds of a request; percentiles by nearest rank.
        images_per_second: by `seconds`.
        runs: of the network in that time, as the server counts them; fewer than requests where it batches them.
    """

    endpoint: str
    concurrency: int
    requests: int
    seconds: float
    median: float
    p90: float
    p99: float
    images_per_second: float
    runs: int


@dataclass(frozen=True, kw_only=True)
class ServerReport:
    """The result of a check.

    Attributes:
        server: name and version.
        model: the artifact here, and what runs it.
        min_top1: the least share that passes.
        max_difference: the largest difference of a probability that passes.
        agreements: by protocol.
        loads: by protocol and concurrency.
    """

    server: str
    model: str
    min_top1: float
    max_difference: float
    agreements: tuple[Agreement, ...]
    loads: tuple[Load, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        """What failed, in words."""
        return tuple(
            f"{found.endpoint}: top-1 is the same on {found.same} of {found.images} images, "
            f"probabilities differ by up to {found.largest:.2g}"
            for found in self.agreements
            if not (found.share >= self.min_top1 and found.largest <= self.max_difference)
        )

    def to_json(self) -> str:
        """A JSON object with all fields, and whether it passed."""
        return json.dumps({**asdict(self), "passed": not self.failures}, indent=2, allow_nan=False) + "\n"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to check.

    Attributes:
        concurrency: numbers of clients to measure with; empty to measure nothing.
        requests: of each measurement.
        min_top1: the least share of images with the same best class.
        max_difference: the largest difference of a probability; None for that of the artifact's precision.

    Raises:
        UsageError: a number is below 1.
    """

    concurrency: tuple[int, ...] = DEFAULT_CONCURRENCY
    requests: int = DEFAULT_REQUESTS
    min_top1: float = 1.0
    max_difference: float | None = None

    def __post_init__(self) -> None:
        if min((self.requests, *self.concurrency)) < 1:
            raise UsageError("numbers of clients and requests are at least 1", where="--concurrency")


Connect = Callable[[Endpoint], Client]


def check_server(
    endpoints: Sequence[Endpoint],
    classifier: Classifier,
    images: Sequence[Path],
    *,
    settings: Settings | None = None,
    connect: Connect = TritonClient,
    progress: Progress = no_progress,
) -> ServerReport:
    """Compare a server's answers with the artifact's here, then measure its latency and throughput.

    Args:
        endpoints: of the server, one for each protocol to use.
        classifier: the artifact that it serves.
        images: to send; a file that no client can read is an error.
        settings: how to check; by default all of it.
        connect: opens a connection.
        progress: called after each image and measurement.

    Raises:
        SmlpError: the server does not answer, serves something else or fails, or a file cannot be read.
    """
    settings = settings or Settings()
    metadata = classifier.runner.metadata
    input_type = "UINT8" if metadata.input == "uint8" else "FP32"
    contents = [read_file(path, limit=MAX_FILE_SIZE, error=SmlpError, fix="name image files") for path in images]
    server = ""
    answers: list[list[Prediction]] = []
    for endpoint in endpoints:
        with closing(connect(endpoint)) as client:
            server = client.check(input_type=input_type)
            answers.append(list(_answers(client, contents, str(endpoint), progress)))
    here = classifier.classify(contents, topk=len(classifier.labels))
    agreements = compare(endpoints, images, answers, here, classifier.labels)
    good = [content for content, found in zip(contents, answers[0], strict=True) if found.error is None]
    loads = tuple(_loads(endpoints, good, input_type, settings, connect, progress)) if good else ()
    bound = MAX_DIFFERENCE[arithmetic_of(classifier.runner)]
    return ServerReport(
        server=server,
        model=classifier.runner.name,
        min_top1=settings.min_top1,
        max_difference=bound if settings.max_difference is None else settings.max_difference,
        agreements=agreements,
        loads=loads,
    )


def _answers(client: Client, contents: Sequence[bytes], name: str, progress: Progress) -> Iterator[Prediction]:
    for number, content in enumerate(contents, start=1):
        yield client.classify(content)
        progress(f"asking {name}", number, len(contents))


def compare(
    endpoints: Sequence[Endpoint],
    images: Sequence[Path],
    answers: Sequence[Sequence[Prediction]],
    here: Iterable[Prediction],
    labels: Sequence[str],
) -> tuple[Agreement, ...]:
    """How far each endpoint's answers agree with the predictions here.

    Args:
        endpoints: in the order of `answers`.
        images: in the order of each endpoint's answers, and of `here`.
        answers: of the server, with the best classes.
        here: predictions with all classes; read once.
        labels: of the artifact here, by index.
    """
    found = [_Comparison(labels) for _ in endpoints]
    for number, (path, local) in enumerate(zip(images, here, strict=True)):
        for comparison, of_endpoint in zip(found, answers, strict=True):
            comparison.add(path, of_endpoint[number], local)
    return tuple(
        Agreement(
            endpoint=str(endpoint),
            images=len(images),
            refused=one.refused,
            same=len(images) - len(one.disagreements),
            largest=one.largest,
            disagreements=tuple(one.disagreements[:_SHOWN]),
        )
        for endpoint, one in zip(endpoints, found, strict=True)
    )


class _Comparison:
    """The counts of one endpoint."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.refused = 0
        self.largest = 0.0
        self.disagreements: list[str] = []
        self._labels = labels

    def add(self, path: Path, server: Prediction, here: Prediction) -> None:
        if server.error is not None and here.error is not None:
            self.refused += 1
        elif server.error is not None or here.error is not None:
            by, reason = ("the server", server.error) if server.error is not None else ("the model here", here.error)
            self.disagreements.append(f"{path}: only {by} refuses it: {reason}")
        else:
            self._add_scores(path, server, here)

    def _add_scores(self, path: Path, server: Prediction, here: Prediction) -> None:
        probabilities = {score.index: score.probability for score in here.scores}
        unknown = [score for score in server.scores if score.index not in probabilities]
        renamed = [s for s in server.scores if s not in unknown and self._labels[s.index] != s.label]
        if unknown or renamed:
            (first, *_) = unknown or renamed
            self.disagreements.append(f"{path}: the server calls class {first.index} {first.label}")
            return
        differences = [abs(score.probability - probabilities[score.index]) for score in server.scores]
        if not all(map(math.isfinite, differences)):
            self.disagreements.append(f"{path}: a probability on the server is not a finite number")
            return
        self.largest = max(self.largest, *differences)
        best, local = server.scores[0], here.scores[0]
        if best.index != local.index:
            self.disagreements.append(
                f"{path}: {best.label} {best.probability:.1%} on the server, {local.label} {local.probability:.1%} here"
            )


def _loads(
    endpoints: Sequence[Endpoint],
    contents: Sequence[bytes],
    input_type: str,
    settings: Settings,
    connect: Connect,
    progress: Progress,
) -> Iterator[Load]:
    for endpoint in endpoints:
        for number, concurrency in enumerate(settings.concurrency, start=1):

            def connected(endpoint: Endpoint = endpoint) -> Client:
                client = connect(endpoint)
                client.check(input_type=input_type)
                return client

            yield measure_load(endpoint, contents, connected, concurrency=concurrency, requests=settings.requests)
            progress(f"measuring {endpoint}", number, len(settings.concurrency))


def measure_load(
    endpoint: Endpoint,
    contents: Sequence[bytes],
    connect: Callable[[], Client],
    *,
    concurrency: int,
    requests: int,
) -> Load:
    """Send requests from several threads, each with a connection of its own.

    Args:
        endpoint: for the name.
        contents: images, sent in turns.
        connect: opens a connection.
        concurrency: threads.
        requests: in total.

    Raises:
        SmlpError: the server fails, or refuses an image.
    """
    left: SimpleQueue[bytes] = SimpleQueue()
    for content in itertools.islice(itertools.cycle(contents), requests):
        left.put(content)
    with closing(connect()) as observer, ThreadPoolExecutor(concurrency) as pool:
        before = observer.runs()
        working = [pool.submit(_time_requests, connect, left) for _ in range(concurrency)]
        with _drained(left):
            spans = [span for thread in working for span in thread.result()]
        after = observer.runs()
    seconds = [end - begin for begin, end in spans]
    total = max(end for _, end in spans) - min(begin for begin, _ in spans)
    p90, p99 = (float(value) for value in np.percentile(seconds, (90, 99), method="inverted_cdf"))
    return Load(
        endpoint=str(endpoint),
        concurrency=concurrency,
        requests=len(spans),
        seconds=total,
        median=median(seconds),
        p90=p90,
        p99=p99,
        images_per_second=len(spans) / total,
        runs=after - before,
    )


def _time_requests(connect: Callable[[], Client], left: SimpleQueue[bytes]) -> list[tuple[float, float]]:
    """Begin and end of each request that this thread sent, until none is left."""
    spans: list[tuple[float, float]] = []
    with closing(connect()) as client, _drained(left):
        while True:
            try:
                content = left.get_nowait()
            except Empty:
                return spans
            begin = time.perf_counter()
            answer = client.classify(content)
            spans.append((begin, time.perf_counter()))
            if answer.error is not None:
                raise SmlpError(f"the server refuses an image that it answered before: {answer.error}")


@contextmanager
def _drained(left: SimpleQueue[bytes]) -> Iterator[None]:
    """Leave no request for other threads, so that they stop if this one does."""
    try:
        yield
    finally:
        with suppress(Empty):
            while True:
                left.get_nowait()
