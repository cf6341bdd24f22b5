"""Train the autoencoder: pictures of 128x128 to latents of 8x16x16 and back.

    python training/train_vae.py --minutes 35

Goes on from vae.pt in the work folder when it is there. The learning rate falls to zero at the end of the budget.
"""

import argparse
import math
import time

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data import SIZE, Item, load, things
from paths import save_atomically, stop_asked, work_folder
from sdedit.models.vae import AutoencoderKL
from workers import Workers

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [32, 64, 96, 128],
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "act_fn": "silu",
    "sample_size": SIZE,
}
KL_WEIGHT = 1e-4  # of the mean over latent elements: keeps latents near a unit Gaussian, costs little sharpness


def on_background(rgba: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Pictures (..., 4) over a flat colour, as float32 in [-1, 1]."""
    rgba = rgba.astype(np.float32) / 255
    alpha = rgba[..., 3:]
    return (rgba[..., :3] * alpha + colour * (1 - alpha)) * 2 - 1


def to_tensor(batch: list[np.ndarray]) -> Tensor:
    stacked = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
    return stacked.contiguous(memory_format=torch.channels_last)


def random_crop(picture: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A crop with something in it, mirrored half the time, on white or sometimes on another colour."""
    for _ in range(3):
        top, left = rng.integers(0, SIZE - size + 1, 2)
        crop = picture[top : top + size, left : left + size]
        if crop[..., 3].mean() > 60:
            break
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    white = rng.random() < 0.8
    return on_background(crop, np.ones(3, np.float32) if white else rng.random(3, dtype=np.float32))


def gradient_difference(a: Tensor, b: Tensor) -> Tensor:
    """How far the differences of neighbouring pixels are apart: keeps edges sharp."""
    d = a - b
    return (d[..., 1:, :] - d[..., :-1, :]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()


def loss(vae: AutoencoderKL, batch: Tensor) -> Tensor:
    """How far a batch comes back changed, and a little of how far its latents are from a unit Gaussian."""
    posterior = vae.encode(batch).latent_dist
    decoded = vae.decode(posterior.sample()).sample.float()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    difference = functional.l1_loss(decoded, batch) + functional.mse_loss(decoded, batch)
    return difference + gradient_difference(decoded, batch) + KL_WEIGHT * kl


def learning_rate(peak: float, step: int, part_done: float) -> float:
    """Linear warm-up, then half a cosine down to zero when the time is spent."""
    return peak * min(1.0, step / 200) * 0.5 * (1 + math.cos(math.pi * min(part_done, 1.0)))


@torch.inference_mode()
def psnr(vae: AutoencoderKL, pictures: np.ndarray, rows: list[int]) -> float:
    """Mean over pictures of the PSNR in dB of encoding and decoding whole pictures on white."""
    values = []
    for start in range(0, len(rows), 16):
        batch = to_tensor([on_background(pictures[i], np.ones(3, np.float32)) for i in rows[start : start + 16]])
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(vae.encode(batch).latent_dist.mode()).sample
        error = ((decoded.float().clamp(-1, 1) - batch) / 2).square().mean((1, 2, 3))
        values += (-10 * error.clamp(min=1e-10).log10()).tolist()
    return sum(values) / len(values)


def load_vae(path: str = "vae.pt") -> AutoencoderKL:
    """The averaged weights of the checkpoint, ready for use."""
    vae = AutoencoderKL(**CONFIG)
    vae.load_state_dict(torch.load(work_folder() / path, weights_only=True)["ema"])
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def pools(items: list[Item]) -> tuple[list[int], list[int], list[int]]:
    """Rows of all training pictures, of those in things.txt among them, and of the held-out ones."""
    train = [i for i, item in enumerate(items) if not item.held_out]
    listed = [i for i in train if items[i].name in things()]
    return train, listed, [i for i, item in enumerate(items) if item.held_out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=35, help="the whole budget, earlier runs included")
    parser.add_argument("--batch", type=int, default=16, help="crops of 64x64 a step")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--workers", type=int, default=2, help="CPU cores to use")
    args = parser.parse_args()

    pictures, items = load()
    train, listed, held_out = pools(items)
    vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=1e-3)
    ema = {key: value.detach().clone() for key, value in vae.state_dict().items()}
    step, spent = 0, 0.0
    checkpoint = work_folder() / "vae.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step, spent = state["ema"], state["step"], state["seconds"]
    rng = np.random.default_rng(step)
    workers = Workers(vae, args.workers)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters, from step {step}", flush=True)

    def save() -> None:
        state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema}
        save_atomically({**state, "step": step, "seconds": spent}, checkpoint)

    started, losses, logged, saved = time.time() - spent, [], spent, spent
    stop = stop_asked()
    while spent < args.minutes * 60 and not stop():
        size, count = (SIZE, args.batch // 4) if rng.random() < 0.2 else (64, args.batch)
        rows = [rng.choice(listed if rng.random() < 0.5 else train) for _ in range(count)]
        batch = to_tensor([random_crop(pictures[i], size, rng) for i in rows])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.rate, step, spent / (args.minutes * 60))
        optimizer.zero_grad(set_to_none=True)
        losses.append(workers.backward(loss, batch))
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        keep = min(0.998, (1 + step) / (10 + step))
        for key, value in vae.state_dict().items():
            ema[key].lerp_(value, 1 - keep)
        spent = time.time() - started
        if spent - logged > 60:
            print(f"step {step}  {spent / 60:.1f} min  loss {np.mean(losses):.4f}", flush=True)
            losses, logged = [], spent
        if spent - saved > 240:
            save()
            saved = spent
            print(f"  held-out PSNR {psnr(load_vae(), pictures, held_out):.2f} dB", flush=True)
    save()
    print(f"stopped at {step} steps, {spent / 60:.1f} min")
    print(f"PSNR: held-out {psnr(load_vae(), pictures, held_out):.2f} dB, "
          f"listed things {psnr(load_vae(), pictures, listed[::10]):.2f} dB")


if __name__ == "__main__":
    main()
