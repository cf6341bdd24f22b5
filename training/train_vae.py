"""Train the autoencoder: pictures of 256x256 to latents of 8x16x16 and back.

    python training/train_vae.py --steps 6000

Goes on from vae.pt in the work folder when it is there.
"""

import argparse

import numpy as np
import torch
from torch import Tensor

from captions import things
from data import SIZE, Item, load, on_ground
from loop import Plan, Training
from model import FACTOR, VAE, encoded, new_vae
from paths import work_folder
from report import Report
from sdedit.apps.finetune.objective import fresh_rng
from sdedit.apps.finetune.stopping import Stop
from sdedit.models.tiny_vae import AutoencoderTiny
from sdedit.models.vae import AutoencoderKL

KL_WEIGHT = 1e-4  # of the mean over latent elements: keeps latents near a unit Gaussian, costs little sharpness
LOG_WEIGHT = 0.1  # of the logarithm of the squared error, which is what PSNR measures
EDGE_WEIGHT = 0.5
LATENT_NOISE = 0.1  # deviation of noise on the latents, beside their own: the UNet will not hit them exactly either


def to_tensor(batch: list[np.ndarray]) -> Tensor:
    """Pictures (H, W, 3) in [0, 1] → (B, 3, H, W) in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2) * 2 - 1
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
    return on_ground(crop) if rng.random() < 0.8 else on_ground(crop, rng.random(3, dtype=np.float32))


class Crops:
    """Crops of 128x128, or once in five a quarter as many whole pictures, and noise for their latents."""

    def __init__(self, pictures: np.ndarray, items: list[Item], size: int) -> None:
        self.pictures, self.size = pictures, size
        self.train, self.listed, _ = pools(items)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        rng, generator = fresh_rng(1, step)
        side, count = (SIZE, max(self.size // 4, 1)) if rng.random() < 0.2 else (SIZE // 2, self.size)
        rows = [rng.choice(self.listed if rng.random() < 0.5 else self.train) for _ in range(count)]
        batch = to_tensor([random_crop(self.pictures[row], side, rng) for row in rows])
        shape = (count, VAE["latent_channels"], side // FACTOR, side // FACTOR)
        return batch, torch.randn(shape, generator=generator)


def gradient_difference(difference: Tensor) -> Tensor:
    """How far the differences of neighbouring pixels are apart: keeps edges sharp."""
    down, right = difference.diff(dim=-2), difference.diff(dim=-1)
    return down.abs().mean() + right.abs().mean()


def likeness(difference: Tensor) -> Tensor:
    """What a difference of pictures counts, the less the more they are alike."""
    squared = difference.square().mean((1, 2, 3))
    near = difference.abs().mean() + LOG_WEIGHT * (squared + 1e-5).log().mean()
    return near + EDGE_WEIGHT * gradient_difference(difference)


def loss(vae: AutoencoderKL, batch: Tensor, noise: Tensor) -> Tensor:
    """How far a batch comes back changed, and a little of how far its latents are from a unit Gaussian."""
    posterior = vae.encode(batch).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    difference = vae.decode(mean + (logvar.exp() + LATENT_NOISE**2).sqrt() * noise).sample.float() - batch
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return likeness(difference) + KL_WEIGHT * kl


@torch.inference_mode()
def psnr(
    vae: AutoencoderKL | AutoencoderTiny, pictures: np.ndarray, rows: list[int], other: AutoencoderKL | None = None
) -> float:
    """Mean over pictures of the PSNR in dB of encoding and decoding whole pictures on white, in float32.

    With another autoencoder the latents are that one's.
    """
    values: list[float] = []
    for start in range(0, len(rows), 16):
        batch = to_tensor([on_ground(pictures[i]) for i in rows[start : start + 16]]).to(vae.device)
        decoded = vae.decode(encoded(vae if other is None else other, batch).mode()).sample
        error = ((decoded.float().clamp(-1, 1) - batch) / 2).square().mean((1, 2, 3))
        values += (-10 * error.clamp(min=1e-10).log10()).tolist()
    return sum(values) / len(values)


def pools(items: list[Item]) -> tuple[list[int], list[int], list[int]]:
    """Rows of all training pictures, of those in things.txt among them, and of the held-out ones."""
    train = [i for i, item in enumerate(items) if not item.held_out]
    listed = [i for i in train if items[i].name in things()]
    return train, listed, [i for i, item in enumerate(items) if item.held_out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000, help="of the whole training, earlier runs included")
    parser.add_argument("--fall", type=int, default=2000, help="of them, with a falling learning rate")
    parser.add_argument("--batch", type=int, default=16, help="crops of 128x128 a step")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--decoder-only", action="store_true", help="keep the latents as they are, so the UNet stays right"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    pictures, items = load()
    held_out = pools(items)[2]
    vae = new_vae().to(args.device)
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    plan = Plan(args.steps, args.rate, fall=args.fall, averaging=0.998, weight_decay=1e-3, muon=True)
    training = Training(vae, loss, Crops(pictures, items, args.batch), plan, work_folder() / "vae.pt")

    def measure() -> str:
        return f"held-out PSNR {psnr(training.averaged(new_vae().to(args.device)), pictures, held_out):.2f} dB"

    report = Report(training, samples=args.batch, often=300, measure=measure)
    with Stop() as stopped:
        for value in training.run(stopped):
            report(value)
    report.end()


if __name__ == "__main__":
    main()
