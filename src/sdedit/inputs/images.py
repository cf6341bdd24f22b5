"""Images in and out: what was read becomes a batch of tensors, and a tensor what the caller asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdedit.inputs.pixels import MAX_PIXELS, Array, read_pixels

# What `image` may be, or a list of.
ImageInput = Image.Image | Array | Tensor | Sequence[Image.Image] | Sequence[Array] | Sequence[Tensor]


@dataclass
class Images:
    """A batch of images as the pipeline uses them.

    Attributes:
        pixels: (B, 3, H, W) in [-1, 1], float32; latents (B, C, h, w) if `latent`.
        alphas: For each image the alpha channel (H, W) in [0, 1] that it came with, or `None`.
        colours: (B, 3, H, W) in [0, 1], to the bit as they came, also below what is clear; none of latents.
        latent: They are latents already, scaled as the UNet expects them.
    """

    pixels: Tensor
    alphas: list[Tensor | None] = field(default_factory=list)
    colours: Tensor = field(default_factory=lambda: torch.empty(0))
    latent: bool = False

    def cropped(self, pixels: Tensor) -> Tensor:
        """Decoded pixels (B, 3, H, W) at the size of these images, without what was padded; of latents, all."""
        height, width = self.pixels.shape[-2:]
        return pixels if self.latent else pixels[..., :height, :width]


def read_images(image: ImageInput, latent_channels: int, max_pixels: int | None = MAX_PIXELS) -> Images:
    """Read what users pass as `image`: see `sdedit.inputs.pixels.read_pixels`."""
    read = read_pixels(image, latent_channels, max_pixels)
    alphas = [None if alpha is None else torch.from_numpy(alpha) for alpha in read.alphas]
    return Images(torch.from_numpy(read.pixels), alphas, torch.from_numpy(read.colours), read.latent)


def pad_to_multiple(pixels: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of (B, C, H, W) until both sides are multiples."""
    height, width = pixels.shape[-2:]
    below, right = -height % multiple, -width % multiple
    return F.pad(pixels, (0, right, 0, below), mode="replicate") if below or right else pixels


def write_images(
    pixels: Tensor, output_type: str, alphas: Sequence[Tensor | None]
) -> list[Image.Image] | Array | Tensor:
    """Give pixels the form that `output_type` asks for; images that came with alpha get it back.

    Args:
        pixels: (B, 3, H, W) in [0, 1].
        alphas: One an image; with one of them all arrays and tensors get a fourth channel.
    """
    if any(alpha is not None for alpha in alphas):
        opaque = torch.ones(pixels.shape[-2:])
        stacked = torch.stack([opaque if alpha is None else alpha for alpha in alphas])
        pixels = torch.cat([pixels, stacked[:, None].to(pixels)], dim=1)
    if output_type == "pt":
        return pixels
    array = pixels.float().cpu().permute(0, 2, 3, 1).numpy()
    if output_type == "np":
        return array
    eight_bit = (array * 255).round().astype(np.uint8)
    return [
        Image.fromarray(one if alpha is not None else np.ascontiguousarray(one[..., :3]))
        for one, alpha in zip(eight_bit, alphas, strict=True)
    ]
