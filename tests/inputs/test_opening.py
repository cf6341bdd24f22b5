"""What picture files may hold: metadata of any kind beside good pixels, and more than fits in memory."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from conftest import picture
from sdedit.apps.measures import l2_distance
from sdedit.inputs import opening, png
from sdedit.inputs.pixels import image_info, open_image, rgb

# ── deep values ──────────────────────────────────────────────────────────────────────────────────────────────────────


def doodle() -> np.ndarray:
    """Sharp strokes of black, grey and white."""
    sheet = np.full((64, 64), 255, np.uint8)
    sheet[10:14, 5:60], sheet[20:50, 30:34], sheet[40:60, 40:60] = 0, 90, 180
    return sheet


def deep(kind: str) -> Image.Image:
    sheet = doodle()
    if kind.startswith("I;16"):
        order = ">u2" if kind.endswith("B") else "<u2"
        return Image.frombytes(kind, (64, 64), (sheet.astype(np.uint16) * 257).astype(order).tobytes())
    values = {"I": sheet * np.int32(257), "I8": sheet.astype(np.int32), "F": sheet.astype(np.float32)}
    values |= {"F1": sheet / np.float32(255), "F16": sheet * np.float32(257)}
    return Image.fromarray(values[kind])


KINDS = ["I;16", "I;16B", "I", "I8", "F", "F1", "F16"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_picture_is_its_8_bit_self(tmp_path: Path, kind: str) -> None:
    want = Image.fromarray(doodle()).convert("RGB")
    deep(kind).save(tmp_path / "a.tiff")
    for source in (deep(kind), open_image(tmp_path / "a.tiff"), Image.open(tmp_path / "a.tiff")):
        assert rgb(source).tobytes() == want.tobytes()
        assert l2_distance(source, want) == 0


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "I;16B"])  # Pillow resizes that byte order as noise
def test_what_resampling_overshot_is_cut_off(kind: str) -> None:
    """Sharp filters leave values below black and above white; they do not make a picture of another range."""
    resized = deep(kind).resize((96, 96), Image.Resampling.LANCZOS)
    want = Image.fromarray(doodle()).resize((96, 96), Image.Resampling.LANCZOS)
    # Not to the bit: with 8 bits Pillow cuts off between its two passes, too.
    assert np.abs(np.asarray(rgb(resized))[..., 0].astype(int) - np.asarray(want)).mean() < 0.5


def test_a_tiff_says_what_its_values_mean(tmp_path: Path) -> None:
    values = doodle().astype(np.float32) / 255 * 3 - 1  # black is -1, white 2
    tags = {340: -1.0, 341: 2.0}
    Image.fromarray(values).save(tmp_path / "a.tiff", tiffinfo=tags)
    assert np.array_equal(np.asarray(rgb(open_image(tmp_path / "a.tiff")))[..., 0], doodle())
    Image.fromarray(doodle().astype(np.uint16) * 257).save(tmp_path / "b.tiff")
    turned = bytearray((tmp_path / "b.tiff").read_bytes())
    at = turned.index(struct.pack("<HHI", 262, 3, 1)) + 8
    turned[at] = 0  # PhotometricInterpretation: white is zero
    (tmp_path / "b.tiff").write_bytes(turned)
    assert np.array_equal(np.asarray(rgb(open_image(tmp_path / "b.tiff")))[..., 0], 255 - doodle())


def test_deep_grey_keeps_its_transparency(tmp_path: Path) -> None:
    Image.fromarray(doodle().astype(np.uint16) * 257).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(with_chunks(whole, chunk(b"tRNS", struct.pack(">H", 90 * 257))))
    for source in (open_image(tmp_path / "a.png"), Image.open(tmp_path / "a.png")):
        seen = np.asarray(rgb(source))
        assert np.array_equal(seen[..., 3] == 0, doodle() == 90) and np.array_equal(seen[..., 0], doodle())


# ── metadata ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(whole: bytes, chunks: bytes, late: bool = False) -> bytes:
    """A PNG with more chunks, before its pixels or after."""
    at = whole.index(b"IEND" if late else b"IDAT") - 4
    return whole[:at] + chunks + whole[at:]


def plain_png() -> bytes:
    file = io.BytesIO()
    picture().save(file, "PNG")
    return file.getvalue()


ZEROS = zlib.compress(bytes(9 << 20))
TROUBLE = {
    "long compressed text": chunk(b"zTXt", b"note\0\0" + ZEROS),
    "long international text": chunk(b"iTXt", b"note\0\1\0\0\0" + ZEROS),
    "long text": chunk(b"tEXt", b"note\0" + bytes(9 << 20)),
    "text in an unknown compression": chunk(b"zTXt", b"note\0\7abc"),
    "profile in an unknown compression": chunk(b"iCCP", b"name\0\7abc"),
    "profile that is none": chunk(b"iCCP", b"name\0\0" + ZEROS),
    "profile that is too large": chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(17 << 20))),
    "damaged text": chunk(b"tEXt", b"note\0abc")[:-1] + b"?",
    "short gamma": chunk(b"gAMA", b"\1"),
    "broken EXIF": chunk(b"eXIf", b"garbage"),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", TROUBLE)
def test_metadata_does_not_stop_the_pixels(tmp_path: Path, name: str, late: bool) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(with_chunks(plain_png(), TROUBLE[name], late))
    with pytest.warns(UserWarning, match="image: "):
        assert open_image(path).tobytes() == picture().tobytes()


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\2\1\x12\0\3"]
)
def test_broken_exif_means_upright(tmp_path: Path, kind: str, exif: bytes) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "tiff":
        pytest.skip("a TIFF's EXIF data are its own tags") if exif else None
    picture().save(path, exif=exif, **({"quality": 100} if kind != "png" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert l2_distance(open_image(path), picture()) < 8
        assert l2_distance(Image.open(path), picture()) < 8


def test_a_tiff_whose_exif_pointer_leads_nowhere(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.tiff", tiffinfo={34665: 0x7FFFFFF0, 34853: 3})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert open_image(tmp_path / "a.tiff").tobytes() == picture().tobytes()


ancillary = st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"gAMA", b"pHYs", b"acTL", b"fcTL", b"teSt"])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(ancillary, st.binary(max_size=40), st.booleans()), max_size=4), st.booleans())
def test_any_metadata_leaves_the_pixels(chunks: list[tuple[bytes, bytes, bool]], late: bool) -> None:
    made = b"".join(
        chunk(kind, data)[: None if sound else -1] + (b"" if sound else b"?") for kind, data, sound in chunks
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert open_image(io.BytesIO(with_chunks(plain_png(), made, late))).tobytes() == picture().tobytes()


def test_texts_are_found_wherever_they_stand(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("early", "a", zip=True)
    file = io.BytesIO()
    picture().save(file, "PNG", pnginfo=text)
    late = chunk(b"tEXt", b"late\0b") + chunk(b"zTXt", b"long\0\0" + ZEROS)
    (tmp_path / "a.png").write_bytes(with_chunks(file.getvalue(), late, late=True))
    with pytest.warns(UserWarning, match=r"zTXt: more than 1 MB"):
        info = image_info(tmp_path / "a.png")
    assert (info["early"], info["late"]) == ("a", "b")


def test_a_large_profile_is_used(tmp_path: Path) -> None:
    """Tables of printers take megabytes, of which Pillow reads one."""
    from inputs.profiles import rgb_profile, srgb_of

    profile = rgb_profile()
    padded = struct.pack(">I", 3 << 20) + profile[4:] + bytes((3 << 20) - len(profile))
    (tmp_path / "a.png").write_bytes(with_chunks(plain_png(), chunk(b"iCCP", b"n\0\0" + zlib.compress(padded))))
    assert (
        np.abs(np.asarray(open_image(tmp_path / "a.png")) / 255 - srgb_of(np.asarray(picture()) / 255)).max() <= 2 / 255
    )


# ── what a file may ask for ──────────────────────────────────────────────────────────────────────────────────────────


def tiled_tiff(width: int, length: int) -> bytes:
    """A TIFF of 16×16 pixels in one tile of that size, compressed: 1 kB of data for all of it."""
    entries = [(256, 4, 16), (257, 4, 16), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1)]
    entries += [(322, 4, width), (323, 4, length), (324, 4, 200), (325, 4, 0)]
    body = zlib.compress(bytes(1 << 20))
    entries[-1] = (325, 4, len(body))
    tags = b"".join(struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in entries)
    return (b"II*\0" + struct.pack("<IH", 8, len(entries)) + tags + bytes(4)).ljust(200, b"\0") + body


def icon(inner: bytes, size: int = 0) -> bytes:
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", size, size, 0, 0, 1, 32, len(inner), 22) + inner


def huge_png(side: int) -> bytes:
    """A PNG of one colour, whose pixels are there: decoding it would take side² bytes."""
    row = zlib.compressobj()
    data = b"".join(row.compress(bytes(side + 1)) for _ in range(side)) + row.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return png.SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BOMBS = {
    "tile.tif": lambda: tiled_tiff(20_000, 20_000),
    "wide.tif": lambda: tiled_tiff(1 << 31, 16),
    "icon.ico": lambda: icon(huge_png(15_000)),
    "bitmap.ico": lambda: icon(struct.pack("<IiiHHIIiiII", 40, 20_000, 40_000, 1, 32, 0, 0, 0, 0, 0, 0)),
    "icns.icns": lambda: b"icns" + struct.pack(">I", 100) + b"ic10" + struct.pack(">I", 92) + huge_png(9000)[:84],
    "mac.png": lambda: b"icns" + struct.pack(">I", 100) + b"ic10" + struct.pack(">I", 92) + huge_png(9000)[:84],
    "large.png": lambda: huge_png(10_001),
}
_CHILD = """
import resource, sys
from sdedit.inputs.pixels import open_image
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), -1))
for path in sys.argv[1:]:
    try:
        open_image(path)
    except ValueError as error:
        print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of a process as Linux tells it")
