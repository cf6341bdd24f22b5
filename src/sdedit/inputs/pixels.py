"""Pictures to arrays: whatever people call an image becomes (B, 3, H, W) in [-1, 1]. NumPy and Pillow only."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
MIN_SIDE = 8

_TOLERANCE = 1e-3  # resampling and rounding overshoot
_PILLOW_LIMIT = threading.Lock()  # Pillow's own limit is a global variable

Array = np.ndarray[Any, Any]


def open_image(path: str | os.PathLike[str], max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """Open and decode an image file.

    Args:
        max_pixels: Larger images are refused before they are decoded; `None` allows any size.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not an image that Pillow reads, damaged, or too large.
    """
    with _opened(path) as image:
        size = image.size
        if max_pixels is None or size[0] * size[1] <= max_pixels:
            image.load()
    check_size(size, max_pixels)
    return image


def image_info(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """What an image file says before its pixels, as Pillow names it; no pixel is decoded, however many there are.

    Raises:
        FileNotFoundError, ValueError: As `open_image`.
    """
    with _opened(path) as image:
        return dict(image.info)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """An image file whose header has been read; what goes wrong inside is the file's fault."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"image: {path} does not exist")
    with _PILLOW_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours is checked instead, in check_size
        try:
            with Image.open(path) as image:
                yield image
        except Exception as error:  # what Pillow's decoders raise on damaged files is of every class
            reason = "no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(f"image: {path} is not an image that can be read ({reason})") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit


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


class Pictures(NamedTuple):
    """What was read.

    Attributes:
        pixels: (B, 3, H, W) in [-1, 1], float32; latents (B, C, h, w) if `latent`.
        alphas: For each image the alpha channel (H, W) in [0, 1] that it came with, or `None`.
        colours: (B, 3, H, W) in [0, 1], to the bit as they came, also below what is clear; none of latents.
        latent: They are latents already.
    """

    pixels: Array
    alphas: list[Array | None]
    colours: Array
    latent: bool = False


def read_pixels(image: Any, latent_channels: int, max_pixels: int | None = MAX_PIXELS) -> Pictures:
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
    if len({latent for _, latent in read}) > 1:
        raise ValueError("image: the list mixes images and latents; expected one kind")
    sizes = {array.shape[1:3] if not latent else array.shape[2:] for array, latent in read}
    if len(sizes) > 1:
        shown = ", ".join(f"{w}×{h}" for h, w in sorted(sizes))
        raise ValueError(
            f"image: the list has several sizes ({shown}, width×height); expected one: resize, or call once a size"
        )
    if read[0][1]:
        latents = np.concatenate([array for array, _ in read])
        return Pictures(latents, [None] * len(latents), np.empty(0, np.float32), latent=True)
    # Values in [-1, 1] are told from [0, 1] by all images of the list: a light one has no negative values.
    units = [to_unit(array) for array, _ in read]
    signed = any(float(array.min()) < -_TOLERANCE for array in units)
    composed = [_composite((one / 2 + 0.5 if signed else one).clip(0, 1)) for array in units for one in array]
    pixels, alphas, colours = zip(*composed, strict=True)
    return Pictures(np.stack(pixels), list(alphas), np.stack(colours))


def _read_one(image: Any, latent_channels: int, max_pixels: int | None) -> tuple[Array, bool]:
    """A PIL image, array or tensor as (B, H, W, C), or latents as (B, C, h, w); and whether it is latents."""
    if isinstance(image, Image.Image):
        check_size(image.size, max_pixels)
        array = pil_to_array(image)[None]
    elif (tensor := _from_tensor(image)) is not None:
        array = tensor[None] if tensor.ndim == 3 else tensor
        if array.ndim != 4:
            raise ValueError(f"image: a tensor of shape {list(image.shape)}; expected (C, H, W) or (B, C, H, W)")
        if array.shape[1] == latent_channels and latent_channels not in (1, 3):
            if not np.issubdtype(array.dtype, np.floating) or not array.size:
                raise ValueError(f"image: latents {list(image.shape)} of {image.dtype}; expected floats, at least one")
            _check_finite(array)
            return array, True
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
    return array, False


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
    """A PIL image of any mode, upright, as (H, W, C) in [0, 1]; C is 3, or 4 if it has transparency."""
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            return _deep_to_array(image)
        image = image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image
        return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB")).astype(np.float32) / 255
    except Exception as error:  # decoding may begin only here
        raise ValueError(
            f"image: this {image.mode} picture cannot be read as RGB ({error}); save it as an ordinary PNG first"
        ) from error


def _deep_to_array(image: Image.Image) -> Array:
    """PIL's modes of more than 8 bits, all of them grey, as (H, W, 3) in [0, 1]; PIL itself would clip them.

    "I;16" fills 16 bits. "I" and "F" are containers: what lies in them is taken to fill 16 bits if it exceeds 8, and
    fractions to be in [0, 1] if none exceeds 1.
    """
    grey = np.asarray(image).astype(np.float32)
    _check_finite(grey)
    low, high = float(grey.min()), float(grey.max())
    top = 65535 if image.mode.startswith("I;16") or high > 255 else 1 if image.mode == "F" and high <= 1 else 255
    if low < 0 or high > top:
        raise ValueError(f"values from {low:g} to {high:g}; expected 0 to {top}")
    return np.repeat(grey[..., None] / top, 3, axis=-1)


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
