from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from smlp_deploy import files
from smlp_deploy.errors import DownloadError, UsageError
from smlp_deploy.models import pretrained
from smlp_deploy.models.pretrained import fetch_weights, find_checkpoint, weights_folder
from smlp_deploy.models.variants import VARIANTS

SMALL = VARIANTS["smlpnet_small"]
CONTENT = bytes(range(256)) * 40


class Mirror(http.server.ThreadingHTTPServer):
    """A server of one file on loopback, which can be told to misbehave."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges = True
        self.cut_at: int | None = None
        self.kind = "application/octet-stream"
        self.etag: str | None = '"first"'
        self.modified: str | None = None
        self.length: int | None = len(CONTENT)
        self.redirect: str | None = None
        self.first_sent = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.drip = False
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/weights/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        mirror, asked = self.server, self.headers["Range"]
        mirror.asked.append(asked)
        if mirror.redirect is not None:
            self.send_response(302)
            self.send_header("Location", mirror.redirect)
            self.end_headers()
        elif self.path != "/weights/smlp_s.pth":
            self.send_error(404)
        else:
            same = self.headers["If-Range"] in (mirror.etag, mirror.modified)
            resumed = asked is not None and mirror.ranges and same
            self.answer(int(asked.removeprefix("bytes=").removesuffix("-")) if asked and resumed else 0)

    def answer(self, start: int) -> None:
        mirror = self.server
        if start >= len(mirror.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", mirror.kind)
        for name, value in (("ETag", mirror.etag), ("Last-Modified", mirror.modified)):
            if value is not None:
                self.send_header(name, value)
        if mirror.length is not None:
            self.send_header("Content-Length", str(mirror.length - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(mirror.content) - 1}/{len(mirror.content)}")
        self.end_headers()
        self.send(mirror.content[start : mirror.cut_at])

    def send(self, content: bytes) -> None:
        mirror = self.server
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[:100])
            mirror.first_sent.set()
            mirror.go_on.wait()
            for at in range(100, len(content) if mirror.drip else 0):
                self.wfile.write(content[at : at + 1])
                threading.Event().wait(0.01)
            self.wfile.write(content[100:])

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "user_cache_path", lambda name: tmp_path / "cache" / name)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    server = Mirror()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("SMLP_WEIGHTS_URL", server.url)
    yield server
    server.go_on.set()
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
    assert not list(path.parent.glob("*.part*"))


def test_a_cut_download_is_resumed(mirror: Mirror) -> None:
    mirror.cut_at = 3000
    with pytest.raises(DownloadError, match=r"connection ended after 3000 of 10240 bytes.*try again to resume"):
        fetch_weights(SMALL)
    assert not (weights_folder() / "smlp_s.pth").exists()
    mirror.cut_at = None
    assert fetch_weights(SMALL).read_bytes() == CONTENT
    assert mirror.asked == [None, "bytes=3000-"]


def test_a_server_that_cannot_resume_sends_all(mirror: Mirror) -> None:
    mirror.cut_at = 3000
    with pytest.raises(DownloadError):
        fetch_weights(SMALL)
    mirror.cut_at, mirror.ranges = None, False
    assert fetch_weights(SMALL).read_bytes() == CONTENT


def cut(mirror: Mirror) -> None:
    """Leave the first 3,000 bytes of the file in the cache."""
    mirror.cut_at = 3000
    with pytest.raises(DownloadError, match="ended after 3000 of 10240"):
        fetch_weights(SMALL)
    mirror.cut_at = None


def test_another_version_is_not_glued_to_the_first(mirror: Mirror) -> None:
    cut(mirror)
    mirror.content, mirror.etag = CONTENT[::-1], '"second"'
    assert fetch_weights(SMALL).read_bytes() == CONTENT[::-1]
    assert mirror.asked == [None, "bytes=3000-"]


def test_a_date_names_a_version_too(mirror: Mirror) -> None:
    mirror.etag, mirror.modified = 'W/"weak"', "Sat, 01 Jan 2022 00:00:00 GMT"
    cut(mirror)
    assert fetch_weights(SMALL).read_bytes() == CONTENT
    assert mirror.asked == [None, "bytes=3000-"]


@pytest.mark.parametrize("change", ["no validator", "another mirror", "damaged record"])
def test_what_cannot_be_known_to_be_the_same_is_fetched_anew(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    if change == "no validator":
        mirror.etag = None
    cut(mirror)
    if change == "another mirror":
        monkeypatch.setenv("SMLP_WEIGHTS_URL", mirror.url.replace("127.0.0.1", "localhost"))
    if change == "damaged record":
        (weights_folder() / "smlp_s.pth.part.json").write_text('["smlp_s.pth"]')
    assert fetch_weights(SMALL).read_bytes() == CONTENT
    assert mirror.asked == [None, None]


def test_a_server_that_resumes_elsewhere_is_refused(mirror: Mirror) -> None:
    cut(mirror)
    mirror.content = CONTENT + b"more"
    with pytest.raises(DownloadError, match="the server sent bytes 3000-10243/10244, expected bytes 3000-10239/10240"):
        fetch_weights(SMALL)


@pytest.mark.parametrize(
    ("length", "reason"),
    [
        (len(CONTENT) + 7, "ended after 10240 of 10247 bytes"),
        (None, "does not say how long the file is"),
        (3 << 30, "more than 2147483648 bytes"),
    ],
)
def test_a_wrong_length_is_refused(mirror: Mirror, length: int | None, reason: str) -> None:
    mirror.length = length
    with pytest.raises(DownloadError, match=reason):
        fetch_weights(SMALL)
    assert not (weights_folder() / "smlp_s.pth").exists()


def test_what_follows_the_stated_length_is_no_part_of_the_file(mirror: Mirror) -> None:
    mirror.length = 5000
    assert fetch_weights(SMALL).read_bytes() == CONTENT[:5000]


def test_a_web_page_is_known_by_its_content_too(mirror: Mirror) -> None:
    mirror.content = b"\n<!DOCTYPE html><title>Sign in</title>".ljust(len(CONTENT))
    with pytest.raises(DownloadError, match="a web page, not weights"):
        fetch_weights(SMALL)
    assert not list(weights_folder().glob("*.part"))


def test_a_server_that_falls_silent_is_given_up(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_TIMEOUT_SECONDS", 0.2)
    mirror.go_on.clear()
    with pytest.raises(DownloadError, match=r"timed out.*try again to resume"):
        fetch_weights(SMALL)
    mirror.go_on.set()
    assert fetch_weights(SMALL).read_bytes() == CONTENT
    assert mirror.asked == [None, "bytes=100-"]


def test_a_server_that_drips_is_given_up(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_WATCH_SECONDS", 0.05)
    mirror.drip = True
    with pytest.raises(DownloadError, match=r"the server sent only \d+ bytes in 0 seconds.*try again to resume"):
        fetch_weights(SMALL)
    assert (weights_folder() / "smlp_s.pth.part").stat().st_size < len(CONTENT)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("file:///etc/passwd", "Redirection to url 'file:///etc/passwd' is not allowed"),
        ("FILE:///etc/passwd", "Redirection to url 'FILE:///etc/passwd' is not allowed"),
        ("data:,x", "Redirection to url 'data:,x' is not allowed"),
        ("ftp://127.0.0.1/x.pth", "refused: the server redirects from http to ftp"),
    ],
)
def test_redirects_lead_to_http_only(mirror: Mirror, target: str, reason: str) -> None:
    mirror.redirect = target
    with pytest.raises(DownloadError, match=reason):
        fetch_weights(SMALL)
    assert not list(weights_folder().glob("smlp_s.pth*[!k]"))


def test_redirects_do_not_leave_encryption() -> None:
    request = urllib.request.Request("https://example.org/x.pth")
    redirects = pretrained._Redirects()
    headers = http.client.HTTPMessage()
    with pytest.raises(urllib.error.URLError, match="refused: the server redirects from https to http"):
        redirects.redirect_request(request, io.BytesIO(), 302, "", headers, "http://example.org/x.pth")
    followed = redirects.redirect_request(request, io.BytesIO(), 302, "", headers, "https://example.org/y.pth")
    assert followed is not None
    assert followed.full_url == "https://example.org/y.pth"


FETCH = """
import logging, resource, signal, sys
from pathlib import Path
from smlp_deploy import files
from smlp_deploy.errors import SmlpError
from smlp_deploy.models import pretrained
from smlp_deploy.models.variants import VARIANTS

