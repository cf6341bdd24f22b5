"""The denoiser that knows the answer: what a UNet would predict that had learned a set of pictures by heart.

With it a curve shows what the procedure gives where the model is not the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sdedit.inputs.images import read_images


class ExactDenoiser(nn.Module):
    """E[x0 | x] for latents that are one of a set's, each as likely, as a UNet's v, ε or x0; it reads no prompt.

    At time t, x = α x0 + σ ε, so the set's latents weigh exp(-|x - α x0|² / 2σ²). Between two training steps α² is
    interpolated, as for `exact_steps`.

    Args:
        pipe: The pipeline in whose UNet's place this is to be put.
        pictures: PIL images of one size.
    """

    levels: Tensor

    def __init__(self, pipe: Any, pictures: Sequence[Image.Image]) -> None:
        super().__init__()
        self.config, self.dtype, self.device = pipe.unet.config, torch.float32, pipe.device
        self.prediction = pipe.scheduler.config.prediction_type
        with torch.no_grad():
            encoded = [
                pipe.vae.encode(read_images(one, latent_channels=0).pixels.to(pipe.device, pipe.vae.dtype))
                for one in pictures
            ]
        means = torch.cat([one.latent_dist.mean for one in encoded]).float() * pipe.vae.config.scaling_factor
        self.latents = nn.Parameter(means, requires_grad=False)
        self.register_buffer("levels", pipe.scheduler.alphas_cumprod.float().to(pipe.device))

    def forward(self, sample: Tensor, timestep: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        """(B, C, h, w) at times (B,) or () → a tuple of the prediction (B, C, h, w)."""
        x, times = sample.float(), torch.as_tensor(timestep, device=sample.device).float().reshape(-1)
        below = times.long().clamp(0, len(self.levels) - 2)
        bar = torch.lerp(self.levels[below], self.levels[below + 1], times - below)
        alpha, sigma = (level.sqrt().expand(len(x)).view(-1, 1, 1, 1) for level in (bar, 1 - bar))
        squares = (x.flatten(1)[:, None] - alpha[:, 0] * self.latents.flatten(1)).square().sum(2)  # (B, N)
        weights = (-squares / (2 * sigma.flatten()[:, None] ** 2)).softmax(1)
        x0 = torch.einsum("bn,nchw->bchw", weights, self.latents)
        if self.prediction == "sample":
            return (x0,)
        predicted = (alpha * x - x0) / sigma if self.prediction == "v_prediction" else (x - alpha * x0) / sigma
        return (predicted.to(sample.dtype),)
