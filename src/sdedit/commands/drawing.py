"""Drawing, as the commands do it: the model with its adapters on PyTorch or JAX, the input at its size, the files."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sdedit.commands.metadata import sampler_label, to_text
from sdedit.commands.options import Place, check_ranges
from sdedit.commands.saving import check_output, check_size, save_all, say
from sdedit.commands.settings import PictureSettings

if TYPE_CHECKING:
    from PIL.Image import Image

_DTYPES = ("float32", "float16", "bfloat16")


def check(settings: PictureSettings, place: Place, output: Path | None = None, count: int = 1) -> None:
    """The door: what was asked for, before a file is opened or a model loaded.

    Raises:
        ValueError, FileNotFoundError: Something cannot be; the message names the option.
    """
    from sdedit.schedulers.names import named

    if output is not None:
        check_output(output, count=count)
    check_ranges(settings)
    asked_size(place)
    if settings.scheduler not in (None, "own"):
        named(settings.scheduler, "--scheduler")
    if settings.dtype not in (None, *_DTYPES):
        raise ValueError(f"--dtype {settings.dtype}; expected auto, {', '.join(_DTYPES)}")
    if settings.backend not in BACKENDS:
        raise ValueError(f"--backend {settings.backend}; expected {' or '.join(BACKENDS)}")
    for name in settings.embeddings:
        if not Path(name).exists() and name.count("/") != 1:  # a hub id has one
            raise FileNotFoundError(f"--embedding {name} does not exist")
    if settings.seed is not None and settings.seed + count > 2**64:
        raise ValueError(f"--seed {settings.seed} with --count {count}; expected seeds below 2^64")


def make_pictures(settings: PictureSettings, guide: Image, output: Path, count: int, place: Place) -> None:
    """Draw `count` pictures and write them, each with its seed and settings."""
    masks = read_masks(settings, guide)
    backend, guide = ready(settings, guide, place)
    check_size(guide.size, output)
    assert settings.seed is not None
    seeds = [settings.seed + i for i in range(count)]
    started = time.perf_counter()
    pictures, done = backend.draw(settings, guide, masks, seeds)
    seconds = time.perf_counter() - started
    save_all(pictures, seeds, settings, output)
    say(to_text(settings.relative_to(output.absolute().parent)).splitlines()[-1])
    say(f"{done}{seconds:.1f} s")


def open_guide(image: str | Path | None, place: Place) -> Image:
    """The input image: upright, RGB or RGBA, in the colours of its profile if it has one; `-` is the standard input."""
    from sdedit.inputs.pixels import open_image, rgb

    if image is None:
        raise ValueError("no input image; expected its path")
    return rgb(open_image(image, place.max_pixels, keep_profile=True), keep_profile=True)


def read_masks(settings: PictureSettings, guide: Image) -> dict[str, Any]:
    """Mask and strength map of the settings, by the pipeline's names, at the size of the input image."""
    options = {"mask_image": ("--mask", settings.mask), "strength_map": ("--strength-map", settings.strength_map)}
    given = {name: (option, file) for name, (option, file) in options.items() if file is not None}
    if not given:
        return {}
    from sdedit.inputs.masks import read_mask
    from sdedit.inputs.pixels import open_image

    return {name: read_mask(option, open_image(file), guide.size) for name, (option, file) in given.items()}


def ready(settings: PictureSettings, guide: Image, place: Place) -> tuple[Backend, Image]:
    """The model and the input image that settings ask for; what they left open is filled in."""
    settings.suit()
    backend = BACKENDS[settings.backend](settings, place.device)
    masked = settings.mask or settings.strength_map  # then what stays shall stay where it is
    settings.framed = settings.framed or (place.size == "auto" and settings.model == "default" and not masked)
    guide = resized(guide, asked_size(place), backend.pipe, settings.framed)
    settings.size = guide.size
    return backend, guide


