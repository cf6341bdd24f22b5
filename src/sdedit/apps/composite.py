"""Compositing: cut-outs pasted into a picture, and made one with it at a low strength (SDEdit, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from sdedit.inputs import checks
from sdedit.inputs.colour import from_srgb
from sdedit.inputs.pixels import rgb

STRENGTH = 0.5  # the paper's 0.35 is on a schedule that is noisier early on
MARGIN = 8

Point = tuple[float, float]


@dataclass
class Pasted:
    """A paste, before the model has seen it.

    Attributes:
        image: The background with the cut-outs on it, RGB.
        mask: White where the picture may change: the cut-outs and a margin around them.
    """

    image: Image.Image
    mask: Image.Image


@dataclass
class Composite(Pasted):
    """A paste, and what the model made of it.

    Attributes:
        result: The picture; outside the mask it is the background to the bit.
    """

    result: Image.Image


def composite(
    pipe: Any,
    background: Image.Image,
    cutouts: Image.Image | Sequence[Image.Image],
    prompt: str,
    at: Point | Sequence[Point],
    scale: float | Sequence[float] = 1.0,
    *,
    margin: int = MARGIN,
    match_colours: bool = False,
    strength: float = STRENGTH,
    **settings: Any,
) -> Composite:
    """Paste cut-outs into a picture and draw them and their surroundings anew, with all else kept to the bit.

    Args:
        pipe: The pipeline.
        background: A PIL image.
        cutouts, at, scale, margin, match_colours: See `paste`. The change fades in over the margin.
        strength: Low keeps the cut-outs as they are, high paints them anew in the background's manner.
        **settings: Further arguments of the pipeline, such as `generator` and `guidance_scale`.
    """
    pasted = paste(background, cutouts, at, scale, margin=margin, match_colours=match_colours)
    given = {**settings, "mask_image": pasted.mask, "mask_feather": margin, "strength": strength, "output_type": "pil"}
    return Composite(pasted.image, pasted.mask, pipe(prompt, pasted.image, **given).images[0])


def paste(
    background: Image.Image,
    cutouts: Image.Image | Sequence[Image.Image],
    at: Point | Sequence[Point],
    scale: float | Sequence[float] = 1.0,
    *,
    margin: int = MARGIN,
    match_colours: bool = False,
) -> Pasted:
    """Paste cut-outs into a picture, one over the other, and mask them.

    Args:
        background: A PIL image; what is clear in it counts as white.
        cutouts: One or several PIL images that are clear around what was cut out.
        at: For each, (x, y) of its left upper corner in the background, in pixels; it may reach beyond the border.
        scale: For each, or for all, the factor of its size.
        margin: Pixels around the cut-outs that the mask has too.
        match_colours: Give each cut-out the background's distribution of colours; needs scikit-image.

    Raises:
        ValueError: A cut-out has no transparency, lies outside the background, or an argument is not as described.
    """
    many = [cutouts] if isinstance(cutouts, Image.Image) else list(cutouts)
    places = [at] if isinstance(cutouts, Image.Image) else list(at)
    scales = list(scale) if isinstance(scale, (list, tuple)) else [scale] * len(many)
    margin = checks.whole_number("margin", margin, 0)
    if not many or not len(many) == len(places) == len(scales):
        raise ValueError(
            f"composite: {len(many)} cut-outs, {len(places)} places (at), {len(scales)} scales; expected at least one "
            "cut-out, a place for each, and one scale or as many"
        )
    sheet = _opaque(background)
    shape, profile = Image.new("L", sheet.size), sheet.info.get("icc_profile")
    for i, (one, place, factor) in enumerate(zip(many, places, scales, strict=True)):
        cut = _cut(one, checks.number(f"scale[{i}]", factor, 1e-3, 1e3), f"cutouts[{i}]")
        cut = from_srgb(cut, profile) if profile else cut
        cut = _matched(cut, sheet) if match_colours else cut
        corner = _corner(place, cut.size, sheet.size, f"at[{i}]")
        sheet.paste(cut, corner, cut)
        shape.paste(255, corner, cut.getchannel("A").point(lambda a: 255 if a else 0))
    white = torch.from_numpy(np.array(shape))[None, None].float()
    grown = F.max_pool2d(white, 2 * margin + 1, stride=1, padding=margin)[0, 0]
    return Pasted(sheet, Image.fromarray(grown.to(torch.uint8).numpy()))


def _opaque(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB, upright, on white, with its colour profile."""
    seen = rgb(image, keep_profile=True)
    opaque = Image.new("RGB", seen.size, "white")
    opaque.paste(seen, mask=seen.getchannel("A") if seen.mode == "RGBA" else None)
    opaque.info = seen.info
    return opaque


def _cut(image: Image.Image, scale: float, name: str) -> Image.Image:
    """A cut-out at its size, RGBA."""
    image = rgb(image)
    if image.mode == "RGB" or image.getchannel("A").getextrema() in ((255, 255), (0, 0)):
        raise ValueError(
            f"{name}: nothing in it is transparent, or all, so it does not say what was cut out of its rectangle; "
            "expected a PNG or WebP whose background was erased (made clear) in a paint program"
        )
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    # Premultiplied, so that colours of clear pixels do not come in at the edges.
    return image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def _corner(place: Any, size: tuple[int, int], sheet: tuple[int, int], name: str) -> tuple[int, int]:
    """Where a cut-out goes, in whole pixels."""
    if not isinstance(place, (list, tuple)) or len(place) != 2:
        raise ValueError(f"{name}={place!r:.80}; expected (x, y), the cut-out's left upper corner in pixels")
    x, y = (round(checks.number(name, value)) for value in place)
    (width, height), (wide, high) = size, sheet
    if not (-width < x < wide and -height < y < high):
        raise ValueError(
            f"{name}=({x}, {y}): there, a cut-out of {width}×{height} lies outside the {wide}×{high} picture"
        )
    return x, y


def _matched(cut: Image.Image, sheet: Image.Image) -> Image.Image:
    """A cut-out whose visible pixels have the colours of the sheet, channel by channel."""
    try:
        from skimage.exposure import match_histograms
    except ImportError:
        raise ImportError("match_colours needs scikit-image: pip install 'sdedit[images]'") from None
    array = np.array(cut)
    seen = array[..., 3] > 0
    array[seen, :3] = match_histograms(array[seen][:, None, :3], np.asarray(sheet), channel_axis=-1)[:, 0]
    return Image.fromarray(array)
