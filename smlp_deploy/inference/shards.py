"""Shards: deterministic shares of a listing of images, which any scheduler can run; `merge.py` makes them one again.

The batches of the listing are dealt in turn: of N shards, shard I has batches I, I + N, I + 2N and so on. The number of
images need not be known beforehand, so a listing can come from a pipe; and as each batch holds the same images as in a
single run, its records have the same digits.

A shard's file says which run, listing and shard it is of (`facts.Facts`): a Parquet file in its metadata, a JSONL file
in a JSON file beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from smlp_deploy.errors import RecordsError, UsageError
from smlp_deploy.files import alone, check_writable, read_text, replacing, write_text
from smlp_deploy.images.preprocessing import Decoder
from smlp_deploy.inference import parquet
from smlp_deploy.inference.classify import Classifier
from smlp_deploy.inference.facts import Facts, Listing
from smlp_deploy.inference.records import RunIdentity, write_records
from smlp_deploy.inference.resume import RecordFile, differences, partial_path
from smlp_deploy.interrupts import StopRequest

if TYPE_CHECKING:
    from smlp_deploy.inference.devices import DeviceClassifier

T = TypeVar("T")

KINDS = {"parquet": "Parquet", "jsonl": "JSONL"}
"""The formats of shards, and what they are called."""

_MOST = 99_999
_TEXT = re.compile("([0-9]{1,5})/([0-9]{1,5})")


@dataclass(frozen=True, order=True)
class Shard:
    """Number `number`, from 1, of `count` shards."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "2/4".

        Raises:
            UsageError: it is something else, or has a number that is out of range.
        """
        match = _TEXT.fullmatch(text)
        shard = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 1 <= shard.number <= shard.count <= _MOST:
            raise UsageError(f"{text!r} is not a shard", where="--shard", fix=f"for example 1/4; at most {_MOST}")
        return shard

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def file(self, folder: Path, kind: str) -> Path:
        """The shard's file in a folder."""
        return folder / f"part-{self.number:05d}-of-{self.count:05d}.{kind}"

    def of(self, images: Iterable[T], *, batch_size: int) -> Iterator[T]:
        """The shard's images, in their order; reads all of them, each as it is needed."""
        for position, image in enumerate(images):
            if _number_of(position, batch_size=batch_size, count=self.count) == self.number:
                yield image

    def size(self, images: int, *, batch_size: int) -> int:
        """How many of that number of images are in the shard."""
        rounds, rest = divmod(images, batch_size * self.count)
        return rounds * batch_size + min(batch_size, max(0, rest - (self.number - 1) * batch_size))


def deal(images: Iterable[T], shards: Iterable[Shard], *, batch_size: int) -> dict[Shard, list[T]]:
    """The images of several shards of one listing, as `Shard.of` gives those of one; reads the listing once."""
    dealt: dict[Shard, list[T]] = {shard: [] for shard in shards}
    by_number = {shard.number: mine for shard, mine in dealt.items()}
    count = next((shard.count for shard in dealt), 1)
    for position, image in enumerate(images):
        mine = by_number.get(_number_of(position, batch_size=batch_size, count=count))
        if mine is not None:
            mine.append(image)
    return dealt


def _number_of(position: int, *, batch_size: int, count: int) -> int:
    """The number of the shard, of `count`, that has the image at a position of the listing."""
    return position // batch_size % count + 1


@dataclass(frozen=True, kw_only=True)
class ShardRun:
    """A shard that is finished.

    Attributes:
        path: its file.
        facts: what is in it.
        skipped: it was finished before.
    """

    path: Path
    facts: Facts
    skipped: bool = False


