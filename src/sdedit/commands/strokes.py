"""`sdedit strokes`: a stroke painting of a photo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdedit.commands import options as o
from sdedit.commands.options import check_output, open_guide


def strokes(
    photo: Annotated[Path, typer.Argument(help="A picture of any format and size.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the strokes go.")],
    colors: Annotated[int, typer.Option(help="Colours that are left at most.")] = 6,
    kernel: Annotated[
        int, typer.Option(help="Breadth of the brush in pixels, odd; 23 is for 256×256, scale it with the picture.")
    ] = 23,
    max_megapixels: o.MaxMegapixels = 100,
    debug: o.Debug = False,
) -> None:
    """Make of PHOTO what somebody might paint of it: few colours, nothing fine; a guide for tests and demos."""
    from sdedit.apps.strokes import simulate_strokes
    from sdedit.files import write_atomically

    check_output(output)
    painted = simulate_strokes(open_guide(photo, max_megapixels), colors, kernel)
    with write_atomically(output) as temporary:
        painted.save(temporary)
    typer.echo(output)
