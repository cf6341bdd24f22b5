"""`sdedit strokes`: a stroke painting of a photo."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sdedit.commands.drawing import open_guide
from sdedit.commands.options import Place, command
from sdedit.commands.saving import check_output, check_size, save_picture, surely, tell


@command(without=("device", "size"))
def strokes(
    photo: Annotated[Path, typer.Argument(help="A picture of any format and size.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the strokes go.")],
    place: Place,
    colors: Annotated[int, typer.Option(min=1, max=256, help="Colours that are left at most.")] = 6,
    kernel: Annotated[
        int,
        typer.Option(
            min=1,
            help="Breadth of the brush in pixels, odd; 23 is for 256×256, scale it with the picture.",
        ),
    ] = 23,
) -> None:
    """Make of PHOTO what somebody might paint of it: few colours, nothing fine; a guide for tests and demos."""
    check_output(output)
    if kernel % 2 == 0:
        raise ValueError(f"--kernel {kernel}; expected an odd number, such as {kernel + 1}")
    image = open_guide(photo, place)
    check_size(image.size, output)
    from sdedit.apps.strokes import simulate_strokes

    saved, problem = surely(partial(save_picture, simulate_strokes(image, colors, kernel)), output)
    tell(saved)
    if problem:
        raise OSError(problem)
