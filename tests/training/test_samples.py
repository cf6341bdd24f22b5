"""What the networks are shown: the samples of the UNet, the crops of the autoencoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data import Item
from guides import KINDS
from latents import centred
from model import FACTOR, VAE
from sdedit import StableDiffusionImg2ImgPipeline
from sdedit.models.vae import AutoencoderKL
from train_unet import BEGINNINGS, GUIDE_SHARE, LATENT_SCALE, Loss, Samples
from train_vae import Crops, loss, psnr, to_tensor
from words import LENGTH

NAMES = ("automobile", "red apple", "house")
SMALL = {**VAE, "block_out_channels": [8] * 5}


@pytest.fixture(scope="module")
def words() -> object:
    return StableDiffusionImg2ImgPipeline.from_pretrained().tokenizer


@pytest.fixture
def items() -> list[Item]:
    return [Item(name, style, name, "group", [], ["red"], False) for name in NAMES for style in ("3d", "flat")]


@pytest.fixture
def samples(items: list[Item], words: object) -> Samples:
    rows = np.repeat(np.arange(len(items)), [2, 2, 1, 1, 3, 3]).tolist()  # so many sheets of each picture
    latents = np.random.default_rng(0).normal(size=(len(rows), len(KINDS), 8, 16, 16)).astype(np.float16)
    latents[:, 0] = np.array(rows)[:, None, None, None]  # the true picture says which one it is
    return Samples(latents, rows, items, words, 48)


def test_a_sample_leads_to_the_true_picture_whatever_it_starts_from(samples: Samples) -> None:
    for step in range(3):
        noisy, times, ids, target = samples(step)
        alpha, sigma = samples.objective.levels(times)
        clean = alpha * noisy - sigma * target  # what v says the picture is
        rows = clean.mean((1, 2, 3)) / LATENT_SCALE
        assert (clean - LATENT_SCALE * rows.round()[:, None, None, None]).abs().max() < 1e-3
        assert ids.shape == (48, LENGTH)
        # From the picture itself, the rest is unit noise; from a guide, it is not.
        left = ((noisy - alpha * clean) / sigma).square().mean((1, 2, 3))
        noisy_enough = times >= min(least for least, _ in BEGINNINGS.values())
        share = ((left - 1).abs() > 0.2)[noisy_enough].float().mean()
        assert 0.1 < share < GUIDE_SHARE + 0.2


def test_words_are_learned_at_the_noisy_levels(samples: Samples) -> None:
    times = torch.cat([samples(step)[1] for step in range(6)])
    assert times.min() >= 0 and times.max() < 1000
    assert 0.24 < (times >= 800).float().mean() < 0.31  # 1 - 0.8 ** (1 / 0.7) = 0.27


def test_what_is_wrong_with_a_guide_fades_as_a_sampler_that_knows_the_picture_goes_down(samples: Samples) -> None:
    # DDIM from time s with the true picture as its prediction, against the start that a sample at time t gets.
    alpha, sigma = (level.flatten().double() for level in samples.objective.levels(torch.tensor([901, 501])))
    true, guide, noise = 0.7, -0.4, 1.3
    noisy = alpha[0] * guide + sigma[0] * noise
    later = alpha[1] * true + sigma[1] * (noisy - alpha[0] * true) / sigma[0]
    fade = samples.noise_to_signal[501] / samples.noise_to_signal[901]
    assert alpha[1] * (true + (guide - true) * fade) + sigma[1] * noise == pytest.approx(float(later), rel=1e-5)


def test_a_step_draws_the_same_samples_again_and_another_step_others(samples: Samples) -> None:
    assert all(torch.equal(a, b) for a, b in zip(samples(5), samples(5), strict=True))
    assert not torch.equal(samples(5)[0], samples(6)[0])


def test_the_loss_counts_errors_by_noise_level(samples: Samples) -> None:
    compute, (noisy, times, ids, target) = Loss(), samples(0)
    value = compute(lambda *_: target + 1, noisy, times, ids, target)
    assert value.item() == pytest.approx(compute.objective.weights(times).mean().item(), rel=1e-5)
    assert compute.by_level() == " ".join(["1.000"] * 5)


def test_crops_are_in_range_and_repeat(disc: np.ndarray, items: list[Item]) -> None:
    crops = Crops(np.stack([disc] * len(items)), items, 8)
    sizes = set()
    for step in range(12):
        pixels, noise = crops(step)
        assert torch.equal(pixels, crops(step)[0])
        assert pixels.min() >= -1 and pixels.max() <= 1
        assert noise.shape == (len(pixels), 8, pixels.shape[2] // FACTOR, pixels.shape[3] // FACTOR)
        sizes.add(tuple(pixels.shape))
    assert sizes == {(8, 3, 128, 128), (2, 3, 256, 256)}


def test_centring_changes_the_latents_and_nothing_else(disc: np.ndarray) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(**SMALL).eval().requires_grad_(False)
    batch = to_tensor([np.random.default_rng(n).random((64, 64, 3), dtype=np.float32) for n in range(4)])
    latents = vae.encode(batch).latent_dist
    before = vae.decode(latents.mode()).sample, latents.std.clone()
    centred(vae, latents.mean.mean((0, 2, 3)), latents.mean.std((0, 2, 3)))
    after = vae.encode(batch).latent_dist
    assert after.mean.mean((0, 2, 3)) == pytest.approx(torch.zeros(8), abs=1e-4)
    assert after.mean.std((0, 2, 3)) == pytest.approx(torch.ones(8), abs=1e-4)
    assert (vae.decode(after.mode()).sample - before[0]).abs().max() < 1e-4
    assert after.std / before[1] == pytest.approx(
        (after.mean.std((0, 2, 3)) / latents.mean.std((0, 2, 3))).view(8, 1, 1).expand_as(before[1]), rel=1e-3
    )


def test_psnr_is_that_of_the_formula(disc: np.ndarray) -> None:
    class Grey:
        device = torch.device("cpu")
        config = AutoencoderKL(**SMALL).config

        def encode(self, batch: torch.Tensor) -> object:
            return type("E", (), {"latent_dist": type("D", (), {"mode": lambda _: batch})()})()

        def decode(self, batch: torch.Tensor) -> object:
            return type("D", (), {"sample": torch.zeros_like(batch)})

    blank = np.zeros((2, 256, 256, 4), np.uint8)  # nothing on white, decoded as mid-grey: half a unit off
    assert psnr(Grey(), blank, [0, 1]) == pytest.approx(-20 * np.log10(0.5), abs=1e-4)


def test_a_part_that_is_frozen_gets_no_gradient(disc: np.ndarray, items: list[Item]) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(**SMALL)
    vae.encoder.requires_grad_(False)
    loss(vae, *Crops(np.stack([disc] * len(items)), items, 2)(0)).backward()
    assert all(p.grad is None for p in vae.encoder.parameters())
    assert all(p.grad is not None for p in vae.decoder.parameters())
