"""Draw the pictures of docs/guide.md for masks, strength maps, composites and repeats, from the drawings in examples/.

python docs/make_guide.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from sdedit import StableDiffusionImg2ImgPipeline
from sdedit.apps.framing import framed
from sdedit.apps.sheets import contact_sheet

ROOT = Path(__file__).parent.parent
SETTINGS = {"num_inference_steps": 5, "guidance_scale": 3.0, "exact_steps": True}


def drawing(name: str, size: int = 256) -> Image.Image:
    """An example as the default model likes it: filling the sheet."""
    image = framed(Image.open(ROOT / "examples" / f"{name}.png").convert("RGB"))
    return image.resize((size, size), Image.Resampling.LANCZOS)


def cutout(name: str) -> Image.Image:
    """A drawing without the white around it."""
    image = Image.open(ROOT / "examples" / f"{name}.png").convert("RGB")
    outside = image.copy()
    for corner in ((0, 0), (image.width - 1, 0), (0, image.height - 1), (image.width - 1, image.height - 1)):
        ImageDraw.floodfill(outside, corner, (255, 0, 255), thresh=60)
    image.putalpha(Image.fromarray(np.uint8(255 * (np.asarray(outside) != (255, 0, 255)).any(-1))))
    return image


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def save(name: str, pictures: list[Image.Image], labels: list[str]) -> None:
    contact_sheet(pictures, labels, columns=len(pictures)).save(ROOT / "docs" / f"{name}.png")


def main() -> None:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained()
    house = drawing("house")

    mask = Image.new("L", house.size)
    ImageDraw.Draw(mask).polygon([(0, 134), (128, 16), (256, 134)], fill=255)
    arguments = {"strength": 0.7, **SETTINGS}
    masked = pipe("house, 3d", house, mask_image=mask, generator=seeded(), **arguments).images[0]
    whole = pipe("house, 3d", house, generator=seeded(), **arguments).images[0]
    save("mask", [house, mask, masked, whole], ["before", "mask: white changes", "after", "without a mask"])

    ramp = np.linspace(0, 0.8, 256, dtype=np.float32)[None].repeat(256, 0)
    mapped = pipe("house, 3d", house, strength_map=ramp, generator=seeded(), **{**arguments, "strength": 1.0}).images[0]
    shown = Image.fromarray(np.uint8(ramp * 255))
    save("strength-map", [house, shown, mapped], ["before", "map: 0 to 0.8", "after"])

    tree = pipe("tree, noto", drawing("tree"), strength=0.6, generator=seeded(), **SETTINGS).images[0]
    made = pipe.composite(
        tree, [cutout("apple"), cutout("apple")], "tree with apples, noto", [(60, 60), (132, 96)], 0.22,
        strength=0.3, margin=8, generator=seeded(), **SETTINGS,
    )  # fmt: skip
    pictures = [tree, made.image, made.mask, made.result]
    save("composite", pictures, ["background", "pasted", "mask", "after"])

    repeated = [
        pipe("house, 3d", house, strength=0.5, repeats=k, generator=seeded(), **SETTINGS).images[0] for k in (1, 2, 3)
    ]
    save("repeats", [house, *repeated], ["before", "K = 1", "K = 2", "K = 3"])


if __name__ == "__main__":
    main()
