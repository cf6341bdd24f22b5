"""Grow the autoencoder that training starts from by one level: pictures twice as wide, the latents as they were.

    python training/grow.py --steps 600 6000 3000

The start's UNet knows its latents, so the new encoder learns to find those in the larger picture that the start's finds
in the smaller one, and the new decoder to make the larger picture of them. Three parts, each from the averaged weights
of the one before: the new levels alone; the decoder, from the start's latents; both, from their own.
"""

import argparse
import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from data import load
from loop import Plan, Training
from model import averaged, encoded, new_vae, start_vae
from paths import work_folder
from report import Report
from sdedit.apps.finetune.stopping import Stop
from sdedit.models.vae import AutoencoderKL
from train_vae import LATENT_NOISE, Crops, likeness, pools, psnr

PARTS = ("outer", "decoder", "both")
LATENT_WEIGHT = 2.0  # of the squared error of the latents, beside that of the pictures


class Loss:
    """How far pictures come back changed, and how far the latents are from those of the smaller pictures.

    Args:
        small: The autoencoder of the smaller pictures; it does not learn.
        part: Of `PARTS`.
    """

    def __init__(self, small: AutoencoderKL, part: str) -> None:
        self.small, self.part = small.eval().requires_grad_(False), part
        self.seen: list[tuple[float, float]] = []

    def __call__(self, vae: AutoencoderKL, batch: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            known = encoded(self.small, batch)
        latents, value = known.mean.float(), batch.new_zeros(())
        if self.part != "decoder":
            found = vae.encode(batch).latent_dist
            error = (found.mean.float() - latents).square().mean()
            value = LATENT_WEIGHT * error + 0.01 * (found.logvar.float() - known.logvar.float()).square().mean()
        if self.part == "both":
            latents = found.mean.float()
        spread = (known.logvar.float().exp() + LATENT_NOISE**2).sqrt()
        near = likeness(vae.decode(latents + spread * noise).sample.float() - batch)
        self.seen.append((near.item(), value.item()))
        return near + value

    def recent(self) -> str:
        """The mean losses since the last call: of the pictures, and of the latents."""
        values, self.seen = self.seen, []
        return " ".join(f"{sum(column) / len(values):.4f}" for column in zip(*values, strict=True))


def learning(vae: AutoencoderKL, part: str) -> nn.Module:
    """The same, of which only what the part trains asks for a gradient."""
    trained = {
        "outer": (
            "encoder.conv_in",
            "encoder.down_blocks.0",
            "encoder.down_blocks.1",
            "decoder.up_blocks.3",
            "decoder.up_blocks.4",
            "decoder.conv_norm_out",
            "decoder.conv_out",
        ),
        "decoder": ("decoder", "post_quant_conv"),
        "both": ("",),
    }[part]
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    return vae


def file(part: str) -> Path:
    return work_folder() / f"vae-{part}.pt"


def grown_vae(parts: Iterable[str] = PARTS) -> AutoencoderKL:
    """The grown autoencoder as these parts leave it, as far as they have come; ready for use."""
    vae = new_vae().eval().requires_grad_(False)
    for part in parts:
        averaged(vae, file(part))
    return vae


def train(part: str, steps: int, args: argparse.Namespace) -> None:
    pictures, items = load()
    held_out = pools(items)[2]
    before = PARTS[: PARTS.index(part)]
    vae = learning(grown_vae(before).to(args.device), part)
    plan = Plan(
        steps, args.rate, warm_up=50, fall=min(args.fall, steps // 2), averaging=0.998, weight_decay=1e-3, muon=True
    )
    loss = Loss(copy.deepcopy(start_vae()).float().to(args.device), part)
    training = Training(vae, loss, Crops(pictures, items, args.batch), plan, file(part))

    def measure() -> str:
        model = training.averaged(grown_vae(before).to(args.device))
        teacher = loss.small if part != "both" else None
        return f"held-out PSNR {psnr(model, pictures, held_out[::3], teacher):.2f} dB"

    report = Report(training, samples=args.batch, often=1500, measure=measure, loss=loss.recent)
    with Stop() as stopped:
        for value in training.run(stopped):
            report(value)
    report.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs=3, default=(600, 6000, 3000), help="of the three parts")
    parser.add_argument("--part", choices=PARTS, help="this one alone")
    parser.add_argument(
        "--fall", type=int, default=1500, help="of a part's steps at most, with a falling learning rate"
    )
    parser.add_argument("--batch", type=int, default=16, help="crops of 128x128 a step")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for part, steps in zip(PARTS, args.steps, strict=True):
        if args.part in (None, part):
            train(part, steps, args)


if __name__ == "__main__":
    main()
