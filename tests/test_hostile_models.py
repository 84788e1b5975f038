"""Hostile checkpoints: each is refused in one line, runs nothing, and takes little memory and time."""

from __future__ import annotations

import functools
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from smlp_deploy.errors import CheckpointError, SmlpError
from smlp_deploy.models import torchfile
from smlp_deploy.models.checkpoint import load_checkpoint
from tests.support.recipe import CASES, config_of, recipe_weights

CONFIG = config_of(CASES["micro"])
KEY = "mlp_head.0.weight"


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return recipe_weights(CONFIG, 1)


def packed(path: Path, pickled: bytes, storages: Mapping[str, bytes] | None = None) -> Path:
    """A zip-format torch file of this pickle and these storages."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/byteorder", b"little")
        for name, content in (storages or {}).items():
            archive.writestr(f"m/data/{name}", content)
    return path


# --- instructions of a pickle, by hand --------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<L", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(*, kind: str = "Float", name: str = "0", elements: int = 4, location: str = "cpu") -> bytes:
    identity = text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(name) + text(location) + number(elements)
    return b"(" + identity + b"tQ"


def tensor(
    stored: bytes, *, offset: int = 0, shape: tuple[int, ...] = (2, 2), stride: tuple[int, ...] = (2, 1)
) -> bytes:
    arguments = stored + number(offset) + numbers(shape) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def state_dict(**values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in values.items()) + b"u."


def one_tensor(path: Path, described: bytes, *, held: int = 16) -> Path:
    return packed(path, state_dict(weight=described), {"0": bytes(held)})


# --- code -------------------------------------------------------------------------------------------------------------


class Runs:
    """Unpickling it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def calls(proof: Path) -> dict[str, Any]:
    command = f"touch {proof}"
    return {
        "os.system": Runs(os.system, command),
        "eval": Runs(eval, f"open({str(proof)!r}, 'w')"),
        "exec": Runs(exec, f"open({str(proof)!r}, 'w')"),
        "subprocess": Runs(subprocess.call, ["touch", str(proof)]),
        "partial": Runs(functools.partial(os.system, command)),
        "nested": {"model": [({"deep": [Runs(os.system, command)]},)]},
        "an argument": Runs(dict, Runs(os.system, command)),
        "torch.load": Runs(torch.load, str(proof)),
        "a numpy array": np.zeros(3),
        "a network": torch.nn.Linear(1, 1),
    }


@pytest.mark.parametrize("case", sorted(calls(Path("x"))))
def test_no_code_beside_the_weights_is_run_or_built(tmp_path: Path, weights: dict[str, Tensor], case: str) -> None:
    proof, path = tmp_path / "proof", tmp_path / "model.pth"
    torch.save({"extra": calls(proof)[case], "model": weights}, path)
    checkpoint = load_checkpoint(path)
    assert torch.equal(checkpoint.state_dict[KEY], weights[KEY])
    assert checkpoint.not_built
    assert not proof.exists()


@pytest.mark.parametrize("case", sorted(calls(Path("x"))))
def test_no_code_in_the_weights_place_is_run(tmp_path: Path, weights: dict[str, Tensor], case: str) -> None:
    proof = tmp_path / "proof"
    call = calls(proof)[case]
    for name, content, reason in [
        ("whole", call, r"^holds (a [\w.]+, not a state dict|no weights)"),
        ("model", {"model": call, "epoch": 3}, r"^(its weights are a [\w.]+, which is not built|holds no weights)"),
        ("tensor", {"model": weights | {KEY: call}}, rf"^'{KEY}' is a [\w.]+, not a tensor"),
    ]:
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=reason):
            load_checkpoint(path)
    assert not proof.exists()


@pytest.mark.parametrize("case", sorted(calls(Path("x"))))
@pytest.mark.parametrize("protocol", [4, 5])
def test_no_instruction_is_read_that_is_not_torchs(
    tmp_path: Path, weights: dict[str, Tensor], case: str, protocol: int
) -> None:
    proof, path = tmp_path / "proof", tmp_path / "model.pth"
    torch.save({"model": weights, "extra": calls(proof)[case]}, path, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=r"^refused, and nothing was run: the file uses FRAME"):
        load_checkpoint(path)
    assert not proof.exists()


