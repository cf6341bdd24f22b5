"""Train the tiny autoencoder: the latents of the large one, and pictures of them, in a fraction of the time.

    python training/train_tiny.py --steps 6000

Goes on from tiny.pt in the work folder when it is there.
"""

import argparse
import copy

import torch
from torch import Tensor

from data import load
from latents import finished_vae
from loop import Plan, Training
from model import encoded, growing, new_tiny, start_vae
from paths import work_folder
from report import Report
from sdedit.apps.finetune.stopping import Stop
from sdedit.models.tiny_vae import AutoencoderTiny
from sdedit.models.vae import AutoencoderKL
from train_vae import LATENT_NOISE, Crops, likeness, pools, psnr

LATENT_WEIGHT = 1.0  # of the squared error of the latents, beside that of the pictures


class Loss:
    """How far the latents are from the large autoencoder's, and how far pictures made of those are from the true ones.

    Args:
        large: It does not learn.
    """

    def __init__(self, large: AutoencoderKL) -> None:
        self.large = large.eval().requires_grad_(False)
        self.seen: list[tuple[float, float]] = []

    def __call__(self, tiny: AutoencoderTiny, batch: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            latents = encoded(self.large, batch).mean.float()
        found = tiny.encode(batch).latents.float()
        far = (found - latents).square().mean()
        near = likeness(tiny.decode(latents + LATENT_NOISE * noise).sample.float() - batch)
        self.seen.append((near.item(), far.item()))
        return near + LATENT_WEIGHT * far

    def recent(self) -> str:
        """The mean losses since the last call: of the pictures, and of the latents."""
        values, self.seen = self.seen, []
        return " ".join(f"{sum(column) / len(values):.4f}" for column in zip(*values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000, help="of the whole training, earlier runs included")
    parser.add_argument("--fall", type=int, default=1500, help="of them, with a falling learning rate")
    parser.add_argument("--batch", type=int, default=16, help="crops of 128x128 a step")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    pictures, items = load()
    held_out = pools(items)[2]
    # Of a grown autoencoder the latents are the start's, which finds them sooner.
    large = copy.deepcopy(start_vae()).float() if growing() else finished_vae()
    large = large.to(args.device)
    plan = Plan(
        args.steps, args.rate, fall=args.fall, averaging=0.998, weight_decay=1e-3, muon=True, workers=args.workers
    )
    loss = Loss(large)
    training = Training(
        new_tiny().to(args.device), loss, Crops(pictures, items, args.batch), plan, work_folder() / "tiny.pt"
    )

    def measure() -> str:
        tiny = training.averaged(new_tiny().to(args.device))
        both = (psnr(tiny, pictures, held_out, large), psnr(tiny, pictures, held_out))
        return "held-out PSNR {:.2f} dB of the large one's latents, {:.2f} dB of its own".format(*both)

    report = Report(training, samples=args.batch, often=1500, measure=measure, loss=loss.recent)
    with Stop() as stopped:
        for value in training.run(stopped):
            report(value)
    report.end()


if __name__ == "__main__":
    main()
