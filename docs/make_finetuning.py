"""Teach the default model linocuts from twenty pictures, and draw the figures of docs/finetuning.md.

python docs/make_finetuning.py [FOLDER]

The pictures, the LoRA and its samples stay in FOLDER (output/linocut if not given); a run that was stopped goes on.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from sdedit import StableDiffusionImg2ImgPipeline
from sdedit.apps.finetune import Samples, train_lora
from sdedit.apps.framing import framed
from sdedit.apps.sheets import contact_sheet

ROOT = Path(__file__).parent.parent
DOODLES = ("cat", "house", "car", "fish", "apple", "boat", "tree", "star")  # none of these is among the twenty
LAYERS = "to_q to_k to_v to_out.0 proj_in proj_out conv1 conv2 ff.net.0.proj ff.net.2"
SETTINGS = {
    "caption": "{}, linocut",
    "steps": 700,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "rank": 32,
    "targets": LAYERS.split(),
    "flip": True,
    "guided": 0.5,
}


def doodle(name: str) -> Image.Image:
    """An example as the default model likes it: filling the sheet, at the model's own size."""
    image = framed(Image.open(ROOT / "examples" / f"{name}.png").convert("RGB"))
    return image.resize((256, 256), Image.Resampling.LANCZOS)


def draw(pipe: StableDiffusionImg2ImgPipeline) -> list[Image.Image]:
    """What the pipeline makes of the doodles."""
    return pipe(
        [f"{name}, linocut" for name in DOODLES],
        [doodle(name) for name in DOODLES],
        strength=0.7,
        guidance_scale=3.0,
        num_inference_steps=20,
        exact_steps=True,
        generator=[torch.Generator().manual_seed(0) for _ in DOODLES],
    ).images


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "output" / "linocut"
    pictures, lora = folder / "pictures", folder / "lora.safetensors"
    subprocess.run([sys.executable, ROOT / "examples" / "draw_linocuts.py", pictures], check=True)
    paths = sorted(pictures.glob("*.png"))
    contact_sheet([Image.open(path) for path in paths], columns=10).save(ROOT / "docs" / "finetuning-pictures.png")

    pipe = StableDiffusionImg2ImgPipeline.from_pretrained()
    before = draw(pipe)
    learner = StableDiffusionImg2ImgPipeline.from_pretrained(torch_dtype=torch.bfloat16)  # as the command does
    result = train_lora(learner, pictures, lora, every=350, samples=Samples([]), **SETTINGS)
    print(f"{result.step} updates, {result.seconds / 60:.1f} minutes, {lora.stat().st_size / 1e6:.1f} MB")
    print(f"loss {sum(result.losses[:20]) / 20:.3f} at first, {sum(result.losses[-20:]) / 20:.3f} in the end")
    pipe.load_lora_weights(lora)
    rows = [*(doodle(name) for name in DOODLES), *before, *draw(pipe)]
    contact_sheet(rows, columns=len(DOODLES)).save(ROOT / "docs" / "finetuning.png")
    (ROOT / "docs" / "finetuning-loss.png").write_bytes((result.folder / "loss.png").read_bytes())


if __name__ == "__main__":
    main()
