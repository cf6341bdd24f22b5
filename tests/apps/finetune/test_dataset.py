"""What the network learns from: latents and guides."""

from __future__ import annotations

import torch

from conftest import picture
from sdedit.apps.finetune.dataset import encode_pictures, guide
from sdedit.apps.folders import fitted, read_folder
from sdedit.inputs.images import read_images
from sdedit.inputs.pixels import open_image


def test_latents_are_what_the_vae_says(pipe, pictures):
    examples = read_folder(pictures)
    latents = encode_pictures(pipe.vae, examples, 64, flip=True, guides=2, seed=1)
    assert latents.mean.shape == (3, 2, 3, 4, 8, 8)
    for n, example in enumerate(examples):
        pixels = fitted(read_images(open_image(example.path), 4).pixels, 64)
        for version, seen in enumerate((pixels, pixels.flip(-1))):
            with torch.no_grad():
                says = pipe.vae.encode(seen).latent_dist
            factor = pipe.vae.config.scaling_factor
            torch.testing.assert_close(latents.mean[n, version, 0], says.mean[0] * factor, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(latents.std[n, version, 0], says.std[0] * factor, atol=1e-5, rtol=1e-4)
    at = [torch.full((400,), n) for n in (1, 0, 2)]
    drawn = latents.draw(*at, torch.Generator().manual_seed(0))
    error = (drawn.mean(0) - latents.mean[1, 0, 2]) / latents.std[1, 0, 2] * 20  # normal with deviation 1
    assert error.abs().max() < 5
    assert (drawn.std(0) / latents.std[1, 0, 2] - 1).abs().max() < 0.2
    unguided = encode_pictures(pipe.vae, examples, 64, flip=True)
    torch.testing.assert_close(unguided.mean[:, :, 0], latents.mean[:, :, 0], atol=1e-5, rtol=1e-4)


def test_guides_keep_white_and_range_and_change_the_rest():
    changes = []
    for seed in range(100):
        pixels = read_images(picture(40, 33, seed=seed), 4).pixels
        pixels[..., :20] = 1
        seen = guide(pixels, torch.Generator().manual_seed(seed))
        assert seen.shape == pixels.shape and seen.abs().max() <= 1
        torch.testing.assert_close(seen[..., :14], torch.ones_like(seen[..., :14]))
        changes.append((seen - pixels).abs().mean().item())
    assert sum(change > 0.01 for change in changes) > 90  # now and then it is drawn to be nearly the picture
