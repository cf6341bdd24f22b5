"""Masked img2img gives the latents of diffusers' inpainting pipeline with an ordinary UNet, where it means the same.

It means the same below strength 1, for masks whose edges are edges of latents, by solvers that do not evaluate between
two levels. Beyond that we differ on purpose:

- at strength 1 theirs starts from noise alone, ours from the image noised to the last level, as img2img does;
- a latent of which the mask covers a part may change in ours; theirs asks for the pixel in its middle;
- a midpoint's source is noised to the midpoint's level, in theirs to that of the step's end;
- theirs decodes what stays through the VAE, ours puts the input's pixels back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import sdedit
from conftest import SCHEDULE, picture

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

IMAGE = picture(64, 48, 1)
MASK = np.zeros((48, 64), dtype=np.float32)
MASK[8:32, 16:56] = 1
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "PNDMScheduler": dict(skip_prk_steps=True),
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": dict(timestep_spacing="trailing"),
    "LMSDiscreteScheduler": dict(use_karras_sigmas=True),
    "HeunDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": dict(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True),
    "DPMSolverSinglestepScheduler": {},
    "DEISMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "LCMScheduler": {},
}


@pytest.fixture(scope="module")
def both(folder: Path) -> Any:
    theirs = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder, safety_checker=None)
    ours = sdedit.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    return theirs, ours


def run(pipe: Any, scheduler: str = "DDIMScheduler", **arguments: Any) -> np.ndarray:
    library = sdedit if isinstance(pipe, sdedit.StableDiffusionImg2ImgPipeline) else diffusers
    pipe.scheduler = getattr(library, scheduler).from_config(SCHEDULE | SCHEDULERS[scheduler])
    common = dict(prompt="an apple", image=IMAGE, mask_image=MASK, num_inference_steps=7, strength=0.75)
    common |= dict(output_type="latent", generator=torch.Generator().manual_seed(7))
    if library is diffusers:
        # Theirs would draw from the generator for latents that only inpainting models read.
        common |= dict(height=48, width=64, masked_image_latents=torch.zeros(1, 4, 6, 8))
    return np.asarray(pipe(**common | arguments).images)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_latents_are_those_of_the_inpainting_pipeline(both: Any, scheduler: str) -> None:
    theirs, ours = (run(pipe, scheduler) for pipe in both)
    assert np.abs(ours - theirs).max() < 1e-4 * max(1, np.abs(theirs).max())
    plain = run(both[1], scheduler, mask_image=None)
    assert np.abs(ours - plain).max() > 1e-2  # and the mask matters


def test_what_stays_is_exact_here_alone(both: Any) -> None:
    source = np.asarray(IMAGE, dtype=np.float32) / 255
    theirs, ours = (run(pipe, output_type="np")[0] for pipe in both)
    stays = MASK == 0
    assert np.array_equal(ours[stays], source[stays])
    assert np.abs(theirs - source)[stays].mean() > 0.01
