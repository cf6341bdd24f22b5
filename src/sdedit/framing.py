"""Where the drawing is on its sheet, so that a small model, which knows things that fill the sheet, sees it so."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageFilter

Array = np.ndarray[Any, Any]
_APART = 24  # of 255: how far a pixel is from the sheet's colour, in its farthest channel, to count as drawn
_EVEN = 0.75  # of the border's pixels are near one colour, or it is no sheet of one colour
_MARGIN = 0.06  # of the drawing's side, on each side of it
_WORK = 512  # larger images are looked at in this size


def framed(image: Image.Image) -> Image.Image:
    """The drawing in the middle of a square sheet that it fills but for a small margin, at the scale it had.

    The sheet is continued in its own colour where it was too small. An image whose border is of many colours (a photo),
    or on which nothing is drawn, is given back as it is.

    Args:
        image: Of any mode; what is clear counts as white, and where it has alpha, new parts are clear.
    """
    clear = image.convert("RGBA") if image.has_transparency_data else None
    opaque = image.convert("RGB")
    if clear is not None:
        opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), clear).convert("RGB")
    found = drawn_box(opaque)
    if found is None:
        return image
    (left, top, right, bottom), colour = found
    side = round(max(right - left, bottom - top) * (1 + 2 * _MARGIN))
    corner = ((left + right - side) // 2, (top + bottom - side) // 2)
    source = opaque if clear is None else clear
    sheet = Image.new(source.mode, (side, side), colour if clear is None else (*colour, 0))
    sheet.paste(source, (-corner[0], -corner[1]))
    return sheet


def drawn_box(image: Image.Image) -> tuple[tuple[int, int, int, int], tuple[int, int, int]] | None:
    """Where an RGB image differs from the colour of its border, as (left, top, right, bottom), and that colour.

    `None` if the border is of many colours, or nothing differs.
    """
    scale = max(1.0, max(image.size) / _WORK)
    small = image.resize((max(1, round(image.width / scale)), max(1, round(image.height / scale))))
    pixels = np.asarray(small.filter(ImageFilter.MedianFilter(3)), np.int16)  # specks and grain are not drawn
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = np.median(border, axis=0).astype(np.int16)
    if (_far(border, colour) > _APART).mean() > 1 - _EVEN:
        return None
    drawn = _far(pixels, colour) > _APART
    if not drawn.any():
        return None
    (top, bottom), (left, right) = (_span(np.flatnonzero(drawn.any(axis))) for axis in (1, 0))
    box = tuple(round(edge * scale) for edge in (left, top, right, bottom))
    red, green, blue = colour.tolist()
    return box, (red, green, blue)  # type: ignore[return-value]


def _far(pixels: Array, colour: Array) -> Array:
    return np.abs(pixels - colour).max(-1)  # type: ignore[no-any-return]


def _span(places: Array) -> tuple[int, int]:
    """First place, and the one after the last."""
    return int(places[0]), int(places[-1]) + 1
