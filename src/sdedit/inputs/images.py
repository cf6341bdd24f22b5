"""Images in and out: what was read becomes a batch of tensors, and a tensor what the caller asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdedit.inputs.opening import MAX_PIXELS
from sdedit.inputs.pixels import Array, Images, read_pixels

# What `image` may be, or a list of.
ImageInput = Image.Image | Array | Tensor | Sequence[Image.Image] | Sequence[Array] | Sequence[Tensor]


def read_images(image: ImageInput, latent_channels: int, max_pixels: int | None = MAX_PIXELS) -> Images:
    """Read what users pass as `image`: see `sdedit.inputs.pixels.read_pixels`."""
    read = read_pixels(image, latent_channels, max_pixels)
    alphas = [None if alpha is None else torch.from_numpy(alpha) for alpha in read.alphas]
    pixels, colours = torch.from_numpy(read.pixels), torch.from_numpy(read.colours)
    return replace(read, pixels=pixels, alphas=alphas, colours=colours)


def pad_to_multiple(pixels: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of (B, C, H, W) until both sides are multiples."""
    height, width = pixels.shape[-2:]
    below, right = -height % multiple, -width % multiple
    return F.pad(pixels, (0, right, 0, below), mode="replicate") if below or right else pixels


def write_images(
    pixels: Tensor,
    output_type: str,
    alphas: Sequence[Tensor | None],
    profiles: Sequence[bytes | None] | None = None,
) -> list[Image.Image] | Array | Tensor:
    """Give pixels the form that `output_type` asks for; images that came with alpha get it back.

    Args:
        pixels: (B, 3, H, W) in [0, 1].
        alphas: One an image; with one of them all arrays and tensors get a fourth channel.
        profiles: Colour profiles, one an image, that the pixels are meant by; PIL images carry them in `info`.
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
    written = [
        Image.fromarray(one if alpha is not None else np.ascontiguousarray(one[..., :3]))
        for one, alpha in zip(eight_bit, alphas, strict=True)
    ]
    for one, profile in zip(written, profiles or [None] * len(written), strict=True):
        if profile:
            one.info["icc_profile"] = profile
    return written
