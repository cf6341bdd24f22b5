"""Files: reading JSON with an error a person can act on, and writing so that nothing half-written is left."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name beside `path`; what was written there becomes `path` when the block ends well.

    The temporary name keeps the suffix, since writers choose their format by it. Whoever may read other new files may
    read this one; safetensors would leave it to its owner alone.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: str | os.PathLike[str], limit: int = 64 << 20) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is larger than `limit` bytes, a git-lfs pointer, not JSON, or not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.stat().st_size > limit:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a JSON file of at most {limit:,} was expected")
    refuse_lfs_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; an object with keys was expected")
    return value


def refuse_lfs_pointer(path: Path) -> None:
    """Raise `ValueError` if `path` is the pointer that git leaves where git-lfs did not fetch the file."""
    mark = b"version https://git-lfs"
    with path.open("rb") as file:
        if file.read(len(mark)) == mark:
            raise ValueError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder")


def shown(value: object, most: int = 100) -> str:
    """What a file says, for a message: cut, and without signs that a terminal would obey."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= most else f"{text[:most]}…"
    return text if text.isprintable() else ascii(text)[1:-1]
