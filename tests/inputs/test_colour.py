"""Colours mean what a picture's profile says: sRGB goes to the model, and what stays keeps its own numbers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from conftest import picture
from inputs.profiles import cmyk_profile, grey_profile, rgb_profile, srgb_of, srgb_of_linear
from sdedit.apps.measures import l2_distance
from sdedit.inputs.images import read_images
from sdedit.inputs.masks import read_region
from sdedit.inputs.pixels import open_image, rgb


def saved(path: Path, image: Image.Image, profile: bytes, **options: Any) -> Path:
    image.save(path, icc_profile=profile, **options)
    return path


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_colours_of_a_wide_screen_become_those_of_srgb(tmp_path: Path, kind: str) -> None:
    options = {"lossless": True, "quality": 100} if kind == "webp" else {}
    path = saved(tmp_path / f"a.{kind}", picture(64, 48), rgb_profile(), **options)
    want = srgb_of(np.asarray(picture(64, 48)) / 255)
    for source in (open_image(path), open_image(path, keep_profile=True), Image.open(path)):
        got = read_images(source, 4).pixels[0].permute(1, 2, 0).numpy() / 2 + 0.5
        assert np.abs(got - want).max() <= 2 / 255
    assert np.abs(np.asarray(open_image(path)) / 255 - np.asarray(picture(64, 48)) / 255).max() > 10 / 255
    assert l2_distance(Image.open(path), open_image(path)) == 0
    kept = open_image(path, keep_profile=True)
    assert kept.tobytes() == picture(64, 48).tobytes() and kept.info == {"icc_profile": rgb_profile()}


def test_srgb_stays_to_the_bit(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path / "a.png", picture(), srgb)
    assert open_image(path).tobytes() == picture().tobytes()
    assert (read_images(Image.open(path), 4).colours == read_images(picture(), 4).colours).all()


def test_transparency_and_palettes_keep_their_alpha(tmp_path: Path) -> None:
    clear = picture(mode="RGBA")
    path = saved(tmp_path / "a.png", clear, rgb_profile())
    opened = open_image(path)
    assert opened.getchannel("A").tobytes() == clear.getchannel("A").tobytes()
    assert np.abs(np.asarray(opened)[..., :3] / 255 - srgb_of(np.asarray(clear)[..., :3] / 255)).max() <= 2 / 255
    few = picture().quantize(16)
    path = saved(tmp_path / "p.png", few, rgb_profile())
    assert np.abs(np.asarray(open_image(path)) / 255 - srgb_of(np.asarray(few.convert("RGB")) / 255)).max() <= 2 / 255


@pytest.mark.parametrize("deep", [False, True])
def test_grey_of_another_gamma(tmp_path: Path, deep: bool) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(ramp.astype(np.uint16) * 257 if deep else ramp)
    opened = open_image(saved(tmp_path / "a.png", image, grey_profile(1.8)))
    assert opened.mode == "RGB"
    assert np.abs(np.asarray(opened)[..., 0] / 255 - srgb_of_linear((ramp / 255) ** (461 / 256))).max() <= 2 / 255


@pytest.mark.parametrize("kind", ["jpg", "tiff"])
def test_cmyk_with_a_profile_and_without(tmp_path: Path, kind: str) -> None:
    """JPEG holds CMYK inverted, as Adobe began it."""
    inks = np.zeros((16, 256, 4), np.uint8)
    inks[..., 3] = np.arange(256)
    image = Image.fromarray(inks, "CMYK")
    options = {"quality": 100, "subsampling": 0} if kind == "jpg" else {}
    plain = open_image(saved(tmp_path / f"plain.{kind}", image, b"", **options))
    assert np.abs(np.asarray(plain).astype(int) - (255 - np.arange(256))[:, None]).max() <= 3
    opened = open_image(saved(tmp_path / f"a.{kind}", image, cmyk_profile(), **options), keep_profile=True)
    lightness = 1 - np.arange(256) / 255  # L*/100, by CIE 15
    luminance = np.where(lightness > 0.08, ((lightness * 100 + 16) / 116) ** 3, lightness * 100 / 903.3)
    assert opened.mode == "RGB" and not opened.info
    assert np.abs(np.asarray(opened)[..., 0] / 255 - srgb_of_linear(luminance)).max() <= 5 / 255


@pytest.mark.parametrize(
    ("mode", "profile"),
    [("RGB", b"broken"), ("RGB", rgb_profile()[:200]), ("RGB", grey_profile(1.0)), ("CMYK", rgb_profile())],
)
def test_a_profile_that_does_not_fit_is_a_warning(tmp_path: Path, mode: str, profile: bytes) -> None:
    path = saved(tmp_path / "a.tiff", picture(mode=mode), profile)
    with pytest.warns(UserWarning, match="colour profile cannot be used"):
        opened = open_image(path)
    assert opened.tobytes() == picture(mode=mode).convert("RGB").tobytes() and not opened.info


def test_what_stays_keeps_its_numbers_and_the_picture_its_profile(pipe: Any) -> None:
    image = picture(64, 64)
    image.info["icc_profile"] = rgb_profile()
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    (drawn,) = pipe("a", image, mask_image=mask, num_inference_steps=2, generator=torch.Generator()).images
    assert drawn.info["icc_profile"] == rgb_profile()
    assert np.array_equal(np.asarray(drawn)[:, 32:], np.asarray(image)[:, 32:])
    (whole,) = pipe("a", image, num_inference_steps=2, generator=torch.Generator()).images
    assert "icc_profile" not in whole.info  # all of it is the model's, in sRGB
    file = io.BytesIO()
    drawn.save(file, "PNG")
    assert Image.open(file).info["icc_profile"] == rgb_profile()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_what_changes_is_brought_to_the_pictures_own_space(mode: str) -> None:
    """If the model gave back what it saw, nothing would change but by rounding: no seam at the mask's edge."""
    grey = 64 + np.asarray(picture(64, 64)).astype(int) // 4  # far from the border of sRGB, which is the narrower one
    image = Image.fromarray(grey.astype(np.uint8)).convert(mode)
    image.info["icc_profile"] = rgb_profile()
    images = read_images(image, 4)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    region = read_region(mask, None, 4, images, 8)
    composed = region.composed(images.pixels / 2 + 0.5, images, [0])[0].permute(1, 2, 0).numpy()
    assert np.abs(composed - np.asarray(image)[..., :3] / 255).max() <= 2 / 255
    assert region.profiles(images, [0]) == [rgb_profile()]


def test_without_littlecms_it_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdedit.inputs import colour

    def missing(profile: bytes) -> None:
        raise ImportError("The _imagingcms C module is not installed")

    monkeypatch.setattr(colour, "_opened", missing)
    image = picture()
    image.info["icc_profile"] = b"any"
    with pytest.warns(UserWarning, match="colour profile"):
        assert rgb(image).tobytes() == picture().tobytes()
