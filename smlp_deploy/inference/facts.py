"""What a finished file of predictions is of: the run, the listing of images, and the share of it that the file has."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smlp_deploy.inference.records import RunIdentity


class Listing(Iterator[str | Path]):
    """The images of a run, counted and hashed as they are read.

    Args:
        images: their paths.

    Attributes:
        count: those read so far.
    """

    def __init__(self, images: Iterable[str | Path]) -> None:
        self.count = 0
        self._images = iter(images)
        self._names = NamesHash()

    def __next__(self) -> str | Path:
        path = next(self._images)
        self.count += 1
        self._names.add(name_bytes(os.fspath(path)))
        return path

    @property
    def sha256(self) -> str:
        """Of the paths read so far, in their order."""
        return self._names.hexdigest()


class NamesHash:
    """The sha256 of names in their order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: bytes) -> None:
        self._hash.update(b"%d:%b" % (len(name), name))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def name_bytes(path: str) -> bytes:
    """The bytes of a file's name; those of what no file can be called are unlike any file's."""
    try:
        return path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return path.encode("utf-8", "surrogatepass")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """See the module.

    Attributes:
        run: what the records depend on besides the images, a `RunIdentity` as JSON values.
        listing: number of images of the whole listing, and the sha256 of their paths.
        shard: "2/4" if the file has the second of four shards of it; None if it has all.
        images: records in the file.
        failed: those of them that have an error.
    """

    run: Mapping[str, Any]
    listing: Mapping[str, Any]
    shard: str | None
    images: int
    failed: int

    @classmethod
    def of(
        cls,
        identity: RunIdentity,
        listing: Listing,
        *,
        failed: int,
        images: int | None = None,
        shard: str | None = None,
    ) -> Facts:
        """The facts of a run whose listing was read to its end; by default the file has all images."""
        return cls(
            run=json.loads(json.dumps(vars(identity))),
            listing={"images": listing.count, "sha256": listing.sha256},
            shard=shard,
            images=listing.count if images is None else images,
            failed=failed,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Facts:
        """Read the JSON form.

        Raises:
            ValueError: it is another.
        """
        try:
            found = cls(**json.loads(text))
            mappings = isinstance(found.run, dict) and isinstance(found.listing, dict)
            numbers = isinstance(found.images, int) and isinstance(found.failed, int)
            whole = found.run.keys() >= {"model", "preprocessing", "versions", "batch_size"}
            counted = isinstance(found.listing["images"], int) and isinstance(found.listing["sha256"], str)
        except (TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError("not the facts of a file of predictions") from None
        if not (mappings and numbers and whole and counted and isinstance(found.shard, str | None)):
            raise ValueError("not the facts of a file of predictions")
        return found
