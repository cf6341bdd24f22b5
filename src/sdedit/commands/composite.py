"""`sdedit composite`: cut-outs pasted into a picture and made one with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdedit.commands.drawing import check, make_pictures, open_guide
from sdedit.commands.options import Count, Place, command
from sdedit.commands.saving import check_output, save_picture
from sdedit.commands.settings import PictureSettings


@command(without=("image", "mask", "feather", "strength_map", "size", "backend"))
def composite(
    background: Annotated[Path, typer.Argument(help="The picture to paste into.")],
    cutouts: Annotated[
        list[Path], typer.Argument(help="What to paste: pictures that are clear around what they show.")
    ],
    settings: PictureSettings,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where the picture goes; the paste and mask: OUT-pasted, OUT-mask.")
    ],
    place: Place,
    at: Annotated[list[str], typer.Option(metavar="X,Y", help="Left upper corner of the cut-out; once for each.")],
    scale: Annotated[list[float] | None, typer.Option(help="Factor of its size; once for each, or for all.")] = None,
    margin: Annotated[
        int, typer.Option(min=0, max=10_000, help="Pixels around the cut-outs that are drawn anew, too.")
    ] = 8,
    match_colours: Annotated[
        bool, typer.Option("--match-colours", help="Give the cut-outs the background's colours; needs scikit-image.")
    ] = False,
    count: Count = 1,
) -> None:
    """Paste CUTOUTS into BACKGROUND and draw them and their surroundings anew as PROMPT; all else stays to the bit.

    --strength is 0.5 if not given: low keeps the cut-outs, high paints them anew.
    """
    check(settings, place, output, count)
    files = [output.with_name(f"{output.stem}-{kind}.png") for kind in ("pasted", "mask")]
    for file in files:
        check_output(file)
    places = [_point(text) for text in at]
    opened = [open_guide(path, place) for path in (background, *cutouts)]
    from sdedit.apps.composite import STRENGTH, paste

    scales = scale[0] if scale and len(scale) == 1 else scale or 1.0
    pasted = paste(opened[0], opened[1:], places, scales, margin=margin, match_colours=match_colours)
    for picture, file in zip((pasted.image, pasted.mask), files, strict=True):
        save_picture(picture, file)
    settings.image, settings.mask, settings.feather = str(files[0]), str(files[1]), margin
    settings.strength = STRENGTH if settings.strength is None else settings.strength
    settings.hash_files()
    place.size = "original"
    make_pictures(settings, pasted.image, output, count, place)


def _point(text: str) -> tuple[float, float]:
    """`30,-5` as two numbers."""
    try:
        x, y = map(float, text.split(","))
        return x, y
    except ValueError:
        raise ValueError(f"--at {text}; expected X,Y in pixels, such as --at 40,12") from None
