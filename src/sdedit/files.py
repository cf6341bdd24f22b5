"""Files: reading JSON with an error a person can act on, and writing so that nothing half-written is left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# How a temporary name looks: what a killed process left of it is swept by a later one that writes beside it.
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}(\..*)?")
_OLD = 24 * 3600.0  # seconds after which nobody writes it any more


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name beside `path`; what was written there becomes `path` when the block ends well.

    The temporary name keeps the suffix, since writers choose their format by it. Whoever may read other new files may
    read this one; safetensors would leave it to its owner alone.

    Raises:
        OSError: The disk is full: see `disk_errors`.
    """
    path = Path(path)
    sweep(path.parent)
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        with disk_errors(path):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_folder(
    folder: str | os.PathLike[str], placed: Callable[[Path], object] = lambda path: None
) -> Iterator[Path]:
    """Give a hidden folder inside `folder`; the files that were written there go to their places when the block ends
    well, over those of the same names, and so that at no moment a mixture of old and new can be loaded.

    What a load begins with, the JSON files, is removed before any other file is moved, and moved last. A process that
    is killed in between leaves a folder that does not load, and nothing else that is wrong: others are left as they
    are.

    Args:
        placed: Called with the path of each other file once it is there.

    Raises:
        ValueError: `folder` is a file.
        OSError: The disk is full: see `disk_errors`. All is then as it was.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_directory: {folder} is a file; expected a folder")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    complete = folder / f".{uuid.uuid4().hex}"
    try:
        with disk_errors(folder):
            complete.mkdir()
            yield complete
        _place(complete, folder, placed)
    finally:
        shutil.rmtree(complete, ignore_errors=True)
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _place(complete: Path, folder: Path, placed: Callable[[Path], object]) -> None:
    files = [file.relative_to(complete) for file in complete.rglob("*") if file.is_file()]
    # The list of components comes before their configs.
    first = sorted((f for f in files if f.suffix == ".json"), key=lambda f: (len(f.parts), f.as_posix()))
    with disk_errors(folder):
        for parent in {(folder / file).parent for file in files}:
            parent.mkdir(parents=True, exist_ok=True)
    for file in first:
        (folder / file).unlink(missing_ok=True)
    for file in sorted(set(files) - set(first)):
        (complete / file).replace(folder / file)
        placed(folder / file)
    for file in reversed(first):
        (complete / file).replace(folder / file)


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say in one sentence that the disk is full, whichever library was the first to notice.

    Raises:
        OSError: With `errno.ENOSPC`, in place of any error that means this.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        full = OSError(f"{path} could not be written, for the disk is full; nothing of it is left: free some room")
        full.errno = errno.ENOSPC
        raise full from error


def is_disk_full(error: BaseException) -> bool:
    """Does this error mean it? safetensors and others have classes of their own for it."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(str(error)) is not None


_FULL = re.compile(r"No space left on device|os error (28|122)\b|Disk quota exceeded", re.IGNORECASE)


def is_temporary(name: str) -> bool:
    """Is this the name of a file that is being written, or was when its process was killed?"""
    return _TEMPORARY.fullmatch(name) is not None


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left in a folder more than a day ago."""
    with contextlib.suppress(OSError):  # not ours to remove, or gone already
        for left in (path for path in folder.iterdir() if is_temporary(path.name)):
            if time.time() - left.stat().st_mtime > _OLD:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def read_json(path: str | os.PathLike[str], limit: int = 1 << 20) -> dict[str, Any]:
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