logging.basicConfig(format="%(message)s")
files.user_cache_path = lambda name: Path(sys.argv[1]) / name
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    print(pretrained.fetch_weights(VARIANTS["smlpnet_small"]))
except SmlpError as error:
    sys.exit(str(error))
"""


def fetching(*arguments: str) -> subprocess.Popen[str]:
    """Another process that fetches into the same cache."""
    cache = str(weights_folder().parent.parent)
    command = [sys.executable, "-c", FETCH, cache, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_full_disk_is_one_line_and_leaves_what_can_be_resumed(mirror: Mirror) -> None:
    output, error = (process := fetching("4096")).communicate()
    assert (process.returncode, output) == (1, "")
    assert error.startswith("could not fetch http://127.0.0.1")
    assert "File too large" in error
    assert error.count("\n") == 1
    assert not (weights_folder() / "smlp_s.pth").exists()
    assert fetch_weights(SMALL).read_bytes() == CONTENT
    assert mirror.asked == [None, "bytes=4096-"]


def test_of_two_processes_one_fetches_and_both_have_the_file(mirror: Mirror) -> None:
    mirror.go_on.clear()
    first = fetching()
    assert mirror.first_sent.wait(30)
    second = fetching()
    assert second.stderr is not None
    assert second.stderr.readline() == "another process is fetching smlp_s.pth; waiting for it\n"
    mirror.go_on.set()
    outputs = [process.communicate()[0] for process in (first, second)]
    assert outputs == [f"{weights_folder() / 'smlp_s.pth'}\n"] * 2
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(mirror.asked) == 1


def test_a_killed_process_leaves_no_lock(mirror: Mirror) -> None:
    mirror.go_on.clear()
    process = fetching()
    assert mirror.first_sent.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    mirror.go_on.set()
    assert fetch_weights(SMALL).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_thrown_away(mirror: Mirror) -> None:
    weights_folder().mkdir(parents=True)
    (weights_folder() / "smlp_s.pth.part").write_bytes(bytes(len(CONTENT) + 5))
    assert fetch_weights(SMALL).read_bytes() == CONTENT


def test_a_web_page_is_not_weights(mirror: Mirror) -> None:
    mirror.kind = "text/html"
    with pytest.raises(DownloadError, match="a web page, not weights"):
        fetch_weights(SMALL)
    assert not (weights_folder() / "smlp_s.pth").exists()


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
    weights_folder().mkdir(parents=True)
    path = weights_folder() / "smlp_s.pth"
    path.write_bytes(CONTENT)
    assert fetch_weights(SMALL) == path
    assert "put there by hand" in caplog.text
    assert fetch_weights(SMALL) == path


def test_no_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMLP_WEIGHTS_URL", "http://127.0.0.1:9/")
    with pytest.raises(DownloadError, match=r"Connection refused.*with no network, fetch http://127"):
        fetch_weights(SMALL)


def test_tiny_was_never_released() -> None:
    with pytest.raises(UsageError, match="no weights were ever released for smlpnet_tiny"):
        fetch_weights(VARIANTS["smlpnet_tiny"])


def test_a_mirror_must_be_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMLP_WEIGHTS_URL", "file:///etc/")
    with pytest.raises(DownloadError, match="not an http or https address"):
        fetch_weights(SMALL)


def test_a_command_takes_a_path_or_a_variant(mirror: Mirror, tmp_path: Path) -> None:
    assert find_checkpoint("smlpnet_small").read_bytes() == CONTENT
    assert find_checkpoint(str(tmp_path / "x.pth")) == tmp_path / "x.pth"