class Backend(Protocol):
    """A framework with a model loaded as settings ask for; it fills in what they left open of the model.

    Attributes:
        pipe: The pipeline.
    """

    pipe: Any

    def __init__(self, settings: PictureSettings, device: str) -> None: ...

    def draw(
        self, settings: PictureSettings, guide: Image, masks: dict[str, Any], seeds: Sequence[int]
    ) -> tuple[list[Image], str]:
        """A picture for each seed, and a few words on what was done."""
        ...


class Torch:
    """PyTorch: see `Backend`."""

    def __init__(self, settings: PictureSettings, device: str) -> None:
        from sdedit.schedulers.names import make_scheduler

        where, dtype = device_and_dtype(device, settings.dtype)
        adapted = bool(settings.embeddings or settings.lora)
        self.pipe = pipe = load_model(settings.model, dtype, adapted=adapted).to(where)
        for report in pipe.load_textual_inversion(settings.embeddings) if settings.embeddings else ():
            say(f"embedding {report}")
        if settings.scheduler not in (None, "own"):
            pipe.scheduler = make_scheduler(str(settings.scheduler), pipe.scheduler.config)
        names = [f"lora_{i}" for i in range(len(settings.lora))]
        for name, lora in zip(names, settings.lora, strict=True):
            say(str(pipe.load_lora_weights(lora.name, adapter_name=name)))
        if names:
            pipe.set_adapters(names, [lora.weight for lora in settings.lora])
        settings.dtype = str(dtype).removeprefix("torch.")
        _sign(settings, pipe.scheduler)

    def arguments(self, settings: PictureSettings) -> dict[str, Any]:
        """What a call of the pipeline gets, but for strength, noise and masks."""
        return {
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance,
            "negative_prompt": settings.negative or None,
            "exact_steps": settings.exact_steps,
            "extra_noise": settings.extra_noise,
            "repeats": settings.repeats,
            "prompt_weighting": settings.weighting,
            "clip_skip": settings.clip_skip or None,
        }

    def draw(
        self, settings: PictureSettings, guide: Image, masks: dict[str, Any], seeds: Sequence[int]
    ) -> tuple[list[Image], str]:
        """See `Backend`."""
        import torch

        if masks:
            from sdedit.inputs.masks import resized_mask

            masks = {name: resized_mask(mask, guide.size) for name, mask in masks.items()}
        drawn = self.pipe(
            settings.prompt,
            guide,
            strength=settings.strength,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            mask_feather=settings.feather,
            **self.arguments(settings),
            **masks,
        )
        times = f"{settings.repeats} times " if settings.repeats > 1 else ""
        return drawn.images, f"{times}{drawn.steps[0]} steps from noise level {drawn.start_sigmas[0]:.3g} (σ/α), "


class Jax:
    """JAX: see `Backend`; the networks' weights are `params`, beside the pipeline."""

    pipe: Any
    _not_here = ("exact_steps", "extra_noise", "repeats", "weighting", "clip_skip", "mask", "strength_map")

    def __init__(self, settings: PictureSettings, device: str) -> None:
        usual = PictureSettings()
        if wrong := [name for name in self._not_here if getattr(settings, name) != getattr(usual, name)]:
            raise ValueError(f"--{wrong[0].replace('_', '-')}: not with --backend jax; leave it out, or use PyTorch")
        if device != "auto":
            raise ValueError(f"--device {device}: JAX chooses it (JAX_PLATFORMS=cpu, cuda or tpu); expected auto")
        if Path(settings.model).is_file() or settings.model.startswith("https://"):
            raise ValueError(f"--model {settings.model}: --backend jax reads folders and hub ids, no single files")
        import jax.numpy as jnp

        from sdedit.flax.pipeline import FlaxStableDiffusionImg2ImgPipeline
        from sdedit.flax.schedulers import make_scheduler

        settings.dtype = settings.dtype or "float32"
        pipe: Any
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
        self.pipe, self.params = pipe, params
        _sign(settings, pipe.scheduler)

    def draw(
        self, settings: PictureSettings, guide: Image, masks: dict[str, Any], seeds: Sequence[int]
    ) -> tuple[list[Image], str]:
        """See `Backend`."""
        pipe = self.pipe
        prompt_ids, image = pipe.prepare_inputs(settings.prompt, guide)
        pictures = []
        for seed in seeds:
            drawn = pipe(
                prompt_ids,
                image,
                self.params,
                seed,
                strength=settings.strength,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                neg_prompt_ids=pipe.prepare_text_inputs(settings.negative),
            )
            pictures += pipe.numpy_to_pil(drawn.images)
        return pictures, ""


