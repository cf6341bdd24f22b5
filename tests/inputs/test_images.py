"""Images of every kind go in, and come out with the size, the range and the transparency that they should have."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from conftest import picture
from sdedit.files import read_json, write_atomically
from sdedit.inputs.images import pad_to_multiple, read_images, write_images
from sdedit.inputs.pixels import open_image

MODES = [
    "1",
    "L",
    "P",
    "PA",
    "LA",
    "La",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I;16",
    "I;16B",
    "I",
    "F",
]
sizes = st.tuples(st.integers(8, 40), st.integers(8, 40))


def of_mode(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture of a mode, made by way of modes that Pillow converts to it."""
    image = picture(*size, seed=seed)
    alpha = image.getchannel(1)
    if mode in ("LA", "La", "PA"):
        image = image.convert("L").convert("P").convert("PA") if mode == "PA" else image.convert("LA")
        image.putalpha(alpha)
        return image.convert("La") if mode == "La" else image
    if mode in ("RGBA", "RGBa"):
        image.putalpha(alpha)
        return image.convert(mode)
    if mode.startswith("I;16"):
        deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
        return Image.frombytes(mode, size, deep.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    return image.convert("L").convert(mode) if mode in ("I", "F") else image.convert(mode)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(MODES), sizes, st.integers(0, 3))
def test_any_mode_becomes_what_pillow_sees_in_it(mode: str, size: tuple[int, int], seed: int) -> None:
    image = of_mode(mode, size, seed)
    images = read_images(image, 4)
    assert images.pixels.shape == (1, 3, size[1], size[0]) and images.pixels.dtype == torch.float32
    assert not images.latent and images.pixels.min() >= -1 and images.pixels.max() <= 1
    (alpha,) = images.alphas
    assert (alpha is not None) == (mode.upper() in ("LA", "PA", "RGBA"))
    if mode[0] in "IF":
        seen = picture(*size, seed=seed).convert("L").convert("RGB")
    else:
        whole = image.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode))
        whole = whole.convert("RGB" if mode == "LAB" else whole.mode).convert("RGBA")
        seen = Image.alpha_composite(Image.new("RGBA", size, "white"), whole).convert("RGB")
    want = torch.from_numpy(np.asarray(seen) / 127.5 - 1).permute(2, 0, 1).float()
    assert (images.pixels[0] - want).abs().max() <= 2.5 / 255


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["LA", "PA", "RGBA"]), sizes, st.integers(0, 9))
def test_alpha_is_given_back_to_the_bit(mode: str, size: tuple[int, int], seed: int) -> None:
    image = of_mode(mode, size, seed)
    images = read_images(image, 4)
    drawn = torch.rand(1, 3, size[1], size[0])
    (out,) = write_images(drawn, "pil", images.alphas)
    assert (out.mode, out.size) == ("RGBA", size)
    assert out.getchannel("A").tobytes() == image.getchannel("A").tobytes()
    assert write_images(drawn, "np", images.alphas).shape == (1, size[1], size[0], 4)
    pixels = write_images(drawn, "pt", images.alphas)
    assert torch.equal(pixels[:, :3], drawn) and torch.equal(pixels[0, 3], images.alphas[0])


def test_transparency_of_palettes_and_of_single_colours(tmp_path: Path) -> None:
    palette = picture().convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    palette.save(tmp_path / "p.png", transparency=bytes(range(0, 256, 32)))
    for file, image in (("p.png", None), ("l.png", picture(mode="L")), ("rgb.png", picture())):
        if image is not None:
            image.putpixel((3, 4), 7 if image.mode == "L" else (1, 2, 3))
            image.save(tmp_path / file, transparency=7 if image.mode == "L" else (1, 2, 3))
        opened = open_image(tmp_path / file)
        (alpha,) = read_images(opened, 4).alphas
        want = np.asarray(opened.convert("RGBA"))[..., 3] / 255
        np.testing.assert_allclose(alpha, want, atol=1e-6)
        assert want.min() < 1


