"""`.pth` files without torch.load: the pickle inside is interpreted as a description, and tensors are read one by one.

A pickle is a program. This reader knows only the instructions that `torch.save` writes, and builds only plain data,
`StoredTensor`s and `Placeholder`s: nothing is imported or called, whatever the file asks for. What a training script
saves beside its weights (metrics, hyperparameters, paths) becomes a placeholder, which keeps nothing but a name. Before
that, every member of the zip archive is compared with its checksum. Only zipfile reads the archive, so that no second
reader can see different contents in it.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from smlp_deploy.errors import CheckpointError

MAX_PICKLE_BYTES = 16 << 20
MAX_INSTRUCTIONS = 2_000_000
"""A training checkpoint of sMLPNet-Base with its optimizer takes about 100,000."""
MAX_DIRECTORY_BYTES = 8 << 20
"""Of the archive's table of contents; as objects it takes about ten times that."""

_DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_MAPPINGS = ("collections OrderedDict", "collections Counter")
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_BUILT = frozenset((*_DTYPES, *_MAPPINGS, _TENSOR, _PARAMETER))
_MAX_NAME_LENGTH = 120
_MAX_NAMES = 32
_CHUNK = 1 << 20
_END, _END64, _LOCATOR64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
# What zipfile and pickletools raise for damaged files.
_DAMAGE = (
    *(zipfile.BadZipFile, OSError, EOFError, RuntimeError, OverflowError, struct.error),
    *(ValueError, KeyError, IndexError),
)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor as a file describes it: its values are unread, and its claims unchecked.

    Attributes:
        dtype: of its elements.
        record: the member of the archive that holds its storage.
        stored: elements of that storage.
        offset: of its first element in the storage.
        shape: its sizes, none negative.
        stride: in elements, none negative.
    """

    dtype: torch.dtype
    record: str
    stored: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values if each were stored once."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def reach(self) -> int:
        """One past the furthest element of the storage that it uses, or would if each value were stored once."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return max(self.offset + last + 1, math.prod(self.shape))


@dataclass(frozen=True, slots=True)
class Placeholder:
    """What a pickle refers to or would build that is neither a tensor nor plain data: only its name is kept.

    It is inert: a call of it is another placeholder, and what would be stored in it is dropped.
    """

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    record: str
    elements: int


class TorchFile:
    """An open `.pth` file.

    Attributes:
        content: what was saved, with a `StoredTensor` for each tensor and a `Placeholder` for each object.
        not_built: the names of what the pickle would have imported in Python, sorted; at most 32 of them.
    """

    def __init__(self, archive: zipfile.ZipFile, pickled: zipfile.ZipInfo, path: Path) -> None:
        self._path, self._archive = path, archive
        self._buffers: dict[str, bytearray] = {}
        self._folder = pickled.filename.removesuffix("data.pkl")
        with _damage(path):
            byte_order = f"{self._folder}byteorder"
            if byte_order in archive.namelist() and archive.read(byte_order) != b"little":
                _refuse("it was written on a big-endian machine", path)
            interpreter = _Interpreter(path)
            self.content = interpreter.run(archive.read(pickled))
            self.not_built = tuple(sorted(interpreter.not_built))

    def check(self, tensor: StoredTensor, key: str) -> None:
        """Check that the file holds what a tensor claims.

        Raises:
            CheckpointError: it does not.
        """
        try:
            held = self._archive.getinfo(f"{self._folder}data/{tensor.record}").file_size
        except KeyError:
            _refuse(f"the values of {key!r} are not in it", self._path)
        if max(tensor.stored, tensor.reach) * tensor.dtype.itemsize > held:
            _refuse(f"{key!r} claims more values than the file holds", self._path)

    def read(self, tensor: StoredTensor) -> Tensor:
        """The values of a checked tensor; they may share memory with other tensors.

        Raises:
            CheckpointError: they are damaged.
        """
        buffer = self._buffers.get(tensor.record)
        if buffer is None:
            with _damage(self._path):
                buffer = bytearray(self._archive.read(f"{self._folder}data/{tensor.record}"))
            self._buffers[tensor.record] = buffer
        usable = len(buffer) // tensor.dtype.itemsize
        values = torch.frombuffer(buffer, dtype=tensor.dtype, count=usable)
        return values.as_strided(tensor.shape, tensor.stride, tensor.offset)


