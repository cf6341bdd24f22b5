"""Train the UNet and, with it, the text encoder on the cached latents.

    python training/train_unet.py --steps 30000

Goes on from unet.pt in the work folder when it is there.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer

from captions import caption, starred, things
from data import SIZE, Item, load
from guides import KINDS
from latents import finished_vae
from loop import Plan, Training
from model import SCHEDULER, VAE, new_denoiser, pipeline, tokenizer
from paths import REPOSITORY, read_json, work_folder
from report import Report
from sdedit import DDIMScheduler
from sdedit.apps.finetune.objective import Objective, fresh_rng, spread_times
from sdedit.apps.finetune.stopping import Stop
from sdedit.apps.sheets import contact_sheet
from words import LENGTH

LATENT_SCALE = float(VAE["scaling_factor"])
# How much oftener than others in things.txt a thing with a star is drawn: few things well, before many. And one that is
# not in things.txt: from those, styles are learned and what to do with any guide.
STARRED_WEIGHT, OTHER_WEIGHT = 15.0, 0.25
CENTRED_SHARE = 0.6  # of the samples: the picture as it is, not placed somewhere else
NOISY_TIMES = 0.7  # the power that turns even noise levels into ones with more noise, where words decide
GUIDE_SHARE = 0.6  # of the samples: the sampler that they stand for began with a guide
FIRST_STEP = 0.4  # of those: it takes its first step, at the noise level where it began
# Guides, each with the least noise level at which a sampler may begin with it and still be led to the true picture,
# and how often it is one there: another style takes some noise to become this one. An empty sheet takes most, and makes
# the words count: of everything else, even so much noise leaves something of the picture to go by.
BEGINNINGS = {"strokes": (300, 1.0), "doodle": (300, 2.0), "other style": (500, 5.0), "blank": (800, 4.0)}
SHEET = {  # doodle -> words
    "apple": "red apple, 3d",
    "face": "face",
    "cat": "cat",
    "house": "house",
    "car": "car, 3d",
    "tree": "tree, noto",
    "flower": "flower",
    "sun": "sun, 3d",
    "fish": "fish",
    "boat": "boat, 3d",
    "star": "star, flat",
    "heart": "heart",
}


def objective() -> Objective:
    """v, every noise level alike: at the noisy ones, which count little by their signal, words are learned."""
    return Objective.of(DDIMScheduler(**SCHEDULER))


class Loss:
    """The objective's loss, which remembers the errors for the log."""

    def __init__(self) -> None:
        self.objective = objective()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, model: nn.Module, noisy: Tensor, times: Tensor, ids: Tensor, target: Tensor) -> Tensor:
        errors = self.objective.loss(model(noisy, times, ids), target, times)
        self.seen.append((times, errors.detach()))
        return errors.mean()

    def by_level(self) -> str:
        """Mean errors of v since the last call, by fifths of the noise levels."""
        times, errors = (torch.cat(parts).cpu() for parts in zip(*self.seen, strict=True))
        self.seen = []
        fifth = SCHEDULER["num_train_timesteps"] // 5
        return " ".join(f"{errors[(times // fifth) == k].mean().item():.3f}" for k in range(5))


