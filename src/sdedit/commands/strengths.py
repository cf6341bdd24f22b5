"""`sdedit sweep` draws several strengths on one sheet, `sdedit search` finds the one that is just faithful enough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdedit.commands.drawing import Torch, check, open_guide, ready
from sdedit.commands.options import Place, command, numbers
from sdedit.commands.saving import check_output, check_size, save_all, save_picture, say, surely, tell
from sdedit.commands.settings import PictureSettings

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdedit.apps.sweep import Sweep

_NOT_HERE = ("strength", "backend", "mask", "feather", "strength_map")


@command(without=_NOT_HERE)
def sweep(
    settings: PictureSettings,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The sheet; an animation if it ends in .gif or .webp.")
    ],
    place: Place,
    strengths: Annotated[
        str, typer.Option(help="Comma-separated, each from 0 to 1.")
    ] = "0.2,0.4,0.5,0.6,0.7,0.8,0.9,1",
) -> None:
    """Draw IMAGE at several strengths on one labelled sheet, with how far each is from it."""
    check(settings, place, output)
    levels = numbers("--strengths", strengths)
    pipe, guide, noise, arguments = _ready(settings, output, place)
    swept = pipe.sweep(guide, settings.prompt, levels, noise, **arguments)
    saved, problem = surely(swept.save, output)
    for level, ran, distance in zip(swept.strengths, swept.steps, swept.distances, strict=True):
        tell(f"strength {level:g}: {ran} steps, L2 {distance:.1f}")
    tell(saved)
    say(f"seed {settings.seed}")
    if problem:
        raise OSError(problem)


@command(without=(*_NOT_HERE, "exact_steps"))
def search(
    settings: PictureSettings,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the picture goes.")],
    place: Place,
    faithful: Annotated[float, typer.Option(min=0, max=1, help="How like IMAGE it must stay: 1 is the same.")] = 0.9,
    measure: Annotated[
        str, typer.Option(help="Of likeness: l2 (1 minus the root mean square difference) or ssim (same structure).")
    ] = "l2",
    ask: Annotated[bool, typer.Option("--ask", help="Show candidates on a sheet and ask which is best.")] = False,
    candidates: Annotated[int, typer.Option(min=1, max=1000, help="Pictures drawn at once in each round.")] = 4,
    tolerance: Annotated[float, typer.Option(min=1e-6, max=0.99, help="Of strength, at which the search ends.")] = 0.01,
) -> None:
    """Find the strength at which a picture of PROMPT is as real as can be and still faithful to IMAGE."""
    check(settings, place, output)
    if measure not in (known := ("l2", "ssim")):
        raise ValueError(f"--measure {measure}; expected one of {', '.join(known)}")
    sheet = output.with_name(f"{output.stem}-sheet.png")
    if ask:
        check_output(sheet)
    pipe, guide, noise, arguments = _ready(settings, output, place)
    found = pipe.search(
        guide,
        settings.prompt,
        faithful,
        measure=measure,
        choose=(lambda shown, last: _ask(shown, last, sheet)) if ask else None,
        candidates=candidates,
        tolerance=tolerance,
        generator=noise,
        **{name: value for name, value in arguments.items() if name != "exact_steps"},
    )
    settings.strength, settings.exact_steps = found.strength, True
    assert settings.seed is not None
    save_all([found.image], [settings.seed], settings, output)
    tell(f"strength {found.strength:.3f}: {found.faithfulness:.3f} faithful by {measure}")
    say(f"{found.unet_calls} UNet calls for {len(found.drawn.images)} candidates")


def _ready(settings: PictureSettings, output: Path, place: Place) -> tuple[Any, Image, Any, dict[str, Any]]:
    """The pipeline, the input image at its size, the noise that all strengths begin from, and further arguments."""
    guide = open_guide(settings.image, place)
    settings.hash_files()
    backend, guide = ready(settings, guide, place)
    check_size(guide.size, output)
    import torch

    assert isinstance(backend, Torch) and settings.seed is not None
    return backend.pipe, guide, torch.Generator().manual_seed(settings.seed), backend.arguments(settings)


def _ask(shown: Sweep, last: int | None, sheet: Path) -> int | None:
    """Write the candidates on a sheet and ask for the number of the best; 0 keeps the one before."""
    from sdedit.apps.sheets import contact_sheet

    labels = [f"{i + 1}: strength {s:.3g}" for i, s in enumerate(shown.strengths)]
    save_picture(contact_sheet([one.convert("RGB") for one in shown.images], labels), sheet)
    say(f"{len(labels)} candidates are on {sheet}")
    question, least = f"Which is best, 1 to {len(labels)}", 1
    if last is not None:
        question, least = f"{question} (0: number {last + 1}, chosen before, will do)", 0
    while True:
        answer: int = typer.prompt(question, type=int, err=True)
        if least <= answer <= len(labels):
            return answer - 1 if answer else None
        say(f"{answer}; expected {least} to {len(labels)}")
