"""A real `tritonserver`, the one inside nvidia-pytriton, on loopback; see `make test-triton`."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PROJECT = Path(__file__).parents[2]
_SPEC = find_spec("pytriton")
NETWORK = Path(__file__).with_name("triton_network.py")
INSTALLED = Path((_SPEC.origin if _SPEC else None) or "absent").parent / "tritonserver"
_FUTURE = "from __future__ import annotations\n"
_STARTED = "Started Metrics Service"
"""Of the log: the last service, after all models are loaded."""


@dataclass(frozen=True)
class Server:
    """A running server: its addresses, and the lines of its log."""

    http: str
    grpc: str
    metrics: str
    log: list[str]


def is_installed() -> bool:
    return _SPEC is not None and find_spec("tritonclient") is not None


def run_here(repository: Path) -> None:
    """Have the Python backend run the ONNX files, as the backend for ONNX Runtime would, and find this environment.

    That backend's Python is isolated: it is the system's, without PYTHONPATH, where an image has smlp-deploy installed.
    """
    config = repository / "smlpnet" / "config.pbtxt"
    text, count = re.subn(r'^platform: "onnxruntime_onnx"$', 'backend: "python"', config.read_text(), flags=re.M)
    assert count in (0, 1)
    config.write_text(text)
    for model in (repository / "smlpnet").glob("*/model.onnx"):
        shutil.copyfile(NETWORK, model.with_name("model.py"))
    paths = [str(PROJECT), str(INSTALLED.parents[1])]
    for file in repository.glob("*/*/model.py"):
        if not (text := file.read_text()).startswith("import sys"):
            file.write_text(f"import sys\n\nsys.path[:0] = {paths}\n\n{text.replace(_FUTURE, '')}")


@contextmanager
def serving(repository: Path, folder: Path, *options: str) -> Iterator[Server]:
    """A server of a repository; `folder` is for its backends."""
    places = {name: f"127.0.0.1:{port}" for name, port in zip(("http", "grpc", "metrics"), _free_ports(3), strict=True)}
    addresses = [
        option
        for name, place in places.items()
        for option in (f"--{name}-address=127.0.0.1", f"--{name}-port={place.rpartition(':')[2]}")
    ]
    command = [
        str(INSTALLED / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={_backends(folder)}",
        "--disable-auto-complete-config",
        *addresses,
        *options,
    ]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(INSTALLED.parents[1] / "nvidia_pytriton.libs")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    log: list[str] = []
    started = threading.Event()
    reader = threading.Thread(target=_read, args=(process, log, started))
    reader.start()
    try:
        assert started.wait(timeout=120), "".join(log)
        assert process.poll() is None, "".join(log)
        yield Server(places["http"], places["grpc"], places["metrics"], log)
    finally:
        process.terminate()
        process.wait(timeout=60)
        reader.join()


def _read(process: subprocess.Popen[str], log: list[str], started: threading.Event) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        log.append(line)
        if _STARTED in line:
            started.set()
    process.stderr.close()
    started.set()


def _backends(folder: Path) -> Path:
    """The folder of backends: the Python backend, with the stub for this version of Python beside it."""
    place = folder / "backends" / "python"
    if not place.exists():
        place.mkdir(parents=True)
        stub = INSTALLED / "python_backend_stubs" / f"3.{sys.version_info.minor}" / "triton_python_backend_stub"
        for file in (*(INSTALLED / "backends" / "python").glob("*.*"), stub):
            (place / file.name).symlink_to(file)
    return place.parent


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
