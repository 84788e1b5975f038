"""The official weights: where they are, fetched once, whole or not at all, and verified on every use.

A download goes to `<file>.part`, which a later attempt resumes; the finished file is moved into place together with
`<file>.download.json`, which records its size and sha256.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_path

from smlp_deploy.errors import DownloadError
from smlp_deploy.files import sha256_of, write_text
from smlp_deploy.models.variants import OFFICIAL_URL, VARIANTS, Variant, find_variant

logger = logging.getLogger(__name__)

MIRROR_VARIABLE = "SMLP_WEIGHTS_URL"

_TIMEOUT_SECONDS = 30
_CHUNK_BYTES = 1 << 20
_MAX_BYTES = 2 << 30

Progress = Callable[[int, int | None], None]
"""Called with the bytes there are, and the bytes there will be if the server said so."""


def cache_folder() -> Path:
    """Where weights are kept: the user's cache directory."""
    return user_cache_path("smlp-deploy") / "weights"


def find_checkpoint(source: str, *, progress: Progress | None = None) -> Path:
    """The weights file that a command's argument means: a path, or a variant whose weights are fetched if need be.

    Raises:
        UsageError: neither a file nor a variant.
        DownloadError: the variant's weights cannot be had.
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
        DownloadError: no weights were ever released for it, or the mirror's address is not http or https.
    """
    if variant.weights_file is None:
        released = ", ".join(v.name for v in VARIANTS.values() if v.weights_file)
        raise DownloadError(
            f"no weights were ever released for {variant.name}", fix=f"released: {released}; or give a checkpoint"
        )
    base = os.environ.get(MIRROR_VARIABLE) or OFFICIAL_URL
    if not base.startswith(("http://", "https://")):
        raise DownloadError("is not an http or https address", where=f"{MIRROR_VARIABLE}={base}")
    return f"{base.rstrip('/')}/{variant.weights_file}"


def cached_weights(variant: Variant) -> Path | None:
    """A variant's weights if they were fetched before, unverified."""
    path = cache_folder() / variant.weights_file if variant.weights_file else None
    return path if path is not None and path.is_file() else None


def fetch_weights(variant: Variant, *, progress: Progress | None = None) -> Path:
    """A variant's official weights: from the cache, verified, or fetched into it.

    Raises:
        DownloadError: none were released, the network failed, or the cached file is not what was fetched.
    """
    url = weights_url(variant)
    path = cache_folder() / url.rpartition("/")[2]
    if path.is_file():
        _verify(path)
        return path
    part = path.with_name(path.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        _download(url, part, progress)
        write_text(_record(path), json.dumps({"url": url, "size": part.stat().st_size, "sha256": sha256_of(part)}))
        part.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(
            f"could not fetch {url}: {_reason(error)}",
            fix=f"try again to resume; with no network, fetch {url} by hand and save it as {path}",
        ) from None
    return path


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
            "is not the file that was fetched", where=path, fix=f"delete it and {record.name}, fetch again"
        )


def _download(url: str, part: Path, progress: Progress | None) -> None:
    """Append what is missing to `part`, or write it anew where the server cannot resume."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "smlp-deploy"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            error.close()
            part.unlink()
            _download(url, part, progress)
            return
        raise
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        start = have if resumed else 0
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise OSError("the server resumed at another place than asked")
        if response.headers.get_content_type() == "text/html":
            raise OSError("the server sent a web page, not weights")
        total = start + response.length if response.length is not None else None
        _store(response, part, start=start, total=total, progress=progress)


def _store(
    response: http.client.HTTPResponse, part: Path, *, start: int, total: int | None, progress: Progress | None
) -> None:
    done = start
    with part.open("r+b" if start else "wb") as file:
        file.seek(start)
        while chunk := response.read(_CHUNK_BYTES):
            done += len(chunk)
            if done > _MAX_BYTES:
                raise OSError(f"more than {_MAX_BYTES} bytes")
            file.write(chunk)
            if progress is not None:
                progress(done, total)
    if total is not None and done != total:
        raise OSError(f"the connection ended after {done} of {total} bytes")


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        return error.reason.strerror or str(error.reason)
    return str(error) or type(error).__name__
