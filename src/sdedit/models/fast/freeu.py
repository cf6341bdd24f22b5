"""FreeU: other weights for what the UNet's way up takes in (Si et al. 2023, arXiv 2309.11497)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FreeU:
    """A way to take a skip in: more of the features from below, less of the skip's lowest frequencies.

    Attributes:
        skip: Weight of those frequencies; 1 changes nothing.
        backbone: Weight of the first half of the channels from below, likewise.
    """

    skip: float
    backbone: float

    def __call__(self, x: Tensor, skip: Tensor) -> Tensor:
        """Features from below (B, C, H, W) and a skip (B, C', H, W), reweighed, as one map (B, C + C', H, W)."""
        first, rest = x.tensor_split([x.shape[1] // 2], dim=1)
        scaled = skip.float() + (self.skip - 1) * lowest(skip.float())
        return torch.cat([first * self.backbone, rest, scaled.to(skip.dtype)], dim=1)


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
