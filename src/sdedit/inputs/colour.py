"""Colour profiles (ICC): what a picture's numbers mean, and the same colours in sRGB, which the models know."""

from __future__ import annotations

import functools
import io
import itertools
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsProfile

# Profiles for so many channels, by the name that ICC gives their space, and the modes that they describe.
_MODES = {"RGB": ("RGB", "RGBA"), "GRAY": ("L", "LA"), "CMYK": ("CMYK",)}


def in_rgb(image: Image.Image) -> Image.Image:
    """A picture of 8 bits a channel as RGB, or RGBA where it has transparency; `info` holds its profile and no more.

    Colours of a profile for RGB stay as they are; those of one for grey or CMYK become sRGB. A profile that cannot be
    read, or is for another kind of picture, is left out with a warning: the colours are then taken as sRGB.
    """
    # Pillow knows LAB by itself, and keeps a profile in it that says how.
    profile: bytes = (image.info.get("icc_profile") or b"") if image.mode != "LAB" else b""
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    clear = image.has_transparency_data
    space = _space(profile) if profile else None
    rgb: Image.Image | None = None
    if space in ("GRAY", "CMYK"):
        # Pictures of one bit and of a palette of greys are grey, too.
        kind = image.convert("LA" if clear else "L") if space == "GRAY" and image.mode in ("1", "LA") else image
        if kind.mode in _MODES[space]:
            rgb = _converted(kind.convert(_MODES[space][0]), _opened(profile), _srgb(), "RGB")
            if clear and rgb is not None:
                rgb.putalpha(image.convert("RGBA").getchannel("A"))
    elif space == "RGB" and image.mode == "CMYK":
        space = None
    if profile and (space is None or (space != "RGB" and rgb is None)):
        warnings.warn(
            f"image: its colour profile cannot be used for a picture of mode {image.mode} (it is damaged, or for "
            "another kind of picture), so its colours are taken as sRGB",
            stacklevel=2,
        )
    if rgb is None:
        rgb = image.convert("RGBA" if clear else "RGB")
    rgb = rgb.copy() if rgb is image else rgb
    rgb.info = {"icc_profile": profile} if space == "RGB" else {}
    return rgb


def to_srgb(image: Image.Image) -> Image.Image:
    """An RGB or RGBA picture, as `in_rgb` gives it, in sRGB; itself if its numbers mean that already."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    if _is_srgb(profile):
        same = image.copy()
        same.info = {}
        return same
    converted = _converted(image, _opened(profile), _srgb(), image.mode)
    assert converted is not None  # in_rgb has tried the profile
    return converted


def from_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An RGB picture in sRGB, in the numbers of another profile for RGB."""
    if _is_srgb(profile):
        return image
    converted = _converted(image, _srgb(), _opened(profile), image.mode)
    if converted is None:
        raise ValueError("image: its colour profile can be read but not written; convert the picture to sRGB first")
    converted.info = {"icc_profile": profile}
    return converted


def _converted(image: Image.Image, source: Any, target: Any, mode: str) -> Image.Image | None:
    """Pixels in another space, perceptually, as viewers show them; `None` if the profiles do not allow it."""
    from PIL import ImageCms

    try:
        done = ImageCms.profileToProfile(image, source, target, ImageCms.Intent.PERCEPTUAL, mode)
    except ImageCms.PyCMSError:
        return None
    assert done is not None
    done.info = {}
    return done


def _opened(profile: bytes) -> ImageCmsProfile:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(io.BytesIO(profile))


def _srgb() -> Any:
    from PIL import ImageCms

    return ImageCms.createProfile("sRGB")


@functools.lru_cache(16)
def _space(profile: bytes) -> str | None:
    """Which of `_MODES` a profile is for and can be turned into sRGB from; `None` if none."""
    try:
        opened = _opened(profile)
    except (OSError, TypeError, ImportError):  # ImportError: a Pillow without LittleCMS
        return None
    space = opened.profile.xcolor_space.strip()
    if space not in _MODES:
        return None
    probe = Image.new(_MODES[space][0], (1, 1))
    return space if _converted(probe, opened, _srgb(), "RGB") is not None else None


@functools.lru_cache(16)
def _is_srgb(profile: bytes) -> bool:
    """Whether a profile for RGB changes no colour by more than rounding: most that are met are sRGB itself."""
    levels = np.array(list(itertools.product(range(0, 256, 15), repeat=3)), np.uint8)[None]
    seen = _converted(Image.fromarray(levels), _opened(profile), _srgb(), "RGB")
    return seen is not None and int(np.abs(np.asarray(seen).astype(int) - levels).max()) <= 1