def test_what_asks_for_much_memory_is_refused_before_it_gets_it(tmp_path: Path) -> None:
    """In a process with 64 MB left; each of these would take from 80 MB to 2 GB."""
    for name, make in BOMBS.items():
        (tmp_path / name).write_bytes(make())
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *[str(tmp_path / name) for name in BOMBS]], capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(BOMBS), done.stderr
    words = ["tiles are 20000×20000", "tiles are", "an icon in it has 15000×15000", "an icon in it has 20000×40000"]
    words += ["icons of macOS", "icons of macOS", "100 megapixels"]
    for line, word in zip(lines, words, strict=True):
        assert word in line and "not enough memory" not in line


def test_usual_tiles_and_icons_are_read(tmp_path: Path) -> None:
    import tifffile

    array = np.asarray(picture(48, 40))
    tifffile.imwrite(tmp_path / "a.tif", array, tile=(256, 256), compression="zlib", photometric="rgb")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.tif")), array)
    picture(256, 256).save(tmp_path / "a.ico", sizes=[(256, 256), (16, 16)])
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.ico"))[..., :3], np.asarray(picture(256, 256)))


def test_pillows_limits_stay_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are global: another thread that opens a picture meanwhile must not find them changed."""
    for kind in ("png", "tiff", "jpg", "webp", "gif", "bmp"):
        picture(64, 48).save(tmp_path / f"a.{kind}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # stands for Pillow's own 89 megapixels
    before = {name: getattr(Image, name) for name in dir(Image) if name.isupper()}
    for path in sorted(tmp_path.iterdir()):
        assert open_image(path).size == (64, 48)
        assert before == {name: getattr(Image, name) for name in dir(Image) if name.isupper()}


def test_what_a_file_is_if_it_is_no_picture(tmp_path: Path) -> None:
    for content, words in (
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "it is PostScript"),
        (b"%PDF-1.7\n", "it is a PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is an SVG"),
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"hello", "no format that is read here"),
    ):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            open_image(tmp_path / "a.png")


def test_postscript_by_another_name_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_args: Any, **_options: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", run)
    picture().save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match="PostScript"):
        open_image(tmp_path / "a.png")


def test_heic_says_what_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(picture(64, 64)).save(tmp_path / "a.heic", quality=-1)
    assert l2_distance(open_image(tmp_path / "a.heic"), picture(64, 64)) < 20
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match=r"pip install 'sdedit\[heif\]'"):
        open_image(tmp_path / "a.heic")


def test_folders_pipes_and_the_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="is a folder"):
        open_image(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match=r"is a pipe, not a file; expected a file, or -"):
        open_image(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="is a device"):
        open_image("/dev/zero")
    monkeypatch.setattr(opening, "_INPUT", [])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(plain_png())))
    assert open_image("-").tobytes() == picture().tobytes() == open_image(Path("-")).tobytes()
