"""The command line: `sdedit run IMAGE PROMPT -o OUT` and its kin. Heavy imports wait until the input was checked."""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdedit.metadata import Settings, hash_file, read_settings, sampler_label, save_picture, scheduler_from_label

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

ImageArgument = Annotated[Path, typer.Argument(help="The picture to start from: any format, any size.")]
PromptArgument = Annotated[str, typer.Argument(help="What it shall become.")]
Out = Annotated[Path, typer.Option("-o", "--output", help="Where the picture goes; with --count, -1, -2, … are added.")]
Model = Annotated[str, typer.Option(help="A model folder, single file or hub id; 'default' is the one in the package.")]
Strength = Annotated[float, typer.Option(help="How far to go from the image: 0 keeps it, 1 forgets it.")]
Steps = Annotated[int, typer.Option(help="Steps of the whole schedule; strength says how many of them run.")]
Guidance = Annotated[float, typer.Option(help="Weight of the prompt; 1 turns guidance off.")]
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
    strength: Strength = 0.8,
    steps: Steps = 30,
    guidance: Guidance = 7.5,
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
    settings = Settings(
        prompt,
        image=str(image),
        negative=negative,
        steps=steps,
        guidance=guidance,
        seed=int.from_bytes(os.urandom(4), "big") if seed is None else seed,
        model=model,
        strength=strength,
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
    _draw(settings, guide, output, count=count, device=device, size=size)


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
        _say(f"warning: {image} is not the file that {picture} was made from (its hash differs)")
    settings.image, settings.image_hash = str(image), hash_file(image)
    if model is None and _beside(picture, settings.model).exists():
        model = str(_beside(picture, settings.model))
    settings.model = model or settings.model
    paths = {name: _beside(picture, name) for name in settings.embeddings}
    settings.embeddings = tuple(str(path) if path.exists() else name for name, path in paths.items())
    settings.lora = [(str(p) if (p := _beside(picture, name)).exists() else name, w) for name, w in settings.lora]
    if settings.scheduler is None and settings.sampler is not None:
        settings.scheduler = scheduler_from_label(settings.sampler, settings.schedule_type)
    size = f"{settings.size[0]}x{settings.size[1]}" if settings.size else "auto"
    target = output or picture.with_name(f"{picture.stem}-again{picture.suffix}")
    _draw(settings, guide, target, count=1, device=device, size=size)


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
    steps: Steps = 30,
    guidance: Guidance = 7.5,
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
    chosen = None if dtype == "auto" else dtype
    embeddings = tuple(embedding or ())
    settings = Settings(prompt, model=model, embeddings=embeddings, scheduler=scheduler, dtype=chosen)
    pipe, guide = _ready(settings, _open(image, max_megapixels), device, size)
    import torch

    swept = pipe.sweep(
        guide,
        prompt,
        levels,
        None if seed is None else torch.Generator().manual_seed(seed),
        num_inference_steps=steps,
        guidance_scale=guidance,
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


def _ready(settings: Settings, guide: Image, device: str, size: str) -> tuple[Any, Image]:
    """The pipeline and the input image that settings ask for; what they left open is filled in."""
    from sdedit import __version__
    from sdedit.schedulers.names import SCHEDULERS, make_scheduler

    own = settings.scheduler in (None, "own")
    if not own and settings.scheduler not in SCHEDULERS:
        raise ValueError(f"--scheduler {settings.scheduler}; expected one of {', '.join(SCHEDULERS)}")
    for name in settings.embeddings:
        if not Path(name).exists() and name.count("/") != 1:  # a hub id has one
            raise FileNotFoundError(f"--embedding {name} does not exist")
    where, dtype = _place(device, settings.dtype)
    pipe = _load(settings.model, dtype).to(where)
    for report in pipe.load_textual_inversion(settings.embeddings):
        _say(f"embedding {report}")
    if not own:
        pipe.scheduler = make_scheduler(str(settings.scheduler), pipe.scheduler.config)
    _load_adapters(pipe, settings)
    guide = _resized(guide, size, pipe)
    settings.size, settings.dtype = guide.size, str(dtype).removeprefix("torch.")
    settings.scheduler = settings.scheduler or "own"
    settings.sampler, settings.schedule_type = sampler_label(pipe.scheduler)
    settings.version = f"sdedit {__version__}"
    return pipe, guide


def _draw(settings: Settings, guide: Image, output: Path, *, count: int, device: str, size: str) -> None:
    """Draw `count` pictures and write them, each with its seed and settings."""
    pipe, guide = _ready(settings, guide, device, size)

    import torch

    seeds = [settings.seed + i for i in range(count)]
    started = time.perf_counter()
    drawn = pipe(
        settings.prompt,
        guide,
        strength=settings.strength,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        negative_prompt=settings.negative or None,
        num_images_per_prompt=count,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        exact_steps=settings.exact_steps,
        extra_noise=settings.extra_noise,
        prompt_weighting=settings.weighting,
    )
    seconds = time.perf_counter() - started
    image = Path(settings.image or "")
    settings.image = os.path.relpath(image, output.absolute().parent)
    if settings.model != "default" and Path(settings.model).exists():
        settings.model = os.path.relpath(settings.model, output.absolute().parent)
    folder = output.absolute().parent
    settings.embeddings = tuple(os.path.relpath(e, folder) if Path(e).exists() else e for e in settings.embeddings)
    settings.lora = [(os.path.relpath(name, folder) if Path(name).exists() else name, w) for name, w in settings.lora]
    for i, (picture, seed) in enumerate(zip(drawn.images, seeds, strict=True)):
        path = output if count == 1 else output.with_stem(f"{output.stem}-{i + 1}")
        settings.seed = seed
        save_picture(picture, path, settings)
        typer.echo(f"{path}  ({picture.width}×{picture.height}, seed {seed})")
    _say(settings.to_text().splitlines()[-1])
    _say(f"{drawn.steps[0]} steps from noise level {drawn.start_sigmas[0]:.3g} (σ/α), {seconds:.1f} s")


def _load(model: str, dtype: Any) -> Any:
    from sdedit.pipeline import StableDiffusionImg2ImgPipeline

    if Path(model).is_file() or model.startswith("https://"):
        return StableDiffusionImg2ImgPipeline.from_single_file(model, torch_dtype=dtype)
    return StableDiffusionImg2ImgPipeline.from_pretrained(None if model == "default" else model, torch_dtype=dtype)


def _with_weight(text: str) -> tuple[str, float]:
    """`FILE:0.8` as the file and its weight, which is 1 if there is none."""
    name, _, weight = text.rpartition(":")
    try:
        return (name, float(weight)) if name and not Path(text).exists() else (text, 1.0)
    except ValueError:
        return text, 1.0


def _load_adapters(pipe: Any, settings: Settings) -> None:
    names = [f"lora_{i}" for i in range(len(settings.lora))]
    for name, (file, _) in zip(names, settings.lora, strict=True):
        _say(str(pipe.load_lora_weights(file, adapter_name=name)))
    if names:
        pipe.set_adapters(names, [weight for _, weight in settings.lora])


def _place(device: str, dtype: str | None) -> tuple[Any, Any]:
    """Device and dtype; where none is named, the fastest at hand that draws the same picture up to rounding."""
    import torch

    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here ({reason}); expected auto, cpu, cuda or mps") from None
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype is None:
        return where, torch.float32 if where.type == "cpu" else torch.float16
    if dtype not in known:
        raise ValueError(f"--dtype {dtype}; expected auto, {', '.join(known)}")
    return where, known[dtype]


def _resized(image: Image, size: str, pipe: Any) -> Image:
    """The image at the size that `--size` asks for; models draw badly far from the area that they were trained at."""
    from PIL import Image as PIL
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if size == "original":
        return image
    if size == "auto":
        factor, own = pipe.vae_scale_factor, pipe.unet.config.sample_size
        native = own * factor if isinstance(own, int) else image.width
        scale = native / (image.width * image.height) ** 0.5
        if 0.6 <= scale <= 1.5:
            return image
        target = tuple(max(round(side * scale / factor), 1) * factor for side in image.size)
        _say(
            f"{image.width}×{image.height} → {target[0]}×{target[1]}, near the size that this model draws "
            "(--size original keeps it)"
        )
    else:
        try:
            width, height = size.lower().split("x")
            target = (int(width), int(height))
        except ValueError:
            raise ValueError(f"--size {size}; expected WIDTHxHEIGHT such as 512x512, original or auto") from None
        if min(target) < 8:
            raise ValueError(f"--size {size}; expected at least 8 on each side")
    if image.mode in ("1", "P"):  # these cannot be interpolated
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    return image.resize(target, PIL.Resampling.LANCZOS)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def main() -> None:
    """Entry point: an error is one sentence and exit code 2; `--debug` gives the traceback."""
    warnings.showwarning = lambda message, *_args, **_kwargs: _say(f"warning: {message}")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError, ImportError) as error:
        if "--debug" in sys.argv:
            raise
        _say(f"error: {str(error) or type(error).__name__}")
        sys.exit(2)
