"""The few questions that readers of adapters ask of an array, whether it is PyTorch's, NumPy's or JAX's."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

Array = Any  # a tensor of PyTorch, or an array of NumPy or JAX
Shape = tuple[int, ...]


def is_array(value: Any) -> bool:
    """Is it a dense array, with values?"""
    if is_torch(value):
        import torch

        return value.layout == torch.strided and not value.is_meta
    return isinstance(value, np.ndarray) or type(value).__module__.startswith("jax")


def is_torch(value: Any) -> bool:
    """Is it a tensor of PyTorch? Asking does not import it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def library(value: Array) -> Any:
    """The module with the functions for it: `torch` or `numpy`."""
    return sys.modules["torch"] if is_torch(value) else np


def is_float(value: Array) -> bool:
    """Does it hold floats, of whatever width?"""
    return "float" in str(value.dtype)


def is_finite(value: Array) -> bool:
    """Does it hold neither NaN nor infinity?"""
    return bool(library(value).isfinite(wide(value)).all())


def size(value: Array) -> int:
    """How many numbers it holds."""
    return math.prod(value.shape)


def wide(value: Array) -> Array:
    """The same in float32."""
    return value.float() if is_torch(value) else np.asarray(value).astype(np.float32)


def no_narrower_than_half(value: Array) -> Array:
    """An array of 8-bit floats in float16, which holds each of their values; others as they are."""
    if "float8" not in str(value.dtype):
        return value
    return value.half() if is_torch(value) else np.asarray(value).astype(np.float16)


def flat(value: Array) -> Array:
    """(n, …) as a matrix (n, m)."""
    return value.reshape(value.shape[0], -1)


def identity(count: int, like: Array) -> Array:
    """The identity matrix, where and as what `like` is."""
    return library(like).eye(count, dtype=like.dtype, device=like.device)


def zeros(shape: Shape, like: Array) -> Array:
    """Zeros, where and as what `like` is."""
    return library(like).zeros(shape, dtype=like.dtype, device=like.device)


def contiguous(value: Array) -> Array:
    """The same, with rows one after the other in memory."""
    return value.contiguous() if is_torch(value) else np.ascontiguousarray(value)


def number(value: Array) -> float | None:
    """The finite number that an array of one holds, or `None` if it holds anything else."""
    if size(value) != 1 or "complex" in str(value.dtype):
        return None
    found = float(value.reshape(-1)[0])
    return found if math.isfinite(found) else None
