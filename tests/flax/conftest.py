"""The small model in JAX, and the noise that both frameworks are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import UNET, make_folder, picture

# Compiling is most of what these tests do, and the numbers do not need fast code.
jax.config.update("jax_disable_most_optimizations", True)

STEPS, STRENGTH = 6, 0.7


# Half of what the other tests' model has, as compiling takes the longer the more layers there are.
SMALLER_UNET = dict(
    block_out_channels=(32,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
)
SMALLER_VAE = dict(
    block_out_channels=(16, 32),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("smaller") / "sd"
    return make_folder(made, unet={**UNET, **SMALLER_UNET}, vae=SMALLER_VAE)


@pytest.fixture(scope="session")
def of_torch(folder: Path) -> Any:
    from sdedit import StableDiffusionImg2ImgPipeline

    return StableDiffusionImg2ImgPipeline.from_pretrained(folder)


@pytest.fixture
def pipe(of_torch: Any) -> Any:
    """The PyTorch pipeline, with a scheduler of its own for each test."""
    from sdedit import DDIMScheduler, StableDiffusionImg2ImgPipeline

    fresh = StableDiffusionImg2ImgPipeline(**of_torch.components, requires_safety_checker=False)
    fresh.scheduler = DDIMScheduler.from_config(of_torch.scheduler.config)
    fresh.set_progress_bar_config(disable=True)
    return fresh


@pytest.fixture
def image() -> Image.Image:
    return picture(16, 12)


@pytest.fixture(scope="session")
def flax(folder: Path) -> tuple[Any, Any]:
    from sdedit import FlaxStableDiffusionImg2ImgPipeline

    return FlaxStableDiffusionImg2ImgPipeline.from_pretrained(folder)


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the PyTorch pipeline draw what JAX draws from a key."""

    def give(pipe: Any, key: Any, steps: int = STEPS, strength: float = STRENGTH) -> None:
        from sdedit.flax.schedulers import draw, laid_out, make_table

        def randn(shape: Any, generator: Any = None, **kind: Any) -> torch.Tensor:
            drawn = next(of_vae_and_latents)(tuple(shape))
            return torch.from_numpy(np.array(drawn)).to(kind.get("dtype"))

        def sample(shape: tuple[int, ...]) -> Any:  # the VAE of Flax has channels last
            batch, channels, height, width = shape
            return jax.random.normal(key, (batch, height, width, channels)).transpose(0, 3, 1, 2)

        def draw_noise(sample: torch.Tensor, generator: Any, index: int, said: Any = None) -> torch.Tensor:
            return torch.from_numpy(np.array(draw(table, index - first, key, tuple(sample.shape))))

        of_vae_and_latents = iter([sample, lambda shape: jax.random.normal(key, shape)])
        monkeypatch.setattr("sdedit.pipeline.randn", randn)
        plan = laid_out(pipe.scheduler, steps)
        first = (steps - int(steps * strength)) * plan.order
        table = make_table(plan, first)
        pipe.scheduler.draw_noise = draw_noise

    return give
