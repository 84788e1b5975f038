"""A running Triton Inference Server that serves a repository of `smlp export`, asked over HTTP or gRPC."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from smlp_deploy.dependencies import require
from smlp_deploy.errors import SmlpError, UsageError
from smlp_deploy.exporters.triton import ENSEMBLE, IMAGE, INDEX, LABEL, NETWORK, PROBABILITY
from smlp_deploy.inference.classify import Prediction, Score

HTTP, GRPC = "http", "grpc"
PROTOCOLS = (HTTP, GRPC)

_HTTP_PORT = 8000
_TIMEOUT = 60.0  # seconds for one answer
_ADDRESS = re.compile(r"(?:(https?)://)?(\[[0-9A-Fa-f:.]+\]|[^/:@\s\[\]]+)(?::(\d{1,5}))?/?")
_REFUSED = ("400", "StatusCode.INVALID_ARGUMENT")  # as a request is whose image cannot be read

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where one protocol of a server is.

    Attributes:
        protocol: `HTTP` or `GRPC`.
        address: host and port.
        secure: use TLS.
    """

    protocol: str
    address: str
    secure: bool = False

    def __str__(self) -> str:
        return f"{self.protocol}{'s' if self.secure else ''}://{self.address}"


def endpoints_of(url: str, *, grpc: str | None = None) -> tuple[Endpoint, Endpoint]:
    """The endpoints of a server for HTTP and gRPC.

    Args:
        url: of HTTP: `host`, `host:port` or `http://host:port`; https for TLS on both.
        grpc: `host:port` of gRPC; by default the same host and the next port, as Triton has it.

    Raises:
        UsageError: one of them is none.
    """
    secure, host, port = _parsed(url, "URL")
    port = port or _HTTP_PORT
    of_grpc = f"{host}:{port + 1}"
    if grpc is not None:
        _, other, other_port = _parsed(grpc, "--grpc")
        if other_port is None:
            raise UsageError(f"{grpc!r} has no port", where="--grpc", fix="for example localhost:8001")
        of_grpc = f"{other}:{other_port}"
    return (
        Endpoint(protocol=HTTP, address=f"{host}:{port}", secure=secure),
        Endpoint(protocol=GRPC, address=of_grpc, secure=secure),
    )


def _parsed(text: str, where: str) -> tuple[bool, str, int | None]:
    """Whether an address asks for TLS, its host, and its port."""
    match = _ADDRESS.fullmatch(text)
    port = int(match[3]) if match and match[3] else None
    if match is None or (port is not None and not 1 <= port <= 65534):
        raise UsageError(f"{text!r} is not the address of a server", where=where, fix="for example localhost:8000")
    return match[1] == "https", match[2], port


class Client(Protocol):
    """One connection to a server; used by one thread."""

    def check(self, *, input_type: str) -> str:
        """Check that the server is there and serves what `smlp export` writes.

        Args:
            input_type: of the network, as Triton calls it: "FP32" or "UINT8".

        Returns:
            The server's name and version.

        Raises:
            SmlpError: the server does not answer, a model is not loaded, or it has other inputs or outputs.
        """
        ...

    def classify(self, content: bytes) -> Prediction:
        """The best classes of an encoded image, or the reason for which the server refuses it.

        Raises:
            SmlpError: the server fails, or its answer is none.
        """
        ...

    def runs(self) -> int:
        """How often the network ran since the server started."""
        ...

    def close(self) -> None: ...


