"""The command line: `sdedit run IMAGE PROMPT -o OUT` and its kin; each command is a function in `commands/`."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from sdedit.commands.composite import composite
from sdedit.commands.drawing import say
from sdedit.commands.evaluate import evaluate
from sdedit.commands.models import inspect, models
from sdedit.commands.run import again, run
from sdedit.commands.search import search
from sdedit.commands.strokes import strokes
from sdedit.commands.sweep import sweep
from sdedit.commands.train import app as train

app = typer.Typer(
    name="sdedit",
    help="Image-to-image with Stable Diffusion: a doodle and a prompt become a picture.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# In the order in which --help lists them.
COMMANDS = (
    run,
    again,
    sweep,
    search,
    composite,
    strokes,
    evaluate,
    models,
    inspect,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(train, name="train")


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from sdedit import __version__

        typer.echo(f"sdedit {__version__}")
        raise typer.Exit()


def main() -> None:
    """Entry point: an error is one sentence and exit code 2; `--debug` gives the traceback."""
    warnings.showwarning = lambda message, *_args, **_kwargs: say(f"warning: {message}")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError, ImportError) as error:
        if "--debug" in sys.argv:
            raise
        say(f"error: {str(error) or type(error).__name__}")
        sys.exit(2)
