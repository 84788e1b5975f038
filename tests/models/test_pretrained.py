from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from smlp_deploy.errors import DownloadError
from smlp_deploy.models import pretrained
from smlp_deploy.models.pretrained import cache_folder, fetch_weights, find_checkpoint
from smlp_deploy.models.variants import VARIANTS

SMALL = VARIANTS["smlpnet_small"]
CONTENT = bytes(range(256)) * 40


class Mirror(http.server.ThreadingHTTPServer):
    """A server of one file on loopback, which can be told to misbehave."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges = True
        self.cut_at: int | None = None
        self.html = False
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/weights/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.asked.append(asked)
        if self.path != "/weights/smlp_s.pth":
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "text/html" if self.server.html else "application/octet-stream")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        self.wfile.write(CONTENT[start : self.server.cut_at])

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "user_cache_path", lambda name: tmp_path / "cache" / name)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    server = Mirror()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("SMLP_WEIGHTS_URL", server.url)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_weights_are_fetched_once_and_recorded(mirror: Mirror) -> None:
    seen: list[tuple[int, int | None]] = []
    path = fetch_weights(SMALL, progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    record = json.loads((path.parent / "smlp_s.pth.download.json").read_text())
    assert record["size"] == len(CONTENT)
    assert len(record["sha256"]) == 64
    assert fetch_weights(SMALL) == path
    assert len(mirror.asked) == 1
    assert not list(path.parent.glob("*.part"))


def test_a_cut_download_is_resumed(mirror: Mirror) -> None:
    mirror.cut_at = 3000
    with pytest.raises(DownloadError, match=r"connection ended after 3000 of 10240 bytes.*try again to resume"):
        fetch_weights(SMALL)
    assert not (cache_folder() / "smlp_s.pth").exists()
    mirror.cut_at = None
    assert fetch_weights(SMALL).read_bytes() == CONTENT
    assert mirror.asked == [None, "bytes=3000-"]


def test_a_server_that_cannot_resume_sends_all(mirror: Mirror) -> None:
    mirror.cut_at = 3000
    with pytest.raises(DownloadError):
        fetch_weights(SMALL)
    mirror.cut_at, mirror.ranges = None, False
    assert fetch_weights(SMALL).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_thrown_away(mirror: Mirror) -> None:
    cache_folder().mkdir(parents=True)
    (cache_folder() / "smlp_s.pth.part").write_bytes(bytes(len(CONTENT) + 5))
    assert fetch_weights(SMALL).read_bytes() == CONTENT


def test_a_web_page_is_not_weights(mirror: Mirror) -> None:
    mirror.html = True
    with pytest.raises(DownloadError, match="a web page, not weights"):
        fetch_weights(SMALL)
    assert not (cache_folder() / "smlp_s.pth").exists()


def test_an_absent_file_names_the_address_and_the_place(mirror: Mirror) -> None:
    base = VARIANTS["smlpnet_base"]
    with pytest.raises(DownloadError, match=r"404.*fetch .*smlp_b\.pth by hand and save it as .*smlp_b\.pth"):
        fetch_weights(base)


def test_a_changed_file_in_the_cache_is_noticed(mirror: Mirror) -> None:
    path = fetch_weights(SMALL)
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(DownloadError, match="is not the file that was fetched"):
        fetch_weights(SMALL)


def test_a_file_put_there_by_hand_is_taken_and_recorded(caplog: pytest.LogCaptureFixture) -> None:
    cache_folder().mkdir(parents=True)
    path = cache_folder() / "smlp_s.pth"
    path.write_bytes(CONTENT)
    assert fetch_weights(SMALL) == path
    assert "put there by hand" in caplog.text
    assert fetch_weights(SMALL) == path


def test_no_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMLP_WEIGHTS_URL", "http://127.0.0.1:9/")
    with pytest.raises(DownloadError, match=r"Connection refused.*with no network, fetch http://127"):
        fetch_weights(SMALL)


def test_tiny_was_never_released() -> None:
    with pytest.raises(DownloadError, match="no weights were ever released for smlpnet_tiny"):
        fetch_weights(VARIANTS["smlpnet_tiny"])


def test_a_mirror_must_be_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMLP_WEIGHTS_URL", "file:///etc/")
    with pytest.raises(DownloadError, match="not an http or https address"):
        fetch_weights(SMALL)


def test_a_command_takes_a_path_or_a_variant(mirror: Mirror, tmp_path: Path) -> None:
    assert find_checkpoint("smlpnet_small").read_bytes() == CONTENT
    assert find_checkpoint(str(tmp_path / "x.pth")) == tmp_path / "x.pth"
