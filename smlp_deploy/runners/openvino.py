"""ONNX graphs in OpenVINO, on the CPU.

The precision is the artifact's. OpenVINO would compute an fp32 graph in bf16 where the CPU has that, so it is told what
to compute in, and asked afterwards. An fp16 or bf16 graph runs natively where the CPU can, and is otherwise computed in
fp32 with rounded weights; the runner's name says which. Quantized layers run in int8 and the rest of their graph in
fp32, except the patch embeddings (`graphs/edit.py`, rule 8).

A batch is spread over parallel requests of at most eight images each, so that memory does not grow with it, and their
number is fixed when a network is compiled. On two cores with AVX2, under load from other work, that was as fast as one
request for the whole batch (0.94 to 1.03 of its time for batches of 8 and 32), and 1.1 to 1.4 times as fast as if
its size is left open. Requests of one image are as fast for smlpnet_tiny, but 1.9 times slower for the bundled model,
whose images take less time than a request costs.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
import os
import stat
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from smlp_deploy.errors import ArtifactError, MissingDependencyError, SmlpError
from smlp_deploy.files import cache_folder, read_file, write_bytes
from smlp_deploy.graphs.check import MAX_FILE_BYTES
from smlp_deploy.graphs.edit import dequantize_embeddings
from smlp_deploy.graphs.file import Graph
from smlp_deploy.images.batches import FloatArray, ImageArray, available_cores
from smlp_deploy.runners.base import Closing, padded

logger = logging.getLogger(__name__)

_DEVICE = "CPU"
_CONVERTER = "openvino.tools.ovc"
_NATIVE = {"fp16": "f16", "bf16": "bf16"}
"""OpenVINO's names of the precisions that only some CPUs compute in."""
_MOST_IMAGES = 8
"""Per request."""
_NETWORKS_IN_MEMORY = 2
_NETWORKS_ON_DISK = 4


def load_openvino() -> Any:
    """OpenVINO's module, imported without its model converter, of which this package has no use.

    Importing the converter reports the import to Google Analytics, through the package openvino-telemetry. It can be
    imported later by its own name, `openvino.tools.ovc`.

    Raises:
        MissingDependencyError: OpenVINO cannot be imported.
    """
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    sys.modules[_CONVERTER] = None  # type: ignore[assignment]  # makes its import fail, which OpenVINO expects
    try:
        module = importlib.import_module("openvino")
        importlib.import_module("openvino.frontend")
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"OpenVINO cannot be imported: {_reason(error)}", fix="pip install --force-reinstall openvino"
        ) from None
    finally:
        del sys.modules[_CONVERTER]
    return module


class CpuFacts(NamedTuple):
    """What OpenVINO says about this CPU.

    Attributes:
        name: of the CPU.
        native: which of "fp16" and "bf16" it computes in.
        version: OpenVINO's.
    """

    name: str
    native: tuple[str, ...]
    version: str


def cpu_facts() -> CpuFacts:
    """What this CPU computes in.

    Raises:
        MissingDependencyError: OpenVINO does not start here.
    """
    return _facts(_start())


