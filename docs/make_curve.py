"""Draw docs/curve.png and docs/curve.csv: SDEdit's curve for the default model, on emoji kept from its training.

    python docs/make_curve.py WORK

WORK is a folder for what is drawn; stop it and start it again as you like. The pictures are those of training/data.py.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "training"))

from data import load  # noqa: E402 (training/ is no package)
from sdedit import DDPMScheduler, StableDiffusionImg2ImgPipeline  # noqa: E402
from sdedit.apps.evaluation.curve import Inputs, Row, evaluate, measure, read_inputs  # noqa: E402
from sdedit.apps.evaluation.exact import ExactDenoiser  # noqa: E402
from sdedit.apps.evaluation.plot import plot_curve  # noqa: E402
from sdedit.apps.sheets import contact_sheet  # noqa: E402
from sdedit.apps.strokes import simulate_strokes  # noqa: E402
from sdedit.files import write_atomically  # noqa: E402

STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# The paper's t0 for strokes, 0.5 on DDPM's linear schedule, is this strength on Stable Diffusion's: the same noise.
OFFICIAL = (0.71,)


def chosen(count: int, held_out: bool) -> list[int]:
    """Numbers of `count` of the pictures that training left out, or did not."""
    rows = [i for i, item in enumerate(load()[1]) if item.held_out == held_out]
    return sorted(np.random.default_rng(0).permutation(rows)[:count].tolist())


def on_white(i: int) -> Image.Image:
    """Picture i of the data."""
    picture = Image.fromarray(np.asarray(load()[0][i]))
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def held_out(folder: Path, count: int) -> Path:
    """A folder with `count` of the pictures that training left out, on white, and their captions."""
    items = load()[1]
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in chosen(count, held_out=True):
        on_white(i).save(folder / f"{i:04d}.png")
        lines.append(json.dumps({"file_name": f"{i:04d}.png", "text": f"{items[i].name}, {items[i].style}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def distorted(inputs: Inputs) -> list[Row]:
    """How the distance behaves: real pictures, changed in known ways."""
    rng = np.random.default_rng(0)

    def noisy(image: Image.Image, deviation: float) -> Image.Image:
        noise = rng.normal(0, deviation, (*image.size[::-1], 3))
        return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))

    sets = {
        "other pictures": [on_white(i) for i in chosen(len(inputs.pictures), held_out=False)],
        "upside down": [image.rotate(180) for image in inputs.pictures],
        "blurred by 0.5 pixels": [image.filter(ImageFilter.GaussianBlur(0.5)) for image in inputs.pictures],
        "blurred by 1 pixel": [image.filter(ImageFilter.GaussianBlur(1)) for image in inputs.pictures],
        "noise of 5 of 255": [noisy(image, 5) for image in inputs.pictures],
        "noise of 25 of 255": [noisy(image, 25) for image in inputs.pictures],
        "six colours": [simulate_strokes(image, 6, 1) for image in inputs.pictures],
        "strokes": inputs.guides,
    }
    return measure(inputs, {(name, 0.0): pictures for name, pictures in sets.items()})


def examples(inputs: Inputs, drawn: Path, strengths: tuple[float, ...], count: int) -> Image.Image:
    """The pictures with the shortest prompts, a row each: picture, strokes, what was drawn at some strengths."""
    cells, labels = [], []
    for i in sorted(range(len(inputs.prompts)), key=lambda i: len(inputs.prompts[i]))[:count]:
        cells += [inputs.pictures[i], inputs.guides[i]]
        labels += [inputs.prompts[i], "its strokes"]
        for s in strengths:
            cells.append(Image.open(drawn / f"strength {s:.3f}" / f"{inputs.names[i]}.png"))
            labels.append(f"strength {s:g}")
    return contact_sheet(cells, labels, columns=2 + len(strengths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--official-steps", type=int, default=50, help="N of the paper; 500 there")
    args = parser.parse_args()
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    inputs = read_inputs(held_out(args.work / f"pictures-{args.count}", args.count), 256)

    def run(name: str, strengths: tuple[float, ...], **settings: Any) -> Any:
        print(name, flush=True)
        folder = args.work / f"{name}, {args.count}"
        return evaluate(pipe, inputs, strengths, folder=folder, guidance_scale=3.0, progress=tqdm, **settings)

    own = f"DDIM, {args.steps} steps"
    curves = {own: run(own, STRENGTHS, num_inference_steps=args.steps)}
    sheet = examples(inputs, args.work / f"{own}, {args.count}", (0.2, 0.4, 0.6, 0.8, 1.0), 5)
    sheet.save(ROOT / "docs" / "curve-examples.png")
    unet, pipe.unet = pipe.unet, ExactDenoiser(pipe, inputs.pictures)
    exact = "exact denoiser"
    curves[exact] = run(exact, STRENGTHS, num_inference_steps=args.steps)
    pipe.unet = unet
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type="fixed_large")
    for repeats in (1, 2):
        name = f"the paper's VP, N = {args.official_steps}, K = {repeats}"
        rows = run(name, OFFICIAL, num_inference_steps=args.official_steps, repeats=repeats)
        curves[name] = [row for row in rows if row.strength > 0]  # the others are those of `own`
    plot_curve(curves, ROOT / "docs" / "curve.png")
    curves["real pictures, changed"] = distorted(inputs)
    with write_atomically(ROOT / "docs" / "curve.csv") as temporary, temporary.open("w", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sampler", *asdict(curves[own][0])])
        for name, rows in curves.items():
            for row in rows:
                writer.writerow([name, *(f"{v:.4g}" if isinstance(v, float) else v for v in asdict(row).values())])


if __name__ == "__main__":
    main()
