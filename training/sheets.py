"""Doodles on sheets of other colours: what the default model makes of them as they are, and brought to white first.

python training/sheets.py sheet.png     the table is printed, the pictures are the sheet's rows
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from data import SIZE
from features import judge
from paths import EXPORT, REPOSITORY, read_json
from sdedit import StableDiffusionImg2ImgPipeline
from sdedit.apps import framing
from sdedit.apps.sheets import contact_sheet
from sdedit.commands.settings import SUITED

EXAMPLES = REPOSITORY / "examples"
GROUNDS = {"white": "#ffffff", "dark": "#202030", "blue": "#3060c0", "light blue": "#bfe3f2"}


def grounded(doodle: Image.Image, colour: str) -> Image.Image:
    """A doodle on white, RGB, with all white that reaches the border in another colour."""
    filled = doodle.copy()
    for corner in ((0, 0), (doodle.width - 1, 0), (0, doodle.height - 1), (doodle.width - 1, doodle.height - 1)):
        ImageDraw.floodfill(filled, corner, (1, 255, 254), thresh=60)
    ground = (np.asarray(filled) == (1, 255, 254)).all(-1)
    pixels = np.array(doodle)
    pixels[ground] = np.array(Image.new("RGB", (1, 1), colour).getpixel((0, 0))) * (pixels[ground] / 255)
    return Image.fromarray(pixels)


def as_it_is(doodle: Image.Image) -> Image.Image:
    """Framed, on a sheet of the colour it has."""
    whitened, framing.whitened = framing.whitened, lambda image, sheet: image
    try:
        return framing.framed(doodle)
    finally:
        framing.whitened = whitened


def drawn(pipe: Any, guides: list[Image.Image], prompts: list[str], seed: int) -> list[Image.Image]:
    small = [guide.resize((SIZE, SIZE), Image.Resampling.LANCZOS) for guide in guides]
    generators = [torch.Generator().manual_seed(seed) for _ in guides]
    settings = {"strength": SUITED.strength, "guidance_scale": SUITED.guidance, "num_inference_steps": SUITED.steps}
    return pipe(prompts, small, generator=generators, **settings).images  # type: ignore[no-any-return]


def on_white(picture: Image.Image) -> Image.Image:
    """What was drawn, with its ground as white as the judge's pictures."""
    pixels = np.asarray(picture, np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    seen = 1 - np.clip((np.abs(pixels - ground).max(-1, keepdims=True) - 12) / 36, 0, 1)
    return Image.fromarray(np.clip(pixels + seen * (255 - ground), 0, 255).round().astype(np.uint8))


def main() -> None:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(EXPORT)
    pipe.set_progress_bar_config(disable=True)
    prompts, found, pictures, labels = read_json(EXAMPLES / "prompts.json"), judge(), [], []
    doodles = [Image.open(EXAMPLES / f"{name}.png").convert("RGB") for name in prompts]
    for name, colour in GROUNDS.items():
        for whiten in (False, True) if name != "white" else (False,):
            frame = framing.framed if whiten or name == "white" else as_it_is
            guides = [frame(grounded(doodle, colour)) for doodle in doodles]
            results = drawn(pipe, guides, list(prompts.values()), 0)
            seen = [np.asarray(on_white(one), np.float32) / 255 for one in results]
            right = [item.name in prompt for item, prompt in zip(found.nearest(seen), prompts.values(), strict=True)]
            kind = f"{name}, {'brought to white' if whiten else 'as it is'}"
            print(f"{kind}: {sum(right)} of {len(right)} things right", flush=True)
            pictures += results
            labels += [kind if i == 0 else "" for i in range(len(results))]
            contact_sheet(pictures, labels, columns=len(doodles)).save(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