HAND_MADE = {
    "global": b"cposix\nsystem\n" + text("touch PROOF") + b"\x85R.",
    "inst": b"(" + text("touch PROOF") + b"iposix\nsystem\n.",
    "obj": b"(cposix\nsystem\n" + text("touch PROOF") + b"o.",
    "stack global": text("posix") + text("system") + b"\x93" + text("touch PROOF") + b"\x85R.",
    "extension": b"\x82\x01)R.",
    "python 2's name": b"c__builtin__\neval\n" + text("1") + b"\x85R.",
    "through a module": b"ctorch.os\nsystem\n" + text("touch PROOF") + b"\x85R.",
    "attribute of an allowed class": b"\x80\x04\x8c\x08argparse\x8c\x17Namespace.__init__.__globals__\x93.",
    "named like an allowed one": b"cargparse Namespace\n\n)R.",
    "allowed by torch, not by us": b"c_codecs\nencode\n" + text("x") + b"\x85R.",
}


@pytest.mark.parametrize("case", HAND_MADE)
def test_no_code_is_run_whatever_the_instruction(tmp_path: Path, case: str) -> None:
    proof = tmp_path / "proof"
    # The paths differ in length, and so would the text.
    program = HAND_MADE[case].replace(text("touch PROOF"), text(f"touch {proof}"))
    reason = r"^refused, and nothing was run|^damaged torch file|^holds a [\w. ]+, not a state dict"
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(packed(tmp_path / "model.pth", program))
    assert not proof.exists()


@pytest.mark.parametrize(
    "program",
    [
        # What may be named may still not be called with anything, built on, or extended, to any effect.
        b"cargparse\nNamespace\n(}" + text("x") + b"tR}" + text("__class__") + text("y") + b"sb.",
        b"ctorch\nSize\n(" + number(1 << 60) + b"tR.",
        b"ctorch\ndevice\n" + text("cuda") + b"\x85R.",
        b"ccollections\nCounter\n" + text("x" * 1000) + b"\x85R.",
        b"ctorch\nFloatStorage\n" + number(1 << 40) + b"\x85R.",
        b"ctorch\nFloatStorage\n" + number(1 << 40) + b"\x85\x81.",
    ],
)
def test_what_may_be_named_is_not_called(tmp_path: Path, program: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^holds a [\w.]+, not a state dict"):
        load_checkpoint(packed(tmp_path / "model.pth", program))


@pytest.mark.parametrize("kind", ["pickle", "tar", "legacy"])
def test_formats_before_zip_are_not_read(tmp_path: Path, weights: dict[str, Tensor], kind: str) -> None:
    path, proof = tmp_path / "model.pth", tmp_path / "proof"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Runs(os.system, f"touch {proof}")))
    elif kind == "legacy":
        torch.save({"model": weights}, path, _use_new_zipfile_serialization=False)
    else:
        (tmp_path / "pickle").write_bytes(pickle.dumps(Runs(os.system, f"touch {proof}")))
        with tarfile.open(path, "w") as archive:
            archive.add(tmp_path / "pickle", "storages")
    with pytest.raises(CheckpointError, match=r"^not a zip-format torch file"):
        load_checkpoint(path)
    assert not proof.exists()


def test_a_pickle_with_an_archive_behind_it_is_read_as_the_archive(tmp_path: Path, micro_pth: Path) -> None:
    # torch.load would take this for the legacy format, and run the pickle at its beginning.
    proof, path = tmp_path / "proof", tmp_path / "model.pth"
    path.write_bytes(pickle.dumps(Runs(os.system, f"touch {proof}"), 2) + micro_pth.read_bytes())
    assert load_checkpoint(path).config == CONFIG
    assert not proof.exists()