class OpenVinoRunner(Closing):
    """Runs a graph that `smlp export` made.

    A network is compiled for the first batch, and again for a batch of another size, unless it keeps all of that
    network's requests busy; the two used last are kept. Compiled networks are also kept in the user's cache directory.

    Args:
        graph: what to run.
        cores: to compute on; by default all that this process may use.

    Attributes:
        arithmetic: the precision of weights and products, which selects the gates; see `arithmetic_of`.

    Raises:
        ArtifactError: OpenVINO cannot read the graph.
        MissingDependencyError: OpenVINO does not start here.
    """

    def __init__(self, graph: Graph, *, cores: int | None = None) -> None:
        self._core = _start()
        facts = _facts(self._core)
        self.metadata = graph.metadata
        self.arithmetic = graph.metadata.precision
        self.name = f"openvino (CPU{_remark(self.arithmetic, facts.native)}) {graph.path.name}"
        self._type = _NATIVE[self.arithmetic] if self.arithmetic in facts.native else "f32"
        self._path = graph.path
        self._cores = cores or available_cores()
        self._content = _content(graph)
        self._networks: dict[_Split, _Network] = {}  # the last used last
        self._cache = _Cache.of(self._content, facts)
        # Read now, so that a graph it cannot read is refused before any image; one in the cache was read before.
        self._model = None if self._cache.is_filled() else self._read()

    @classmethod
    def open(cls, path: Path, *, cores: int | None = None) -> Self:
        """Run a file that `smlp export` wrote.

        Raises:
            ArtifactError: it is not an ONNX file, lacks smlp-deploy's metadata, or is refused by `graphs/check.py`.
            MissingDependencyError: OpenVINO does not start here.
            ConfigError: its metadata is damaged.
        """
        _start()
        return cls(Graph.read(path), cores=cores)

    def infer(self, batch: ImageArray) -> FloatArray:
        logits = np.empty((len(batch), self.metadata.config.num_classes), np.float32)
        network = self._network_for(len(batch))
        try:
            network.run(batch, logits)
        # What OpenVINO raises for a batch it does not take.
        except (RuntimeError, TypeError, ValueError) as error:
            raise ArtifactError(f"OpenVINO cannot run it: {_reason(error)}", where=self._path) from None
        return logits

    def close(self) -> None:
        self._networks.clear()
        self._model = None
        self._content = b""

    def _network_for(self, batch: int) -> _Network:
        """The network for a batch of so many images."""
        assert self._content, "the runner is closed"
        wanted = _Split.of(batch, cores=self._cores, fixed=self.metadata.batch)
        # A last short batch that keeps all requests busy is done before another network would be compiled.
        busy = [split for split in self._networks if batch > split.images * (split.requests - 1) and split > wanted]
        split = wanted if wanted in self._networks or wanted == (1, 1) or not busy else busy[0]
        network = self._networks.pop(split, None)
        if network is None:
            while len(self._networks) >= _NETWORKS_IN_MEMORY:
                self._networks.pop(next(iter(self._networks)))
            network = _Network(self._compiled(split), split)
        self._networks[split] = network
        return network

    def _compiled(self, split: _Split) -> Any:
        """A network of OpenVINO for parallel requests, from the cache if it is there.

        Raises:
            ArtifactError: OpenVINO does not compile it.
            SmlpError: OpenVINO does not compute it in its precision here.
        """
        properties = {
            "INFERENCE_PRECISION_HINT": self._type,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # never quantize what the graph does not
            "INFERENCE_NUM_THREADS": self._cores,
            "NUM_STREAMS": split.requests,
            "ENABLE_CPU_PINNING": False,  # two processes would share their first cores and leave the others idle
        }
        blob = f"{self._type}-{self._cores}-{split.requests}x{split.images}"
        kept = self._cache.read(blob)
        compiled = None if kept is None else self._imported(kept, properties)
        if compiled is None:
            compiled = self._compile(split.images, properties)
            self._cache.write(blob, compiled)
        given = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if given != self._type:
            raise SmlpError(
                f"OpenVINO computes it in {given} in place of {self._type}",
                where=self._path,
                fix="use --runtime onnxruntime",
            )
        return compiled

    def _imported(self, kept: bytes, properties: dict[str, Any]) -> Any:
        """A network from the cache, or None if it is damaged."""
        try:
            return self._core.import_model(kept, _DEVICE, properties)
        except RuntimeError as error:
            logger.info("a compiled network in the cache is not used: %s", _reason(error))
            return None

    def _compile(self, images: int, properties: dict[str, Any]) -> Any:
        model, self._model = self._model or self._read(), None
        try:
            model.reshape([images, *self.metadata.input_shape])
            return self._core.compile_model(model, _DEVICE, properties)
        except RuntimeError as error:
            raise self._cannot_load(error) from None

    def _read(self) -> Any:
        """The graph as OpenVINO's, read as ONNX: OpenVINO would otherwise try all formats it knows, unchecked."""
        from openvino.frontend import FrontEndManager

        try:
            frontend = FrontEndManager().load_by_framework("onnx")
            return frontend.convert(frontend.load(io.BytesIO(self._content)))
        # The frontend's exceptions have no common base class below this one.
        except Exception as error:
            raise self._cannot_load(error) from None

    def _cannot_load(self, error: Exception) -> ArtifactError:
        return ArtifactError(
            f"OpenVINO cannot load it: {_reason(error)}", where=self._path, fix="use --runtime onnxruntime"
        )


