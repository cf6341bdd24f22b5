"""`sdedit run` makes a picture, `sdedit again` makes it anew from the settings in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sdedit.commands import options as o
from sdedit.commands.drawing import draw, say
from sdedit.commands.metadata import Settings, hash_file, read_settings, scheduler_from_label
from sdedit.commands.options import beside, check_output, open_guide, with_weight


def run(
    image: o.ImageArgument,
    prompt: o.PromptArgument,
    output: o.Out,
    model: o.Model = "default",
    strength: o.Strength = None,
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    negative: o.Negative = "",
    scheduler: o.Scheduler = None,
    lora: o.Lora = None,
    seed: o.Seed = None,
    count: o.Count = 1,
    dtype: o.DType = "auto",
    backend: o.Backend = "torch",
    device: o.Device = "auto",
    size: o.Size = "auto",
    exact_steps: o.ExactSteps = None,
    extra_noise: Annotated[float, typer.Option(help="More noise than strength asks for, against blur: 0 to 1.")] = 0.0,
    repeats: o.Repeats = 1,
    mask: o.Mask = None,
    feather: o.Feather = 4,
    strength_map: o.StrengthMap = None,
    weighting: o.Weighting = False,
    embedding: o.Embedding = None,
    max_megapixels: o.MaxMegapixels = 100,
    debug: o.Debug = False,
) -> None:
    """Turn IMAGE into a picture of PROMPT."""
    if count < 1:
        raise ValueError(f"--count {count}; expected at least 1")
    check_output(output)
    usual = o.suited(model, backend)
    settings = Settings(
        prompt,
        image=str(image),
        negative=negative,
        steps=usual.steps if steps is None else steps,
        guidance=usual.guidance if guidance is None else guidance,
        seed=int.from_bytes(os.urandom(4), "big") if seed is None else seed,
        model=model,
        strength=strength if strength is not None else 1.0 if strength_map else usual.strength,
        scheduler=scheduler,
        lora=[with_weight(text) for text in lora or ()],
        dtype=None if dtype == "auto" else dtype,
        exact_steps=usual.exact_steps if exact_steps is None else exact_steps,
        extra_noise=extra_noise,
        repeats=repeats,
        mask=None if mask is None else str(mask),
        feather=feather,
        strength_map=None if strength_map is None else str(strength_map),
        weighting=weighting,
        backend=backend,
        embeddings=tuple(embedding or ()),
    )
    guide = open_guide(image, max_megapixels)
    settings.image_hash = hash_file(image)
    settings.mask_hash, settings.strength_map_hash = (None if f is None else hash_file(f) for f in (mask, strength_map))
    draw(settings, guide, output, count=count, device=device, size=size)


def again(
    picture: Annotated[Path, typer.Argument(help="A PNG that sdedit wrote.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where the picture goes; PICTURE-again.png if not given.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="The input image, if it is no longer where it was.")] = None,
    model: Annotated[str | None, typer.Option(help="The model, if it is no longer where it was.")] = None,
    device: o.Device = "auto",
    max_megapixels: o.MaxMegapixels = 100,
    debug: o.Debug = False,
) -> None:
    """Read the settings of PICTURE and make the same picture again."""
    settings = read_settings(picture)
    if image is None:
        if settings.image is None:
            raise ValueError(f"{picture} does not say which image it was made from: give it with --image")
        image = beside(picture, settings.image)
    guide = open_guide(image, max_megapixels)
    if settings.image_hash not in (None, hash_file(image)):
        say(f"warning: {image} is not the file that {picture} was made from (its hash differs)")
    settings.image, settings.image_hash = str(image), hash_file(image)
    for name in ("mask", "strength_map"):
        if (kept := getattr(settings, name)) is not None:
            setattr(settings, name, str(path := beside(picture, kept)))
            if path.is_file() and getattr(settings, f"{name}_hash") not in (None, hash_file(path)):
                say(f"warning: {path} is not the file that {picture} was made with (its hash differs)")
    if model is None and settings.model != "default" and beside(picture, settings.model).exists():
        model = str(beside(picture, settings.model))
    settings.model = model or settings.model
    paths = {name: beside(picture, name) for name in settings.embeddings}
    settings.embeddings = tuple(str(path) if path.exists() else name for name, path in paths.items())
    settings.lora = [(str(p) if (p := beside(picture, name)).exists() else name, w) for name, w in settings.lora]
    if settings.scheduler is None and settings.sampler is not None:
        settings.scheduler = scheduler_from_label(settings.sampler, settings.schedule_type)
    size = f"{settings.size[0]}x{settings.size[1]}" if settings.size else "auto"
    target = output or picture.with_name(f"{picture.stem}-again{picture.suffix}")
    draw(settings, guide, target, count=1, device=device, size=size)
