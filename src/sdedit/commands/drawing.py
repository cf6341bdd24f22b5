"""What the commands that draw have in common: device and dtype, the model with its adapters, the size, the files."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sdedit.commands.metadata import Settings, sampler_label, save_picture

if TYPE_CHECKING:
    from PIL.Image import Image


def say(text: str) -> None:
    """Tell the user what is not the command's result."""
    typer.echo(text, err=True)


def ready(settings: Settings, guide: Image, device: str, size: str) -> tuple[Any, Image]:
    """The pipeline and the input image that settings ask for; what they left open is filled in."""
    pipe = ready_pipe(settings, device)
    masked = settings.mask or settings.strength_map  # then what stays shall stay where it is
    settings.framed = settings.framed or (size == "auto" and settings.model == "default" and not masked)
    guide = resized(guide, size, pipe, settings.framed)
    settings.size = guide.size
    return pipe, guide


def ready_pipe(settings: Settings, device: str) -> Any:
    """The pipeline that settings ask for; what they left open is filled in."""
    from sdedit import __version__
    from sdedit.schedulers.names import SCHEDULERS, make_scheduler

    own = settings.scheduler in (None, "own")
    if not own and settings.scheduler not in SCHEDULERS:
        raise ValueError(f"--scheduler {settings.scheduler}; expected one of {', '.join(SCHEDULERS)}")
    for name in settings.embeddings:
        if not Path(name).exists() and name.count("/") != 1:  # a hub id has one
            raise FileNotFoundError(f"--embedding {name} does not exist")
    where, dtype = place(device, settings.dtype)
    pipe = load_model(settings.model, dtype, adapted=bool(settings.embeddings or settings.lora)).to(where)
    for report in pipe.load_textual_inversion(settings.embeddings) if settings.embeddings else ():
        say(f"embedding {report}")
    if not own:
        pipe.scheduler = make_scheduler(str(settings.scheduler), pipe.scheduler.config)
    load_adapters(pipe, settings)
    settings.dtype = str(dtype).removeprefix("torch.")
    settings.scheduler = settings.scheduler or "own"
    settings.sampler, settings.schedule_type = sampler_label(pipe.scheduler)
    settings.version = f"sdedit {__version__}"
    return pipe


def draw(settings: Settings, guide: Image, output: Path, *, count: int, device: str, size: str) -> None:
    """Draw `count` pictures and write them, each with its seed and settings."""
    if settings.backend == "jax":
        from sdedit.commands import flax_drawing as of_jax

        return of_jax.draw(settings, guide, output, count=count, device=device, size=size)
    if settings.backend != "torch":
        raise ValueError(f"--backend {settings.backend}; expected torch or jax")
    masks = read_masks(settings, guide)
    pipe, guide = ready(settings, guide, device, size)

    import torch

    from sdedit.inputs.masks import resized_mask

    seeds = [settings.seed + i for i in range(count)]
    started = time.perf_counter()
    drawn = pipe(
        settings.prompt,
        guide,
        strength=settings.strength,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        negative_prompt=settings.negative or None,
        num_images_per_prompt=count,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        exact_steps=settings.exact_steps,
        extra_noise=settings.extra_noise,
        repeats=settings.repeats,
        prompt_weighting=settings.weighting,
        mask_feather=settings.feather,
        **{name: resized_mask(mask, guide.size) for name, mask in masks.items()},
    )
    seconds = time.perf_counter() - started
    save_all(drawn.images, seeds, settings, output)
    say(settings.to_text().splitlines()[-1])
    times = f"{settings.repeats} times " if settings.repeats > 1 else ""
    say(f"{times}{drawn.steps[0]} steps from noise level {drawn.start_sigmas[0]:.3g} (σ/α), {seconds:.1f} s")


def read_masks(settings: Settings, guide: Image) -> dict[str, Any]:
    """Mask and strength map of the settings, by the pipeline's names, at the size of the input image."""
    from PIL import ImageOps

    from sdedit.inputs.masks import read_mask
    from sdedit.inputs.pixels import open_image

    size = ImageOps.exif_transpose(guide).size
    options = {"mask_image": ("--mask", settings.mask), "strength_map": ("--strength-map", settings.strength_map)}
    return {
        name: read_mask(option, open_image(file), size) for name, (option, file) in options.items() if file is not None
    }


def save_all(pictures: Sequence[Image], seeds: Sequence[int], settings: Settings, output: Path) -> None:
    """Write pictures, each with its seed and settings, in which paths become relative to the pictures' folder."""
    folder = output.absolute().parent
    settings.image = os.path.relpath(settings.image or "", folder)
    settings.mask = settings.mask and os.path.relpath(settings.mask, folder)
    settings.strength_map = settings.strength_map and os.path.relpath(settings.strength_map, folder)
    if settings.model != "default" and Path(settings.model).exists():
        settings.model = os.path.relpath(settings.model, folder)
    settings.embeddings = tuple(os.path.relpath(e, folder) if Path(e).exists() else e for e in settings.embeddings)
    settings.lora = [(os.path.relpath(name, folder) if Path(name).exists() else name, w) for name, w in settings.lora]
    for i, (picture, seed) in enumerate(zip(pictures, seeds, strict=True)):
        path = output if len(pictures) == 1 else output.with_stem(f"{output.stem}-{i + 1}")
        settings.seed = seed
        save_picture(picture, path, settings)
        typer.echo(f"{path}  ({picture.width}×{picture.height}, seed {seed})")


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


def load_adapters(pipe: Any, settings: Settings) -> None:
    """Load the LoRAs of the settings, with their weights, and say what each load reports."""
    names = [f"lora_{i}" for i in range(len(settings.lora))]
    for name, (file, _) in zip(names, settings.lora, strict=True):
        say(str(pipe.load_lora_weights(file, adapter_name=name)))
    if names:
        pipe.set_adapters(names, [weight for _, weight in settings.lora])


def place(device: str, dtype: str | None) -> tuple[Any, Any]:
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
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype is None:
        return where, torch.float32 if where.type == "cpu" else torch.float16
    if dtype not in known:
        raise ValueError(f"--dtype {dtype}; expected auto, {', '.join(known)}")
    return where, known[dtype]


def resized(image: Image, size: str, pipe: Any, frame: bool = False) -> Image:
    """The image at the size that `--size` asks for; models draw badly far from the area that they were trained at.

    With `frame`, the drawing is first brought to the middle of a sheet that it fills: small models know such sheets.
    """
    from PIL import Image as PIL
    from PIL import ImageOps

    from sdedit.apps.framing import framed

    image = ImageOps.exif_transpose(image)
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
        try:
            width, height = size.lower().split("x")
            target = (int(width), int(height))
        except ValueError:
            raise ValueError(f"--size {size}; expected WIDTHxHEIGHT such as 512x512, original or auto") from None
        if min(target) < 8:
            raise ValueError(f"--size {size}; expected at least 8 on each side")
    if image.mode in ("1", "P"):  # these cannot be interpolated
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    return image.resize(target, PIL.Resampling.LANCZOS)
