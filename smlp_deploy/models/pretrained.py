"""The official weights: where they are, fetched once, whole or not at all, and verified on every use.

A download goes to `<file>.part`. A later attempt resumes it if the server still has the version that
`<file>.part.json` names; otherwise it starts over. The finished file is moved into place together with
`<file>.download.json`, which records its size and sha256. One process fetches a file while any others wait for it.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from smlp_deploy.errors import DownloadError, SmlpError, UsageError
from smlp_deploy.files import alone, cache_folder, sha256_of, write_text
from smlp_deploy.models.variants import OFFICIAL_URL, VARIANTS, Variant, find_variant

logger = logging.getLogger(__name__)

MIRROR_VARIABLE = "SMLP_WEIGHTS_URL"

_TIMEOUT_SECONDS = 30.0
_WATCH_SECONDS = 30.0
_LEAST_BYTES = 64 << 10
"""What a server must send in `_WATCH_SECONDS`; otherwise the download is abandoned."""
_CHUNK_BYTES = 1 << 20
_MAX_BYTES = 2 << 30

ByteProgress = Callable[[int, int | None], None]
"""Called with the bytes so far, and the total if the server states it."""


def weights_folder() -> Path:
    """Where weights are kept: in the user's cache directory.

    Raises:
        SmlpError: there is no home directory.
    """
    return cache_folder("weights")


def find_checkpoint(source: str, *, progress: ByteProgress | None = None) -> Path:
    """The weights file that a command's argument names: a path, or a variant, whose weights are fetched if needed.

    Raises:
        UsageError: neither a file nor a variant.
        DownloadError: the variant's weights are not available.
    """
    if source in VARIANTS:
        return fetch_weights(VARIANTS[source], progress=progress)
    path = Path(source)
    if not path.exists() and not path.suffix:
        find_variant(source)
    return path


def weights_url(variant: Variant) -> str:
    """The address of a variant's weights, at the mirror if `SMLP_WEIGHTS_URL` names one.

    Raises:
        UsageError: no weights were ever released for it.
        DownloadError: the mirror's address is not http or https.
    """
    if variant.weights_file is None:
        released = ", ".join(v.name for v in VARIANTS.values() if v.weights_file)
        raise UsageError(
            f"no weights were ever released for {variant.name}", fix=f"released: {released}; or give a checkpoint"
        )
    base = os.environ.get(MIRROR_VARIABLE) or OFFICIAL_URL
    if not base.startswith(("http://", "https://")):
        raise DownloadError("is not an http or https address", where=f"{MIRROR_VARIABLE}={base}")
    return f"{base.rstrip('/')}/{variant.weights_file}"


def cached_weights(variant: Variant) -> Path | None:
    """A variant's weights if they are in the cache, unverified."""
    try:
        path = weights_folder() / variant.weights_file if variant.weights_file else None
    except SmlpError:
        return None
    return path if path is not None and path.is_file() else None


def fetch_weights(variant: Variant, *, progress: ByteProgress | None = None) -> Path:
    """A variant's official weights: from the cache, verified, or fetched into it.

    Raises:
        UsageError: none were released.
        DownloadError: the network failed, or the cached file differs from what was fetched.
    """
    url = weights_url(variant)
    path = weights_folder() / url.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with alone(path, waiting_for=f"another process is fetching {path.name}; waiting for it"):
                if not path.is_file():
                    _fetch(url, path, progress)
                    return path
        except (OSError, http.client.HTTPException) as error:
            raise DownloadError(
                f"could not fetch {url}: {_reason(error)}",
                fix=f"try again to resume; with no network, fetch {url} by hand and save it as {path}",
            ) from None
    _verify(path)
    return path


def _fetch(url: str, path: Path, progress: ByteProgress | None) -> None:
    part = path.with_name(f"{path.name}.part")
    _download(url, part, progress)
    with part.open("rb") as file:
        if file.read(512).lstrip()[:1] == b"<":
            part.unlink()
            raise OSError("the server sent a web page, not weights")
    write_text(_record(path), json.dumps({"url": url, "size": part.stat().st_size, "sha256": sha256_of(part)}))
    part.replace(path)
    _version_file(part).unlink(missing_ok=True)


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".download.json")


