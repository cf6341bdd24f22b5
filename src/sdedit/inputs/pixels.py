"""Pictures to arrays: whatever people call an image becomes (B, 3, H, W) in [-1, 1]. NumPy and Pillow only.

Every picture goes through here first, guides, masks and what is measured alike: upright, deep values scaled, colours
in sRGB. What comes after, framing and resizing too, may take that for granted.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from sdedit.inputs import colour, opening
from sdedit.inputs.opening import MAX_PIXELS, check_size, check_tiles

_TOLERANCE = 1e-3  # resampling and rounding overshoot
_OVERSHOOT = 0.3  # of the range: what sharp resampling (Lanczos, along both sides) adds to its ends at most

Array = np.ndarray[Any, Any]


@dataclass
class Images:
    """A batch of images, as arrays or as tensors.

    Attributes:
        pixels: (B, 3, H, W) in [-1, 1], float32, in sRGB; latents (B, C, h, w) if `latent`.
        alphas: For each image the alpha channel (H, W) in [0, 1] that it came with, or `None`.
        colours: (B, 3, H, W) in [0, 1], to the bit as they came, also below what is clear; none of latents.
        profiles: For each image the colour profile (ICC) that its `colours` are meant by, or `None` for sRGB.
        latent: They are latents already, scaled as the UNet expects them.
    """

    pixels: Any
    alphas: list[Any] = field(default_factory=list)
    colours: Any = None
    profiles: list[bytes | None] = field(default_factory=list)
    latent: bool = False

    def cropped(self, pixels: Any) -> Any:
        """Decoded pixels (B, 3, H, W) at the size of these images, without what was padded; of latents, all."""
        height, width = self.pixels.shape[-2:]
        return pixels if self.latent else pixels[..., :height, :width]


class _Read(NamedTuple):
    """One entry of what users pass: (B, H, W, C), or latents (B, C, h, w)."""

    array: Array
    latent: bool = False
    own: Array | None = None  # before it was brought to sRGB, in [0, 1]
    profile: bytes | None = None


def open_image(
    path: str | os.PathLike[str] | BinaryIO, max_pixels: int | None = MAX_PIXELS, *, keep_profile: bool = False
) -> Image.Image:
    """Open and decode a picture file.

    Args:
        path: A file of one of `opening.FORMATS` (or HEIC, if pillow-heif is installed); `-` is the standard input.
        max_pixels: Larger images are refused before they are decoded; `None` allows any size.
        keep_profile: Leave the colours in the space of the file's profile, which then is in `info`; all that reads
            pictures here turns them into sRGB.

    Returns:
        It, upright: RGB, or RGBA where it has transparency, in sRGB. A grey one of more than 8 bits is of mode I;16.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not an image that is read here, damaged, or too large.
    """
    with opening.opened(path, max_pixels) as image:
        opening.check_size(image.size, max_pixels)
        opening.decode(image)
        return settled(image, keep_profile=keep_profile)


def image_info(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """What an image file says beside its pixels, as Pillow names it; no pixel is decoded, however many there are.

    Raises:
        FileNotFoundError, ValueError: As `open_image`.
    """
    with opening.opened(path, None, header=True) as image:
        return dict(image.info)


def read_pixels(image: Any, latent_channels: int, max_pixels: int | None = MAX_PIXELS) -> Images:
    """Read what users pass as an image.

    Args:
        image: One of these, or a list of one kind. PIL: any mode; EXIF orientation is applied. NumPy: (H, W),
            (H, W, C) or (B, H, W, C), uint8 or float in [0, 1] or [-1, 1]. Tensor: (C, H, W) or (B, C, H, W) likewise.
            C is 1 or 3; or 4 or 2 with alpha last (NumPy and PIL). A tensor of `latent_channels` other than 1 or 3
            is taken as latents.
        latent_channels: Channels of the VAE's latents.
        max_pixels: Limit of one image; `None` for none.

    Raises:
        TypeError, ValueError: It is none of these, empty, of mixed sizes, out of range, not finite, or too large.
    """
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if not images:
        raise ValueError("image: the list is empty; expected at least one image")
    read = [_read_one(one, latent_channels, max_pixels) for one in images]
    if len({one.latent for one in read}) > 1:
        raise ValueError("image: the list mixes images and latents; expected one kind")
    sizes = {one.array.shape[2:] if one.latent else one.array.shape[1:3] for one in read}
    if len(sizes) > 1:
        shown = ", ".join(f"{w}×{h}" for h, w in sorted(sizes))
        raise ValueError(
            f"image: the list has several sizes ({shown}, width×height); expected one: resize, or call once a size"
        )
    if read[0].latent:
        latents = np.concatenate([one.array for one in read])
        return Images(latents, [None] * len(latents), np.empty(0, np.float32), [None] * len(latents), latent=True)
    return _batch(read)


def _batch(read: list[_Read]) -> Images:
    # Values in [-1, 1] are told from [0, 1] by all images of the list: a light one has no negative values.
    units = [to_unit(one.array) for one in read]
    signed = any(float(array.min()) < -_TOLERANCE for array in units)
    composed = [_composite((one / 2 + 0.5 if signed else one).clip(0, 1)) for array in units for one in array]
    pixels, alphas, colours = (list(part) for part in zip(*composed, strict=True))
    profiles = [one.profile for one in read for _ in one.array]
    own = [one.own for one in read for _ in one.array]
    colours = [c if o is None else _composite(o)[2] for c, o in zip(colours, own, strict=True)]
    return Images(np.stack(pixels), alphas, np.stack(colours), profiles)


def _read_one(image: Any, latent_channels: int, max_pixels: int | None) -> _Read:
    """A PIL image, array or tensor, checked."""
    if isinstance(image, Image.Image):
        check_size(image.size, max_pixels)
        return _read_pil(image)
    if (tensor := _from_tensor(image)) is not None:
        array = tensor[None] if tensor.ndim == 3 else tensor
        if array.ndim != 4:
            raise ValueError(f"image: a tensor of shape {list(image.shape)}; expected (C, H, W) or (B, C, H, W)")
        if array.shape[1] == latent_channels and latent_channels not in (1, 3):
            if not np.issubdtype(array.dtype, np.floating) or not array.size:
                raise ValueError(f"image: latents {list(image.shape)} of {image.dtype}; expected floats, at least one")
            _check_finite(array)
            return _Read(array, latent=True)
        if array.shape[1] not in (1, 3):
            raise ValueError(
                f"image: a tensor with {array.shape[1]} channels; expected 1 or 3, or {latent_channels} for latents"
            )
        array = array.transpose(0, 2, 3, 1)
    elif isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        array = array[None] if array.ndim == 3 else array
        if array.ndim != 4 or array.shape[-1] not in (1, 2, 3, 4):
            raise ValueError(
                f"image: an array of shape {list(image.shape)}; "
                "expected (H, W), (H, W, C) or (B, H, W, C) with C from 1 to 4"
            )
    else:
        raise TypeError(
            f"image: {type(image).__name__}; expected a PIL image, a NumPy array, a tensor, or a list of them "
            "(open a file with sdedit.inputs.pixels.open_image)"
        )
    if not len(array):
        raise ValueError(f"image: a batch of shape {list(array.shape)}; expected at least one image")
    check_size((array.shape[2], array.shape[1]), max_pixels)
    return _Read(array)


def _from_tensor(image: Any) -> Array | None:
    """A tensor of PyTorch or an array of JAX, floats of any width in float32; `None` if it is neither."""
    library = type(image).__module__.partition(".")[0]
    if library == "torch":
        held = image.detach().cpu()
        return np.asarray((held.float() if held.is_floating_point() else held).numpy())
    if library in ("jax", "jaxlib"):
        held = np.asarray(image)
        return held if held.dtype == bool or np.issubdtype(held.dtype, np.integer) else held.astype(np.float32)
    return None


def pil_to_array(image: Image.Image) -> Array:
    """A PIL image of any mode, upright and in sRGB, as (H, W, C) in [0, 1]; C is 3, or 4 if it has transparency."""
    return _read_pil(image).array[0]


def rgb(image: Image.Image, *, keep_profile: bool = False) -> Image.Image:
    """A PIL image of any mode, upright, as RGB, or RGBA if it has transparency; deep values are scaled to 8 bits.

    Args:
        keep_profile: Leave its colours as they are if it has a profile for RGB, which stays in `info`; else they
            become sRGB.
    """
    settled_image = settled(image, keep_profile=keep_profile)
    if not _is_deep(settled_image):
        return settled_image
    return Image.fromarray((_deep_to_array(settled_image) * 255).round().astype(np.uint8))


def on_white(image: Image.Image) -> Image.Image:
    """A PIL image of any mode, upright and in sRGB, as RGB; what is clear is white."""
    seen = rgb(image)
    if seen.mode == "RGB":
        return seen
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def settled(image: Image.Image, *, keep_profile: bool = False) -> Image.Image:
    """As `rgb`, but a grey image of more than 8 bits keeps 16 of them, in mode I;16."""
    try:
        image = upright(image)
        if _is_deep(image) and not image.info.get("icc_profile"):
            grey = _deep_to_array(image)
            deep = Image.fromarray((grey[..., 0] * 65535).round().astype(np.uint16))
            deep.info = {"transparency": image.info["transparency"]} if grey.shape[-1] == 4 else {}
            return deep
        if _is_deep(image):
            image = _eight_bit(image)
        own = colour.in_rgb(image)
        return own if keep_profile else colour.to_srgb(own)
    except Exception as error:  # decoding may begin only here
        if str(error).startswith("image: "):
            raise
        raise ValueError(
            f"image: this {image.mode} picture cannot be read as RGB ({error}); save it as an ordinary PNG first"
        ) from error


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data says, if they can be read; else as it is, with a warning."""
    check_tiles(image)
    image.load()
    try:
        if "exif" in image.info:  # some of Pillow's readers hide what is wrong with them
            Image.Exif().load(image.info["exif"])
        orientation = image.getexif().get(274, 1)  # Orientation; by XMP too
    except Exception as error:  # bytes that anybody may have written
        warnings.warn(f"image: its EXIF data cannot be read ({error}), so it is taken as upright", stacklevel=2)
        return image
    methods = [Image.Transpose(method) for method in (0, 3, 1, 5, 4, 6, 2)]  # of orientations 2 to 8
    if orientation not in range(2, 9):
        return image
    turned = image.transpose(methods[orientation - 2])
    turned.info = {key: image.info[key] for key in ("icc_profile", "transparency") if key in image.info}
    return turned


