"""`sdedit run` makes a picture, `sdedit again` makes it anew from the settings in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sdedit.commands.drawing import check, make_pictures, open_guide
from sdedit.commands.metadata import read_settings, scheduler_from_label
from sdedit.commands.options import Count, Out, Place, command
from sdedit.commands.saving import check_output, say
from sdedit.commands.settings import LoraWeight, PictureSettings, beside, hash_file


@command()
def run(settings: PictureSettings, output: Out, place: Place, count: Count = 1) -> None:
    """Turn IMAGE into a picture of PROMPT."""
    check(settings, place, output, count)
    guide = open_guide(settings.image, place)
    settings.hash_files()
    make_pictures(settings, guide, output, count, place)


@command(changes=PictureSettings, without=("size",))
def again(
    picture: Annotated[Path, typer.Argument(help="A PNG that sdedit wrote.")],
    place: Place,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where the picture goes; PICTURE-again.png if not given.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="WxH, original or auto, if not that of PICTURE.")] = None,
    **changes: Any,
) -> None:
    """Read the settings of PICTURE and make the same picture again; or another, where an option says so."""
    settings = read_settings(picture)
    output = output or picture.with_name(f"{picture.stem}-again{picture.suffix}")
    check_output(output)
    _find_files(settings, picture)
    if settings.scheduler is None and settings.sampler is not None and "scheduler" not in changes:
        settings.scheduler = scheduler_from_label(settings.sampler, settings.schedule_type)
    kept = {name: getattr(settings, f"{name}_hash") for name in ("image", "mask", "strength_map")}
    settings = replace(settings, **changes)
    place.size = size or (f"{settings.size[0]}x{settings.size[1]}" if settings.size else "auto")
    check(settings, place, output)
    if settings.image is None:
        raise ValueError(f"{picture} does not say which image it was made from: give it with --image")
    guide = open_guide(settings.image, place)
    for name, was in kept.items():
        path = getattr(settings, name)
        if path is not None and was is not None and Path(path).is_file() and was != hash_file(path):
            say(f"warning: {path} is not the file that {picture} was made with (its hash differs)")
    settings.hash_files()
    make_pictures(settings, guide, output, 1, place)


def _find_files(settings: PictureSettings, picture: Path) -> None:
    """Paths of a picture's settings, as seen from here."""

    def there(name: str) -> str:
        path = beside(picture, name)
        return str(path) if path.exists() else name

    for name in ("image", "mask", "strength_map"):
        if (path := getattr(settings, name)) is not None:
            setattr(settings, name, str(beside(picture, path)))
    settings.model = settings.model if settings.model == "default" else there(settings.model)
    settings.embeddings = [there(name) for name in settings.embeddings]
    settings.lora = [LoraWeight(there(name), weight) for name, weight in settings.lora]
