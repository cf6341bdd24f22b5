"""Kinds of numbers that files of weights hold, by the names that PyTorch and NumPy share; no framework is needed."""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """A kind of number: `getattr(torch, dtype.name)` is PyTorch's."""

    name: str
    itemsize: int
    is_floating_point: bool

    def __str__(self) -> str:
        return self.name


_SIZES = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint16": 2, "uint32": 4, "uint64": 8,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
}  # fmt: skip
DTYPES = {name: DType(name, size, "float" in name) for name, size in _SIZES.items()}

# What the headers of safetensors files call them.
SAFETENSORS = {
    "BOOL": DTYPES["bool"],
    "U8": DTYPES["uint8"],
    "I8": DTYPES["int8"],
    "I16": DTYPES["int16"],
    "I32": DTYPES["int32"],
    "I64": DTYPES["int64"],
    "F8_E4M3": DTYPES["float8_e4m3fn"],
    "F8_E5M2": DTYPES["float8_e5m2"],
    "F16": DTYPES["float16"],
    "BF16": DTYPES["bfloat16"],
    "F32": DTYPES["float32"],
    "F64": DTYPES["float64"],
}

# What pickles of torch call the storages of their numbers.
STORAGES = {
    "torch.DoubleStorage": DTYPES["float64"],
    "torch.FloatStorage": DTYPES["float32"],
    "torch.HalfStorage": DTYPES["float16"],
    "torch.BFloat16Storage": DTYPES["bfloat16"],
    "torch.LongStorage": DTYPES["int64"],
    "torch.IntStorage": DTYPES["int32"],
    "torch.ShortStorage": DTYPES["int16"],
    "torch.CharStorage": DTYPES["int8"],
    "torch.ByteStorage": DTYPES["uint8"],
    "torch.BoolStorage": DTYPES["bool"],
    "torch.storage.UntypedStorage": DTYPES["uint8"],
}