# --- claims about sizes -----------------------------------------------------------------------------------------------


LYING_TENSORS = {
    "more than the storage": (tensor(storage(), shape=(1 << 20, 4)), "claims more values"),
    "terabytes of one value": (tensor(storage(), shape=(1 << 40, 1), stride=(0, 0)), "claims more values"),
    "a far offset": (tensor(storage(), offset=1 << 40), "claims more values"),
    "an offset one too far": (tensor(storage(), offset=1), "claims more values"),
    "a long stride": (tensor(storage(), stride=(1 << 50, 1)), "claims more values"),
    "an enormous size": (tensor(storage(), shape=(1 << 62, 1 << 62)), "claims more values"),
    "a storage larger than its record": (tensor(storage(elements=1 << 40)), "claims more values"),
    "a storage that is not there": (tensor(storage(name="7")), "the values of 'weight' are not in it"),
    "a storage outside": (tensor(storage(name="../../../etc/passwd")), "the values of 'weight' are not in it"),
    "a negative stride": (tensor(storage(), offset=3, stride=(-2, -1)), "damaged torch file"),
    "a negative offset": (tensor(storage(), offset=-1), "damaged torch file"),
    "a negative size": (tensor(storage(), shape=(-2, -2)), "damaged torch file"),
    "a size beyond all machines": (tensor(storage(), shape=(1 << 200, 1)), "damaged torch file"),
    "fewer strides than sizes": (tensor(storage(), stride=(1,)), "damaged torch file"),
    "a thousand axes": (tensor(storage(), shape=(1,) * 1000, stride=(1,) * 1000), "damaged torch file"),
    "a negative storage": (tensor(storage(elements=-4)), "damaged torch file"),
    "no storage": (tensor(text("storage")), "damaged torch file"),
    "a storage of no type": (tensor(storage(kind="Untyped")), "'weight' is a torch.UntypedStorage"),
    "complex": (tensor(storage(kind="ComplexFloat")), "'weight' is a torch.ComplexFloatStorage"),
    "quantized": (tensor(storage(kind="QInt8")), "'weight' is a torch.QInt8Storage"),
}


@pytest.mark.parametrize("case", LYING_TENSORS)
def test_a_tensor_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    described, reason = LYING_TENSORS[case]
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(one_tensor(tmp_path / "model.pth", described))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda t: t.to_sparse(), f"'{KEY}' is a torch._utils._rebuild_sparse_tensor"),
        (lambda t: t.to_sparse_csr(), f"'{KEY}' is a torch._utils._rebuild_sparse"),
        (lambda t: t.to("meta"), f"'{KEY}' is a torch._utils._rebuild_meta_tensor"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), f"'{KEY}' is a torch._utils._rebuild_qtensor"),
        (lambda t: t.to(torch.complex64), f"'{KEY}' is a torch.ComplexFloatStorage"),
        (lambda t: t.to(torch.float8_e5m2), f"'{KEY}' is a "),
        (lambda t: t.to(torch.int64), f"'{KEY}' is int64, expected float32"),
        (lambda t: t.bool(), f"'{KEY}' is bool, expected float32"),
        (lambda t: t.tolist(), f"'{KEY}' is a list, not a tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*:")
