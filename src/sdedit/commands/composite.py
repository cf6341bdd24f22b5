"""`sdedit composite`: cut-outs pasted into a picture and made one with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sdedit.commands import options as o
from sdedit.commands.drawing import draw
from sdedit.commands.metadata import Settings, hash_file, save_picture
from sdedit.commands.options import check_output, open_guide


def composite(
    background: Annotated[Path, typer.Argument(help="The picture to paste into.")],
    cutouts: Annotated[
        list[Path], typer.Argument(help="What to paste: pictures that are clear around what they show.")
    ],
    prompt: Annotated[str, typer.Argument(help="What the whole shows.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where the picture goes; the paste and mask: OUT-pasted, OUT-mask.")
    ],
    at: Annotated[list[str], typer.Option(metavar="X,Y", help="Left upper corner of the cut-out; once for each.")],
    scale: Annotated[list[float] | None, typer.Option(help="Factor of its size; once for each, or for all.")] = None,
    margin: Annotated[int, typer.Option(help="Pixels around the cut-outs that are drawn anew, too.")] = 8,
    match_colours: Annotated[
        bool, typer.Option("--match-colours", help="Give the cut-outs the background's colours; needs scikit-image.")
    ] = False,
    model: o.Model = "default",
    strength: Annotated[float, typer.Option(help="Low keeps the cut-outs, high paints them anew.")] = 0.5,
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    negative: o.Negative = "",
    scheduler: o.Scheduler = None,
    lora: o.Lora = None,
    seed: o.Seed = None,
    count: o.Count = 1,
    dtype: o.DType = "auto",
    device: o.Device = "auto",
    exact_steps: o.ExactSteps = None,
    max_megapixels: o.MaxMegapixels = 100,
    debug: o.Debug = False,
) -> None:
    """Paste CUTOUTS into BACKGROUND and draw them and their surroundings anew as PROMPT; all else stays to the bit."""
    check_output(output)
    places = [_point(text) for text in at]
    opened = [open_guide(path, max_megapixels) for path in (background, *cutouts)]
    from sdedit.apps.composite import paste

    scales = scale[0] if scale and len(scale) == 1 else scale or 1.0
    pasted = paste(opened[0], opened[1:], places, scales, margin=margin, match_colours=match_colours)
    files = [output.with_name(f"{output.stem}-{kind}.png") for kind in ("pasted", "mask")]
    for picture, file in zip((pasted.image, pasted.mask), files, strict=True):
        save_picture(picture, file)
    usual = o.suited(model)
    settings = Settings(
        prompt,
        image=str(files[0]),
        image_hash=hash_file(files[0]),
        mask=str(files[1]),
        mask_hash=hash_file(files[1]),
        feather=margin,
        negative=negative,
        steps=usual.steps if steps is None else steps,
        guidance=usual.guidance if guidance is None else guidance,
        seed=int.from_bytes(os.urandom(4), "big") if seed is None else seed,
        model=model,
        strength=strength,
        scheduler=scheduler,
        lora=[o.with_weight(text) for text in lora or ()],
        dtype=None if dtype == "auto" else dtype,
        exact_steps=usual.exact_steps if exact_steps is None else exact_steps,
    )
    draw(settings, pasted.image, output, count=count, device=device, size="original")


def _point(text: str) -> tuple[float, float]:
    """`30,-5` as two numbers."""
    try:
        x, y = map(float, text.split(","))
        return x, y
    except ValueError:
        raise ValueError(f"--at {text}; expected X,Y in pixels, such as --at 40,12") from None
