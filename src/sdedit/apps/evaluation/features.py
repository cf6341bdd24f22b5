"""Features of a picture that need no download: means of its wavelet scattering transform.

A picture is filtered with wavelets of four scales and four orientations, and the modulus averaged over the whole
picture: how much of it is edge or shading at each scale, in luminance and in two colour axes. For luminance each
modulus is filtered once more with the coarser wavelets: how these edges lie together, which tells a lone outline from a
texture (scattering: Bruna and Mallat 2013, arXiv 1203.1513). Nothing is learned, so the features favour no model and no
kind of picture; they do not change when a picture is shifted, and they see no meaning: a face that stands on its head
is as good as a face.

The pictures are brought to 64×64 first. At 128×128 and more the finest wavelets see little but how sharp a decoder is,
and that outweighs all the rest.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64
SCALES, ORIENTATIONS = 4, 4
FINEST = 1 / 3  # cycles a pixel; each further scale has half of it
SIZE = 3 + 3 * SCALES * ORIENTATIONS + SCALES * (SCALES - 1) // 2 * ORIENTATIONS**2

# What lies below is not seen: about half a level of 8 bits.
FLOOR = 2e-3

# Luminance, red against green, yellow against blue: an orthonormal basis of RGB.
_AXES = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
_AXES = _AXES / _AXES.norm(dim=1, keepdim=True)


def wavelet_features(pixels: Tensor) -> Tensor:
    """Scattering features of pictures, at 64×64.

    Args:
        pixels: (B, 3, H, W) in [0, 1].

    Returns:
        (B, 147) float32: the mean of each colour axis; for each axis, scale and orientation the logarithm of the mean
        modulus; for luminance and each pair of a scale and a coarser one, the logarithm of the second mean over the
        first.
    """
    small = F.interpolate(pixels.float(), (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    axes = torch.einsum("ac,bchw->bahw", _AXES.to(small), small)
    return torch.stack([_scattering(one) for one in axes])


def _scattering(axes: Tensor) -> Tensor:
    """Features (147,) of one picture's colour axes (3, N, N)."""
    filters = _wavelets().to(axes.device)
    moduli = _modulus(axes[:, None, None], filters)  # (3, scales, orientations, N, N)
    first = moduli.mean((-2, -1))
    second = []
    for j in range(SCALES - 1):
        again = _modulus(moduli[0, j, :, None, None], filters[j + 1 :])  # (orientations, coarser, orientations, N, N)
        second.append(((again.mean((-2, -1)) + FLOOR) / (first[0, j, :, None, None] + FLOOR)).log().flatten())
    return torch.cat([axes.mean((-2, -1)), (first + FLOOR).log().flatten(), *second])


def _modulus(x: Tensor, filters: Tensor) -> Tensor:
    """|x ∗ ψ| over the last two axes, for filters given by their transforms."""
    return torch.fft.ifft2(torch.fft.fft2(x) * filters).abs()


@cache
def _wavelets() -> Tensor:
    """Transforms of the wavelets, (scales, orientations, N, N), each 1 at its own frequency and 0 at frequency 0.

    They are log-Gabor filters (Field 1987), Gaussians in the logarithm of the frequency and in its direction, of one
    half-plane of frequencies, so that the modulus is the envelope of an oscillation.
    """
    y, x = torch.meshgrid(*[torch.fft.fftfreq(SIDE, dtype=torch.float64)] * 2, indexing="ij")
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)
    filters = torch.zeros(SCALES, ORIENTATIONS, SIDE, SIDE, dtype=torch.float64)
    for j in range(SCALES):
        octaves = torch.log2(radius / (FINEST / 2**j))  # -∞ at frequency 0
        for k in range(ORIENTATIONS):
            away = torch.remainder(angle - math.pi * k / ORIENTATIONS + math.pi, 2 * math.pi) - math.pi
            filters[j, k] = torch.exp(-2 * octaves**2 - (away * ORIENTATIONS / math.pi * 2) ** 2 / 2)
    return filters.float()
