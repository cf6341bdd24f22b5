"""The command line: `sdedit run IMAGE PROMPT -o OUT` and its kin; each command is a function in `commands/`."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from sdedit.commands.again import again
from sdedit.commands.composite import composite
from sdedit.commands.evaluate import evaluate, strokes
from sdedit.commands.models import inspect, models
from sdedit.commands.run import run
from sdedit.commands.saving import Unbreakable, say, tell
from sdedit.commands.strengths import search, sweep
from sdedit.commands.train import app as train

app = typer.Typer(
    name="sdedit",
    help="Image-to-image with Stable Diffusion: a doodle and a prompt become a picture.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# In the order in which --help lists them.
COMMANDS = (run, again, sweep, search, composite, strokes, evaluate, models, inspect)
for command in COMMANDS:
    app.command()(command)
app.add_typer(train, name="train")

# Packages that are not always there, and the extra that brings each.
EXTRAS = {
    "accelerate": "offload",
    "flax": "flax",
    "jax": "flax",
    "matplotlib": "plot",
    "peft": "lora",
    "skimage": "images",
    "torchsde": "sde",
}
# What is raised on purpose; anything else is our own fault.
_EXPECTED = (ValueError, TypeError, OSError, RuntimeError, MemoryError, ImportError)
# How long threads of OpenMP wait by spinning, by library: libgomp (in rounds), LLVM's and Intel's (in ms).
# Without a bound they spin for each other when other programs use the cores: see docs/performance.md.
SPIN = {"GOMP_SPINCOUNT": "30000", "KMP_BLOCKTIME": "1"}


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from sdedit import __version__

        tell(f"sdedit {__version__}")
        raise typer.Exit()


def bound_spinning() -> None:
    """Let waiting threads sleep soon; libraries read this when they are loaded. A choice of the user's stands."""
    if not {*SPIN, "OMP_WAIT_POLICY"} & set(os.environ):
        os.environ.update(SPIN)


def sentence(error: Exception) -> str:
    """What went wrong, in the words of the error if it was raised on purpose."""
    text = str(error).strip()
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if package in EXTRAS and "pip install" not in text:
        text += f": pip install 'sdedit[{EXTRAS[package]}]'"
    if isinstance(error, MemoryError):
        return text or "there is not enough memory"
    return text if text and isinstance(error, _EXPECTED) else f"{type(error).__name__} {text} (--debug shows where)"


def main() -> None:
    """Entry point: an error is one sentence and exit code 2; `--debug` gives the traceback."""
    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)  # type: ignore[assignment]
    warnings.showwarning = lambda message, *_args, **_kwargs: say(f"warning: {message}")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    bound_spinning()
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        say(f"error: {sentence(error)}")
        sys.exit(2)