def _read_pil(image: Image.Image) -> _Read:
    own = settled(image, keep_profile=True)
    if _is_deep(own):
        return _Read(_deep_to_array(own)[None])
    shown = colour.to_srgb(own)
    array = np.asarray(shown).astype(np.float32) / 255
    before = None if shown is own else np.asarray(own).astype(np.float32) / 255
    return _Read(array[None], False, before, own.info.get("icc_profile"))


def _is_deep(image: Image.Image) -> bool:
    return image.mode[0] in "IF"


def _deep_to_array(image: Image.Image) -> Array:
    """PIL's modes of more than 8 bits, all of them grey, as (H, W, 3) in [0, 1]; PIL itself would clip them.

    With a transparent value it is (H, W, 4). "I;16" fills 16 bits. "I" and "F" are containers: a TIFF may say which
    values stand for black and white (SMinSampleValue, SMaxSampleValue); else what lies in them is taken to fill 16
    bits if it exceeds 8, and fractions to be in [0, 1] if none exceeds 1. What resampling overshot is cut off.
    """
    values = np.asarray(image).astype(np.float32)
    _check_finite(values)
    tags = getattr(image, "tag_v2", {})
    floor, top = 0.0, 65535.0
    if not image.mode.startswith("I;16"):
        floor, top = _sample_range(tags) or (0.0, _top(image.mode, float(values.max())))
        low, high = float(values.min()), float(values.max())
        slack = _OVERSHOOT * (top - floor)
        if low < floor - slack or high > top + slack:
            raise ValueError(f"values from {low:g} to {high:g}; expected {floor:g} to {top:g}")
    grey = ((values - floor) / (top - floor)).clip(0, 1)
    if tags.get(262) == 0:  # PhotometricInterpretation: white is zero
        grey = 1 - grey
    channels = [grey] * 3
    if "transparency" in image.info:
        channels.append((values != image.info["transparency"]).astype(np.float32))
    return np.stack(channels, axis=-1)