def test_what_is_no_plain_tensor_of_floats_is_refused(
    tmp_path: Path, weights: dict[str, Tensor], make: Callable[[Tensor], Any], reason: str
) -> None:
    torch.save({**weights, KEY: make(weights[KEY])}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(tmp_path / "model.pth")


def test_tensors_that_share_a_storage_are_read(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    whole = torch.arange(2 * weights[KEY].numel(), dtype=torch.float32)
    tied = "token_mix.0.1.proj_h.weight", "token_mix.0.1.proh_w.weight"
    weights[KEY] = whole[1::2].reshape(weights[KEY].shape)
    weights[tied[0]] = weights[tied[1]]
    torch.save(weights, tmp_path / "model.pth")
    state = load_checkpoint(tmp_path / "model.pth").state_dict
    assert torch.equal(state[KEY], weights[KEY])
    assert torch.equal(state[tied[0]], weights[tied[1]])
    state[tied[0]].add_(1)
    assert torch.equal(state[tied[1]], weights[tied[1]])


def test_one_storage_for_everything_is_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    largest = torch.zeros(max(tensor.numel() for tensor in weights.values()))
    shared = {
        f"{key}{copy}": largest[: tensor.numel()].view(tensor.shape)
        for key, tensor in weights.items()
        for copy in range(9)
    }
    torch.save(shared, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="its tensors share values and claim far more than it holds"):
        load_checkpoint(tmp_path / "model.pth")


# --- pickles that mean to keep the reader busy ------------------------------------------------------------------------


def tuples_of_tuples(times: int) -> bytes:
    """A tuple of 2^times elements in a few bytes, as a key: hashing it takes forever."""
    return b"}" + b"))\x86" + b"q\x00h\x00\x86" * times + b"Ns"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (tuples_of_tuples(200), "holds no state dict"),
        (b"])" + b"q\x00h\x00\x86" * 200 + b"a", "holds a list"),
        (b"]q\x00h\x00a", "holds a list"),
        (b"}q\x00" + text("model") + b"h\x00s", "'model' is a dict, not a tensor"),
        (b"]" * 100_000 + b"a" * 99_999, "holds a list"),
        (b"(" * 100_000 + b"t" * 100_000, "holds a tuple"),
        (b"}" + text("x" * 100_000) + b"Ns", "a name of more than 200 characters"),
        (b"\x8b\xff\xff\xff\x7f" + b"\x01" * 100, "damaged torch file"),
        (b"\x8a\xff" + b"\x01" * 255, "holds a int"),
        (b"\x8e" + b"\xff" * 7 + b"\x7f" + b"x", "damaged torch file"),
        (b"X\xff\xff\xff\xffabc", "damaged torch file"),
        (b"\x96" + b"\xff" * 8, "damaged torch file"),
        (b"", "holds a|damaged torch file"),
        (b"t", "damaged torch file"),
        (b"h\x05", "damaged torch file"),
        (b"NNs", "damaged torch file"),
        (b")R", "damaged torch file"),
        (b"Q", "damaged torch file"),
        (b"N(Nu", "damaged torch file"),
        (b"\x00", "damaged torch file"),
    ],
)
def test_a_pickle_that_makes_no_sense_ends_quickly(tmp_path: Path, program: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(packed(tmp_path / "model.pth", b"\x80\x02" + program + b"."))


def test_the_bounds_of_a_pickle_hold(
    tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pth"
    torch.save(weights, path)
    load_checkpoint(path)
    for bound, reason in [
        ("MAX_INSTRUCTIONS", "more than 100 instructions"),
        ("MAX_PICKLE_BYTES", r"no data\.pkl of sensible size"),
        ("MAX_DIRECTORY_BYTES", "table of contents has more than 100 bytes"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(torchfile, bound, 100)
            with pytest.raises(CheckpointError, match=reason):
                load_checkpoint(path)


def test_more_names_than_any_network_has_are_refused(tmp_path: Path) -> None:
    # One small tensor under very many names; 3 bytes each would do.
    blocks = b"".join(text(f"token_mix.{i}.0.conv_merge.Conv.weight") + b"h\x00" for i in range(70_000))
    first = text("first") + tensor(storage()) + b"q\x00"
    packed(tmp_path / "model.pth", b"\x80\x02}(" + first + blocks + b"u.", {"0": bytes(16)})
    with pytest.raises(CheckpointError, match="more than 65536 tensors"):
        load_checkpoint(tmp_path / "model.pth")


# --- archives ---------------------------------------------------------------------------------------------------------


def changed(path: Path, old: bytes, new: bytes, *, last: bool = False) -> None:
    content = path.read_bytes()
    at = content.rfind(old) if last else content.find(old)
    assert at >= 0
    path.write_bytes(content[:at] + new + content[at + len(old) :])


def test_a_bomb_is_not_inflated(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", state_dict(weight=tensor(storage())))
        archive.writestr("m/data/0", bytes(100 << 20))
    with pytest.raises(CheckpointError, match="members are compressed"):
        load_checkpoint(path)


def test_names_that_differ_in_case_are_refused(tmp_path: Path, micro_pth: Path) -> None:
    with zipfile.ZipFile(micro_pth, "a") as archive:
        archive.writestr("micro/DATA.pkl", b"another opinion")
    with pytest.raises(CheckpointError, match="a member of the archive occurs twice"):
        load_checkpoint(micro_pth)


@pytest.mark.parametrize("behind", [b"x", b"x" * 1000])
def test_something_behind_the_archive_is_refused(micro_pth: Path, behind: bytes) -> None:
    micro_pth.write_bytes(micro_pth.read_bytes() + behind)
    with pytest.raises(CheckpointError, match=r"something follows the archive|not a zip-format"):
        load_checkpoint(micro_pth)


@pytest.mark.parametrize("last", [False, True], ids=["local header", "central directory"])
def test_headers_that_contradict_each_other_are_refused(micro_pth: Path, last: bool) -> None:
    changed(micro_pth, b"micro/data/0", b"micro/data/~", last=last)
    with pytest.raises(CheckpointError, match=r"damaged torch file|are not in it"):
        load_checkpoint(micro_pth)


def test_a_member_that_claims_to_lie_outside_is_refused(micro_pth: Path) -> None:
    content = bytearray(micro_pth.read_bytes())
    entry = content.rfind(b"micro/data/0") - 46
    assert content[entry : entry + 4] == b"PK\1\2"
    struct.pack_into("<L", content, entry + 42, 0xFFFF_FF00)
    micro_pth.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged torch file"):
        load_checkpoint(micro_pth)


def test_a_member_that_claims_gigabytes_is_refused(micro_pth: Path) -> None:
    content = bytearray(micro_pth.read_bytes())
    entry = content.rfind(b"micro/data/0") - 46
    struct.pack_into("<LL", content, entry + 20, 0xF000_0000, 0xF000_0000)
    micro_pth.write_bytes(content)
    with pytest.raises(CheckpointError, match="members claim more bytes than the file has"):
        load_checkpoint(micro_pth)


def test_encrypted_members_are_refused(micro_pth: Path) -> None:
    content = bytearray(micro_pth.read_bytes())
    entry = content.rfind(b"micro/data/0") - 46
    content[entry + 8] |= 1
    micro_pth.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged torch file"):
        load_checkpoint(micro_pth)


def test_another_byte_order_is_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "model.pth", state_dict(weight=tensor(storage())), {"0": bytes(16)})
    content = path.read_bytes().replace(b"little", b"biggie")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"big-endian|damaged"):
        load_checkpoint(path)


# --- files that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_only_regular_files_are_opened(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / f"empty{suffix}").touch()
    (tmp_path / f"loop{suffix}").symlink_to(f"loop{suffix}")
    for name, reason in [
        ("pipe", "is not a regular file"),
        ("folder", "is a directory"),
        ("empty", "empty file"),
        ("absent", "no such file"),
        ("loop", "cannot read it: Too many levels of symbolic links"),
    ]:
        with pytest.raises(CheckpointError, match=rf"^{reason} · .*{name}"):
            load_checkpoint(tmp_path / f"{name}{suffix}")


# --- safetensors ------------------------------------------------------------------------------------------------------


def entry(name: str = "a", *, dtype: str = "F32", shape: str = "[1]", offsets: str = "[0,4]") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (f"{{{entry()},{entry()}}}", "occurs twice"),
        ('{"__metadata__":{"a":"1"},"__metadata__":{"a":"2"}}', "occurs twice"),
        (f"{{{entry('a')},{entry('b')}}}", "damaged safetensors file"),
        (f"{{{entry(offsets='[0,400]')}}}", "damaged safetensors file"),
        (f"{{{entry(offsets='[4,0]')}}}", "damaged safetensors file"),
        (f"{{{entry(offsets='[-4,0]')}}}", "damaged safetensors file"),
        (f"{{{entry(shape='[1,99999999999]')}}}", "damaged safetensors file"),
        (f"{{{entry(shape='[4294967296,4294967296,4294967296]')}}}", "damaged safetensors file"),
        (f"{{{entry(shape='[-1]')}}}", "damaged safetensors file"),
        (f"{{{entry(shape='[1e999]')}}}", "damaged safetensors file"),
        (f"{{{entry(dtype='PICKLE')}}}", "damaged safetensors file"),
        (f"{{{entry(dtype='I32')}}}", "'a' is I32, expected float32"),
        (f"{{{entry('x' * 1000)}}}", "a name of more than 200 characters"),
        (f"{{{','.join(entry(str(i)) for i in range(66_000))}}}", "more than 65536 tensors"),
        ('{"__metadata__":{"a":1}}', "damaged safetensors file"),
        ("{}", "damaged safetensors file|not an sMLPNet"),
        ("[]", "its header is not"),
        ("[" * 100_000, "its header is not"),
        ("{", "its header is not"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_a_header_of_safetensors_that_lies_is_refused(tmp_path: Path, header: str, reason: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(path)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 1 << 30, 1 << 62, (1 << 64) - 1])
def test_a_length_of_safetensors_that_lies_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match="damaged safetensors file"):
        load_checkpoint(path)


def test_safetensors_with_values_that_are_no_numbers_are_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    weights[KEY][0, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"'{KEY}' has values that are NaN"):
        load_checkpoint(tmp_path / "model.safetensors")


# --- the JSON beside a checkpoint -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "metadata is damaged"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[" * 100_000, "metadata is damaged: nested more than 32 deep"),
        (b'{"training": ' + b"[" * 50 + b"]" * 50 + b"}", "nested more than 32 deep"),
        (b'{"training": {"loss": 1e999}}', "1e999 is not a finite number"),
        (b'{"training": {"loss": NaN}}', "NaN is not a finite number"),
        (b'{"training": {"loss": -Infinity}}', "-Infinity is not a finite number"),
        (b'{"training": [1]}', "Expected `object`, got `array` - .*training"),
        (b'{"labels": ["a"], "labels": ["b"]}', "a key occurs twice"),
        (b'{"labels": ["\\ud800"]}', "half a character"),
        (b'{"labels": ["' + b"x" * 2000 + b'"]}', "Expected `str` of length <= 1000 - .*labels"),
        (b'{"labels": [1, 2]}', "Expected `str`, got `int` - .*labels"),
        (b'{"preprocessing": {"crop_pct": "1"}}', "metadata is damaged: Expected .*, got `str` - .*crop_pct"),
        (b'{"preprocessing": {"std": [1, 1, 1e-300]}}', "std is not three positive numbers"),
        (b'{"preprocessing": {"interpolation": ["bicubic"]}}', "Expected `str`, got `array` - .*interpolation"),
        (b'{"preprocessing": [1]}', "metadata is damaged"),
        (b'{"preprocessing": {"' + b"x" * 9999 + b'": 1}}', r"unknown field 'x{100,300}\.\.\. "),
        (b'{"schema": ' + b"9" * 4000 + b"}", r"metadata schema 9{300}\.\.\. is not 1"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "metadata is damaged: Exceeds the limit"),
        (b'"' + b"x" * (16 << 20) + b'"', "is larger than 4194304 bytes"),
    ],
    ids=lambda value: value[:40] if isinstance(value, bytes) else None,
)
def test_a_hostile_json_beside_a_checkpoint_is_refused(micro_pth: Path, content: bytes, reason: str) -> None:
    micro_pth.with_suffix(".json").write_bytes(content)
    with pytest.raises(SmlpError, match=reason) as caught:
        load_checkpoint(micro_pth)
    assert "micro.json" in str(caught.value)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_json_that_is_no_file_is_left_alone(micro_pth: Path, kind: str) -> None:
    beside = micro_pth.with_suffix(".json")
    if kind == "folder":
        beside.mkdir()
    else:
        os.mkfifo(beside)
    assert load_checkpoint(micro_pth).metadata.labels is None