def _verify(path: Path) -> None:
    """Compare a cached file with what was recorded when it was fetched; one put there by hand is recorded now."""
    record, found = _record(path), {"size": path.stat().st_size, "sha256": sha256_of(path)}
    if not record.is_file():
        logger.warning("%s was put there by hand; its sha256 %s is recorded from now on", path, found["sha256"])
        write_text(record, json.dumps(found))
        return
    try:
        recorded = json.loads(record.read_text(encoding="utf-8"))
        matches = all(recorded[key] == found[key] for key in ("size", "sha256"))
    except (ValueError, KeyError, TypeError):
        matches = False
    if not matches:
        raise DownloadError(
            "is not the file that was fetched", where=path, fix=f"delete it and {record.name}, then fetch again"
        )


@dataclass(frozen=True, kw_only=True)
class _Version:
    """The version of a file on a server.

    Attributes:
        url: the address requested.
        validator: the server's name for the version, for If-Range.
        size: in bytes.
    """

    url: str
    validator: str
    size: int


def _version_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _begun(url: str, part: Path) -> _Version | None:
    """The version that `part` is the beginning of, if a download of `url` can be resumed."""
    try:
        begun = _Version(**json.loads(_version_file(part).read_text(encoding="utf-8")))
        fits = begun.url == url and isinstance(begun.validator, str) and 0 < part.stat().st_size < begun.size
    except (OSError, ValueError, TypeError):
        return None
    return begun if fits else None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https, but not from https to http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        scheme = urlsplit(newurl).scheme.lower()
        if scheme not in ("http", "https") or (req.type == "https" and scheme != "https"):
            fp.close()
            raise urllib.error.URLError(OSError(f"refused: the server redirects from {req.type} to {scheme}"))
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, part: Path, progress: ByteProgress | None) -> None:
    """Append what is missing to `part`, or start over if the version differs or the server cannot resume."""
    begun = _begun(url, part)
    request = urllib.request.Request(url, headers={"User-Agent": "smlp-deploy"})
    if begun is not None:
        request.add_header("Range", f"bytes={part.stat().st_size}-")
        request.add_header("If-Range", begun.validator)
    try:
        response = urllib.request.build_opener(_Redirects).open(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and begun is not None:
            _version_file(part).unlink()
            _download(url, part, progress)
            return
        raise
    with response:
        start = _start(response, begun, part)
        if start == 0:
            # In this order, so that a version file never lies beside the beginning of another version.
            part.unlink(missing_ok=True)
            _version_file(part).unlink(missing_ok=True)
            validator = _validator(response.headers)
            if validator is not None:
                version = _Version(url=url, validator=validator, size=response.length)
                write_text(_version_file(part), json.dumps(asdict(version)))
        _store(response, part, start=start, progress=progress)


def _start(response: http.client.HTTPResponse, begun: _Version | None, part: Path) -> int:
    """Where in the file the response begins, after checking that it holds weights and states their length."""
    if response.headers.get_content_type() == "text/html":
        raise OSError("the server sent a web page, not weights")
    if response.length is None:
        raise OSError("the server does not say how long the file is")
    start = 0
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        start = part.stat().st_size if begun is not None else 0
        expected = f"bytes {start}-{begun.size - 1}/{begun.size}" if begun is not None else "nothing"
        if response.headers.get("Content-Range") != expected:
            raise OSError(f"the server sent {response.headers.get('Content-Range')}, expected {expected}")
    elif response.status != http.HTTPStatus.OK:
        raise OSError(f"the server answered {response.status}")
    if start + response.length > _MAX_BYTES:
        raise OSError(f"more than {_MAX_BYTES} bytes")
    return start


def _validator(headers: Message) -> str | None:
    """What identifies this version for If-Range: the entity tag if it is strong, otherwise a date."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified")


def _store(response: http.client.HTTPResponse, part: Path, *, start: int, progress: ByteProgress | None) -> None:
    done, total = start, start + (response.length or 0)
    watched, since = done, time.monotonic()
    with part.open("r+b" if start else "wb") as file:
        file.seek(start)
        # read1, because read would wait for a whole chunk, however slowly it arrives.
        while chunk := response.read1(_CHUNK_BYTES):
            done += len(chunk)
            file.write(chunk)
            if progress is not None:
                progress(done, total)
            if (now := time.monotonic()) - since > _WATCH_SECONDS:
                if done - watched < _LEAST_BYTES and done < total:
                    raise OSError(f"the server sent only {done - watched} bytes in {now - since:.0f} seconds")
                watched, since = done, now
    if done != total:
        raise OSError(f"the connection ended after {done} of {total} bytes")


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        error = error.reason
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
