"""Damage: one flipped bit in a checkpoint is refused by the name of its member, or changes nothing that is read."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from smlp_deploy.errors import CheckpointError
from smlp_deploy.models.checkpoint import load_checkpoint
from smlp_deploy.models.smlpnet import SMLPNet
from smlp_deploy.models.torchfile import StoredTensor, open_torch_file
from tests.support.recipe import CASES, config_of, recipe_weights

CONFIG = config_of(CASES["micro"])
SMALL = {"model": {"a": torch.arange(5.0), "b": torch.ones(2, 2), "c": torch.tensor(7)}, "epoch": 3}


def official() -> dict[str, Any]:
    """A training checkpoint: moving averages, optimizer and arguments beside the weights."""
    weights = recipe_weights(CONFIG, 1)
    network = SMLPNet(CONFIG)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    arguments = argparse.Namespace(model="smlpnet_tiny", lr=1e-3)
    return {"model": weights, "model_ema": weights, "optimizer": optimizer.state_dict(), "args": arguments}


STYLES: dict[str, Callable[[], dict[str, Any]]] = {
    "official": official,
    "bare": lambda: recipe_weights(CONFIG, 1),
    "module.": lambda: {f"module.{key}": tensor for key, tensor in recipe_weights(CONFIG, 1).items()},
}


def members(path: Path) -> dict[str, range]:
    """Where in the file the bytes of each member lie."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        found = {}
        for member in archive.infolist():
            at = member.header_offset
            name, extra = (int.from_bytes(content[at + i : at + i + 2], "little") for i in (26, 28))
            start = at + 30 + name + extra
            found[member.filename] = range(start, start + member.file_size)
    return found


@contextmanager
def flipped(path: Path, at: int, bit: int) -> Iterator[None]:
    """The file with one bit flipped, and afterwards as it was."""
    with path.open("r+b", buffering=0) as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))
        yield
        file.seek(at)
        file.write(bytes([byte]))


def damage_to(member: str) -> str:
    what = f"damaged torch file: the member {member!r} does not have the checksum that the archive states"
    return f"^{re.escape(what)}"


def saved(tmp_path: Path, content: object, name: str = "small.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def read(path: Path) -> tuple[Any, list[Tensor]]:
    """What a small file holds, and the values of its tensors."""
    with open_torch_file(path) as file:
        tensors = [value for value in file.content["model"].values() if isinstance(value, StoredTensor)]
        for tensor in tensors:
            file.check(tensor, "a tensor")
        return file.content, [file.read(tensor).clone() for tensor in tensors]


@pytest.mark.parametrize("style", STYLES)
def test_a_flipped_bit_in_any_member_is_refused_by_name(tmp_path: Path, style: str) -> None:
    path = saved(tmp_path, STYLES[style]())
    load_checkpoint(path)
    rng = Random(style)
    found = members(path)
    assert {"small/data.pkl", "small/data/0", "small/byteorder", "small/version"} <= found.keys()
    assert "small/.data/serialization_id" in found
    for member, where in found.items():
        if style != "bare" and "small/data/" in member and rng.random() < 0.95:
            continue
        for at in {where[0], where[len(where) // 2], where[-1], rng.choice(where)}:
            with flipped(path, at, rng.randrange(8)), pytest.raises(CheckpointError, match=damage_to(member)):
                load_checkpoint(path)
    load_checkpoint(path)


def test_any_flipped_bit_in_the_members_of_a_small_file_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path, SMALL)
    for member, where in members(path).items():
        for at in where:
            with (
                flipped(path, at, at % 8),
                pytest.raises(CheckpointError, match=damage_to(member)),
                open_torch_file(path),
            ):
                pass


# With names of 18 characters an entry of the table of contents takes 64 bytes: one bit of a comment's length hides it.
@pytest.mark.parametrize("name", ["small.pth", "eleven_long.pth"])
def test_a_flipped_bit_between_the_members_is_refused_or_changes_nothing(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, SMALL, name)
    content, values = read(path)
    inside = {at for where in members(path).values() for at in where}
    refused, same = set(), 0
    for at in set(range(path.stat().st_size)) - inside:
        with flipped(path, at, at % 8):
            try:
                content_then, values_then = read(path)
            except CheckpointError as error:
                refused.add(error.what)
            else:
                assert content_then == content
                assert all(map(torch.equal, values_then, values))
                same += 1
    assert same > 0
    assert any("does not begin where and as" in what for what in refused)
    assert all(
        re.match("damaged torch file|refused: |not a zip-format torch file|not a torch file", w) for w in refused
    )


@pytest.mark.parametrize("offset", [26, 28], ids=["name", "extra"])
def test_a_local_header_that_moves_the_data_is_refused(tmp_path: Path, offset: int) -> None:
    path = saved(tmp_path, SMALL)
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("small/data/0").header_offset + offset
    reason = r"^damaged torch file: the member 'small/data/0' does not (begin|have the checksum)"
    for bit in range(16):
        with flipped(path, at + bit // 8, bit % 8), pytest.raises(CheckpointError, match=reason):
            read(path)


def test_a_member_that_its_table_of_contents_hides_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, SMALL, "eleven_long.pth")
    entry = path.read_bytes().rfind(b"eleven_long/data/0") - 46
    with flipped(path, entry + 32, 6), zipfile.ZipFile(path) as archive:
        assert "eleven_long/data/1" not in archive.namelist()
    reason = "^damaged torch file: its table of contents states 9 members but has 8"
    with flipped(path, entry + 32, 6), pytest.raises(CheckpointError, match=reason):
        read(path)


class Runs:
    """Unpickling it calls a function."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.system, ("true",)


def test_checksums_are_compared_before_anything_is_interpreted(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps(Runs(), protocol=4))
        archive.writestr("m/data/0", bytes(16))
    with pytest.raises(CheckpointError, match="nothing was run"), open_torch_file(path):
        pass
    with (
        flipped(path, members(path)["m/data/0"][3], 3),
        pytest.raises(CheckpointError, match=damage_to("m/data/0")),
        open_torch_file(path),
    ):
        pass


def test_checksums_are_compared_in_little_memory(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": SMALL["model"], "optimizer": torch.zeros(16 << 20)})
    tracemalloc.start()
    try:
        read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_a_file_without_checksums_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path, SMALL)
    finally:
        torch.serialization.set_crc32_options(True)
    reason = r"^saved without checksums \(torch\.serialization\.set_crc32_options\).* save it again with checksums$"
    with pytest.raises(CheckpointError, match=reason):
        read(path)
    # What the message tells to do.
    torch.save(torch.load(path, weights_only=True), path)
    read(path)


def test_an_empty_storage_needs_no_checksum(tmp_path: Path) -> None:
    path = saved(tmp_path, {"none": torch.zeros(0), "some": torch.ones(1)})
    with open_torch_file(path) as file:
        assert [tensor.shape for tensor in file.content.values()] == [(0,), (1,)]