class Samples:
    """Draws a step's training samples: noisy latents, their times, the captions' ids and the v to predict.

    Args:
        latents: (sheets, kinds, 8, 16, 16), as `latents.py` writes them.
        rows: Which of the items each sheet shows.
    """

    def __init__(
        self, latents: np.ndarray, rows: list[int], items: list[Item], words: CLIPTokenizer, size: int
    ) -> None:
        self.latents, self.words, self.size = latents, words, size
        shown, self.first, self.count = np.unique(rows, return_index=True, return_counts=True)
        self.items = [items[row] for row in shown]
        weight = np.array([weight_of(item) for item in self.items])
        self.chance = weight / weight.sum()
        self.same: dict[str, list[int]] = {}
        for n, item in enumerate(self.items):
            self.same.setdefault(item.code, []).append(n)
        self.objective = objective()
        kept = self.objective.alphas_cumprod.numpy()
        self.noise_to_signal = np.sqrt((1 - kept) / kept)

    def scaled(self, picture: int, placement: int, kind: int) -> np.ndarray:
        return LATENT_SCALE * self.latents[self.first[picture] + placement, kind].astype(np.float32)

    def start(self, picture: int, placement: int, time: int, rng: np.random.Generator) -> np.ndarray:
        """The latents that get the noise: the picture's own, or (part of the way to) those of a guide to it.

        A sampler that began with a guide at time s and knows the true picture treats what was wrong with the guide as
        noise. By DDIM's step, at time t as much of it is left as σ(t)/α(t) is of σ(s)/α(s).
        """
        true = self.scaled(picture, placement, 0)
        if rng.random() >= GUIDE_SHARE:
            return true
        began = time if rng.random() < FIRST_STEP else int(rng.integers(time, len(self.noise_to_signal)))
        shares = np.array([share * (began >= least) for least, share in BEGINNINGS.values()])
        if not shares.any():
            return true
        kind = str(rng.choice(list(BEGINNINGS), p=shares / shares.sum()))
        if kind == "other style":
            guide = self.scaled(int(rng.choice(self.same[self.items[picture].code])), placement, 0)
        else:
            alike = [n for n, name in enumerate(KINDS) if name == kind]
            guide = self.scaled(picture, placement, int(rng.choice(alike)))
        return true + (guide - true) * (self.noise_to_signal[time] / self.noise_to_signal[began])

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rng, generator = fresh_rng(2, step)
        pictures = rng.choice(len(self.items), self.size, p=self.chance)
        placements = rng.integers(0, self.count[pictures]) * (rng.random(self.size) >= CENTRED_SHARE)
        total = len(self.noise_to_signal)
        times = ((spread_times(rng, self.size, total) / total) ** NOISY_TIMES * total).astype(np.int64)
        starts = [self.start(n, p, t, rng) for n, p, t in zip(pictures, placements, times, strict=True)]
        clean = torch.from_numpy(np.stack([self.scaled(n, p, 0) for n, p in zip(pictures, placements, strict=True)]))
        ids = token_ids(self.words, [caption(self.items[n], rng) for n in pictures])
        start, levels = torch.from_numpy(np.stack(starts)), torch.from_numpy(times)
        noisy = self.objective.noisy(start, torch.randn(clean.shape, generator=generator), levels)
        alpha, sigma = self.objective.levels(levels)
        noise = (noisy - alpha * clean) / sigma  # as if all of it had been noise on the true picture
        target = self.objective.target(clean, noise, levels)
        return noisy.contiguous(memory_format=torch.channels_last), levels, ids, target


def weight_of(item: Item) -> float:
    """How often its pictures are drawn, as a multiple of those of a thing in things.txt without a star."""
    if item.name in starred():
        return STARRED_WEIGHT
    return 1.0 if item.name in things() else OTHER_WEIGHT


def token_ids(words: CLIPTokenizer, captions: list[str]) -> Tensor:
    return words(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def draw_sheet(training: Training, path: Path) -> str:
    """A doodle a column: itself, image-to-image at strengths 0.6, 0.7 and 0.8, then the words alone."""
    pipe = pipeline(finished_vae(), training.averaged(new_denoiser()).eval()).to(training.device)
    doodles = [Image.open(REPOSITORY / "examples" / f"{name}.png").convert("RGB") for name in SHEET]
    doodles = [doodle.resize((SIZE, SIZE), Image.Resampling.LANCZOS) for doodle in doodles]
    rows = list(doodles)
    for strength, guidance in ((0.6, 3.0), (0.7, 3.0), (0.8, 4.0), (1.0, 4.0)):
        generators = [torch.Generator().manual_seed(0) for _ in doodles]
        rows += pipe(
            list(SHEET.values()),
            doodles,
            strength=strength,
            guidance_scale=guidance,
            num_inference_steps=20,
            generator=generators,
        ).images
    contact_sheet(rows, columns=len(SHEET)).save(path)
    return path.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30000, help="of the whole training, earlier runs included")
    parser.add_argument("--fall", type=int, default=10000, help="of them, with a falling learning rate")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.backends.cuda.enable_flash_sdp(False)  # the plain attention is faster for 64 tokens, on the CPU too
    latents, rows = np.load(work_folder() / "latents.npy", mmap_mode="r"), read_json(work_folder() / "latents.json")
    samples = Samples(latents, rows, load()[1], tokenizer(), args.batch)
    plan, loss = Plan(args.steps, args.rate, warm_up=300, fall=args.fall, muon=True), Loss()
    training = Training(new_denoiser().to(args.device), loss, samples, plan, work_folder() / "unet.pt")

    def measure() -> str:
        return draw_sheet(training, work_folder() / f"sheet-{training.step:06d}.png")

    report = Report(training, args.batch, often=1200, measure=measure, loss=loss.by_level)
    with Stop() as stopped:
        for value in training.run(stopped):
            report(value)
    report.end()


if __name__ == "__main__":
    main()
