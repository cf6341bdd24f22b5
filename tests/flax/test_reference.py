"""Pictures of diffusers 0.34.0, the last release with Flax, from the same params and seed: see flax_reference.py."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import flax_reference as reference
import sdedit
from sdedit.flax import convert
from sdedit.flax import pipeline as module

with np.load(reference.FILE) as file:
    PICTURES = dict(file)


@pytest.mark.parametrize("name", reference.SCHEDULERS)
def test_pictures_are_those_of_diffusers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    networks: dict[str, Any] = {
        "unet": sdedit.FlaxUNet2DConditionModel(**reference.UNET),
        "vae": sdedit.FlaxAutoencoderKL(**reference.VAE),
        "text_encoder": sdedit.FlaxCLIPTextModel(**reference.TEXT),
    }
    params = {
        part: convert.unflatten({path: reference.numbers(path, shape) for path, shape in network.shapes().items()})
        for part, network in networks.items()
    }
    # diffusers' DPM-Solver in Flax always ended at the lowest level of noise, as its PyTorch one does with this option.
    options = {"final_sigmas_type": "sigma_min"} if name.startswith("DPM") else {}
    scheduler = getattr(sdedit, f"Flax{name}")(**reference.SCHEDULERS[name], **options)
    pipe = sdedit.FlaxStableDiffusionImg2ImgPipeline(**networks, tokenizer=None, scheduler=scheduler)
    if name == "PNDMScheduler":
        # PNDM evaluates once more than there are steps. diffusers' loop stops at the number of steps, and so leaves out
        # the last evaluation, which its PyTorch pipeline makes.
        whole = module.make_table
        monkeypatch.setattr(module, "make_table", lambda *a, **o: (t := whole(*a, **o))._replace(count=t.count - 1))
    ids, negative, pixels = reference.inputs()
    with jax.threefry_partitionable(False):  # what a key draws changed in JAX 0.5
        images = pipe(
            ids, pixels, params, jax.random.PRNGKey(reference.SEED), neg_prompt_ids=negative, **reference.SETTINGS
        ).images
    np.testing.assert_allclose(images, PICTURES[name], atol=3e-4)
