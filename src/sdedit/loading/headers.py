"""What a file of weights says of itself, names, shapes and dtypes, read and checked before any tensor is."""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sdedit.files import refuse_lfs_pointer, shown
from sdedit.loading.dtypes import SAFETENSORS, DType
from sdedit.loading.pickles import MAX_AXES, MAX_TENSORS, StoredTensor, read_pickle

Shape = tuple[int, ...]

_MAGIC = 0x1950A86A20F9469CFC6C

# Bytes of the part that describes the tensors; of the largest Stable Diffusion files it is under 1 MB.
MAX_HEADER = 4 << 20


# Bytes of a tensor's name; those of real files have up to about 150.
_MAX_NAME = 512

# How files begin that are no weights, and yet come by the name of some.
_FOREIGN = (
    (rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|script|\?xml)", "an HTML page, perhaps of a login or an error"),
    (rb"(\xef\xbb\xbf)?\s*[\[{]", "a JSON file"),
    (rb"GGUF", "a GGUF file, as llama.cpp reads"),
    (rb"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (rb"\xff\xd8\xff", "a JPEG picture"),
    (rb"RIFF....WEBP", "a WebP picture"),
    (rb"GIF8", "a GIF picture"),
    (rb"%PDF", "a PDF document"),
    (rb"\x1f\x8b", "a gzip archive"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (rb"Rar!\x1a", "a RAR archive"),
    (rb"\x89HDF\r\n", "an HDF5 file, as Keras writes"),
    (rb"\x93NUMPY", "a NumPy array"),
)


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        tensors: Names to shapes and dtypes; of a pickle, those of its `state_dict` if it has one.
        metadata: Strings of a safetensors file; of a pickle, the numbers and strings beside the tensors.
        tree: Of a pickle, all that it holds (in its `state_dict` if it has one), with `StoredTensor` for tensors.
        kind: "safetensors", "zip" (a pickle of today's torch) or "legacy" (of torch before 1.6).
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    tree: Any = None
    kind: str = "safetensors"

    def nested(self) -> dict[str, TensorInfo]:
        """`tensors`, or where there are none those of dicts in dicts, their names joined by dots."""
        found: dict[str, TensorInfo] = dict(self.tensors)
        todo: list[tuple[str, Any, int]] = [] if found else [("", self.tree, 0)]
        while todo:
            name, value, depth = todo.pop()
            if isinstance(value, StoredTensor):
                found[name] = TensorInfo(value.shape, value.dtype)
            elif isinstance(value, dict) and depth < 3:
                todo += [(f"{name}.{key}" if name else str(key), inner, depth + 1) for key, inner in value.items()]
        return found


def read_header(path: Path, also: frozenset[str] = frozenset()) -> Header:
    """Read and check the names, shapes and dtypes of a safetensors file or a pickle of torch.

    Args:
        also: Classes that a pickle may name besides those of tensors, see `read_pickle`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a git-lfs pointer, damaged, holds code, or claims more than it has.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    kind = _kind(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    try:
        tree = (_read_zip if kind == "zip" else _read_legacy)(path, also)
        _check_total(path, tree)
        named = tree["state_dict"] if isinstance(tree, dict) and "state_dict" in tree else tree
        _check_names(map(str, named if isinstance(named, dict) else ()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} {error}: use a .safetensors file instead") from error
    inside = named.items() if isinstance(named, dict) else ()
    beside = tree.items() if isinstance(tree, dict) else ()
    return Header(
        {str(k): TensorInfo(v.shape, v.dtype) for k, v in inside if isinstance(v, StoredTensor)},
        {str(k): str(v) for k, v in beside if isinstance(v, (int, float, str))},
        named,
        kind,
    )


def _kind(path: Path) -> str:
    """ "safetensors", "zip" or "legacy", by what is in the file, whatever its name.

    Raises:
        ValueError: It is something else, which is named; or a pickle by a safetensors file's name, whose readers
            expect none.
    """
    refuse_lfs_pointer(path)
    with path.open("rb") as file:
        start = file.read(512)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 40:
        return "safetensors"
    if start[257:262] == b"ustar":
        raise ValueError(f"{path} is a tar file, as torch wrote before 2018: its pickles are not read; convert it")
    for mark, what in _FOREIGN:
        if re.match(mark, start, re.IGNORECASE | re.DOTALL):
            raise ValueError(f"{path} is {what}, not a file of weights: download it again, or give another file")
    kind = "zip" if start[:4] == b"PK\x03\x04" else "legacy" if start[:1] == b"\x80" else None
    if path.suffix != ".safetensors":
        if kind is None:
            raise ValueError(
                f"{path} is damaged, or no file of weights; expected safetensors, or a pickle that torch wrote"
            )
        return kind
    if kind is not None:
        raise ValueError(f"{path} is not a safetensors file but a zip or pickle, as torch writes: call it .ckpt")
    return "safetensors"


def _read_safetensors(path: Path) -> Header:
    """The header of a safetensors file: held to our limits here, and for all else checked by safetensors itself."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError(f"its header should have {length:,} bytes; at most {MAX_HEADER:,} are read")
            raw = file.read(length)
        if raw.count(b'"data_offsets"') > MAX_TENSORS:
            raise ValueError(f"it lists more than {MAX_TENSORS:,} tensors")
        with safe_open(path, framework="np"):  # refuses gaps, overlaps, wrong sizes, and bytes too few or too many
            entries = json.loads(raw, object_pairs_hook=_unique)
        metadata = entries.pop("__metadata__", None) or {}
        _check_names(entries)
        return Header({name: _tensor_info(name, entry) for name, entry in entries.items()}, metadata)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}): download it again") from error


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if len(name) > _MAX_NAME:
            raise ValueError(f"has a name of {len(name):,} letters, {shown(name)}; at most {_MAX_NAME} are read")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name is there twice")
    return made


def _tensor_info(name: str, entry: Mapping[str, Any]) -> TensorInfo:
    if entry["dtype"] not in SAFETENSORS:
        raise ValueError(f"{shown(name)} has the dtype {entry['dtype']!r}, which is not known")
    if len(entry["shape"]) > MAX_AXES:
        raise ValueError(f"{shown(name)} has {len(entry['shape'])} axes; at most {MAX_AXES} are read")
    return TensorInfo(tuple(entry["shape"]), SAFETENSORS[entry["dtype"]])


def _read_zip(path: Path, also: frozenset[str]) -> Any:
    """The zip that `torch.save` writes: a pickle `data.pkl`, and one member a storage, none of them compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if any("/code/" in name for name in members):
                raise ValueError("is a TorchScript program, not a file of weights")
            pickled = next((name for name in members if name.endswith("/data.pkl")), "")
            root = pickled.removesuffix("data.pkl")
            if not pickled or not all(name.startswith(root) for name in members):
                raise ValueError("is a zip archive, but not one that torch wrote (if it holds a model, unpack it)")
            _check_members(archive.infolist(), path.stat().st_size)
            tree = read_pickle(io.BytesIO(archive.read(pickled)), also)
    except ValueError:
        raise
    except Exception as error:  # a damaged zip raises errors of many classes
        raise ValueError(f"is a damaged zip ({str(error)[:100] or type(error).__name__})") from error
    for tensor in _tensors(tree):
        storage, member = tensor.storage, members.get(f"{root}data/{tensor.storage.key}")
        if member is None or member.file_size < storage.count * storage.dtype.itemsize:
            raise ValueError(f"is damaged (the numbers of a tensor of shape {list(tensor.shape)} are missing)")
    return tree


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    if len({member.filename for member in members}) != len(members) or len(members) > 2 * MAX_TENSORS:
        raise ValueError("is a zip with the same name twice, or too many")
    if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size or m.flag_bits & 1 for m in members):
        raise ValueError("is a compressed zip, which could unpack to any size; torch writes none")
    if sum(m.file_size for m in members) > size:
        raise ValueError(f"is a zip of {size:,} bytes that claims to hold more")
    if any(m.file_size > MAX_HEADER for m in members if m.filename.endswith(".pkl")):
        raise ValueError(f"has a pickle of more than {MAX_HEADER:,} bytes beside its numbers")


def _read_legacy(path: Path, also: frozenset[str]) -> Any:
    """What torch wrote before 1.6: pickles of a magic number, a version, the machine, the tensors, then the numbers."""
    with path.open("rb") as file:
        magic = read_pickle(file, also)
        if magic != _MAGIC:
            raise ValueError("is damaged, or a pickle that torch did not write")
        for _ in range(2):
            read_pickle(file, also)
        tree = read_pickle(file, also)
    storages = {tensor.storage for tensor in _tensors(tree)}
    if sum(s.count * s.dtype.itemsize for s in storages) > path.stat().st_size:
        raise ValueError("is damaged (it has fewer bytes than its tensors)")
    return tree


def _tensors(tree: Any) -> list[StoredTensor]:
    """All tensors in a tree; what is there several times is looked at once."""
    found, seen, todo = [], {id(tree)}, [tree]
    while todo:
        one = todo.pop()
        if isinstance(one, StoredTensor):
            found.append(one)
        inner = list(one.values()) if isinstance(one, dict) else one if isinstance(one, (list, tuple)) else []
        todo += [part for part in inner if id(part) not in seen]
        seen |= {id(part) for part in inner}
    return found


def _check_total(path: Path, tree: Any) -> None:
    """Refuse tensors that share their numbers so often that casting them would take far more than the file."""
    tensors = _tensors(tree)
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"lists more than {MAX_TENSORS:,} tensors")
    claimed = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)
    if claimed > 2 * path.stat().st_size + (1 << 20):
        raise ValueError(f"describes tensors of {claimed:,} bytes in all, more than it has")


def differences(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], others: Sequence[str] = (), most: int = 20
) -> str:
    """Lines with every name that is missing (-), unknown (+) or of another shape (!), and `others`; or nothing.

    Args:
        most: How many lines; what is beyond them is counted.
    """
    lines = [f"- {name} {list(expected[name])} is missing" for name in expected if name not in found]
    lines += [f"+ {shown(name)} {list(found[name])} is not expected" for name in found if name not in expected]
    lines += [
        f"! {name} is {list(found[name])} in the file; {list(expected[name])} expected"
        for name in expected
        if name in found and expected[name] != found[name]
    ]
    lines += others
    return "\n".join(lines[:most] + ([f"and {len(lines) - most} more"] if len(lines) > most else []))
