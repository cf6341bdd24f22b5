"""A drawing on its sheet, made what a small model knows: a thing that fills a clean sheet."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from sdedit.inputs.pixels import on_white, rgb

Array = np.ndarray[Any, Any]
_APART = 24  # of 255: how far a pixel is from the sheet, in its farthest channel, to count as drawn
_EVEN = 0.75  # of the border's pixels are near the sheet's colour, or it is no sheet
_MARGIN = 0.06  # of the drawing's side, on each side of it
_WORK = 256  # larger images are looked at in this size
_LIGHT, _GREY = 110, 0.12  # paper is at least so light (of 255), and its channels differ by at most this part


class Sheet(NamedTuple):
    """What lies below a drawing.

    Attributes:
        box: (left, top, right, bottom) of what is drawn, in pixels.
        light: (6, 3), RGB of the sheet at (x, y), both from 0 to 1: `_powers(x, y) @ light`.
    """

    box: tuple[int, int, int, int]
    light: Array


def framed(image: Image.Image) -> Image.Image:
    """The drawing in the middle of a square sheet that it fills but for a small margin, at the scale it had.

    The sheet is continued in its own colour where it was too small; grey or unevenly lit paper becomes white. An image
    whose border has many colours (a photo), which is drawn on from edge to edge or not at all, is given back as it is.

    Args:
        image: Of any mode; what is clear counts as white, and where it has alpha, new parts are clear.
    """
    seen = rgb(image)
    opaque, clear = on_white(seen), seen if seen.mode == "RGBA" else None
    sheet = find_sheet(opaque)
    if sheet is None:
        return image
    if clear is None:
        opaque = whitened(opaque, sheet)
    left, top, right, bottom = sheet.box
    side = round(max(right - left, bottom - top) * (1 + 2 * _MARGIN))
    corner = ((left + right - side) // 2, (top + bottom - side) // 2)
    source = opaque if clear is None else clear
    square = Image.new(source.mode, (side, side), _border_colour(opaque) if clear is None else (0, 0, 0, 0))
    square.paste(source, (-corner[0], -corner[1]))
    return square


def find_sheet(image: Image.Image) -> Sheet | None:
    """The sheet of a drawing (RGB): a colour that changes slowly from place to place, and what differs from it.

    `None` if the border does not look like one sheet, or nothing differs.
    """
    scale = max(1.0, max(image.size) / _WORK)
    small = image.resize((max(1, round(image.width / scale)), max(1, round(image.height / scale))))
    pixels = np.asarray(small.filter(ImageFilter.MedianFilter(3)), np.float64)  # specks and grain are not drawn
    powers = _powers(*_places(small.size))
    border = np.ones(pixels.shape[:2], bool)
    border[1:-1, 1:-1] = False
    near = border & (_far(pixels, np.median(pixels[border], axis=0)) < 3 * _APART)
    for _ in range(4):  # first of the border, then of all that is near what was found
        if near.sum() < 16:
            return None
        light = np.linalg.lstsq(powers[near], pixels[near], rcond=None)[0]
        far = _far(pixels, powers @ light)
        near = far < _APART
    if near[border].mean() < _EVEN or near.all():
        return None
    (top, bottom), (left, right) = (_span(np.flatnonzero((~near).any(axis))) for axis in (1, 0))
    if (right - left, bottom - top) == small.size:  # a ground of many colours, or a drawing that fills it already
        return None
    left, top, right, bottom = (round(edge * scale) for edge in (left, top, right, bottom))
    return Sheet((left, top, right, bottom), light)


def whitened(image: Image.Image, sheet: Sheet) -> Image.Image:
    """The image (RGB) as on white, if it is on paper; else as it is."""
    light = np.clip(_powers(*_places(image.size)) @ sheet.light, 1, 255)
    if light.min() < _LIGHT or (light.max(-1) / light.min(-1)).max() > 1 / (1 - _GREY):
        return image
    return Image.fromarray(np.clip(np.asarray(image) * (255 / light), 0, 255).round().astype(np.uint8))


def _border_colour(image: Image.Image) -> tuple[int, int, int]:
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = np.median(border, axis=0).astype(int).tolist()
    return red, green, blue


def _places(size: tuple[int, int]) -> tuple[Array, Array]:
    """x and y of all pixels, (H, W) each, from 0 to 1."""
    x, y = np.meshgrid(*(np.arange(side) / max(side - 1, 1) for side in size))
    return x, y


def _powers(x: Array, y: Array) -> Array:
    """(…, 6): what a slow change of light is made of, up to squares."""
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1)


def _far(pixels: Array, sheet: Array) -> Array:
    return np.abs(pixels - sheet).max(-1)  # type: ignore[no-any-return]


def _span(places: Array) -> tuple[int, int]:
    """First place, and the one after the last."""
    return int(places[0]), int(places[-1]) + 1
