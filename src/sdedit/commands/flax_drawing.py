"""`sdedit run --backend jax`: what `sdedit.commands.drawing` does, on JAX."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdedit.commands.drawing import resized, save_all, say
from sdedit.commands.metadata import Settings, sampler_label

if TYPE_CHECKING:
    from PIL.Image import Image

_NOT_HERE = {
    "exact_steps": False,
    "extra_noise": 0.0,
    "repeats": 1,
    "weighting": False,
    "mask": None,
    "strength_map": None,
}


def ready(settings: Settings) -> tuple[Any, Any]:
    """The pipeline and its params that settings ask for; what they left open is filled in."""
    import jax.numpy as jnp

    from sdedit import __version__
    from sdedit.flax.pipeline import FlaxStableDiffusionImg2ImgPipeline
    from sdedit.flax.schedulers import make_scheduler

    if wrong := [name for name, usual in _NOT_HERE.items() if getattr(settings, name) != usual]:
        raise ValueError(f"--{wrong[0].replace('_', '-')}: not with --backend jax; leave it out, or use PyTorch")
    known = ("float32", "float16", "bfloat16")
    if settings.dtype not in (None, *known):
        raise ValueError(f"--dtype {settings.dtype}; expected auto, {', '.join(known)}")
    if Path(settings.model).is_file() or settings.model.startswith("https://"):
        raise ValueError(f"--model {settings.model}: --backend jax reads model folders and hub ids, no single files")
    settings.dtype = settings.dtype or "float32"
    pipe, params = FlaxStableDiffusionImg2ImgPipeline.from_pretrained(
        None if settings.model == "default" else settings.model, dtype=jnp.dtype(settings.dtype)
    )
    if settings.embeddings:
        params, reports = pipe.load_textual_inversion(params, list(settings.embeddings))
        for report in reports:
            say(f"embedding {report}")
    if settings.scheduler not in (None, "own"):
        pipe.scheduler = make_scheduler(str(settings.scheduler), pipe.scheduler.config)
    for file, weight in settings.lora:
        params, found = pipe.load_lora_weights(params, file, scale=weight)
        say(str(found))
    settings.scheduler = settings.scheduler or "own"
    settings.sampler, settings.schedule_type = sampler_label(pipe.scheduler)
    settings.version = f"sdedit {__version__}"
    return pipe, params


def draw(settings: Settings, guide: Image, output: Path, *, count: int, device: str, size: str) -> None:
    """Draw `count` pictures and write them, each with its seed and settings."""
    if device != "auto":
        raise ValueError(f"--device {device}: JAX chooses its device (JAX_PLATFORMS=cpu, cuda or tpu); expected auto")
    pipe, params = ready(settings)
    settings.framed = settings.framed or (size == "auto" and settings.model == "default")
    guide = resized(guide, size, pipe, settings.framed)
    settings.size = guide.size
    prompt_ids, image = pipe.prepare_inputs(settings.prompt, guide)
    seeds = [settings.seed + i for i in range(count)]
    started = time.perf_counter()
    pictures = []
    for seed in seeds:
        drawn = pipe(
            prompt_ids,
            image,
            params,
            seed,
            strength=settings.strength,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            neg_prompt_ids=pipe.prepare_text_inputs(settings.negative),
        )
        pictures += pipe.numpy_to_pil(drawn.images)
    save_all(pictures, seeds, settings, output)
    say(settings.to_text().splitlines()[-1])
    say(f"{time.perf_counter() - started:.1f} s")
