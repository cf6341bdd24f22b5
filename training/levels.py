"""How much a model's words count at each noise level.

    python training/levels.py [FOLDER]

For 96 pictures of what was taught most, as they are, noised to several levels, and for empty sheets noised so: the
mean square between the picture and what the UNet of the folder (src/sdedit/default_model) takes it for, in latents,
with the right caption, with none, and with another picture's. What has learned its pictures by heart has 0 with the
right one.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from captions import starred
from data import load
from evaluate import load_pipe
from guides import KINDS
from paths import EXPORT, read_json, work_folder
from train_unet import LATENT_SCALE, objective, token_ids

LEVELS = (150, 400, 650, 850, 980)
COUNT = 96
BLANK = 800  # from this level on, empty sheets too


@torch.inference_mode()
def errors(pipe, start: Tensor, true: Tensor, level: int, captions: list[str]) -> float:
    """Mean square of the difference between the true latents (B, C, H, W) and what is seen in noisy ones."""
    times = torch.full((len(true),), level)
    noisy = objective().noisy(start, torch.randn(true.shape, generator=torch.Generator().manual_seed(1)), times)
    alpha, sigma = objective().levels(times)
    seen = pipe.unet(noisy, times, pipe.text_encoder(token_ids(pipe.tokenizer, captions))[0]).sample
    return (alpha * noisy - sigma * seen - true).square().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=EXPORT)
    pipe = load_pipe(parser.parse_args().folder, "float32", "cpu")
    items, rows = load()[1], read_json(work_folder() / "latents.json")
    latents = np.load(work_folder() / "latents.npy", mmap_mode="r")
    first = [n for n in np.unique(rows, return_index=True)[1] if items[rows[n]].name in starred()]
    chosen = np.random.default_rng(0).choice(first, COUNT, replace=False)
    true, blank = (
        LATENT_SCALE * torch.from_numpy(latents[chosen, KINDS.index(kind)].astype(np.float32))
        for kind in ("picture", "blank")
    )
    captions = [f"{items[rows[n]].name}, {items[rows[n]].style}" for n in chosen]
    asked = {"right": captions, "none": [""] * COUNT, "another": captions[1:] + captions[:1]}
    for level in LEVELS:
        for name, start in {"picture": true, "empty sheet": blank}.items():
            if name == "picture" or level >= BLANK:
                found = {which: round(errors(pipe, start, true, level, words), 3) for which, words in asked.items()}
                print(f"level {level}, {name}: {found}", flush=True)


if __name__ == "__main__":
    main()