def _top(mode: str, high: float) -> float:
    """The value that stands for white, judged by the highest one."""
    tops = (1.0, 255.0) if mode == "F" else (255.0,)
    return next((top for top in tops if high <= top * (1 + _OVERSHOOT)), 65535.0)


def _sample_range(tags: Any) -> tuple[float, float] | None:
    """The values of black and white that a TIFF names."""
    found = [tags.get(tag) for tag in (340, 341)]  # SMinSampleValue, SMaxSampleValue
    try:
        floor, top = (float(value[0] if isinstance(value, tuple) else value) for value in found)
    except (TypeError, ValueError, IndexError):
        return None
    return (floor, top) if np.isfinite([floor, top]).all() and floor < top else None


def _eight_bit(image: Image.Image) -> Image.Image:
    """A deep grey image as L, or LA, with its profile."""
    array = (_deep_to_array(image) * 255).round().astype(np.uint8)
    grey = Image.fromarray(np.ascontiguousarray(array[..., 0]))
    if array.shape[-1] == 4:
        grey.putalpha(Image.fromarray(np.ascontiguousarray(array[..., 3])))
    grey.info["icc_profile"] = image.info["icc_profile"]
    return grey


def to_unit(array: Array, name: str = "image") -> Array:
    """Arrays of whole numbers, or of floats in [0, 1] or [-1, 1], to float32; floats keep their range."""
    if array.dtype == bool:
        return array.astype(np.float32)
    if np.issubdtype(array.dtype, np.integer):
        top = 65535 if array.dtype == np.uint16 else 255
        if array.min() < 0 or array.max() > top:
            raise ValueError(f"{name}: whole numbers from {array.min()} to {array.max()}; expected 0 to {top}")
        return array.astype(np.float32) / top
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{name}: an array of {array.dtype}; expected uint8, uint16, bool or floating point")
    array = array.astype(np.float32)
    _check_finite(array, name)
    low, high = float(array.min()), float(array.max())
    if low < -1 - _TOLERANCE or high > 1 + _TOLERANCE:
        raise ValueError(
            f"{name}: values from {low:g} to {high:g}; expected floats in [0, 1] or [-1, 1] (divide by 255), or uint8"
        )
    return array


def _check_finite(values: Array, name: str = "image") -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: it holds NaN or infinite values; expected finite ones")


def _composite(array: Array) -> tuple[Array, Array | None, Array]:
    """(H, W, C) in [0, 1] to (3, H, W) in [-1, 1] on white; its alpha (H, W); and its colours, (3, H, W) in [0, 1]."""
    colours = opaque = np.ascontiguousarray(array).transpose(2, 0, 1)
    alpha = None
    if len(colours) in (2, 4):
        colours, alpha = colours[:-1], colours[-1]
        opaque = colours * alpha + (1 - alpha)
    shape = (3, *colours.shape[1:])
    return np.broadcast_to(opaque, shape) * 2 - 1, alpha, np.broadcast_to(colours, shape)
