"""Picture files: which formats are read, and what a file may ask for before and while it is decoded.

Pillow's limits are global variables; ours are checked here instead, and Pillow's are left as the user set them.
"""

from __future__ import annotations

import importlib
import io
import math
import stat
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageFile

from sdedit.inputs import png

MAX_PIXELS = 100_000_000
MIN_SIDE = 8

# The formats that are read and Pillow's modules for them, the usual ones first. TGA has no mark, so it is tried last.
FORMATS = {
    "PNG": "Png",
    "JPEG": "Jpeg",
    "WEBP": "WebP",
    "GIF": "Gif",
    "TIFF": "Tiff",
    "BMP": "Bmp",
    "PPM": "Ppm",
    "ICO": "Ico",
    "JPEG2000": "Jpeg2K",
    "AVIF": "Avif",
    "QOI": "Qoi",
    "PSD": "Psd",
    "PCX": "Pcx",
    "TGA": "Tga",
}
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# What else a file may begin with, and what to say of it.
_OTHERS = (
    (b"%!PS", "it is PostScript, which is a program; save it as PNG"),
    (b"\xc5\xd0\xd3\xc6", "it is PostScript, which is a program; save it as PNG"),
    (b"%PDF", "it is a PDF; save the page as PNG"),
    (b"<svg", "it is an SVG drawing; save it as PNG"),
    (b"icns", "icons of macOS are not read; save it as PNG"),
    (b"version https://git-lfs", "it is a pointer of Git LFS: fetch the file itself with 'git lfs pull'"),
)
_ICON_SIDE = 1024  # pixels; icons are 256 or less by their format, and a few are twice or four times that
_TILE = 1 << 22  # pixels of a TIFF's tile; larger ones only for pictures that fill half of them


def check_size(size: tuple[int, int], max_pixels: int | None) -> None:
    """Refuse sides under 8 pixels and more than `max_pixels` pixels in all."""
    width, height = size
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"image: {width}×{height} pixels; expected at least {MIN_SIDE} on each side")
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(
            f"image: {width}×{height} is {width * height / 1e6:,.0f} megapixels; "
            f"at most {max_pixels / 1e6:,.0f} are taken unless you allow more: make it smaller, or set max_pixels "
            "(on the command line --max-megapixels)"
        )


def check_tiles(image: Image.Image) -> None:
    """Refuse a TIFF whose tiles are far larger than the picture: a decoder holds a whole one."""
    tags = getattr(image, "tag_v2", None)
    if not tags or not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return
    width, height = (max(side, 1) for side in image.size)
    sides = [tags.get(tag) for tag in (322, 323)]  # TileWidth, TileLength
    tile = math.prod(side for side in sides if isinstance(side, int))
    if any(side is not None for side in sides) and not 0 < tile <= max(_TILE, 2 * width * height):
        raise ValueError(f"its tiles are {sides[0]}×{sides[1]} pixels, for a picture of {width}×{height}")


