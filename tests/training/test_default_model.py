"""What the autoencoders of the package are promised to be, on doodles that they never saw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from paths import EXPORT, REPOSITORY
from sdedit import AutoencoderKL, AutoencoderTiny, framed
from train_vae import to_tensor

NAMES = ("apple", "house", "car", "star", "banana", "dog")


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    drawings = [framed(Image.open(REPOSITORY / "examples" / f"{name}.png").convert("RGB")) for name in NAMES]
    return to_tensor([np.asarray(d.resize((256, 256)), np.float32) / 255 for d in drawings])


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(EXPORT, subfolder="vae").float()


@pytest.fixture(scope="module")
def tiny() -> AutoencoderTiny:
    return AutoencoderTiny.from_pretrained(EXPORT, subfolder="tiny_vae").float()


def psnr(made: Tensor, true: Tensor) -> float:
    error = ((made.clamp(-1, 1) - true) / 2).square().mean((1, 2, 3))
    return float(-10 * error.log10().mean())


@torch.inference_mode()
def test_pictures_of_256_come_back(vae: AutoencoderKL, pictures: Tensor) -> None:
    latents = vae.encode(pictures).latent_dist.mode()
    assert latents.shape == (len(NAMES), 8, 16, 16)
    assert psnr(vae.decode(latents).sample, pictures) > 27


@torch.inference_mode()
def test_the_tiny_one_knows_the_latents(vae: AutoencoderKL, tiny: AutoencoderTiny, pictures: Tensor) -> None:
    latents = vae.encode(pictures).latent_dist.mode()
    assert psnr(tiny.decode(latents).sample, pictures) > 24
    far = (tiny.encode(pictures).latents - latents).square().mean() / latents.var()
    assert far < 0.2
    assert psnr(vae.decode(tiny.encode(pictures).latents).sample, pictures) > 20
    assert tiny.config.scaling_factor == vae.config.scaling_factor


def test_the_tiny_one_decodes_with_a_fifth_of_the_work(vae: AutoencoderKL, tiny: AutoencoderTiny) -> None:
    work = []
    for one in (vae, tiny):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one.decode(torch.zeros(1, 8, 16, 16))
        work.append(counter.get_total_flops())
    assert 0 < work[1] <= work[0] / 5
