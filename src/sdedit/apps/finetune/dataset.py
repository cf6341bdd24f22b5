"""What the network learns from: latents of a folder's pictures, and of guides to them, cached once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdedit.apps.finetune.objective import fresh_rng
from sdedit.apps.folders import Example, fitted
from sdedit.inputs.images import read_images
from sdedit.inputs.pixels import open_image
from sdedit.noise import Generator, retry_in_float32


@dataclass(frozen=True)
class Latents:
    """What the VAE says of each picture: a normal distribution of latents, times `scaling_factor`.

    Attributes:
        mean, std: (N, V, G, C, h, w) on the CPU; V is 2 if pictures are shown mirrored too, else 1. The first of the
            G is the picture, the others are guides to it.
    """

    mean: Tensor
    std: Tensor

    def draw(self, rows: Tensor, versions: Tensor, kinds: Tensor, generator: torch.Generator) -> Tensor:
        """A sample for each of B pictures, mirrored or not, or of a guide to it, (B, C, h, w)."""
        mean, std = self.mean[rows, versions, kinds], self.std[rows, versions, kinds]
        return mean + std * torch.randn(mean.shape, generator=generator)


@torch.no_grad()
def encode_pictures(
    vae: Any,
    examples: Sequence[Example],
    size: int,
    *,
    flip: bool = False,
    guides: int = 0,
    seed: int = 0,
    done: Callable[[], Any] = lambda: None,
) -> Latents:
    """Latents of all pictures, and of so many guides to each; `done` is called after each picture."""
    both = []
    for n, example in enumerate(examples):
        pixels = fitted(read_images(open_image(example.path), vae.config.latent_channels).pixels, size)
        generator = fresh_rng(seed, 2, n)[1]
        batch = torch.cat([pixels, *(guide(pixels, generator) for _ in range(guides))])
        batch = torch.stack([batch, batch.flip(-1)] if flip else [batch])
        found = retry_in_float32("VAE encoder", vae, functools.partial(_distribution, batch.flatten(0, 1)))
        both.append(found.float().cpu().unflatten(1, batch.shape[:2]) * vae.config.scaling_factor)
        done()
    mean, std = torch.stack(both, 1)
    return Latents(mean, std)


def guide(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A picture (1, 3, H, W) in rough colours: what is not white becomes another colour, blurred; white stays white."""
    kept = torch.rand((1, 3, 1, 1), generator=generator) * 1.6
    other = 1 - (1 - pixels) * kept.clamp(max=2 / (1 - pixels).amax((2, 3), keepdim=True).clamp(min=1e-3))
    height, width = pixels.shape[-2:]
    coarse = int(torch.randint(1, 5, (1,), generator=generator))
    small = F.interpolate(other, (height // coarse, width // coarse), mode="area")
    return F.interpolate(small, (height, width), mode="bilinear", align_corners=False).clamp(-1, 1)


def _distribution(pixels: Tensor, vae: Any, _: Generator) -> Tensor:
    """Mean and deviation of the latents, (2, B, C, h, w); those of a tiny VAE have no deviation."""
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    if hasattr(encoded, "latents"):
        return torch.stack([encoded.latents, torch.zeros_like(encoded.latents)])
    return torch.stack([encoded.latent_dist.mean, encoded.latent_dist.std])