# --- memory -----------------------------------------------------------------------------------------------------------


MEASURE = """
import resource, sys
from pathlib import Path
from smlp_deploy.errors import SmlpError
from smlp_deploy.models.checkpoint import load_checkpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

for path in map(Path, sys.argv[1:]):
    before = peak()
    try:
        load_checkpoint(path)
        told = "loaded"
    except SmlpError as error:
        told = str(error)
    print(path.stat().st_size, peak() - before, told.replace(chr(10), " "))
"""
TIMES, CONSTANT = 8, 300 << 20


def test_memory_stays_within_a_multiple_of_the_file(
    tmp_path: Path, micro_pth: Path, weights: dict[str, Tensor]
) -> None:
    many_objects = b"\x80\x02]" + b"}a" * 900_000 + b"."
    first = text("k") + tensor(storage(elements=1 << 20), shape=(1 << 20,), stride=(1,)) + b"q\x00"
    aliased = b"\x80\x02}(" + first + b"".join(text(f"k{i}") + b"h\x00" for i in range(60_000))
    names = b"".join(b"cm\n%d\n" % i for i in range(900_000))
    called = b"cposix\n" + b"x" * (1 << 20) + b"\nq\x00" + b"h\x00)R" * 400_000
    prefixed = {f"{i}.{key}": tensor for i in range(300) for key, tensor in list(weights.items())[:9]}
    torch.save(prefixed | {f"{i}.{KEY}": weights[KEY] for i in range(300)}, tmp_path / "prefixed.pth")
    wide = dict(weights) | {"mlp_head.0.weight": torch.zeros(1).expand(1 << 30, 64)}
    torch.save(wide, tmp_path / "wide.pth")
    large = {"model": weights, "optimizer": torch.zeros(16 << 20)}
    torch.save(large, tmp_path / "large.pth")
    files = [
        micro_pth,
        packed(tmp_path / "objects.pth", many_objects),
        packed(tmp_path / "names.pth", b"\x80\x02" + names + b"."),
        packed(tmp_path / "called.pth", b"\x80\x02" + called + b"."),
        tmp_path / "prefixed.pth",
        packed(tmp_path / "aliased.pth", aliased + b"u.", {"0": bytes(4 << 20)}),
        one_tensor(tmp_path / "terabytes.pth", tensor(storage(), shape=(1 << 36, 4))),
        one_tensor(tmp_path / "strided.pth", tensor(storage(), shape=(1 << 40, 1), stride=(0, 0))),
        one_tensor(tmp_path / "claimed.pth", tensor(storage(elements=1 << 36))),
        packed(tmp_path / "tuples.pth", b"\x80\x02" + tuples_of_tuples(5000) + b"."),
        packed(tmp_path / "deep.pth", b"\x80\x02" + b"]" * 900_000 + b"a" * 899_999 + b"."),
        tmp_path / "wide.pth",
        tmp_path / "large.pth",
    ]
    command = [sys.executable, "-c", MEASURE, *map(str, files)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    told = {}
    for path, line in zip(files, output.splitlines(), strict=True):
        size, growth, told[path.stem] = line.split(" ", 2)
        assert int(growth) <= TIMES * int(size) + CONSTANT, line
    assert {name for name, what in told.items() if what == "loaded"} == {"micro", "large"}
    assert "claim far more than it holds" in told["aliased"]


def test_nested_training_metadata_survives(micro_pth: Path) -> None:
    document = {"labels": list("abcdefghij"), "training": {"deep": [[[[1]]]], "loss": 1e300}}
    micro_pth.with_suffix(".json").write_text(json.dumps(document))
    assert load_checkpoint(micro_pth).metadata.training == document["training"]
