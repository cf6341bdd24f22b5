"""The wavelet features against closed forms: waves, flat pictures, shifts, turns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from conftest import picture
from sdedit.apps.evaluation import features
from sdedit.apps.evaluation.features import FINEST, ORIENTATIONS, SCALES, SIDE, SIZE, wavelet_features
from sdedit.apps.strokes import simulate_strokes

FLOOR = features.FLOOR


def first_order(found: torch.Tensor) -> torch.Tensor:
    """(B, colour axes, scales, orientations) mean moduli."""
    return found[:, 3 : 3 + 3 * SCALES * ORIENTATIONS].exp().unflatten(1, (3, SCALES, ORIENTATIONS)) - FLOOR


def second_order(found: torch.Tensor, j: int) -> torch.Tensor:
    """(B, orientations, coarser scales, orientations) means of the moduli of the moduli at scale j, in luminance."""
    lengths = [ORIENTATIONS**2 * (SCALES - 1 - i) for i in range(SCALES - 1)]
    part = found[:, 3 + 3 * SCALES * ORIENTATIONS :].split(lengths, 1)[j]
    ratio = part.exp().unflatten(1, (ORIENTATIONS, SCALES - 1 - j, ORIENTATIONS))
    return ratio * (first_order(found)[:, 0, j, :, None, None] + FLOOR) - FLOOR


def random_pictures(count: int, size: int = SIDE) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_a_flat_picture_is_its_colour_alone() -> None:
    colour = torch.tensor([0.2, 0.5, 0.9])
    found = wavelet_features(colour.view(1, 3, 1, 1).expand(1, 3, 40, 50))
    assert found.shape == (1, SIZE)
    r, g, b = colour
    axes = [(r + g + b) / math.sqrt(3), (r - g) / math.sqrt(2), (r + g - 2 * b) / math.sqrt(6)]
    assert torch.allclose(found[0, :3], torch.stack(axes), atol=1e-6)
    assert first_order(found).abs().max() < 1e-5
    assert found[0, 3 + 3 * SCALES * ORIENTATIONS :].abs().max() < 1e-2  # log 1


@pytest.mark.parametrize(("fx", "fy"), [(8, 0), (0, 16), (4, 4), (3, -3), (21, 0)])
def test_a_wave_has_the_modulus_of_the_formula(fx: int, fy: int) -> None:
    """A wave of amplitude A has the envelope A/2·ψ̂(ω), for each filter, and no second order at all."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    wave = 0.5 + 0.25 * torch.cos(2 * math.pi * (fx * x + fy * y) / SIDE)
    found = wavelet_features(wave.expand(1, 3, SIDE, SIDE))
    expected = torch.zeros(SCALES, ORIENTATIONS)
    for sign in (1, -1):  # both half-planes; at most one of them counts
        radius, angle = math.hypot(fx, fy) / SIDE, math.atan2(sign * fy, sign * fx)
        for j in range(SCALES):
            for k in range(ORIENTATIONS):
                away = (angle - math.pi * k / ORIENTATIONS + math.pi) % (2 * math.pi) - math.pi
                radial = math.exp(-2 * math.log2(radius / FINEST * 2**j) ** 2)
                gain = radial * math.exp(-((away * ORIENTATIONS / math.pi * 2) ** 2) / 2)
                expected[j, k] = max(expected[j, k], 0.125 * math.sqrt(3) * gain)
    assert torch.allclose(first_order(found)[0, 0], expected, atol=1e-3)
    assert first_order(found)[0, 1:].abs().max() < 1e-5


def test_shifts_change_nothing() -> None:
    pixels = random_pictures(2)
    shifted = torch.roll(pixels, (37, -20), (2, 3))
    assert torch.allclose(wavelet_features(pixels), wavelet_features(shifted), atol=1e-4)


def test_a_mirror_image_swaps_orientations() -> None:
    pixels = random_pictures(1)
    pixels = pixels + 0.3 * pixels.roll((3, 3), (2, 3))  # with a direction of its own
    plain, mirrored = (first_order(wavelet_features(p))[0] for p in (pixels, pixels.flip(3)))
    assert torch.allclose(mirrored, plain[:, :, [0, 3, 2, 1]], atol=5e-4)  # the highest frequency has no mirror image
    assert not torch.allclose(mirrored, plain, atol=2e-3)


def test_a_picture_is_the_same_alone_and_in_a_batch() -> None:
    pixels = random_pictures(3, 80)
    assert torch.allclose(wavelet_features(pixels)[1:2], wavelet_features(pixels[1:2]), atol=1e-6)


def test_grey_noise_of_twice_the_contrast_has_twice_the_moduli() -> None:
    noise = random_pictures(1) - 0.5
    small, large = (wavelet_features(0.5 + s * noise) for s in (0.4, 0.8))
    assert torch.allclose(first_order(large), 2 * first_order(small), rtol=1e-3, atol=1e-5)
    for j in range(SCALES - 1):
        assert torch.allclose(second_order(large, j), 2 * second_order(small, j), rtol=1e-3, atol=1e-5)


def test_second_order_tells_a_lone_edge_from_a_texture() -> None:
    """Across the lines and one scale up, the modulus of bars is level, that of an edge a bump."""
    edge = torch.zeros(1, 3, SIDE, SIDE)
    edge[..., SIDE // 2 :] = 1
    x = torch.arange(SIDE).expand(SIDE, SIDE)
    bars = (0.5 + 0.5 * torch.cos(2 * math.pi * 11 * x / SIDE)).expand(1, 3, SIDE, SIDE)
    ratios = []
    for pixels in (edge, bars):
        found = wavelet_features(pixels)
        ratios.append(float(second_order(found, 1)[0, 0, 0, 0] / first_order(found)[0, 0, 1, 0]))
    assert ratios[0] > 0.1 and ratios[1] < 0.01


def test_blur_strokes_and_noise_each_move_them() -> None:
    """In the direction that the description says: blur and strokes lose fine moduli, noise gains them."""
    image = picture(128, 128)
    noisy = np.asarray(image) / 255 + 0.1 * np.random.default_rng(0).normal(size=(128, 128, 3))
    image = Image.fromarray((noisy.clip(0, 1) * 255).astype(np.uint8))
    versions = [image, image.filter(ImageFilter.GaussianBlur(1.5)), simulate_strokes(image, 6, 11)]
    pixels = torch.stack([torch.from_numpy(np.asarray(one) / 255).permute(2, 0, 1) for one in versions])
    fine = first_order(wavelet_features(pixels))[:, 0, 0].mean(-1)
    assert fine[1] < 0.5 * fine[0] and fine[2] < 0.5 * fine[0]
