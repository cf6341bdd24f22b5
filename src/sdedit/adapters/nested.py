"""Files of adapters: tensors with numbers, strings and dicts around them, read as safely as weights."""

from __future__ import annotations

import re
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdedit.loading.headers import Header, read_header
from sdedit.loading.weights import read_weights

_one_at_a_time = threading.Lock()


def read_nested(path: Path, stand_ins: Sequence[tuple[type, str]] = ()) -> Any:
    """What a safetensors file holds, or a pickle, read with `weights_only=True`.

    Args:
        stand_ins: Classes of ours to make instead of the classes that the pickle names.

    Raises:
        ValueError: It is a git-lfs pointer, damaged, or names code.
    """
    header, needed = _headed(path, stand_ins)
    if header.kind == "safetensors":
        return read_weights(path, header=header)
    try:
        # Mapped where it is a zip: torch then refuses compressed ones, which could unpack to any size.
        with _allowed(needed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {code[1]}, which is code, and code is not run" if code else type(error).__name__
        raise ValueError(f"{path} is damaged, or holds more than tensors, numbers and strings ({reason})") from error


def _headed(path: Path, stand_ins: Sequence[tuple[type, str]]) -> tuple[Header, Sequence[tuple[type, str]]]:
    """What a file says of itself, and the stand-ins without which it is refused: few files need any.

    A pickle is walked through for it, and nothing in it is made.
    """
    try:
        return read_header(path), ()
    except ValueError:
        if not stand_ins:
            raise
    return read_header(path, also=frozenset(name for _, name in stand_ins)), stand_ins


@contextmanager
def _allowed(stand_ins: Sequence[tuple[type, str]]) -> Iterator[None]:
    """Let torch make these. It has one list for all threads; two that change it at once leave it changed."""
    if not stand_ins:
        yield
        return
    with _one_at_a_time, torch.serialization.safe_globals(list(stand_ins)):
        yield


def is_plain(value: object) -> bool:
    """Is it a dense tensor, with values?"""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