class TritonClient:
    """A `Client` by NVIDIA's package.

    Args:
        endpoint: where to connect.

    Raises:
        MissingDependencyError: the package is not installed.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        require_client()
        self.endpoint = endpoint
        self._module = importlib.import_module(f"tritonclient.{endpoint.protocol}")
        self._error: type[Exception] = importlib.import_module("tritonclient.utils").InferenceServerException
        settings = {"connection_timeout": _TIMEOUT, "network_timeout": _TIMEOUT} if endpoint.protocol == HTTP else {}
        self._client = self._module.InferenceServerClient(endpoint.address, ssl=endpoint.secure, **settings)
        self._timeout = {} if endpoint.protocol == HTTP else {"client_timeout": _TIMEOUT}
        self._as_json = {} if endpoint.protocol == HTTP else {"as_json": True}
        self._shape = [1, 1]

    def close(self) -> None:
        self._client.close()

    def check(self, *, input_type: str) -> str:
        # Not whether the server is ready: it is not while it changes a version, and its models answer meanwhile.
        absent = [name for name in (NETWORK, ENSEMBLE) if not self._is_loaded(name)]
        if absent:
            what = f"the model {absent[0]} is not loaded"
            raise SmlpError(what, where=self.endpoint, fix="the server's log says why")
        self._check_signature(self._metadata(ENSEMBLE))
        network = self._metadata(NETWORK)
        (found,) = (tensor["datatype"] for tensor in network["inputs"])
        if found != input_type:
            raise SmlpError(
                f"its {NETWORK} takes {found}, and the model here {input_type}",
                where=self.endpoint,
                fix="give the model that it serves with --model",
            )
        about = self._asked(lambda: self._client.get_server_metadata(**self._as_json))
        return f"{about['name']} {about['version']}"

    def _is_loaded(self, model: str) -> bool:
        try:
            return bool(self._asked(lambda: self._client.is_model_ready(model)))
        except _RefusedError:
            return False

    def _metadata(self, model: str) -> Mapping[str, Any]:
        return self._asked(lambda: self._client.get_model_metadata(model, **self._as_json))

    def _check_signature(self, ensemble: Mapping[str, Any]) -> None:
        taken = [tensor["name"] for tensor in ensemble.get("inputs", ())]
        given = sorted(tensor["name"] for tensor in ensemble.get("outputs", ()))
        if taken != [IMAGE] or given != sorted((INDEX, LABEL, PROBABILITY)):
            raise SmlpError(
                f"its {ENSEMBLE} takes {', '.join(taken)} and gives {', '.join(given)}: smlp export did not write it",
                where=self.endpoint,
                fix="serve a repository of smlp export --format triton",
            )
        self._shape = _shape_of_one([int(size) for size in ensemble["inputs"][0]["shape"]])

    def classify(self, content: bytes) -> Prediction:
        image = self._module.InferInput(IMAGE, self._shape, "BYTES")
        several = np.array([content] * int(np.prod(self._shape)), np.object_)  # of a network of one batch size
        image.set_data_from_numpy(several.reshape(self._shape))
        try:
            result = self._asked(lambda: self._client.infer(ENSEMBLE, [image], **self._timeout))
        except _RefusedError as refused:
            return Prediction("", error=refused.what)
        index, label, probability = (result.as_numpy(name) for name in (INDEX, LABEL, PROBABILITY))
        if any(values is None or not values.size for values in (index, label, probability)):
            raise SmlpError(f"an answer of {ENSEMBLE} lacks an output", where=self.endpoint)
        best = zip(index[0].tolist(), label[0].tolist(), probability[0].tolist(), strict=True)
        return Prediction("", tuple(Score(number, name.decode(), value) for number, name, value in best))

    def runs(self) -> int:
        found = self._asked(lambda: self._client.get_inference_statistics(NETWORK, **self._as_json))
        return sum(int(version.get("execution_count", 0)) for version in found["model_stats"])

    def _asked(self, ask: Callable[[], _Result]) -> _Result:
        """The server's answer.

        Raises:
            _RefusedError: the server refused the request.
            SmlpError: it did not answer, or failed.
        """
        with self._explained():
            return ask()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            status, message = str(error.status()), str(error.message())  # type: ignore[attr-defined]
            if status in _REFUSED:
                raise _RefusedError(message, where=self.endpoint) from None
            if status == "StatusCode.UNAVAILABLE" and "failed to connect" in message:
                raise self._absent(message) from None
            raise SmlpError(f"the server fails: {message}", where=self.endpoint, fix="its log says why") from None
        except OSError as error:  # of HTTP
            raise self._absent(error.strerror or str(error)) from None

    def _absent(self, reason: str) -> SmlpError:
        return SmlpError(
            f"no server answers: {next(iter(reason.splitlines()), 'no reason given')}",
            where=self.endpoint,
            fix="check the address, and --grpc for gRPC",
        )


class _RefusedError(SmlpError):
    """The server refused a request as one that cannot be served."""


def require_client() -> None:
    """Check for NVIDIA's client.

    Raises:
        MissingDependencyError: it is not installed.
    """
    require("tritonclient", purpose="to ask a Triton server", extra="serve")


def _shape_of_one(shape: list[int]) -> list[int]:
    """The shape of a request with one image, or with as many as the network takes: -1 is any batch size."""
    return [1 if size == -1 else size for size in shape]