def run_shard(
    classifier: Classifier | DeviceClassifier,
    identity: RunIdentity,
    images: Iterable[str | Path],
    folder: Path,
    *,
    shard: Shard,
    resume: bool = True,
    stop: StopRequest | None = None,
    workers: int | None = None,
    decoder: Decoder | None = None,
    advance: Callable[[], None] = lambda: None,
) -> ShardRun:
    """Classify one shard of a listing into its file, which appears whole or not at all.

    Args:
        classifier: the model of `identity`.
        identity: the format ("parquet" or "jsonl"), batch size, and all else that the records depend on; all shards
            have the same.
        images: the whole listing, the same for all shards.
        folder: for the files.
        shard: which one.
        resume: skip the shard if it is finished, and continue it if it was interrupted.
        stop: checked after each batch.
        workers: decoding threads; by default one per core.
        decoder: the one of `identity`, if images are not decoded by Pillow alone.
        advance: called after each image.

    Raises:
        UsageError: the file there is of another run, or an interrupted one and `resume` is false.
        StoppedError: a signal arrived.
        SmlpError: the file cannot be written, or the model cannot go on.
    """
    if identity.format not in KINDS:
        raise UsageError("shards are Parquet or JSONL", where=identity.format)
    listing = Listing(images)
    stop = StopRequest() if stop is None else stop  # it is false until a signal arrives
    if resume and (finished := finished_shard(identity, listing, folder, shard=shard, stop=stop)):
        return finished
    target = shard.file(folder, identity.format)
    with RecordFile.open(target, identity, resume=resume) as records:
        mine = shard.of(listing, batch_size=identity.batch_size)
        records.skip(mine)
        predictions = classifier.classify(
            stop.before(mine),
            batch_size=identity.batch_size,
            topk=identity.topk,
            workers=workers,
            decoder=decoder,
        )
        done, failed = write_records(predictions, records, stop, batch_size=identity.batch_size, advance=advance)
        facts = Facts.of(identity, listing, images=done, failed=failed, shard=str(shard))
        if identity.format == "parquet":
            parquet.conclude(records, facts)
        else:
            write_text(_facts_path(target), facts.to_json() + "\n")
    return ShardRun(path=target, facts=facts)


def finished_shard(
    identity: RunIdentity, listing: Listing, folder: Path, *, shard: Shard, stop: StopRequest | None = None
) -> ShardRun | None:
    """A shard that is finished already, after checking that this run would give the same; else None.

    Raises:
        UsageError: it would not.
        StoppedError: a signal arrived.
        SmlpError: nothing is known of the file.
    """
    target = shard.file(folder, identity.format)
    if not target.exists() or partial_path(target).exists():
        return None
    facts = _finished(target, identity, listing, shard, StopRequest() if stop is None else stop)
    return ShardRun(path=target, facts=facts, skipped=True)


def write_shard(
    rows: Any, identity: RunIdentity, listing: Listing, folder: Path, *, shard: Shard, failed: int
) -> ShardRun:
    """Write the file of a shard that was classified elsewhere; it has the bytes of `run_shard`'s.

    Args:
        rows: all of the shard's records, as `parquet.table_of` makes them or as JSON lines.
        identity: see `run_shard`.
        listing: read to its end.
        folder: for the file.
        shard: which one.
        failed: records with an error.

    Raises:
        UsageError: an interrupted run of the shard is there.
        SmlpError: the file cannot be written.
    """
    target = shard.file(folder, identity.format)
    facts = Facts.of(identity, listing, images=len(rows), failed=failed, shard=str(shard))
    check_writable(target)
    with alone(target):
        if partial_path(target).exists():
            fix = "finish it with --shard and --resume, or delete it"
            raise UsageError("found an interrupted run", where=partial_path(target), fix=fix)
        if identity.format == "parquet":
            with replacing(target) as temporary:
                parquet.write_table(temporary, rows, facts)
        else:
            write_text(target, "".join(f"{line}\n" for line in rows))
            write_text(_facts_path(target), facts.to_json() + "\n")
    return ShardRun(path=target, facts=facts)


def _facts_path(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _finished(target: Path, identity: RunIdentity, listing: Listing, shard: Shard, stop: StopRequest) -> Facts:
    """What a finished file is of, after checking that this run would give the same.

    Raises:
        UsageError: it would not.
        StoppedError: a signal arrived.
        RecordsError: nothing is known of the file.
    """
    found = read_facts(target)
    if not (different := difference(found, Facts.of(identity, listing, failed=0, shard=str(shard)), listed=False)):
        for _ in stop.before(listing):
            pass
        stop.report(0, partial=None)
        different = difference(found, Facts.of(identity, listing, failed=0, shard=str(shard)))
    if different:
        fix = "choose another folder with -o, or delete it to run it again"
        raise UsageError(f"is of another run: {different}", where=target, fix=fix)
    return found


def read_facts(path: Path) -> Facts:
    """What a shard's file is of.

    Raises:
        RecordsError: it does not say.
    """
    if path.suffix == ".parquet":
        return parquet.read_facts(path)
    fix = "delete it to run it again"
    try:
        return Facts.from_json(read_text(_facts_path(path), error=RecordsError, fix=fix))
    except ValueError:
        raise RecordsError("is not a file of smlp predict", where=_facts_path(path), fix=fix) from None


def difference(then: Facts, now: Facts, *, listed: bool = True) -> str | None:
    """The first difference of two runs, or of their shards or listings."""
    if then.shard != now.shard:
        return f"shard was {then.shard}, now it is {now.shard}"
    pairs = [({"listing": then.listing}, {"listing": now.listing})] if listed else []
    try:
        return next((text for pair in [(then.run, now.run), *pairs] for text in differences(*pair)), None)
    except (KeyError, TypeError):
        return "its settings have another form"
