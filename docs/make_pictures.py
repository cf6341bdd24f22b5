"""Draw the pictures of README.md and docs/strength.md with the default model, from the doodles in examples/.

python docs/make_pictures.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image, ImageOps

from sdedit import StableDiffusionImg2ImgPipeline
from sdedit.apps.framing import framed
from sdedit.apps.measures import l2_faithfulness
from sdedit.apps.sheets import contact_sheet

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SHOWN = ("apple", "cat", "house", "car", "boat", "face", "tree", "fish")
PROMPTS = {name: json.loads((EXAMPLES / "prompts.json").read_text("utf-8"))[name] for name in SHOWN}
SETTINGS = {"num_inference_steps": 5, "guidance_scale": 3.0, "exact_steps": True}


def doodle(name: str) -> Image.Image:
    """An example as the default model likes it: filling the sheet, at the model's own size."""
    image = framed(Image.open(EXAMPLES / f"{name}.png").convert("RGB"))
    return image.resize((256, 256), Image.Resampling.LANCZOS)


def search_sheet(pipe: StableDiffusionImg2ImgPipeline) -> Image.Image:
    """The candidates of a search, with a frame around the one that was found."""
    settings = {name: value for name, value in SETTINGS.items() if name != "exact_steps"}  # a search always has it
    seed = torch.Generator().manual_seed(0)
    found = pipe.search(doodle("house"), PROMPTS["house"], 0.85, generator=seed, **settings)
    framed = [ImageOps.expand(one, 3, "red" if one is found.image else "white") for one in found.drawn.images]
    pairs = zip(found.drawn.strengths, found.drawn.images, strict=True)
    labels = [f"strength {s:.3g}\nfaithful {l2_faithfulness(one, doodle('house')):.3f}" for s, one in pairs]
    return contact_sheet(framed, labels, columns=7)


def main() -> None:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained()
    guides = [doodle(name) for name in PROMPTS]
    generators = [torch.Generator().manual_seed(0) for _ in guides]
    pictures = pipe(list(PROMPTS.values()), guides, strength=0.65, generator=generators, **SETTINGS).images
    pairs = [image for pair in zip(guides, pictures, strict=True) for image in pair]
    labels = [label for prompt in PROMPTS.values() for label in ("", prompt)]
    contact_sheet(pairs, labels, columns=8).save(ROOT / "docs" / "doodles.png")

    search_sheet(pipe).save(ROOT / "docs" / "search.png")
    strengths = (0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    swept = pipe.sweep(doodle("house"), "house, 3d", strengths, torch.Generator().manual_seed(0), **SETTINGS)
    swept.sheet(columns=9).save(ROOT / "docs" / "sweep.png")


if __name__ == "__main__":
    main()