class _Split(NamedTuple):
    """How a batch is spread: over so many parallel requests, of so many images each."""

    requests: int
    images: int

    @classmethod
    def of(cls, batch: int, *, cores: int, fixed: int | None) -> Self:
        """The split of a batch: of a power of two images, so that few networks serve all sizes, or a fixed number."""
        if fixed is not None:
            return cls(min(cores, -(-batch // fixed)), fixed)
        requests = min(cores, batch)
        return cls(requests, min(_MOST_IMAGES, 1 << ((batch // requests).bit_length() - 1)))


class _Network:
    """A compiled network with its requests, each of which computes in a stream of its own."""

    def __init__(self, compiled: Any, split: _Split) -> None:
        self._requests = [compiled.create_infer_request() for _ in range(split.requests)]
        self._images = split.images

    def run(self, batch: ImageArray, logits: FloatArray) -> None:
        """Compute the logits of a batch."""
        from openvino import Tensor

        started: list[ImageArray] = []  # kept, because requests read them where they are
        try:
            for number, start in enumerate(range(0, len(batch), self._images)):
                piece = batch[start : start + self._images]
                request = self._requests[number % len(self._requests)]
                if number >= len(self._requests):
                    self._collect(number - len(self._requests), logits)
                started.append(_shareable(padded(piece, self._images)))
                request.set_input_tensor(Tensor(started[-1], shared_memory=True))
                request.start_async()
            for number in range(max(0, len(started) - len(self._requests)), len(started)):
                self._collect(number, logits)
        except BaseException:
            for request in self._requests:  # which may still read the batch
                with suppress(RuntimeError):
                    request.wait()
            raise

    def _collect(self, number: int, logits: FloatArray) -> None:
        """Wait for a piece, and copy its logits."""
        request = self._requests[number % len(self._requests)]
        request.wait()
        rows = logits[number * self._images : (number + 1) * self._images]
        rows[:] = request.get_output_tensor().data[: len(rows)]


def _shareable(images: ImageArray) -> ImageArray:
    """The images themselves, or a copy of them if OpenVINO cannot read them where they are."""
    return images if images.flags.c_contiguous and images.flags.writeable else images.copy()


class _Cache:
    """The folder with the compiled networks of one graph, for one version of OpenVINO and one kind of CPU.

    It is used only while nobody else can write there, because OpenVINO does not check what it loads.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    @classmethod
    def of(cls, content: bytes, facts: CpuFacts) -> Self:
        digest = hashlib.sha256(repr(facts).encode())
        digest.update(content)
        return cls(digest.hexdigest()[:32])

    @property
    def _folder(self) -> Path:
        return cache_folder("openvino") / self._name

    def is_filled(self) -> bool:
        return self._is_ours() and any(self._folder.glob("*.blob"))

    def read(self, name: str) -> bytes | None:
        if not self._is_ours():
            return None
        path = self._folder / f"{name}.blob"
        if not path.exists():
            return None
        try:
            os.utime(path)
            return read_file(path, limit=MAX_FILE_BYTES, error=SmlpError, fix="")
        except (OSError, SmlpError) as error:
            logger.info("a compiled network is not read from the cache: %s", error)
            return None

    def write(self, name: str, compiled: Any) -> None:
        """Keep a network, and remove those used least recently; results do not depend on whether that works."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_ours():
                raise SmlpError("others can write there", where=self._folder)
            write_bytes(self._folder / f"{name}.blob", compiled.export_model().read())
            blobs = sorted(self._folder.parent.glob("*/*.blob"), key=lambda path: path.stat().st_mtime, reverse=True)
            for old in blobs[_NETWORKS_ON_DISK:]:
                old.unlink(missing_ok=True)
        except (OSError, RuntimeError, SmlpError) as error:
            logger.warning("the compiled network is not kept, so the next start is slower: %s", _reason(error))

    def _is_ours(self) -> bool:
        try:
            status = self._folder.stat()
        except (OSError, SmlpError):
            return False
        own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
        writable = stat.S_IWGRP | stat.S_IWOTH
        return own and (sys.platform == "win32" or not status.st_mode & writable)


@cache
def _start() -> Any:
    """OpenVINO's core with its CPU plugin: one for the process, which is never freed.

    A plugin gives the thread that loads it a stack for signal handlers. The second of two plugins frees the first one's
    while it is in use, and the next Ctrl-C would end the process with a segmentation fault.

    Raises:
        MissingDependencyError: it cannot be imported, or has no CPU plugin that starts.
    """
    openvino = load_openvino()
    try:
        core = openvino.Core()
        core.get_property(_DEVICE, "FULL_DEVICE_NAME")
    except RuntimeError as error:
        raise MissingDependencyError(
            f"OpenVINO does not start here: {_reason(error)}", fix="pip install --force-reinstall openvino"
        ) from None
    return core


def _facts(core: Any) -> CpuFacts:
    capabilities = core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")
    return CpuFacts(
        name=core.get_property(_DEVICE, "FULL_DEVICE_NAME"),
        native=tuple(precision for precision in _NATIVE if precision.upper() in capabilities),
        version=load_openvino().get_version(),
    )


def _remark(precision: str, native: tuple[str, ...]) -> str:
    """What a graph of a precision is computed in, for the runner's name; nothing for fp32."""
    if precision == "fp32":
        return ""
    if precision == "int8":
        return ", int8 and fp32"
    return f", {precision}" if precision in native else f", {precision} computed in fp32"


def _content(graph: Graph) -> bytes:
    """The bytes that OpenVINO gets: the graph's, or for int8 an edited graph's."""
    if graph.metadata.precision != "int8":
        return graph.content
    model = graph.model()
    dequantize_embeddings(model.graph)
    return bytes(model.SerializeToString(deterministic=True))


def _reason(error: Exception) -> str:
    """What OpenVINO's message says, without the lines on where in its source, unless there are no others."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith("Exception from ")]
    plain = [line for line in said if not line.startswith("Check '")]
    return " ".join((plain or said)[:4]) or type(error).__name__
