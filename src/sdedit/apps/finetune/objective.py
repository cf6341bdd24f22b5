"""What a diffusion model learns from: a noisy sample, what to predict in it, and how much its error weighs.

A sample at time t is α x0 + σ ε with α² = ᾱ(t), σ² = 1 - ᾱ(t), and its signal-to-noise ratio is SNR = α² / σ².
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Objective:
    """A noise schedule and what the network predicts.

    Attributes:
        alphas_cumprod: (T,), ᾱ of each training time.
        prediction: "epsilon" for ε, "v_prediction" for v = α ε - σ x0 (arXiv 2202.00512), "sample" for x0.
        min_snr_gamma: γ of min-SNR weighting (Hang et al. 2023, arXiv 2303.09556): the error, seen as one of x0, weighs
            min(SNR, γ), so that the easy, little noisy times do not rule. `None` weighs all times alike.
    """

    alphas_cumprod: Tensor
    prediction: str
    min_snr_gamma: float | None = None

    @classmethod
    def of(cls, scheduler: Any, min_snr_gamma: float | None = None) -> Objective:
        """That of a scheduler's config.

        Raises:
            ValueError: It predicts something else.
        """
        prediction = scheduler.config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise ValueError(f"scheduler: prediction_type={prediction!r}; expected one of {', '.join(PREDICTIONS)}")
        return cls(scheduler.alphas_cumprod.float().cpu(), prediction, min_snr_gamma)

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at times (B,), (B, 1, 1, 1) each."""
        kept = self.alphas_cumprod[times.cpu()].view(-1, 1, 1, 1).to(times.device)
        return kept.sqrt(), (1 - kept).sqrt()

    def noisy(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """α x0 + σ ε, (B, C, H, W)."""
        alpha, sigma = self.levels(times)
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the network shall predict, (B, C, H, W)."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        alpha, sigma = self.levels(times)
        return alpha * noise - sigma * clean

    def weights(self, times: Tensor) -> Tensor:
        """Factors (B,) of the squared error of what is predicted."""
        if self.min_snr_gamma is None:
            return torch.ones(times.shape, device=times.device)
        alpha, sigma = (level.flatten() for level in self.levels(times))
        # An error of x0 is one of ε times σ/α, and one of v times σ.
        capped = torch.clamp(alpha.square() / sigma.square(), max=self.min_snr_gamma)
        if self.prediction == "sample":
            return capped
        return capped * sigma.square() / (alpha.square() if self.prediction == "epsilon" else 1.0)

    def loss(self, predicted: Tensor, target: Tensor, times: Tensor) -> Tensor:
        """Weighted squared error of each sample, (B,), in float32."""
        error = (predicted.float() - target.float()).square().mean((1, 2, 3))
        return error * self.weights(times)


class Denoiser(nn.Module):
    """UNet and text encoder as one network, for training both, or the UNet alone from prompt embeds."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, times: Tensor, text: Tensor) -> Tensor:
        """Noisy latents (B, C, H, W), times (B,), token ids (B, M) or embeds (B, M, D) → prediction (B, C, H, W)."""
        embeds = text if self.text_encoder is None else self.text_encoder(text)[0]
        return self.unet(noisy, times, embeds)[0]  # type: ignore[no-any-return]


def spread_times(rng: np.random.Generator, count: int, total: int) -> np.ndarray[Any, Any]:
    """`count` whole times from 0 to total - 1, in random order, one in each of `count` equal parts of that range.

    Each alone is uniform; together they cover the range, so the loss of a batch varies less.
    """
    times = ((np.arange(count) + rng.random(count)) / count * total).astype(np.int64)
    return rng.permutation(times)


def fresh_rng(*key: int) -> tuple[np.random.Generator, torch.Generator]:
    """Generators that depend on whole numbers alone: what step n draws is the same after a restart."""
    sequence = np.random.SeedSequence(key)
    seed = int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
    return np.random.default_rng(sequence), torch.Generator().manual_seed(seed)


def shuffled(first: int, count: int, total: int, seed: int) -> list[int]:
    """Places `first` to `first + count - 1` of an endless row of shuffled packs of `range(total)`."""
    packs: dict[int, Sequence[int]] = {}
    drawn = []
    for n in range(first, first + count):
        pack = n // total
        if pack not in packs:
            packs[pack] = fresh_rng(seed, 0, pack)[0].permutation(total).tolist()
        drawn.append(packs[pack][n % total])
    return drawn
