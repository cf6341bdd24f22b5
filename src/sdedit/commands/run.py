"""`sdedit run` makes a picture."""

from __future__ import annotations

from sdedit.commands.drawing import check, make_pictures, open_guide
from sdedit.commands.options import Count, Out, Place, command
from sdedit.commands.settings import PictureSettings


@command()
def run(settings: PictureSettings, output: Out, place: Place, count: Count = 1) -> None:
    """Turn IMAGE into a picture of PROMPT."""
    check(settings, place, output, count)
    guide = open_guide(settings.image, place)
    settings.hash_files()
    make_pictures(settings, guide, output, count, place)