BACKENDS: dict[str, type[Backend]] = {"torch": Torch, "jax": Jax}


def _sign(settings: PictureSettings, scheduler: Any) -> None:
    """Fill in the scheduler's names and the version."""
    from sdedit import __version__

    settings.scheduler = settings.scheduler or "own"
    settings.sampler, settings.schedule_type = sampler_label(scheduler)
    settings.version = f"sdedit {__version__}"


def load_model(model: str, dtype: Any, *, adapted: bool = False) -> Any:
    """The pipeline of `--model`; one that is not to be `adapted` reads prompts without transformers where it can."""
    from sdedit.loading.folders import DEFAULT_MODEL
    from sdedit.pipeline import StableDiffusionImg2ImgPipeline

    if Path(model).is_file() or model.startswith("https://"):
        return StableDiffusionImg2ImgPipeline.from_single_file(model, torch_dtype=dtype)
    folder = DEFAULT_MODEL if model == "default" else Path(model)
    parts = {}
    if folder.is_dir() and not adapted:
        from sdedit.loading.pretrained import quick_parts

        parts = quick_parts(folder, dtype)
    return StableDiffusionImg2ImgPipeline.from_pretrained(
        None if model == "default" else model, torch_dtype=dtype, **parts
    )


def device_and_dtype(device: str, dtype: str | None) -> tuple[Any, Any]:
    """Device and dtype; where none is named, the fastest at hand that draws the same picture up to rounding."""
    import torch

    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here ({reason}); expected auto, cpu, cuda or mps") from None
    if dtype is None:
        return where, torch.float32 if where.type == "cpu" else torch.float16
    return where, getattr(torch, dtype)


def asked_size(place: Place) -> tuple[int, int] | str:
    """`--size` as (width, height), or the word."""
    if place.size in ("auto", "original"):
        return place.size
    try:
        width, height = map(int, place.size.lower().split("x"))
    except ValueError:
        raise ValueError(f"--size {place.size}; expected WIDTHxHEIGHT such as 512x512, original or auto") from None
    if min(width, height) < 8:
        raise ValueError(f"--size {place.size}; expected at least 8 on each side")
    if width * height > (place.max_pixels or math.inf):
        raise ValueError(
            f"--size {place.size}; expected at most {place.max_megapixels:g} megapixels, or more --max-megapixels"
        )
    return width, height


def resized(image: Image, size: tuple[int, int] | str, pipe: Any, frame: bool = False) -> Image:
    """The image at the size that was asked for; models draw badly far from the area that they were trained at.

    With `frame`, the drawing is first brought to the middle of a sheet that it fills: small models know such sheets.
    """
    from PIL import Image as PIL

    from sdedit.apps.framing import framed

    if frame and (sheet := framed(image)) is not image:
        say(f"the drawing is brought to the middle of a sheet of {sheet.width}×{sheet.height} (--size original: not)")
        image = sheet
    if size == "original":
        return image
    if size == "auto":
        factor, own = pipe.vae_scale_factor, pipe.unet.config.sample_size
        native = own * factor if isinstance(own, int) else image.width
        scale = native / (image.width * image.height) ** 0.5
        if 0.6 <= scale <= 1.5 and not frame:
            return image
        target = tuple(max(round(side * scale / factor), 1) * factor for side in image.size)
        say(
            f"{image.width}×{image.height} → {target[0]}×{target[1]}, near the size that this model draws "
            "(--size original keeps it)"
        )
    else:
        assert isinstance(size, tuple)
        target = size
    return image.resize(target, PIL.Resampling.LANCZOS)
