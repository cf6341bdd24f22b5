"""A drawing on its sheet, made what a small model knows: a thing that fills a clean sheet."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from sdedit.inputs.pixels import on_white, rgb

Array = np.ndarray[Any, Any]
# All found on the doodles of examples/, on sheets of many colours and under uneven light, and on made-up photos.
_APART = 24  # of 255: how far a pixel is from the sheet, in its farthest channel, to count as drawn
_EVEN = 0.75  # share of the border's pixels near the sheet's colour; with less it is no sheet
_SHADED = 0.12  # share of what is drawn that is shaded: 0 to 0.11 in doodles, in photos mostly 0.2 and more
_SLOPE = 2.0  # of 255 over _STRIDE pixels: what counts as shading; paper under a lamp has less than 1.5
_STRIDE = 4  # pixels of the working size
_MARGIN = 0.06  # of the drawing's side, on each side of it
_WORK = 256  # pixels: larger images are looked at in this size
_LIGHT, _GREY = 110, 0.12  # paper is at least so light (of 255), and its channels differ by at most this part
_LEFT = 0.05  # share of what is drawn that must differ from white, or the sheet keeps its colour (chalk on a board)


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

    The sheet becomes white, whatever its colour, since models are taught on white; only one whose drawing would vanish
    on white (chalk on a board) is continued in its own colour. An image whose border has many colours or whose things
    are shaded (a photo), which is drawn on from edge to edge or not at all, is given back as it is.

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

    `None` if the border does not look like one sheet, nothing differs, or what does is shaded as things in photos are.
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
    if near[border].mean() < _EVEN or near.all() or _photographed(small, ~near):
        return None
    (top, bottom), (left, right) = (_span(np.flatnonzero((~near).any(axis))) for axis in (1, 0))
    if (right - left, bottom - top) == small.size:  # a ground of many colours, or a drawing that fills it already
        return None
    left, top, right, bottom = (round(edge * scale) for edge in (left, top, right, bottom))
    return Sheet((left, top, right, bottom), light)


def _photographed(image: Image.Image, drawn: Array) -> bool:
    """Whether things in an image (RGB) at the working size are shaded, or reach around a corner of it.

    Light makes a thing's brightness rise or fall over many pixels in a row, about evenly; a doodle has areas of one
    colour and edges. A table fills two corners, a doodle seldom more than one.
    """
    high, wide = (max(side // 16, 1) for side in drawn.shape)
    corners = [
        drawn[rows, columns]
        for rows in (slice(high), slice(-high, None))
        for columns in (slice(wide), slice(-wide, None))
    ]
    if sum(bool(corner.mean() > 0.5) for corner in corners) > 1:
        return True
    light = np.asarray(image.filter(ImageFilter.GaussianBlur(1.5)).convert("L"), np.float64)
    shaded = np.zeros(drawn.shape, bool)
    for axis in (0, 1):
        step = np.roll(light, -_STRIDE, axis) - light
        steps = np.stack([np.roll(step, -n * _STRIDE, axis) for n in (-2, -1, 0, 1)])
        sizes = np.abs(steps)
        even = (
            (sizes.min(0) > _SLOPE) & (sizes.max(0) < 4 * sizes.min(0)) & (np.abs(np.sign(steps).sum(0)) == len(steps))
        )
        shaded |= even
    edge = 2 * _STRIDE  # rolled around there
    inner = np.zeros(drawn.shape, bool)
    inner[edge:-edge, edge:-edge] = True
    return bool((shaded & inner)[drawn].mean() > _SHADED)


def whitened(image: Image.Image, sheet: Sheet) -> Image.Image:
    """The image (RGB) as on white: paper by its light, a sheet of another colour by taking that colour off it.

    As it is if next to nothing of the drawing would be left.
    """
    light = np.clip(_powers(*_places(image.size)) @ sheet.light, 1, 255)
    pixels = np.asarray(image, np.float64)
    if light.min() >= _LIGHT and (light.max(-1) / light.min(-1)).max() <= 1 / (1 - _GREY):
        return Image.fromarray(np.clip(pixels * (255 / light), 0, 255).round().astype(np.uint8))
    far = _far(pixels, light)
    seen = 1 - np.clip((far - _APART / 2) / (1.5 * _APART), 0, 1)[..., None]  # how much of the sheet is seen
    white = np.clip(pixels + seen * (255 - light), 0, 255)
    drawn = far >= _APART
    left = (_far(white, np.float64(255)) >= _APART) & drawn
    return Image.fromarray(white.round().astype(np.uint8)) if left.sum() >= _LEFT * drawn.sum() else image


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


def _far(pixels: Array, sheet: Any) -> Array:
    return np.abs(pixels - sheet).max(-1)  # type: ignore[no-any-return]


def _span(places: Array) -> tuple[int, int]:
    """First place, and the one after the last."""
    return int(places[0]), int(places[-1]) + 1
