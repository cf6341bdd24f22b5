"""Options that several commands have, and how they are read."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdedit.commands.metadata import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

# What large models are used with, and what suits the small one of the package.
USUAL = Settings("", strength=0.8, guidance=7.5, steps=30)
SUITED = Settings("", strength=0.65, guidance=3.0, steps=5, exact_steps=True)


def suited(model: str, backend: str = "torch") -> Settings:
    """What suits a model; on JAX, which has no exact steps, about as many of the schedule run."""
    if model != "default":
        return USUAL
    return SUITED if backend == "torch" else replace(SUITED, steps=8, exact_steps=False)


ImageArgument = Annotated[Path, typer.Argument(help="The picture to start from: any format, any size.")]
PromptArgument = Annotated[str, typer.Argument(help="What it shall become.")]
Out = Annotated[Path, typer.Option("-o", "--output", help="Where the picture goes; with --count, -1, -2, … are added.")]
Model = Annotated[str, typer.Option(help="A model folder, single file or hub id; 'default' is the one in the package.")]
Strength = Annotated[
    float | None, typer.Option(help="How far to go from the image: 0 keeps it, 1 forgets it. 0.8; default model: 0.65.")
]
Steps = Annotated[
    int | None, typer.Option(help="Steps of the schedule; strength says how many run. 30; default model: 5, exact.")
]
Guidance = Annotated[
    float | None, typer.Option(help="Weight of the prompt; 1 turns guidance off. 7.5; default model: 3.")
]
Negative = Annotated[str, typer.Option(help="What to go away from.")]
Scheduler = Annotated[
    str | None, typer.Option(help="Such as ddim, euler-a, dpm++-2m-karras; the model's own if not given.")
]
Lora = Annotated[
    list[str] | None, typer.Option(metavar="FILE[:WEIGHT]", help="A LoRA file, folder or hub id; may be given again.")
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same picture; drawn and printed if not given.")]
Count = Annotated[int, typer.Option(help="Pictures to make, with the seeds SEED, SEED+1, …")]
Repeats = Annotated[int, typer.Option(help="Noise and denoise so often: more realistic, slower.")]
Mask = Annotated[Path | None, typer.Option(help="Where IMAGE may change: white changes, black stays to the bit.")]
Feather = Annotated[int, typer.Option(help="Pixels over which the change fades in from the mask's edges, inwards.")]
StrengthMap = Annotated[
    Path | None, typer.Option(help="The strength of each pixel, black 0 to white 1; --strength is then the most, 1.")
]
ExactSteps = Annotated[
    bool | None,
    typer.Option(help="Run all of --steps, whatever the strength, which is then continuous; the default model does."),
]
Weighting = Annotated[
    bool, typer.Option("--weighting", help="Read (word:1.2), [word] and BREAK in prompts, of any length.")
]
Embedding = Annotated[
    list[str] | None, typer.Option(help="A textual inversion, for its word in prompts; may be given several times.")
]
DType = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Backend = Annotated[str, typer.Option(help="torch or jax; a seed gives each a picture of its own.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")]
Size = Annotated[
    str, typer.Option(help="WxH, or 'original'; 'auto' brings images far from the model's own size near it.")
]
MaxMegapixels = Annotated[float, typer.Option(help="Larger input images are refused.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


def check_output(output: Path) -> None:
    """Refuse a name without a suffix, or in a folder that does not exist."""
    if output.suffix == "" or not output.absolute().parent.is_dir():
        raise ValueError(f"-o {output}: expected a picture's name, such as out.png, in a folder that exists")


def numbers(name: str, text: str) -> list[float]:
    """`0.2,0.5` as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} {text}; expected numbers with commas between them") from None


def beside(picture: Path, name: str) -> Path:
    """A path as a picture's settings hold it: relative to the picture's folder."""
    return Path(os.path.normpath(picture.absolute().parent / name))


def open_guide(image: Path, max_megapixels: float) -> Image:
    """The input image."""
    from sdedit.inputs.pixels import open_image

    return open_image(image, int(max_megapixels * 1e6))


def with_weight(text: str) -> tuple[str, float]:
    """`FILE:0.8` as the file and its weight, which is 1 if there is none."""
    name, _, weight = text.rpartition(":")
    try:
        return (name, float(weight)) if name and not Path(text).exists() else (text, 1.0)
    except ValueError:
        return text, 1.0
