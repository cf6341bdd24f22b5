"""Contact sheets: several pictures on one page, each with its label below."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 6


def contact_sheet(
    pictures: Sequence[Image.Image], labels: Sequence[str] | None = None, columns: int | None = None
) -> Image.Image:
    """Put pictures of one size on a white page, row by row.

    Args:
        labels: One a picture, of one or several lines; none if not given.
        columns: About as many as there are rows, if not given.
    """
    if not pictures:
        raise ValueError("contact_sheet: no pictures; expected at least one")
    if labels is not None and len(labels) != len(pictures):
        raise ValueError(f"contact_sheet: {len(labels)} labels for {len(pictures)} pictures; expected as many")
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = (max(p.size[i] for p in pictures) for i in (0, 1))
    font = ImageFont.load_default(max(10, width // 12))
    line = math.ceil(font.getbbox("Ag")[3]) + 3
    text_height = max((label.count("\n") + 1 for label in labels), default=0) * line if labels else 0
    cell = (width + _MARGIN, height + text_height + _MARGIN)
    page = Image.new("RGB", (columns * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), "white")
    draw = ImageDraw.Draw(page)
    for i, picture in enumerate(pictures):
        x, y = _MARGIN + i % columns * cell[0], _MARGIN + i // columns * cell[1]
        clear = picture.convert("RGBA")
        page.paste(clear, (x, y), clear)
        for n, text in enumerate(labels[i].split("\n") if labels else []):
            draw.text((x, y + height + 1 + n * line), text, fill="black", font=font)
    return page
