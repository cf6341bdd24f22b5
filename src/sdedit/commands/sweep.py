"""`sdedit sweep`: several strengths on one sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdedit.commands import options as o
from sdedit.commands.drawing import ready
from sdedit.commands.metadata import Settings
from sdedit.commands.options import check_output, numbers, open_guide


def sweep(
    image: o.ImageArgument,
    prompt: o.PromptArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The sheet; an animation if it ends in .gif or .webp.")
    ],
    strengths: Annotated[
        str, typer.Option(help="Comma-separated, each from 0 to 1.")
    ] = "0.2,0.4,0.5,0.6,0.7,0.8,0.9,1",
    model: o.Model = "default",
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    negative: o.Negative = "",
    scheduler: o.Scheduler = None,
    seed: o.Seed = 0,
    dtype: o.DType = "auto",
    device: o.Device = "auto",
    size: o.Size = "auto",
    exact_steps: o.ExactSteps = None,
    weighting: o.Weighting = False,
    embedding: o.Embedding = None,
    max_megapixels: o.MaxMegapixels = 100,
    debug: o.Debug = False,
) -> None:
    """Draw IMAGE at several strengths on one labelled sheet, with how far each is from it."""
    check_output(output)
    levels = numbers("--strengths", strengths)
    usual, chosen = o.suited(model), None if dtype == "auto" else dtype
    embeddings = tuple(embedding or ())
    settings = Settings(prompt, model=model, embeddings=embeddings, scheduler=scheduler, dtype=chosen)
    pipe, guide = ready(settings, open_guide(image, max_megapixels), device, size)
    import torch

    swept = pipe.sweep(
        guide,
        prompt,
        levels,
        None if seed is None else torch.Generator().manual_seed(seed),
        num_inference_steps=usual.steps if steps is None else steps,
        guidance_scale=usual.guidance if guidance is None else guidance,
        negative_prompt=negative or None,
        exact_steps=usual.exact_steps if exact_steps is None else exact_steps,
        prompt_weighting=weighting,
    )
    swept.save(output)
    for level, ran, distance in zip(swept.strengths, swept.steps, swept.distances, strict=True):
        typer.echo(f"strength {level:g}: {ran} steps, L2 {distance:.1f}")
    typer.echo(output)
