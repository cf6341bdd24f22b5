"""`sdedit models` lists what is at hand, `sdedit inspect` says what a file is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdedit.commands import options as o


def models(debug: o.Debug = False) -> None:
    """List the models at hand: the one in the package, and Stable Diffusion folders in the hub's cache."""
    from sdedit.loading.folders import DEFAULT_MODEL
    from sdedit.loading.hub import cached_models

    rows = [("default", DEFAULT_MODEL), *cached_models()]
    for name, folder in rows:
        if (folder / "model_index.json").is_file():
            size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
            typer.echo(f"{name}\t{size / 1e6:,.0f} MB\t{folder}")


def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint, VAE, LoRA, embedding, IP-Adapter or model folder.")],
    debug: o.Debug = False,
) -> None:
    """Say what FILE is, and whether it would load; only its header is read."""
    from sdedit.loading.inspect import describe

    typer.echo(describe(file))
