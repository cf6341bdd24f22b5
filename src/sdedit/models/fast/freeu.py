"""FreeU: other weights for what the UNet's way up takes in (Si et al. 2023, arXiv 2309.11497)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FreeU:
    """In the first two blocks on the way up, more of the features from below, less of the skips' lowest frequencies.

    Attributes:
        skips: Weight of those frequencies, for the first and the second block; 1 changes nothing.
        backbone: Weight of the first half of the channels from below, likewise.
    """

    skips: tuple[float, float]
    backbone: tuple[float, float]

    def __call__(self, stage: int, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Features from below (B, C, H, W) and a skip (B, C', H, W) of the block `stage`, as they are to be used."""
        if stage >= len(self.skips):
            return x, skip
        first, rest = x.tensor_split([x.shape[1] // 2], dim=1)
        scaled = skip.float() + (self.skips[stage] - 1) * lowest(skip.float())
        return torch.cat([first * self.backbone[stage], rest], dim=1), scaled.to(skip.dtype)


def lowest(x: Tensor) -> Tensor:
    """The part of (…, H, W) at the frequencies 0 and -1 along both axes.

    That band is not symmetric, so the part is complex and this is its real half: with P = A + iB the projection along
    one axis, Re(P·x·Pᵀ) = A·x·Aᵀ - B·x·Bᵀ.
    """
    real_h, imaginary_h = _projection(x.shape[-2], x)
    real_w, imaginary_w = _projection(x.shape[-1], x)
    return real_h @ x @ real_w.T - imaginary_h @ x @ imaginary_w.T


def _projection(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the (n, n) matrix that keeps the frequencies 0 and -1 of n samples."""
    places = torch.arange(n, dtype=like.dtype, device=like.device)
    angles = -2 * math.pi / n * (places[:, None] - places[None, :])
    if n == 1:  # the two are one
        return torch.ones_like(angles), torch.zeros_like(angles)
    return (1 + angles.cos()) / n, angles.sin() / n
