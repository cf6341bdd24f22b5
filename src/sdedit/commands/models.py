"""`sdedit models` lists what is at hand, `sdedit inspect` says what a file is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdedit.commands.options import command
from sdedit.commands.saving import tell


@command()
def models() -> None:
    """List the models at hand: the one in the package, and Stable Diffusion folders in the hub's cache."""
    from sdedit.loading.folders import DEFAULT_MODEL
    from sdedit.loading.hub import cached_models

    rows = [("default", DEFAULT_MODEL), *cached_models()]
    for name, folder in rows:
        if (folder / "model_index.json").is_file():
            size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
            tell(f"{name}\t{size / 1e6:,.0f} MB\t{folder}")


@command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint, VAE, LoRA, embedding, IP-Adapter or model folder.")],
) -> None:
    """Say what FILE is, and whether it would load; only its header is read."""
    from sdedit.apps.inspect import describe

    tell(describe(file))
