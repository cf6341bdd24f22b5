"""The doodles of examples/ before and after, as `sdedit run` draws them: the picture in the model card.

python training/doodles.py sheet.png [FOLDER]
"""

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data import SIZE
from paths import EXPORT, REPOSITORY, read_json
from sdedit import StableDiffusionImg2ImgPipeline
from sdedit.apps.framing import framed
from sdedit.apps.sheets import contact_sheet
from sdedit.commands.settings import SUITED

EXAMPLES = REPOSITORY / "examples"
SIDE = 160  # of each on the sheet


def doodle_sheet(pipe: Any, strength: float = SUITED.strength, guidance: float = SUITED.guidance) -> Image.Image:
    """Each doodle and, beside it, what it becomes, seed 0."""
    pictures, labels = [], []
    for name, prompt in read_json(EXAMPLES / "prompts.json").items():
        doodle = on_white(Image.open(EXAMPLES / f"{name}.png"))
        drawn = pipe(
            prompt,
            framed(doodle).resize((SIZE, SIZE), Image.Resampling.LANCZOS),
            strength=strength,
            guidance_scale=guidance,
            num_inference_steps=SUITED.steps,
            exact_steps=SUITED.exact_steps,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
        shown = Image.new("RGB", (SIDE, SIDE), (225, 225, 225))
        doodle.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        shown.paste(doodle, ((SIDE - doodle.width) // 2, (SIDE - doodle.height) // 2))
        pictures += [shown, drawn.resize((SIDE, SIDE), Image.Resampling.LANCZOS)]
        labels += ["", prompt]
    return contact_sheet(pictures, labels, columns=8)


def on_white(image: Image.Image) -> Image.Image:
    """RGB; what is clear is white, as `sdedit run` has it."""
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def main() -> None:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(sys.argv[2] if len(sys.argv) > 2 else EXPORT)
    pipe.set_progress_bar_config(disable=True)
    doodle_sheet(pipe).save(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
