"""What a pickle of torch holds, found without making any of it: tensors are described, code is named and refused.

`torch.load(weights_only=True)` runs no code either, but it makes every object while it reads, and a small file can ask
for large or slow ones: a bytearray of any length, a tensor of stride 0, a key whose hash takes years. So a pickle is
first walked through here, where only plain values are made; torch reads it afterwards, if what it holds was expected.
"""

from __future__ import annotations

import math
import pickletools
from dataclasses import dataclass
from typing import IO, Any

from sdedit.loading.dtypes import DTYPES, STORAGES, DType

MAX_TENSORS = 25_000
_MAX_STEPS = 500_000  # a checkpoint of Stable Diffusion with its EMA takes about 100,000
MAX_AXES = 8

_REBUILD = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"}
_KNOWN = {
    *STORAGES,
    *_REBUILD,
    "torch._utils._rebuild_parameter",
    "collections.OrderedDict",
    "builtins.set",
    "__builtin__.set",
    "torch.Size",
    *(f"torch.{name}" for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")),
}


@dataclass(frozen=True)
class Storage:
    """The numbers of one or several tensors: `count` of them, in the member `key` of the file."""

    key: str
    dtype: DType
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a pickle describes it."""

    shape: tuple[int, ...]
    dtype: DType
    storage: Storage


@dataclass(frozen=True)
class _Global:
    """A class or function by its name."""

    name: str


class _Object(dict[str, Any]):
    """The state of an object of one of the classes that the caller allows."""


class _Mark:
    """Where a tuple, or a row of items, begins on the stack."""


def read_pickle(file: IO[bytes], also: frozenset[str] = frozenset()) -> Any:
    """Walk through one pickle.

    Args:
        file: Left behind the pickle's end.
        also: Classes whose objects are given as a dict of their state, such as
            `"torch.nn.modules.container.ParameterDict"`.

    Returns:
        Dicts, lists, numbers and strings, with `StoredTensor` in the place of tensors.

    Raises:
        ValueError: It is damaged, too long, describes impossible tensors, or names other classes or functions.
    """
    walk = _Walk(also)
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if step > _MAX_STEPS:
                raise ValueError("takes more steps to read than weights need")
            if opcode.name == "STOP":
                return walk.stack.pop()
            walk.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f"is damaged ({type(error).__name__} while reading it)") from error
    raise ValueError("is damaged (it ends too early)")


class _Walk:
    """A stack machine for the instructions that `torch.save` uses; others are refused."""

    def __init__(self, also: frozenset[str]) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.also = also

    def step(self, name: str, argument: Any) -> None:
        """Follow one instruction."""
        stack = self.stack
        if name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"):
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._since_mark()
            for key, value in zip(items[::2], items[1::2], strict=True):
                _expect(stack[-1], dict)[_key(key)] = value
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._since_mark()
            _expect(stack[-1], list).extend(items)
        elif name == "GLOBAL":
            stack.append(self._global(argument.replace(" ", ".")))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function.name, _expect(arguments, tuple)))
        elif name == "NEWOBJ":
            stack.pop()
            stack[-1] = _called_class(stack[-1].name)
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], _Object) and isinstance(state, dict):
                stack[-1].update(state)  # the state of an OrderedDict, a network's `_metadata`, is left out
        elif name != "PROTO":
            raise ValueError(f"has the instruction {name}, which weights do not need")

    def _since_mark(self) -> list[Any]:
        items = []
        while not isinstance(one := self.stack.pop(), _Mark):
            items.append(one)
        return items[::-1]

    def _global(self, name: str) -> _Global:
        if name not in _KNOWN and name not in self.also:
            if name.startswith("torch._"):
                raise ValueError(f"has tensors of a kind that weights are not ({name[:100]})")
            whose = "an object of Lightning, the training program" if "lightning" in name.lower() else "a custom class"
            raise ValueError(f"holds {whose}, {name[:100]}, which is code, and code is not run")
        return _Global(name)


_CONSTANTS: dict[str, Any] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "MARK": _Mark,
}


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"is damaged (a {type(value).__name__} where a {kind.__name__} should be)")
    return value


def _key(value: Any) -> Any:
    """Only what is hashed in no time: the hash of a tuple of tuples of tuples … can take years."""
    if not isinstance(value, (str, int, float, type(None))):
        raise ValueError(f"has a key that is a {type(value).__name__}, not a name")
    return value


def _called_class(name: str) -> dict[str, Any]:
    if name == "collections.OrderedDict":
        return {}
    if name in _KNOWN:
        raise ValueError(f"makes a {name} in a way that weights do not need")
    return _Object()


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    """What a function that weights need would give."""
    if name == "collections.OrderedDict":
        return {_key(key): value for key, value in _expect(arguments[0], list)} if arguments else {}
    if name.endswith("builtin__.set") or name == "builtins.set":
        return [_key(one) for one in _expect(arguments[0], list)]
    if name == "torch._utils._rebuild_parameter":
        return _expect(arguments[0], StoredTensor)
    if name == "torch.Size":
        return _sizes(arguments[0])
    if name in _REBUILD:
        storage, offset, shape, strides = _expect(arguments[0], Storage), *arguments[1:4]
        dtype = storage.dtype
        if name.endswith("_v3"):
            dtype = DTYPES[_expect(arguments[6], _Global).name.removeprefix("torch.")]
        return _tensor(storage, dtype, _sizes((offset,))[0], _sizes(shape), _sizes(strides))
    raise ValueError(f"calls {name}, which weights do not need")


def _storage(described: Any) -> Storage:
    tag, kind, key, _device, count = _expect(described, tuple)[:5]
    if tag != "storage" or not isinstance(key, str) or kind.name not in STORAGES:
        raise ValueError("is damaged (its numbers are described in an unknown way)")
    return Storage(key, STORAGES[kind.name], _sizes((count,))[0])


def _sizes(values: Any) -> tuple[int, ...]:
    values = tuple(_expect(values, tuple))
    if len(values) > MAX_AXES or not all(type(n) is int and 0 <= n < 1 << 48 for n in values):
        raise ValueError(f"has a size, stride or offset that is out of range: {str(values)[:80]}")
    return values


def _tensor(
    storage: Storage, dtype: DType, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> StoredTensor:
    """Refuse a tensor that reaches beyond its numbers, or that has more elements than there are numbers for."""
    if len(shape) != len(strides):
        raise ValueError(f"has a tensor of shape {list(shape)} with strides {list(strides)}")
    count = storage.count * storage.dtype.itemsize // dtype.itemsize
    reach = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    if math.prod(shape) and (reach > count or math.prod(shape) > count):
        raise ValueError(f"has a tensor of shape {list(shape)}, of which only {count:,} values are stored")
    return StoredTensor(shape, dtype, storage)
