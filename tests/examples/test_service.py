"""The service of examples/, started as its users start it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from smlp_deploy.pipeline.export import Export

ROOT = Path(__file__).parents[2]
MOST_BYTES = 1 << 30
"""Of memory: some 300 MB for Python and the libraries, and the decoded pixels of the largest image."""


class Service:
    """The running service."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process, self._port = process, port

    def ask(self, body: bytes, query: str = "") -> tuple[int, Any]:
        connection = HTTPConnection("127.0.0.1", self._port)
        connection.request("POST", f"/classify{query}", body)
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        return response.status, answer

    def peak_bytes(self) -> int:
        (line,) = re.findall(
            r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{self._process.pid}/status").read_text(), re.MULTILINE
        )
        return int(line) << 10


@pytest.fixture(scope="module")
def service(digits_export: Export) -> Iterator[Service]:
    command = (sys.executable, "-m", "uvicorn", "service:app", "--app-dir", "examples", "--port", "0")
    variables = os.environ | {"SMLP_MODEL": str(digits_export.path), "SMLP_LARGEST": "5000000"}
    with subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        port = next(int(found[1]) for line in lines if (found := re.search(r"running on http://127.0.0.1:(\d+)", line)))
        yield Service(process, port)
        process.terminate()
        process.stderr.read()


def jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_200_uploads_at_once(service: Service, digit_images: list[Path]) -> None:
    contents = [path.read_bytes() for path in digit_images]
    wrong = [b"", b"no image", contents[0][:700], jpeg(10_000, 10_000), bytes(5_000_001)]
    uploads = [contents[number % 12] for number in range(194)] + wrong + [jpeg(10_000, 8_000)]
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(service.ask, uploads))
    alone = [service.ask(content) for content in contents]
    labels = [answer["classes"][0]["label"] for _, answer in alone]
    right = [label == path.name.split("-")[1] for label, path in zip(labels, digit_images, strict=True)]
    assert sum(right) == 11
    assert answers[:194] == [alone[number % 12] for number in range(194)]
    assert answers[194:199] == [
        (422, {"detail": "empty file"}),
        (422, {"detail": answers[195][1]["detail"]}),
        (422, {"detail": answers[196][1]["detail"]}),
        (422, {"detail": "more than 89478485 pixels"}),
        (413, {"detail": "larger than 5000000 bytes"}),
    ]
    assert answers[195][1]["detail"].startswith("not an image in a supported format")
    assert answers[196][1]["detail"].startswith("damaged image")
    assert answers[199][0] == 200
    assert service.peak_bytes() < MOST_BYTES


def test_more_classes(service: Service, digit_images: list[Path]) -> None:
    content = digit_images[3].read_bytes()
    status, answer = service.ask(content, "?topk=10")
    assert status == 200
    assert len(answer["classes"]) == 10
    assert sum(one["probability"] for one in answer["classes"]) == pytest.approx(1, abs=1e-5)
    assert service.ask(content, "?topk=11")[0] == 422