@contextmanager
def opened(path: Any, max_pixels: int | None, header: bool = False) -> Iterator[ImageFile.ImageFile]:
    """An image file whose header has been read; what goes wrong inside is the file's fault."""
    source, name = _source(path)
    with source as file:
        try:
            yield _identified(file, name, max_pixels, header)
        except Exception as error:  # what Pillow's decoders raise on damaged files is of every class
            if str(error).startswith("image: "):
                raise
            raise ValueError(f"image: {name} is not an image that can be read ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return "not enough memory" if isinstance(error, MemoryError) else str(error)[:200] or type(error).__name__


def _source(path: Any) -> tuple[BinaryIO, str]:
    """The file of a path, open; and its name for messages."""
    if hasattr(path, "read"):
        return io.BytesIO(path.read()), "this file"
    if str(path) == "-":
        return io.BytesIO(standard_input()), "what came through the standard input"
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        raise FileNotFoundError(f"image: {str(path)[:200]} does not exist") from None
    if stat.S_ISDIR(mode):
        raise FileNotFoundError(f"image: {path} is a folder; expected a picture file in it")
    if not stat.S_ISREG(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise FileNotFoundError(f"image: {path} is {kind}, not a file; expected a file, or - for the standard input")
    return Path(path).open("rb"), str(path)


_INPUT: list[bytes] = []


def standard_input() -> bytes:
    """What comes through the standard input, up to 1 GiB; read once, and the same when asked again."""
    if not _INPUT:
        largest = 1 << 30
        data = sys.stdin.buffer.read(largest + 1)
        if len(data) > largest:
            raise ValueError("image: more than 1 GiB comes through the standard input; expected a picture file")
        _INPUT.append(data)
    return _INPUT[0]


def _identified(file: BinaryIO, name: str, max_pixels: int | None, header: bool) -> ImageFile.ImageFile:
    """Pillow's image of a file, by its content; only the header is read."""
    start = file.read(32)
    if not start:
        raise ValueError("it is empty")
    too_large: bytes | None = None
    if start.startswith(png.SIGNATURE) and len(start) >= 24:
        size = struct.unpack(">II", start[16:24])
        if max_pixels is not None:
            check_size(size, max_pixels)
        read = png.cleaned(file, 0 if header else size[0] * size[1] * 9 + (1 << 20))  # at most 64 bits a pixel
        file, too_large = read.file, read.profile
        if read.left_out:
            warnings.warn(f"image: {name}: metadata left out ({'; '.join(read.left_out)[:300]})", stacklevel=2)
    elif start.startswith(b"\0\0\1\0"):
        _check_icons(file)
    elif start[4:8] == b"ftyp" and start[8:12] in _HEIF:
        return _heif(file)
    for kind, module in FORMATS.items():
        file.seek(0)
        image = _of_format(kind, module, file, start[:16])
        if image is not None:
            check_tiles(image)
            if too_large is not None:
                image.info["icc_profile"] = too_large
            return image
    shown = start.lstrip()
    raise ValueError(next((say for mark, say in _OTHERS if shown.startswith(mark)), "no format that is read here"))


def _of_format(kind: str, module: str, file: BinaryIO, start: bytes) -> ImageFile.ImageFile | None:
    """The file as an image of a format, `None` if it is none or Pillow was built without."""
    importlib.import_module(f"PIL.{module}ImagePlugin")
    if kind not in Image.OPEN:
        return None
    factory, accept = Image.OPEN[kind]
    if accept is not None and accept(start) is not True:
        return None
    try:
        return factory(file, "")
    except (SyntaxError, IndexError, TypeError, struct.error):  # as Pillow, which means: not of this format
        if accept is not None:
            raise
        return None


def _heif(file: BinaryIO) -> ImageFile.ImageFile:
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise ValueError("it is HEIC, which the package pillow-heif reads: pip install 'sdedit[heif]'") from None
    return HeifImageFile(file)  # type: ignore[no-any-return]


def _check_icons(file: BinaryIO) -> None:
    """Refuse an ICO file that holds a picture far larger than icons are; Pillow decodes it while it opens the file."""
    file.seek(4)
    (count,) = struct.unpack("<H", file.read(2))
    entries = file.read(16 * count)
    for i in range(len(entries) // 16):
        (offset,) = struct.unpack_from("<I", entries, 16 * i + 12)
        file.seek(offset)
        head = file.read(24)
        if len(head) < 24:
            continue
        size = struct.unpack(">II", head[16:24]) if head.startswith(png.SIGNATURE) else struct.unpack("<ii", head[4:12])
        if max(map(abs, size)) > 2 * _ICON_SIDE:  # a bitmap's height counts its mask too
            raise ValueError(f"an icon in it has {size[0]}×{size[1]} pixels; expected at most {_ICON_SIDE} a side")


def decode(image: ImageFile.ImageFile) -> None:
    """Read the pixels. Metadata that Pillow reads after them, and fails at, does not matter."""
    if image.format == "TIFF":  # for TIFF alone, Pillow checks a limit of its own when it decodes
        image.im = Image.new(image.mode, getattr(image, "_tile_size", image.size)).im
    try:
        image.load()
    except Exception as error:
        if image.format != "TIFF" or image.tile:
            raise
        image._size = image.im.size  # decoded, but not turned
        warnings.warn(f"image: metadata left out ({_reason(error)})", stacklevel=2)
