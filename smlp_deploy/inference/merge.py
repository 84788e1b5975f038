"""One file of all shards of a listing, in its order, after checking that nothing is missing or doubled."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar

from smlp_deploy.errors import CheckError, RecordsError, SmlpError, UsageError
from smlp_deploy.files import replacing
from smlp_deploy.inference import parquet
from smlp_deploy.inference.facts import Facts, NamesHash, name_bytes
from smlp_deploy.inference.shards import KINDS, Shard, difference, read_facts

T = TypeVar("T")

_NAME = re.compile(rf"part-([0-9]{{5}})-of-([0-9]{{5}})\.({'|'.join(KINDS)})(\.partial)?")


@dataclass(frozen=True)
class _Part:
    shard: Shard
    path: Path
    facts: Facts


@dataclass(frozen=True)
class Merged:
    """What a merged file is of, and of how many shards it was made."""

    facts: Facts
    shards: int


def merge_shards(folder: Path, target: Path) -> Merged:
    """Make one file of all shards, in the order of the listing, after checking that they are complete and of one run.

    The records are compared with the listing's hash, so that none is missing, doubled or of another image. Memory does
    not grow with their number; each shard's file is open at the same time.

    Args:
        folder: with the shards of one run.
        target: the file, `.parquet` or `.jsonl` as they are.

    Raises:
        UsageError: `folder` is not one, or the name has another suffix.
        CheckError: shards are missing, unfinished, doubled, or of different runs.
        RecordsError: a shard is damaged.
    """
    kind, shards = _find_shards(folder)
    if target.suffix != f".{kind}":
        raise UsageError(f"the shards are {KINDS[kind]}", where=target, fix=f"end it in .{kind}")
    if kind == "parquet":
        parquet.require_parquet()
    parts = [_Part(shard, shard.file(folder, kind), read_facts(shard.file(folder, kind))) for shard in shards]
    _check_parts(parts)
    first = parts[0].facts
    facts = replace(
        first,
        shard=None,
        images=sum(part.facts.images for part in parts),
        failed=sum(part.facts.failed for part in parts),
    )
    with replacing(target) as temporary:
        sha256 = (_merge_parquet if kind == "parquet" else _merge_jsonl)(parts, temporary, facts)
        if sha256 != first.listing["sha256"]:
            raise _not_the_listings(folder)
    return Merged(facts, len(parts))


def _not_the_listings(where: Path) -> CheckError:
    return CheckError("records are not those of the listing", where=where, fix="delete the shards, and run them again")


def _find_shards(folder: Path) -> tuple[str, list[Shard]]:
    """The format and the shards in a folder, in their order, after checking that they are all there and finished."""
    if not folder.is_dir():
        raise UsageError("is not a folder", where=folder, fix="give the folder of smlp predict --shard")
    matches = [match for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    if not matches:
        raise CheckError("has no shards", where=folder, fix="smlp predict --shard writes them")
    fix = "merge one set of shards; move the other elsewhere"
    counts = sorted({int(match[2]) for match in matches})
    if len(counts) > 1:
        raise CheckError(f"has shards of {counts[0]} and of {counts[1]}", where=folder, fix=fix)
    kinds = sorted({match[3] for match in matches})
    if len(kinds) > 1:
        raise CheckError(f"has shards in {' and in '.join(KINDS[kind] for kind in kinds)}", where=folder, fix=fix)
    shards = [Shard(number, counts[0]) for number in range(1, counts[0] + 1)]
    started, finished = ({int(match[1]) for match in matches if bool(match[4]) is partial} for partial in (True, False))
    _require_all([shard for shard in shards if shard.number in started], folder, "not finished")
    _require_all([shard for shard in shards if shard.number not in finished], folder, "missing")
    return kinds[0], shards


def _require_all(wrong: Sequence[Shard], folder: Path, what: str) -> None:
    if wrong:
        shown = ", ".join(map(str, wrong[:10])) + (f" and {len(wrong) - 10} others" if len(wrong) > 10 else "")
        these = f"shard {shown} is" if len(wrong) == 1 else f"shards {shown} are"
        fix = f"run smlp predict --shard {wrong[0]} with the same options and --resume"
        raise CheckError(f"{these} {what}", where=folder, fix=fix)


def _check_parts(parts: Sequence[_Part]) -> None:
    """Check that all parts are of one run, each under its own name and with as many images as it should have."""
    first = parts[0].facts
    for part in parts:
        if part.facts.shard != str(part.shard):
            raise CheckError(f"holds shard {part.facts.shard}", where=part.path, fix="delete it, and run its shard")
        if different := difference(first, replace(part.facts, shard=first.shard)):
            fix = "delete those that are not wanted, and run them again"
            raise CheckError(f"shards are of different runs: {different}", where=part.path, fix=fix)
        if part.facts.images != part.shard.size(first.listing["images"], batch_size=first.run["batch_size"]):
            raise _not_the_listings(part.path)


def _merge_jsonl(parts: Sequence[_Part], target: Path, facts: Facts) -> str:
    """Write the lines of all parts in the order of the listing; returns the hash of their paths."""
    size = facts.run["batch_size"]
    names = NamesHash()
    with ExitStack() as stack, target.open("wb") as merged:
        files = [stack.enter_context(_open(part.path)) for part in parts]
        for lines in _dealt([_in_groups(file, size) for file in files], parts):
            for line in lines:
                try:
                    names.add(name_bytes(json.loads(line)["path"]))
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise _not_the_listings(parts[0].path.parent) from None
            merged.writelines(lines)
    return names.hexdigest()


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        what = f"cannot read: {error.strerror}"
        if error.errno == errno.EMFILE:
            raise SmlpError(what, where=path, fix="raise the limit with ulimit -n") from None
        raise RecordsError(what, where=path) from None


def _in_groups(lines: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    remaining = iter(lines)
    while group := list(islice(remaining, size)):
        yield group


def _merge_parquet(parts: Sequence[_Part], target: Path, facts: Facts) -> str:
    """Write the rows of all parts in the order of the listing; returns the hash of their paths."""
    size = facts.run["batch_size"]
    names = NamesHash()
    with ExitStack() as stack:
        files = [stack.enter_context(_open(part.path)) for part in parts]
        read = (parquet.read_batches(file, part.path) for file, part in zip(files, parts, strict=True))
        pieces = [parquet.regroup(batches, size) for batches in read]
        batches = parquet.regroup(_dealt(pieces, parts), parquet.ROW_GROUP)
        parquet.write_batches(target, parquet.counting_names(batches, names), facts)
    return names.hexdigest()


def _dealt(pieces: Sequence[Iterator[T]], parts: Sequence[_Part]) -> Iterator[T]:
    """The batches of all parts in turn, up to the first part that has no more, which has to be the end of all."""
    while True:
        for piece in pieces:
            batch = next(piece, None)
            if batch is None:
                if any(next(other, None) is not None for other in pieces):
                    raise _not_the_listings(parts[0].path.parent)
                return
            yield batch
