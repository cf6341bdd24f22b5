"""PNG files whose metadata would stop a reader: the pixels as they are, without what cannot be read beside them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_ANIMATION = (b"acTL", b"fcTL", b"fdAT")  # what comes after the first picture, or says how it is shown
_SHORTEST = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9}  # bytes
# Pillow reads at most 1 MiB of a text or profile that is compressed, and 64 MiB of texts; no settings are so long.
_LARGEST = 1 << 20
_LARGEST_PROFILE = 16 << 20  # those of printers have tables of some MiB
_TEXTS = 256


class Cleaned(NamedTuple):
    """A PNG for Pillow to read.

    Attributes:
        file: The file itself, or a copy in memory.
        left_out: What of its metadata is not in it, and why.
        profile: A colour profile that Pillow would find too large.
    """

    file: BinaryIO
    left_out: list[str]
    profile: bytes | None = None


class _Chunk(NamedTuple):
    kind: bytes
    start: int  # of its data, in the file
    length: int


def cleaned(file: BinaryIO, largest: int) -> Cleaned:
    """Look through a PNG's chunks and leave out what does not concern its pixels and cannot be read.

    Texts that come after the pixels are moved before them, where readers see them without decoding.

    Args:
        file: At its start.
        largest: Bytes of compressed pixels that are copied at most, where a copy is needed.
    """
    head: list[_Chunk] = []
    pixels: list[_Chunk] = []
    kept: list[_Chunk] = []
    left_out, profile, copy, texts = [], None, False, 0
    for chunk in _chunks(file):
        if chunk.kind in _PIXELS:
            (pixels if chunk.kind in (b"IDAT", b"IEND") else head).append(chunk)
            continue
        fault, found = _fault(file, chunk)
        profile = found or profile
        texts += chunk.kind in (b"tEXt", b"zTXt", b"iTXt")
        if fault is None and found is None and chunk.kind not in _ANIMATION and texts <= _TEXTS:
            kept.append(chunk)
            copy = copy or bool(pixels)
            continue
        copy = True
        if fault is not None:
            left_out.append(f"{chunk.kind.decode('latin-1')}: {fault}")
    file.seek(0)
    if not copy:
        return Cleaned(file, left_out)
    whole = io.BytesIO()
    whole.write(SIGNATURE)
    for chunk in [*head, *kept, *pixels]:
        if chunk.kind == b"IDAT" and whole.tell() > largest:
            continue
        file.seek(chunk.start - 8)
        whole.write(file.read((min(chunk.length, largest) if chunk.kind == b"IDAT" else chunk.length) + 12))
    whole.seek(0)
    return Cleaned(whole, left_out, profile)


def _chunks(file: BinaryIO) -> Iterator[_Chunk]:
    """The chunks of a PNG, up to its end or to where it breaks off."""
    file.seek(len(SIGNATURE))
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        start = file.tell()
        yield _Chunk(kind, start, length)
        if kind == b"IEND" or not kind.isalpha():
            return
        file.seek(start + length + 4)


def _fault(file: BinaryIO, chunk: _Chunk) -> tuple[str | None, bytes | None]:
    """Why a chunk cannot be read, if so; and the colour profile in it if only its size is in Pillow's way."""
    if chunk.length > _LARGEST_PROFILE or (chunk.length > _LARGEST and chunk.kind != b"iCCP"):
        return f"{chunk.length / 1e6:.1f} MB", None
    file.seek(chunk.start)
    data, check = file.read(chunk.length), file.read(4)
    if len(data) < chunk.length or check != struct.pack(">I", zlib.crc32(chunk.kind + data)):
        return "damaged", None
    if len(data) < _SHORTEST.get(chunk.kind, 0):
        return "too short", None
    if chunk.kind == b"iCCP":
        profile, fault = _inflated(data.partition(b"\0")[2], _LARGEST_PROFILE)
        return fault, profile if len(profile) > _LARGEST else None
    if chunk.kind == b"zTXt":
        return _inflated(data.partition(b"\0")[2], _LARGEST)[1], None
    if chunk.kind == b"iTXt":
        flag, _, rest = (after := data.partition(b"\0")[2])[:1], after[1:2], after[1:]
        text = rest[1:].partition(b"\0")[2].partition(b"\0")[2]
        return (_inflated(rest[:1] + text, _LARGEST)[1] if flag == b"\1" else None), None
    return None, None


def _inflated(data: bytes, largest: int) -> tuple[bytes, str | None]:
    """What follows a byte for the method of compression, which PNG has only one of; and why not, if it cannot be."""
    if data[:1] != b"\0":
        return b"", "compressed in an unknown way"
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data[1:], largest)
    except zlib.error:
        return b"", "damaged"
    return (b"", f"more than {largest / 1e6:.0f} MB") if inflater.unconsumed_tail else (plain, None)
