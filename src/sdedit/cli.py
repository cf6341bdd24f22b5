"""The command line: `sdedit run IMAGE PROMPT -o OUT` and its kin. Heavy imports wait until the input was checked."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdedit.drawing import draw, ready, say
from sdedit.metadata import Settings, hash_file, read_settings, scheduler_from_label

if TYPE_CHECKING:
    from PIL.Image import Image

app = typer.Typer(
    name="sdedit",
    help="Image-to-image with Stable Diffusion: a doodle and a prompt become a picture.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# What large models are used with, and what suits the small one of the package.
_USUAL = Settings("", strength=0.8, guidance=7.5, steps=30)
_SUITED = Settings("", strength=0.65, guidance=3.0, steps=20)

ImageArgument = Annotated[Path, typer.Argument(help="The picture to start from: any format, any size.")]
PromptArgument = Annotated[str, typer.Argument(help="What it shall become.")]
Out = Annotated[Path, typer.Option("-o", "--output", help="Where the picture goes; with --count, -1, -2, … are added.")]
Model = Annotated[str, typer.Option(help="A model folder, single file or hub id; 'default' is the one in the package.")]
Strength = Annotated[
    float | None, typer.Option(help="How far to go from the image: 0 keeps it, 1 forgets it. 0.8; default model: 0.65.")
]
Steps = Annotated[
    int | None, typer.Option(help="Steps of the schedule; strength says how many run. 30; default model: 20.")
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
ExactSteps = Annotated[
    bool, typer.Option("--exact-steps", help="Run all of --steps, whatever the strength, which is then continuous.")
]
Weighting = Annotated[
    bool, typer.Option("--weighting", help="Read (word:1.2), [word] and BREAK in prompts, of any length.")
]
Embedding = Annotated[
    list[str] | None, typer.Option(help="A textual inversion, for its word in prompts; may be given several times.")
]
DType = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")]
Size = Annotated[
    str, typer.Option(help="WxH, or 'original'; 'auto' brings images far from the model's own size near it.")
]
MaxMegapixels = Annotated[float, typer.Option(help="Larger input images are refused.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


@app.command()
def run(
    image: ImageArgument,
    prompt: PromptArgument,
    output: Out,
    model: Model = "default",
    strength: Strength = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = "",
    scheduler: Scheduler = None,
    lora: Lora = None,
    seed: Seed = None,
    count: Count = 1,
    dtype: DType = "auto",
    device: Device = "auto",
    size: Size = "auto",
    exact_steps: ExactSteps = False,
    extra_noise: Annotated[float, typer.Option(help="More noise than strength asks for, against blur: 0 to 1.")] = 0.0,
    weighting: Weighting = False,
    embedding: Embedding = None,
    max_megapixels: MaxMegapixels = 100,
    debug: Debug = False,
) -> None:
    """Turn IMAGE into a picture of PROMPT."""
    if count < 1:
        raise ValueError(f"--count {count}; expected at least 1")
    _check_output(output)
    suited = _SUITED if model == "default" else _USUAL
    settings = Settings(
        prompt,
        image=str(image),
        negative=negative,
        steps=suited.steps if steps is None else steps,
        guidance=suited.guidance if guidance is None else guidance,
        seed=int.from_bytes(os.urandom(4), "big") if seed is None else seed,
        model=model,
        strength=suited.strength if strength is None else strength,
        scheduler=scheduler,
        lora=[_with_weight(text) for text in lora or ()],
        dtype=None if dtype == "auto" else dtype,
        exact_steps=exact_steps,
        extra_noise=extra_noise,
        weighting=weighting,
        embeddings=tuple(embedding or ()),
    )
    guide = _open(image, max_megapixels)
    settings.image_hash = hash_file(image)
    draw(settings, guide, output, count=count, device=device, size=size)


@app.command()
def again(
    picture: Annotated[Path, typer.Argument(help="A PNG that sdedit wrote.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where the picture goes; PICTURE-again.png if not given.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="The input image, if it is no longer where it was.")] = None,
    model: Annotated[str | None, typer.Option(help="The model, if it is no longer where it was.")] = None,
    device: Device = "auto",
    max_megapixels: MaxMegapixels = 100,
    debug: Debug = False,
) -> None:
    """Read the settings of PICTURE and make the same picture again."""
    settings = read_settings(picture)
    if image is None:
        if settings.image is None:
            raise ValueError(f"{picture} does not say which image it was made from: give it with --image")
        image = _beside(picture, settings.image)
    guide = _open(image, max_megapixels)
    if settings.image_hash not in (None, hash_file(image)):
        say(f"warning: {image} is not the file that {picture} was made from (its hash differs)")
    settings.image, settings.image_hash = str(image), hash_file(image)
    if model is None and settings.model != "default" and _beside(picture, settings.model).exists():
        model = str(_beside(picture, settings.model))
    settings.model = model or settings.model
    paths = {name: _beside(picture, name) for name in settings.embeddings}
    settings.embeddings = tuple(str(path) if path.exists() else name for name, path in paths.items())
    settings.lora = [(str(p) if (p := _beside(picture, name)).exists() else name, w) for name, w in settings.lora]
    if settings.scheduler is None and settings.sampler is not None:
        settings.scheduler = scheduler_from_label(settings.sampler, settings.schedule_type)
    size = f"{settings.size[0]}x{settings.size[1]}" if settings.size else "auto"
    target = output or picture.with_name(f"{picture.stem}-again{picture.suffix}")
    draw(settings, guide, target, count=1, device=device, size=size)


@app.command()
def sweep(
    image: ImageArgument,
    prompt: PromptArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The sheet; an animation if it ends in .gif or .webp.")
    ],
    strengths: Annotated[
        str, typer.Option(help="Comma-separated, each from 0 to 1.")
    ] = "0.2,0.4,0.5,0.6,0.7,0.8,0.9,1",
    model: Model = "default",
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = "",
    scheduler: Scheduler = None,
    seed: Seed = 0,
    dtype: DType = "auto",
    device: Device = "auto",
    size: Size = "auto",
    exact_steps: ExactSteps = False,
    weighting: Weighting = False,
    embedding: Embedding = None,
    max_megapixels: MaxMegapixels = 100,
    debug: Debug = False,
) -> None:
    """Draw IMAGE at several strengths on one labelled sheet, with how far each is from it."""
    _check_output(output)
    try:
        levels = [float(part) for part in strengths.split(",")]
    except ValueError:
        raise ValueError(f"--strengths {strengths}; expected numbers with commas between them") from None
    suited, chosen = _SUITED if model == "default" else _USUAL, None if dtype == "auto" else dtype
    embeddings = tuple(embedding or ())
    settings = Settings(prompt, model=model, embeddings=embeddings, scheduler=scheduler, dtype=chosen)
    pipe, guide = ready(settings, _open(image, max_megapixels), device, size)
    import torch

    swept = pipe.sweep(
        guide,
        prompt,
        levels,
        None if seed is None else torch.Generator().manual_seed(seed),
        num_inference_steps=suited.steps if steps is None else steps,
        guidance_scale=suited.guidance if guidance is None else guidance,
        negative_prompt=negative or None,
        exact_steps=exact_steps,
        prompt_weighting=weighting,
    )
    swept.save(output)
    for level, ran, distance in zip(swept.strengths, swept.steps, swept.distances, strict=True):
        typer.echo(f"strength {level:g}: {ran} steps, L2 {distance:.1f}")
    typer.echo(output)


@app.command()
def models(debug: Debug = False) -> None:
    """List the models at hand: the one in the package, and Stable Diffusion folders in the hub's cache."""
    from sdedit.loading.pretrained import DEFAULT_MODEL, cached_models

    rows = [("default", DEFAULT_MODEL), *cached_models()]
    for name, folder in rows:
        if (folder / "model_index.json").is_file():
            size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
            typer.echo(f"{name}\t{size / 1e6:,.0f} MB\t{folder}")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint, VAE, LoRA, embedding, IP-Adapter or model folder.")],
    debug: Debug = False,
) -> None:
    """Say what FILE is, and whether it would load; only its header is read."""
    from sdedit.loading.inspect import describe

    typer.echo(describe(file))


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from sdedit import __version__

        typer.echo(f"sdedit {__version__}")
        raise typer.Exit()


def _check_output(output: Path) -> None:
    if output.suffix == "" or not output.absolute().parent.is_dir():
        raise ValueError(f"-o {output}: expected a picture's name, such as out.png, in a folder that exists")


def _beside(picture: Path, name: str) -> Path:
    """A path as a picture's settings hold it: relative to the picture's folder."""
    return Path(os.path.normpath(picture.absolute().parent / name))


def _open(image: Path, max_megapixels: float) -> Image:
    from sdedit.images import open_image

    return open_image(image, int(max_megapixels * 1e6))


def _with_weight(text: str) -> tuple[str, float]:
    """`FILE:0.8` as the file and its weight, which is 1 if there is none."""
    name, _, weight = text.rpartition(":")
    try:
        return (name, float(weight)) if name and not Path(text).exists() else (text, 1.0)
    except ValueError:
        return text, 1.0


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