@contextmanager
def open_torch_file(path: Path) -> Iterator[TorchFile]:
    """Open a `.pth` file in the format that `torch.save` has written since torch 1.6.

    Raises:
        CheckpointError: it is something else, damaged, or holds more than weights and plain values.
    """
    with _damage(path):
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                "not a zip-format torch file: truncated, something else, or written before torch 1.6",
                where=path,
                fix="fetch it again, or save it again with torch.save",
            )
        stated = _check_directory(path)
        archive = zipfile.ZipFile(path)
    with archive:
        pickled = _check_members(archive, stated, path)
        _check_sums(archive, path)
        yield TorchFile(archive, pickled, path)


@contextmanager
def _damage(path: Path, how: str = "") -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        what = f": {how}" if how else f" ({type(error).__name__})"
        raise CheckpointError(f"damaged torch file{what}", where=path, fix="fetch it again") from None


def _refuse(why: str, path: Path, *, refused: str = "refused") -> NoReturn:
    fix = "if you trust it, save only its weights, as safetensors"
    raise CheckpointError(f"{refused}: {why}", where=path, fix=fix)


def _check_directory(path: Path) -> int:
    """Bound the archive's table of contents, which zipfile reads whole; return the number of members it states."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 98))
        tail = file.read().rjust(98, b"\0")
    if tail[76:80] != _END:
        _refuse("something follows the archive", path)
    count, size = struct.unpack_from("<HL", tail, 86)
    if tail[:4] == _END64 and tail[56:60] == _LOCATOR64:
        count, size = struct.unpack_from("<QQ", tail, 32)
    if size > MAX_DIRECTORY_BYTES:
        _refuse(f"its table of contents has more than {MAX_DIRECTORY_BYTES} bytes", path)
    return int(count)


def _check_members(archive: zipfile.ZipFile, stated: int, path: Path) -> zipfile.ZipInfo:
    """Check the members, and return the one that describes the others."""
    members = archive.infolist()
    if len(members) != stated:
        what = f"damaged torch file: its table of contents states {stated} members but has {len(members)}"
        raise CheckpointError(what, where=path, fix="fetch it again")
    if len({member.filename.casefold() for member in members}) != len(members):
        _refuse("a member of the archive occurs twice", path)
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        _refuse("members are compressed, which torch.save never does", path)
    if any(member.compress_size != member.file_size for member in members):
        _refuse("a member states two different sizes", path)
    if sum(member.file_size for member in members) > path.stat().st_size:
        _refuse("members claim more bytes than the file has", path)
    pickles = [member for member in members if member.filename.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
        raise CheckpointError("not a torch file: no data.pkl of sensible size", where=path, fix="save it again")
    return pickles[0]


def _check_sums(archive: zipfile.ZipFile, path: Path) -> None:
    """Compare every member with its checksum, including those that are not read later."""
    members = archive.infolist()
    if not any(member.CRC for member in members):
        raise CheckpointError(
            "saved without checksums (torch.serialization.set_crc32_options), so that damage would go unnoticed",
            where=path,
            fix="if you trust it, load it with torch.load and save it again with checksums",
        )
    for member in members:
        name = repr(member.filename[:120])
        with _damage(path, f"the member {name} does not begin where and as the archive states"):
            content = archive.open(member)
        with _damage(path, f"the member {name} does not have the checksum that the archive states"), content:
            while content.read(_CHUNK):
                pass


class _Interpreter:
    """Runs a pickle's instructions on a stack of descriptions.

    Raises:
        ValueError, IndexError, KeyError: the instructions make no sense.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self.not_built: set[str] = set()
        push = self._stack.append
        same: dict[str, Callable[[Any], None]] = {
            "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE BINSTRING SHORT_BINSTRING": push,
            "PROTO STOP": lambda _: None,
            "NONE": lambda _: push(None),
            "NEWTRUE": lambda _: push(True),
            "NEWFALSE": lambda _: push(False),
            "EMPTY_TUPLE": lambda _: push(()),
            "EMPTY_LIST": lambda _: push([]),
            "EMPTY_DICT": lambda _: push({}),
            "MARK": lambda _: self._marks.append(len(self._stack)),
            "TUPLE": lambda _: push(tuple(self._marked())),
            "TUPLE1": lambda _: push(tuple(self._top(1))),
            "TUPLE2": lambda _: push(tuple(self._top(2))),
            "TUPLE3": lambda _: push(tuple(self._top(3))),
            "APPEND": lambda _: self._extend(self._top(1)),
            "APPENDS": lambda _: self._extend(self._marked()),
            "SETITEM": lambda _: self._set(self._top(2)),
            "SETITEMS": lambda _: self._set(self._marked()),
            "BINPUT LONG_BINPUT": self._remember,
            "BINGET LONG_BINGET": lambda index: push(self._memo[index]),
            "GLOBAL": self._global,
            "BINPERSID": lambda _: push(_storage(self._stack.pop())),
            "REDUCE NEWOBJ": self._reduce,
            "BUILD": lambda _: self._build(),
        }
        self._steps = {name: step for names, step in same.items() for name in names.split()}

    def run(self, content: bytes) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count >= MAX_INSTRUCTIONS:
                _refuse(f"its pickle has more than {MAX_INSTRUCTIONS} instructions", self._path)
            step = self._steps.get(opcode.name)
            if step is None:
                what = f"the file uses {opcode.name}, which torch.save does not by default"
                _refuse(what, self._path, refused="refused, and nothing was run")
            step(argument)
        return self._stack.pop()

    def _top(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("too few values")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _marked(self) -> list[Any]:
        at = self._marks.pop()
        values = self._stack[at:]
        del self._stack[at:]
        return values

    def _remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _global(self, name: str) -> None:
        if name not in _BUILT:
            # Cut, because the same name may be pushed a million times.
            name = name[:_MAX_NAME_LENGTH].replace(" ", ".")
            if len(self.not_built) < _MAX_NAMES:
                self.not_built.add(name)
        self._stack.append(Placeholder(name))

    def _reduce(self, _: object) -> None:
        function, arguments = self._top(2)
        if not isinstance(function, Placeholder) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is not a function")
        result: Any = function
        if function.name in _BUILT:
            result = _built(function.name, arguments)
        self._stack.append(result)

    def _build(self) -> None:
        """Drop the state meant for an object."""
        if len(self._stack) < 2:
            raise ValueError("too few values")
        self._stack.pop()

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Placeholder):
            raise ValueError("an append to something that is not a list")

    def _set(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, (dict, Placeholder)) or len(values) % 2:
            raise ValueError("items for something that is not a mapping")
        if isinstance(target, dict):
            # Other keys are left out: nested tuples can take forever to hash.
            pairs = zip(values[::2], values[1::2], strict=True)
            target.update((key, value) for key, value in pairs if isinstance(key, (str, int, float)))


def _built(name: str, arguments: tuple[Any, ...]) -> Any:
    """What a call of one of the functions `_BUILT` with these arguments returns."""
    if name in _MAPPINGS and not arguments:
        return {}
    if name == _TENSOR:
        return _tensor(arguments)
    if name == _PARAMETER and arguments:
        return arguments[0]
    return Placeholder(name.replace(" ", "."))


def _storage(identity: Any) -> _Storage | Placeholder:
    match identity:
        case ("storage", Placeholder(name) as kind, str(record), str(), int(elements)) if elements >= 0:
            return _Storage(_DTYPES[name], record, elements) if name in _DTYPES else kind
    raise ValueError("not a storage")


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor | Placeholder:
    """The tensor, or a placeholder if its type is none that weights have."""
    match arguments:
        case (Placeholder() as storage, *_):
            return storage
        case (_Storage(dtype, record, stored), int(offset), tuple(shape), tuple(stride), *_):
            numbers = (offset, *shape, *stride)
            sound = len(shape) == len(stride) <= 8 and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
            if sound and not any(arguments[6:]):
                return StoredTensor(
                    dtype=dtype, record=record, stored=stored, offset=offset, shape=shape, stride=stride
                )
    raise ValueError("not a tensor")
