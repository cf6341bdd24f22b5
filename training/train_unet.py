"""Train the UNet and, with it, the text encoder on the cached latents.

    python training/train_unet.py --minutes 240

Goes on from unet.pt in the work folder when it is there. The learning rate falls to zero at the end of the budget.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from data import Item, caption, load, starred
from latents import finished_vae
from paths import REPOSITORY, read_json, save_atomically, stop_asked, work_folder
from sdedit.models.unet import UNet2DConditionModel
from sdedit.models.vae import AutoencoderKL
from words import LENGTH, text_config, tokenizer
from workers import Workers

CONFIG = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [128, 192, 192],
    "layers_per_block": 1,
    "cross_attention_dim": 192,
    "attention_head_dim": 4,  # the number of heads, under its published name
    "norm_num_groups": 32,
}
STEPS = 1000
BETAS = (0.00085, 0.012)  # Stable Diffusion's "scaled_linear" schedule
SNR_CAP = 5.0
# Latents of deviation 1 become deviation 2 (the VAE's scaling_factor). 16x16 values drown in noise sooner than 64x64
# do; at twice the size a strength keeps about as much of a doodle as users of Stable Diffusion expect.
LATENT_SCALE = 2.0
STARRED_WEIGHT = 6.0  # how much oftener a thing with a star is drawn
GUIDED = (250, 950)  # noise levels at which a sample may start from a guide
GUIDE_SHARE = 0.45  # of the samples at those levels
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


class Painter(nn.Module):
    """The two networks that learn here, as one module."""

    def __init__(self, words: CLIPTokenizer) -> None:
        super().__init__()
        self.text = CLIPTextModel(text_config(words))
        self.unet = UNet2DConditionModel(**CONFIG).to(memory_format=torch.channels_last)

    def forward(self, noisy: Tensor, levels: Tensor, ids: Tensor) -> Tensor:
        return self.unet(noisy, levels, encoder_hidden_states=self.text(ids).last_hidden_state).sample.float()


def signal() -> Tensor:
    """How much of the picture is left at each of the 1000 noise levels: the cumulative product of 1 - beta."""
    root = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, STEPS, dtype=torch.float64)
    return (1 - root.square()).cumprod(0).float()


SIGNAL = signal()


def scales(levels: Tensor) -> tuple[Tensor, Tensor]:
    """What the picture and the noise are multiplied by, (B, 1, 1, 1) each."""
    kept = SIGNAL[levels].view(-1, 1, 1, 1)
    return kept.sqrt(), (1 - kept).sqrt()


class Loss:
    """Error of v, weighted to be that of the picture times min(SNR, 5); logged by fifths of the noise levels."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, model: Painter, noisy: Tensor, levels: Tensor, ids: Tensor, target: Tensor) -> Tensor:
        error = (model(noisy, levels, ids) - target).square().mean((1, 2, 3))
        self.seen.append((levels, error.detach()))
        kept = SIGNAL[levels]
        snr = LATENT_SCALE**2 * kept / (1 - kept)
        return (error * (1 - kept) * snr.clamp(max=SNR_CAP)).mean()

    def by_level(self) -> str:
        levels, errors = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
        self.seen = []
        fifth = STEPS // 5
        return " ".join(f"{errors[(levels // fifth) == k].mean().item():.3f}" for k in range(5))