def test_a_batch_of_which_some_have_alpha() -> None:
    images = read_images([picture(mode="RGBA"), picture()], 4)
    with_alpha, without = write_images(torch.rand(2, 3, 48, 64), "pil", images.alphas)
    assert (with_alpha.mode, without.mode) == ("RGBA", "RGB")
    pixels = write_images(torch.rand(2, 3, 48, 64), "pt", images.alphas)
    assert pixels.shape == (2, 4, 48, 64) and (pixels[1, 3] == 1).all()


TURNED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.fliplr(np.rot90(a, 3)),
    6: lambda a: np.rot90(a, 3),
    7: lambda a: np.fliplr(np.rot90(a)),
    8: np.rot90,
}


@pytest.mark.parametrize("format", ["png", "tiff", "webp", "jpg"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation(tmp_path: Path, format: str, orientation: int) -> None:
    image = picture(40, 24)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    arguments = (
        {"quality": 100, "subsampling": 0} if format == "jpg" else {"lossless": True} if format == "webp" else {}
    )
    image.save(tmp_path / f"a.{format}", exif=exif, **arguments)
    want = TURNED[orientation](np.asarray(image)) / 127.5 - 1
    opened = open_image(tmp_path / f"a.{format}")
    for source in (opened, Image.open(tmp_path / f"a.{format}")):
        got = read_images(source, 4).pixels[0].permute(1, 2, 0)
        assert got.shape == want.shape
        assert np.abs(got.numpy() - want).mean() < 0.02


def test_16_bits_keep_their_precision(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    for source in (
        open_image(tmp_path / "a.png"),
        open_image(tmp_path / "a.tiff"),
        Image.fromarray(ramp.astype(np.int32)),
        ramp,
    ):
        pixels = read_images(source, 4).pixels
        assert len(pixels.unique()) == 64 * 64
        np.testing.assert_allclose(pixels[0, 0], ramp / 32767.5 - 1, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), sizes, st.sampled_from([1, 3]), st.booleans(), st.sampled_from([np.uint8, np.uint16, np.float32])
)
def test_arrays_and_tensors_mean_the_same(
    batch: int, size: tuple[int, int], channels: int, signed: bool, dtype: Any
) -> None:
    rng = np.random.default_rng(0)
    unit = rng.integers(0, 256, (batch, size[1], size[0], channels)) / 255
    unit[..., 0, 0, :] = 0
    floats = (unit * 2 - 1 if signed else unit).astype(np.float32)
    array = floats if dtype is np.float32 else np.round(unit * np.iinfo(dtype).max).astype(dtype)
    tensor = torch.from_numpy(array.astype(np.int32) if dtype is np.uint16 else array).permute(0, 3, 1, 2)
    forms: list[Any] = [array, list(array), [array]]
    if dtype is not np.uint16:
        forms += [tensor, list(tensor), [tensor], tuple(tensor)]
    if dtype is np.float32:
        forms += [array.astype(np.float64), tensor.double()]
    want = torch.from_numpy(unit * 2 - 1).float().permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
    for form in forms:
        torch.testing.assert_close(read_images(form, 4).pixels, want, atol=1e-5, rtol=0)
    if channels == 1:
        torch.testing.assert_close(read_images(array[0, ..., 0], 4).pixels, want[:1], atol=1e-5, rtol=0)


def test_a_list_is_of_one_range() -> None:
    """A light image in [-1, 1] has no negative values: its neighbours say what is meant."""
    dark, light = torch.full((3, 8, 8), -0.5), torch.full((3, 8, 8), 0.5)
    pixels = read_images([dark, light], 4).pixels
    assert (pixels[0] == -0.5).all() and (pixels[1] == 0.5).all()
    # What resampling leaves below 0 is no sign of [-1, 1].
    assert (read_images(torch.full((3, 8, 8), -1e-6), 4).pixels == -1).all()


def test_latents_are_taken_as_they_are() -> None:
    latents = torch.randn(2, 4, 5, 3)
    images = read_images([latents[0], latents[1]], 4)
    assert images.latent and torch.equal(images.pixels, latents) and images.alphas == [None, None]
    assert not read_images(torch.rand(1, 3, 8, 8), 3).latent


BAD: dict[str, tuple[Any, str]] = {
    "text": ("a.png", "str; expected a PIL image"),
    "number": (7, "int; expected"),
    "empty list": ([], "the list is empty"),
    "list of paths": ([Path("a.png")], "PosixPath; expected"),
    "tensor of 2 axes": (torch.rand(8, 8), r"shape \[8, 8\]; expected \(C, H, W\)"),
    "tensor with channels last": (torch.rand(16, 16, 3), "16 channels; expected 1 or 3, or 4 for latents"),
    "array of 5 axes": (np.zeros((1, 1, 8, 8, 3)), r"shape \[1, 1, 8, 8, 3\]"),
    "array with channels first": (np.zeros((3, 16, 16)), r"shape \[3, 16, 16\]; expected \(H, W\)"),
    "no images": (np.zeros((0, 8, 8, 3)), "at least one"),
    "no latents": (torch.zeros(0, 4, 8, 8), "at least one"),
    "no height": (np.zeros((0, 8, 3)), "8×0 pixels; expected at least 8"),
    "floats to 255": (np.full((8, 8, 3), 200.0), r"values from 200 to 200; expected floats in \[0, 1\]"),
    "whole numbers to 1000": (np.full((8, 8, 3), 1000), "from 1000 to 1000; expected 0 to 255"),
    "negative whole numbers": (np.full((8, 8, 3), -1), "from -1 to -1; expected 0 to 255"),
    "NaN": (torch.full((3, 8, 8), float("nan")), "NaN"),
    "infinity": (np.full((8, 8, 3), np.inf), "NaN or infinite"),
    "NaN latents": (torch.full((4, 8, 8), float("nan")), "NaN"),
    "latents of whole numbers": (torch.ones(4, 8, 8, dtype=torch.uint8), r"torch\.uint8; expected floats"),
    "complex": (np.zeros((8, 8, 3), complex), "complex128"),
    "objects": (np.full((8, 8), None), "object"),
    "narrow": (Image.new("RGB", (7, 100)), "7×100 pixels; expected at least 8"),
    "mixed kinds": ([torch.rand(3, 8, 8), torch.rand(4, 8, 8)], "images and latents"),
    "mixed sizes": ([picture(16, 8), picture(8, 16)], r"several sizes \(16×8, 8×16, width×height\)"),
    "float image": (Image.fromarray(np.full((8, 8), 1e6, np.float32)), "expected 0 to 65535"),
    "NaN image": (Image.fromarray(np.full((8, 8), np.nan, np.float32)), "NaN"),
    "deep image": (Image.fromarray(np.full((8, 8), 1 << 20, np.int32)), "expected 0 to 65535"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_refused(name: str) -> None:
    image, words = BAD[name]
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        read_images(image, 4)
    assert str(caught.value).startswith("image: ") and len(str(caught.value)) < 400


def huge_png(path: Path, width: int, height: int) -> None:
    """A PNG whose header promises more than is there, and more than there is memory for."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def test_over_100_megapixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    huge_png(tmp_path / "huge.png", 200_000, 200_000)
    with pytest.raises(ValueError, match=r"200000×200000 is 40,000 megapixels; at most 100"):
        open_image(tmp_path / "huge.png")
    limit = Image.MAX_IMAGE_PIXELS
    lazy = Image.new("1", (16, 16))
    lazy._size = (10_001, 10_000)  # a size alone, without the memory
    with pytest.raises(ValueError, match="100 megapixels"):
        read_images(lazy, 4)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_larger_ones_are_taken_if_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # stands for Pillow's own limit of 89 megapixels
    picture(64, 48).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").size == open_image(tmp_path / "a.png", None).size == (64, 48)
    with pytest.raises(ValueError, match="64×48"):
        open_image(tmp_path / "a.png", 3000)
    assert read_images(picture(64, 48), 4, max_pixels=None).pixels.shape[-1] == 64
    threads = [threading.Thread(target=open_image, args=(tmp_path / "a.png",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Image.MAX_IMAGE_PIXELS == 1000


FORMATS = {}
for _name in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "TGA", "ICO", "JPEG2000"):
    _file = io.BytesIO()
    picture(32, 32).save(_file, _name)
    FORMATS[_name] = _file.getvalue()


@pytest.fixture(scope="module")
def spoiled_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spoiled") / "image"


@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on what it still reads
@settings(deadline=None, max_examples=250)
@given(st.data())
def test_damaged_files_give_a_picture_or_an_error_that_names_them(spoiled_file: Path, data: st.DataObject) -> None:
    content = bytearray(FORMATS[data.draw(st.sampled_from(sorted(FORMATS)))])
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    spoiled_file.write_bytes(content)
    try:
        image = open_image(spoiled_file, 1_000_000)
    except ValueError as error:
        assert str(error).startswith("image: ")
    else:
        read_images(image, 4)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        open_image(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        open_image(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png is not an image that can be read"):
        open_image(tmp_path / "text.png")
    (tmp_path / "cut.png").write_bytes(FORMATS["PNG"][:-200])
    with pytest.raises(ValueError, match=r"cut\.png is not an image that can be read"):
        open_image(tmp_path / "cut.png")
    (tmp_path / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match=r"lfs\.png"):
        open_image(tmp_path / "lfs.png")


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 4, 8, 16]))
def test_padding_repeats_the_edge_and_is_undone_by_a_crop(height: int, width: int, multiple: int) -> None:
    pixels = torch.rand(2, 3, height, width)
    padded = pad_to_multiple(pixels, multiple)
    assert padded.shape[2] % multiple == padded.shape[3] % multiple == 0
    assert padded.shape[2] < height + multiple and padded.shape[3] < width + multiple
    assert torch.equal(padded[..., :height, :width], pixels)
    assert (padded[..., height:, :width] == pixels[..., -1:, :]).all()
    assert (padded[..., width:] == padded[..., width - 1 : width]).all()


def test_what_is_written_is_what_was_drawn() -> None:
    pixels = torch.rand(2, 3, 8, 16)
    assert write_images(pixels, "pt", [None, None]) is pixels
    array = write_images(pixels.bfloat16(), "np", [None, None])
    assert array.shape == (2, 8, 16, 3) and array.dtype == np.float32
    for drawn, image in zip(pixels, write_images(pixels, "pil", [None, None]), strict=True):
        assert (image.mode, image.size) == ("RGB", (16, 8))
        assert np.abs(np.asarray(image) / 255 - drawn.permute(1, 2, 0).numpy()).max() <= 0.5001 / 255
    exact = picture(16, 8)
    (again,) = write_images(read_images(exact, 4).pixels / 2 + 0.5, "pil", [None])
    assert again.tobytes() == exact.tobytes()


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with pytest.raises(RuntimeError), write_atomically(target) as temporary:
        assert temporary.suffix == ".txt" and temporary.parent == tmp_path
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    target.write_text("before")
    with pytest.raises(KeyboardInterrupt), write_atomically(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]
    with write_atomically(target) as temporary:
        temporary.write_text("after")
        assert target.read_text() == "before"
    assert [p.read_text() for p in tmp_path.iterdir()] == ["after"]


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content, words in ((b"{", "not a JSON file"), (b"[1]", "holds a JSON list"), (b"\xff\xfe", "not a JSON file")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_json(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not a JSON file"):
        read_json(path)
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"8 bytes; a JSON file of at most 7"):
        read_json(path, 7)
    assert read_json(path) == {"a": 1}
