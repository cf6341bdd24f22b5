"""A folder of pictures with captions, as people keep them for training and for measuring."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sdedit.inputs.pixels import open_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
OTHER_PICTURES = (".heic", ".heif", ".jxl", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw")  # not read
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTIONS = (".caption", ".txt")  # the first wins

# What cameras and programs call pictures: no caption.
_DEVICES = re.compile(
    r"(img|dscn?|dscf|dji|gopr|pxl|mvi|p|pict?|pics?|photos?|pictures?|images?|scan|screenshot|untitled|download"
    r"|whatsapp image|frame|sample|output)( (at|from|on))?",
    re.IGNORECASE,
)
_COUNTER = r"\(\d+\)|\d+"


@dataclass(frozen=True)
class Example:
    """A picture's file and its caption."""

    path: Path
    caption: str


def read_folder(folder: Path, pattern: str = "{}") -> list[Example]:
    """Find the pictures of a folder, and their captions, and see that all of them can be read.

    Captions come from `metadata.jsonl` or `metadata.csv` (`file_name` and `text`) if there is one; else from text files
    beside the pictures (`cat.caption`, `cat.txt` or `cat.png.txt` for `cat.png`) if there are any; else from the file
    names, see `caption_from_name`. A folder of folders such as `10_red apple` is read as kohya's scripts do: each
    picture of it counts 10 times, and "red apple" is the caption of those that have no text file.

    Args:
        folder: The pictures lie in it, not in folders inside it (but for those above, and those in a metadata file).
            Hidden files are no pictures: other systems' shadows (`._cat.png`), and what a killed program left.
        pattern: The caption, with "{}" for the picture's own; without "{}" none are looked for.

    Raises:
        FileNotFoundError, NotADirectoryError: There is no such folder, or a file that the metadata names is missing.
        ValueError: There are no pictures, some have no caption or cannot be read; all of them are named.
    """
    if not folder.is_dir():
        raise (NotADirectoryError if folder.exists() else FileNotFoundError)(
            f"{folder}: expected a folder with pictures to learn from"
        )
    pictures = _pictures(folder)
    counted: dict[Path, int] = {}
    if "{}" not in pattern:
        captions = dict.fromkeys(pictures, "")
    elif metadata := [folder / name for name in METADATA if (folder / name).is_file()]:
        captions = read_metadata(metadata[0])
    elif any(_caption_file(path) for path in pictures):
        captions = {path: _one_line(_text(found)) for path in pictures if (found := _caption_file(path))}
    else:
        captions = {path: caption_from_name(path.stem) for path in pictures}
    if not pictures and not captions:
        captions, counted = _counted_folders(folder)
    if not captions and not pictures:
        raise ValueError(f"{folder} has no pictures; expected files that end in {', '.join(SUFFIXES)}")
    without = [path for path in pictures if not captions.get(path)] if "{}" in pattern else []
    if without:
        raise ValueError(
            f"captions are missing for {_listed(path.name for path in without)}: name the files by what they show, "
            f"write cat.txt beside cat.png for all of them, or a metadata.jsonl with file_name and text; or give one "
            "caption for all"
        )
    _refuse_unreadable(captions)
    return [
        Example(path, pattern.replace("{}", caption))
        for path, caption in sorted(captions.items())
        for _ in range(counted.get(path, 1))
    ]


def _pictures(folder: Path) -> list[Path]:
    """The pictures that lie in a folder; those that nothing here can read are named in a warning."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if skipped := [path.name for path in files if path.suffix.lower() in OTHER_PICTURES]:
        warnings.warn(
            f"{folder}: {_listed(skipped)} cannot be read and will be left out: make PNG or JPEG of them", stacklevel=3
        )
    return [path for path in files if path.suffix.lower() in SUFFIXES]


def _counted_folders(folder: Path) -> tuple[dict[Path, str], dict[Path, int]]:
    """Captions of the pictures in folders such as `10_red apple`, and how often each counts, in lowest terms."""
    captions, times = {}, {}
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        if found := re.fullmatch(r"(\d{1,5})_(.+)", inner.name):
            for path in _pictures(inner):
                text = _caption_file(path)
                captions[path] = _one_line(_text(text)) if text else caption_from_name(found[2]) or found[2]
                times[path] = int(found[1])
    shared = math.gcd(*times.values()) or 1
    return captions, {path: count // shared for path, count in times.items()}


def _caption_file(picture: Path) -> Path | None:
    """The text file with a picture's caption."""
    names = [f"{name}{suffix}" for name in (picture.stem, picture.name) for suffix in CAPTIONS]
    return next((picture.with_name(name) for name in names if picture.with_name(name).is_file()), None)


def caption_from_name(stem: str) -> str:
    """Words of a file name without its suffix, and without counters; "" for what says nothing of the picture.

    `red_apple-2`, `red apple (2)` and `0001_red_apple` are "red apple"; `00000`, `IMG_2023` and `image (3)` are "".
    """
    words = re.sub(r"[\s_\-.]+", " ", stem).strip()
    words = re.sub(r"^0\d*\s+", "", words)
    words = re.sub(rf"(^|\s+)({_COUNTER})(\s+({_COUNTER}))*$", "", words).strip()
    words = re.sub(r"(?<=[^\W\d])0\d+$", "", words)
    without_numbers = " ".join(re.sub(_COUNTER, " ", words).split())
    return "" if not without_numbers or _DEVICES.fullmatch(without_numbers) else words


def read_metadata(path: Path) -> dict[Path, str]:
    """Captions by picture, from the rows of a `metadata.jsonl` or `metadata.csv` as Hugging Face's data sets have it.

    Raises:
        FileNotFoundError: A picture that it names is missing.
        ValueError: A row is damaged, or has no `file_name` or no `text`.
    """
    captions = {}
    for number, row in _rows(path):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file_name", "text")):
            keys = sorted(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{path}, line {number}: expected file_name and text, both words; it has {keys}")
        picture = path.parent / row["file_name"]
        if not picture.is_file():
            raise FileNotFoundError(f"{path}, line {number}: {picture} does not exist")
        captions[picture] = _one_line(row["text"])
    return captions


def _rows(path: Path) -> Iterable[tuple[int, Any]]:
    text = _text(path)
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))  # a quoted field may have lines of its own
        try:
            yield from ((reader.line_num, row) for row in reader)
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num} is not CSV ({error})") from None
        return
    # JSON's strings may hold U+2028 and its kin, which `splitlines` takes for ends of lines.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error})") from None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error})") from None


def _refuse_unreadable(pictures: Iterable[Path]) -> None:
    broken = []
    for path in pictures:
        try:
            open_image(path)
        except ValueError as error:
            broken.append(str(error).removeprefix("image: "))
    if broken:
        raise ValueError(f"{len(broken)} pictures cannot be used: {'; '.join(broken[:10])}")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def fitted(pixels: Tensor, size: int) -> Tensor:
    """Pixels (1, 3, H, W) scaled until the shorter side is `size`, and the middle cut out: (1, 3, size, size)."""
    height, width = pixels.shape[-2:]
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    if shape != (height, width):
        pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return pixels[..., top : top + size, left : left + size]