class Batches:
    """Draws training samples: noisy latents, their level, the caption's ids and the v to predict."""

    def __init__(self, items: list[Item], words: CLIPTokenizer, seed: int) -> None:
        self.latents = np.load(work_folder() / "latents.npy", mmap_mode="r")
        self.items = [items[row] for row in read_json(work_folder() / "latents.json")]
        weight = np.array([STARRED_WEIGHT if item.name in starred() else 1.0 for item in self.items])
        self.chance = weight / weight.sum()
        self.same: dict[str, list[int]] = {}
        for n, item in enumerate(self.items):
            self.same.setdefault(item.code, []).append(n)
        self.words, self.rng, self.generator = words, np.random.default_rng(seed), torch.Generator().manual_seed(seed)

    def scaled(self, row: int, version: int, kind: int) -> np.ndarray:
        return LATENT_SCALE * self.latents[row, version, kind].astype(np.float32)

    def start(self, row: int, version: int, level: int) -> np.ndarray:
        """The latents that get the noise: the picture's own, or (part of the way to) those of a guide to it."""
        true = self.scaled(row, version, 0)
        if not (GUIDED[0] <= level < GUIDED[1] and self.rng.random() < GUIDE_SHARE):
            return true
        kind = self.rng.choice(3, p=(0.15, 0.4, 0.45))  # another style, strokes, a doodle
        other = int(self.rng.choice(self.same[self.items[row].code])) if kind == 0 else row
        if kind == 0 and level < 500:
            return true
        guide = self.scaled(other, version, kind)
        # While a sampler goes down, what was wrong with the guide fades with the noise: hence all parts of the way.
        return true + (guide - true) * (1.0 if self.rng.random() < 0.5 else self.rng.random())

    def draw(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = self.rng.choice(len(self.items), size, p=self.chance)
        versions = self.rng.integers(0, self.latents.shape[1], size)
        levels = ((np.arange(size) + self.rng.random()) / size * STEPS).astype(np.int64)  # spread evenly
        self.rng.shuffle(levels)
        starts = [self.start(r, v, t) for r, v, t in zip(rows, versions, levels, strict=True)]
        true = torch.from_numpy(np.stack([self.scaled(r, v, 0) for r, v in zip(rows, versions, strict=True)]))
        a, s = scales(torch.from_numpy(levels))
        noisy = a * torch.from_numpy(np.stack(starts)) + s * torch.randn(true.shape, generator=self.generator)
        noise = (noisy - a * true) / s  # as if all of it had been noise on the true picture
        ids = token_ids(self.words, [caption(self.items[row], self.rng) for row in rows])
        channels_last = noisy.contiguous(memory_format=torch.channels_last)
        return channels_last, torch.from_numpy(levels), ids, a * noise - s * true


def token_ids(words: CLIPTokenizer, captions: list[str]) -> Tensor:
    return words(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


@torch.inference_mode()
def sample(model: Painter, words: CLIPTokenizer, start: Tensor, prompts: list[str], strength: float, guidance: float,
           steps: int = 20) -> Tensor:
    """Image-to-image in latents: DDIM from `start` noised as far as `strength` says; at 1, as good as from noise."""
    ids = token_ids(words, [""] * len(prompts) + prompts)
    levels = [i * (STEPS // steps) + 1 for i in range(round(steps * strength))][::-1]
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    a, s = scales(torch.tensor(levels[:1]))
    x = a * start + s * noise if strength < 1 else noise
    for level, following in zip(levels, [*levels[1:], 0], strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            v = model(torch.cat([x, x]), torch.full((2 * len(x),), level), ids)
        empty, worded = v.chunk(2)
        v = empty + guidance * (worded - empty)
        a, s = scales(torch.tensor([level]))
        picture, noise = a * x - s * v, s * x + a * v
        a, s = scales(torch.tensor([following]))
        x = a * picture + s * noise
    return x


def to_image(pixels: Tensor) -> np.ndarray:
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


@torch.inference_mode()
def sheet(model: Painter, words: CLIPTokenizer, vae: AutoencoderKL, path: Path) -> None:
    """A doodle a column: itself, image-to-image at strengths 0.6, 0.7 and 0.8, then the words alone."""
    doodles = []
    for name in SHEET:
        image = Image.open(REPOSITORY / "examples" / f"{name}.png").convert("RGB")
        image.thumbnail((128, 128), Image.Resampling.LANCZOS)
        square = Image.new("RGB", (128, 128), "white")
        square.paste(image, ((128 - image.width) // 2, (128 - image.height) // 2))
        doodles.append(torch.from_numpy(np.array(square)).permute(2, 0, 1) / 127.5 - 1)
    pixels = torch.stack(doodles)
    start = LATENT_SCALE * vae.encode(pixels).latent_dist.mode()
    rows = [pixels]
    for strength, guidance in ((0.6, 3.0), (0.7, 3.0), (0.8, 4.0), (1.0, 4.0)):
        latents = sample(model, words, start, list(SHEET.values()), strength, guidance)
        rows.append(vae.decode(latents / LATENT_SCALE).sample)
    Image.fromarray(np.concatenate([np.concatenate([to_image(p) for p in row], 1) for row in rows])).save(path)


def learning_rate(peak: float, step: int, part_done: float) -> float:
    """Linear warm-up, level for half of the time, then straight down to zero."""
    return peak * min(1.0, (step + 1) / 300) * min(1.0, 2 * max(0.0, 1 - part_done))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=240, help="the whole budget, earlier runs included")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--workers", type=int, default=2, help="CPU cores to use")
    parser.add_argument("--sheet-minutes", type=float, default=12, help="how often to draw a sample sheet")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.backends.cuda.enable_flash_sdp(False)  # the plain attention is faster for 64 tokens, on the CPU too
    words = tokenizer()
    model = Painter(words)
    workers = Workers(model, args.workers)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    step, spent = 0, 0.0
    checkpoint = work_folder() / "unet.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        with torch.no_grad():  # in place: the workers share this storage
            for own, saved_value in zip(model.state_dict().values(), state["model"].values(), strict=True):
                own.copy_(saved_value)
        average.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
    vae, (_, items) = finished_vae(), load()
    batches, loss = Batches(items, words, seed=step), Loss()
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.unet, model.text)]
    print(f"UNet {sizes[0]:.2f}M, text encoder {sizes[1]:.2f}M, {len(batches.items)} pictures, step {step}", flush=True)

    def save() -> None:
        state = {"model": model.state_dict(), "ema": average.state_dict(), "optimizer": optimizer.state_dict()}
        save_atomically({**state, "step": step, "seconds": spent, "batch": args.batch}, checkpoint)

    started, logged, saved, drawn = time.time() - spent, (step, spent), spent, spent
    stop = stop_asked()
    while spent < args.minutes * 60 and not stop():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.rate, step, spent / (args.minutes * 60))
        optimizer.zero_grad(set_to_none=True)
        workers.backward(loss, *batches.draw(args.batch))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        keep = min(0.9985, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), parameters, 1 - keep)
        spent = time.time() - started
        if spent - logged[1] > 60:
            speed = (step - logged[0]) * args.batch / (spent - logged[1])
            print(f"step {step}  {spent / 60:.1f} min  {speed:.0f} pictures/s  loss {loss.by_level()}", flush=True)
            logged = (step, spent)
        if spent - saved > 240:
            save()
            saved = spent
        if spent - drawn > args.sheet_minutes * 60:
            sheet(average, words, vae, work_folder() / f"sheet-{step:06d}.png")
            drawn = spent
    save()
    sheet(average, words, vae, work_folder() / f"sheet-{step:06d}.png")
    print(f"stopped at {step} steps, {spent / 60:.1f} min")


if __name__ == "__main__":
    main()
