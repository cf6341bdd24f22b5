"""`sdedit search`: the strength that is just faithful enough."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdedit.commands import options as o
from sdedit.commands.drawing import ready, save_all, say
from sdedit.commands.metadata import Settings, hash_file
from sdedit.commands.options import check_output, open_guide
from sdedit.files import write_atomically

if TYPE_CHECKING:
    from sdedit.apps.sweep import Sweep


def search(
    image: o.ImageArgument,
    prompt: o.PromptArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the picture goes.")],
    faithful: Annotated[float, typer.Option(help="How like IMAGE it must stay: 1 is the same.")] = 0.9,
    measure: Annotated[
        str, typer.Option(help="Of likeness: l2 (1 minus the root mean square difference) or ssim (same structure).")
    ] = "l2",
    ask: Annotated[bool, typer.Option("--ask", help="Show candidates on a sheet and ask which is best.")] = False,
    candidates: Annotated[int, typer.Option(help="Pictures drawn at once in each round.")] = 4,
    tolerance: Annotated[float, typer.Option(help="Of strength, at which the search ends.")] = 0.01,
    model: o.Model = "default",
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    negative: o.Negative = "",
    scheduler: o.Scheduler = None,
    seed: o.Seed = None,
    dtype: o.DType = "auto",
    device: o.Device = "auto",
    size: o.Size = "auto",
    max_megapixels: o.MaxMegapixels = 100,
    debug: o.Debug = False,
) -> None:
    """Find the strength at which a picture of PROMPT is as real as can be and still faithful to IMAGE."""
    check_output(output)
    usual = o.suited(model)
    settings = Settings(
        prompt,
        image=str(image),
        negative=negative,
        steps=usual.steps if steps is None else steps,
        guidance=usual.guidance if guidance is None else guidance,
        seed=int.from_bytes(os.urandom(4), "big") if seed is None else seed,
        model=model,
        scheduler=scheduler,
        dtype=None if dtype == "auto" else dtype,
        exact_steps=True,
    )
    pipe, guide = ready(settings, open_guide(image, max_megapixels), device, size)
    settings.image_hash = hash_file(image)
    import torch

    found = pipe.search(
        guide,
        prompt,
        faithful,
        measure=measure,
        choose=(lambda shown, last: _ask(shown, last, output.with_stem(f"{output.stem}-sheet"))) if ask else None,
        candidates=candidates,
        tolerance=tolerance,
        generator=torch.Generator().manual_seed(settings.seed),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        negative_prompt=negative or None,
    )
    settings.strength = found.strength
    save_all([found.image], [settings.seed], settings, output)
    typer.echo(f"strength {found.strength:.3f}: {found.faithfulness:.3f} faithful by {measure}")
    say(f"{found.unet_calls} UNet calls for {len(found.drawn.images)} candidates")


def _ask(shown: Sweep, last: int | None, sheet: Path) -> int | None:
    """Write the candidates on a sheet and ask for the number of the best; 0 keeps the one before."""
    from sdedit.apps.sheets import contact_sheet

    labels = [f"{i + 1}: strength {s:.3g}" for i, s in enumerate(shown.strengths)]
    with write_atomically(sheet) as temporary:
        contact_sheet([one.convert("RGB") for one in shown.images], labels).save(temporary)
    say(f"{len(labels)} candidates are on {sheet}")
    question, least = f"Which is best, 1 to {len(labels)}", 1
    if last is not None:
        question, least = f"{question} (0: number {last + 1}, chosen before, will do)", 0
    while True:
        answer: int = typer.prompt(question, type=int, err=True)
        if least <= answer <= len(labels):
            return answer - 1 if answer else None
        say(f"{answer}; expected {least} to {len(labels)}")
